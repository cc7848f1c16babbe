"""The heads: build, fit, save and load. Each maps cached rows to class probabilities.

`flatten` reads full tensors (n, h, w, c), `gap` and `logreg` their spatial means (n, c).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import IceboxError, RunError
from pipeline.core.spec import HeadSpec
from pipeline.training.heads.base import JSON_FILE, Data, Fitted, Head
from pipeline.training.heads.ensemble import Ensemble, member_name
from pipeline.training.loop import TrainingContext

READS = {"flatten": "features", "gap": "pooled", "logreg": "pooled"}
_MOST_MEMBERS = 1000
_MOST_BYTES = 2**20  # of a head.json

__all__ = [
    "READS",
    "Data",
    "Ensemble",
    "Fitted",
    "Head",
    "TrainingContext",
    "fit",
    "load",
    "memory_needed",
    "not_of_its_run",
    "of_its_run",
    "release",
    "require_memory",
    "steps",
]


def fit(spec: HeadSpec, data: Data, watch: TrainingContext) -> Fitted:
    """Train a new head; `watch.advance(1)` is called after each epoch, or fit of the solver."""
    from pipeline.training.heads import dense, logreg

    return logreg.fit_logreg(spec, data, watch) if spec.head == "logreg" else dense.fit_dense(spec, data, watch)


def steps(spec: HeadSpec) -> int:
    """Return how often `fit` advances at most."""
    from pipeline.training.heads import logreg

    return logreg.fit_steps(spec) if spec.head == "logreg" else spec.settings["epochs"]


def memory_needed(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> int:
    """Return about how many bytes `fit` takes beside the rows."""
    from pipeline.training.heads import dense

    return 0 if spec.head == "logreg" else dense.memory_needed(spec, row_shape, classes)


def require_memory(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> None:
    """Report what training a large head takes. Raises DoNotFitError if it takes more memory than is free."""
    from pipeline.training.heads import dense

    if spec.head != "logreg":
        dense.require_memory(spec, row_shape, classes)


def release() -> None:
    """Give back what Keras keeps of heads that are no longer there."""
    if "keras" in sys.modules:
        sys.modules["keras"].backend.clear_session()


@contextmanager
def of_its_run(directory: Path, classes: int, row_shape: tuple[int, ...]) -> Iterator[None]:
    """Turn what Keras, NumPy or scikit-learn raise where a head does not fit its run into a RunError."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, IceboxError):
            raise
        raise not_of_its_run(directory, classes, row_shape) from error


def not_of_its_run(directory: Path, classes: int, row_shape: tuple[int, ...]) -> RunError:
    """Return the error for a head that reads other rows than its run, or tells other classes apart."""
    shape = "x".join(map(str, row_shape))
    return RunError(
        f"the head in {directory} is of another run: it does not tell {classes} classes apart by rows of {shape}"
    )


def load(directory: Path) -> Head:
    """Return the head that `save` wrote.

    It is rebuilt from our own JSON and filled with plain arrays; nothing in the file can run code.

    Raises
    ------
    RunError
        If the files are missing, or are not what the JSON says.
    """
    try:
        made = json.loads(files.read_small(directory / JSON_FILE, _MOST_BYTES))
        return _loaded(directory, made)
    except Exception as error:
        # JSON, Keras, HDF5, zip and skops readers raise many kinds, some of them over dozens of lines.
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RunError(f"no head can be loaded from {directory}: {reason}") from error


def _loaded(directory: Path, made: dict[str, Any]) -> Head:
    from pipeline.training.heads import dense, logreg

    if made["head"] == "ensemble":
        if not 1 <= made["members"] <= _MOST_MEMBERS:
            raise RunError(f"an ensemble of {made['members']} heads")
        return Ensemble([load(directory / member_name(number + 1)) for number in range(made["members"])])
    return (logreg.LogregHead if made["head"] == "logreg" else dense.DenseHead).load(directory, made)
