"""TensorFlow and Keras, loaded once, quietly, and with the threads and the memory they should have."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import machine
from pipeline.imports import without
from pipeline.native_stderr import held_back

KerasModel = Any  # keras.Model; its own type hints are wrong in too many places to be checked against
_IMPORTING = threading.Lock()

# What Keras imports if it is there, for wrappers, plots and tables that nothing here uses: a third of its start.
_OPTIONAL = ("matplotlib", "pandas", "sklearn")


def import_keras(*, whole: bool = False) -> Any:
    """Import TensorFlow and Keras quietly, GPU memory growing as needed, and return the keras module.

    Keras is left without what only other programs would use of it, unless they are to have the `whole` of it.
    """
    with _IMPORTING:  # one thread may have begun with it while files are hashed
        return _import_keras(() if whole else _OPTIONAL)


def _import_keras(hidden: Sequence[str]) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    if not machine.driver_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # or TensorFlow looks for one and reports a failure
    if "keras" not in sys.modules:
        # TensorFlow's libraries greet on stderr before any of their settings is read.
        with held_back("TensorFlow"), _uncollected() if hidden else contextlib.nullcontext(), without(*hidden):
            importlib.import_module("keras")
    import keras
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # several small models in one process make it warn of retracing
    # A keras.json in somebody's home must not decide what a feature is.
    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")
    if not tf.config.threading.get_intra_op_parallelism_threads():  # nobody has said how many
        limit_threads(machine.usable_cores(), machine.usable_cores())
    for gpu in tf.config.list_physical_devices("GPU"):
        # Refused once the GPU is in use, which it can only be with the setting already made.
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)
    return keras


def limit_threads(of_a_layer: int, layers: int) -> None:
    """Have TensorFlow compute so many layers at a time, each in so many threads, unless it has computed something."""
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # how it says that it is too late; slower, perhaps, but as right
        tf.config.threading.set_intra_op_parallelism_threads(of_a_layer)
        tf.config.threading.set_inter_op_parallelism_threads(layers)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for garbage among modules that are being imported, nor later: they stay, a million objects.

    Not in somebody else's program, whose own objects would stay too.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
