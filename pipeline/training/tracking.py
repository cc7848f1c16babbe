"""Write the history of a training as TensorBoard logs while it runs. Needs the extra `tensorboard`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.backbone.keras_start import import_keras
from pipeline.core import machine

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Raise UsageError unless TensorBoard is installed."""
    machine.require_packages("--tensorboard", ["tensorboard"], "tensorboard")


@contextmanager
def tensorboard(directory: Path, wanted: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that logs one history entry; without `wanted` the function does nothing.

    Older logs are removed first, because a resumed run logs its earlier entries again.
    """
    if not wanted:
        yield lambda entry: None
        return
    import_keras()
    import tensorflow as tf

    shutil.rmtree(directory / FOLDER, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(directory / FOLDER))
    step = 0

    def note(entry: Mapping[str, float]) -> None:
        nonlocal step
        step += 1
        with writer.as_default():
            for name, value in entry.items():
                tf.summary.scalar(name, float(value), step=step)
        writer.flush()

    try:
        yield note
    finally:
        writer.close()
