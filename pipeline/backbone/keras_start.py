"""TensorFlow and Keras, loaded once, quietly, and with the threads and the memory they should have."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import environment, machine
from pipeline.core.errors import IceboxError
from pipeline.core.lazy_imports import import_matplotlib, without
from pipeline.core.native_stderr import hold_back

logger = logging.getLogger(__name__)

KerasModel = Any  # keras.Model; its own type hints are wrong in too many places to be checked against
_IMPORTING = threading.Lock()
_ADDRESS_SPACE = 2_500_000_000  # bytes: measured were 1.7 GB for Keras imported, and 0.4 GB for its first operation

# What Keras imports if it is there, for wrappers, plots and tables that nothing here uses: a third of its start.
_OPTIONAL = ("matplotlib", "pandas", "sklearn")


def import_keras(*, whole: bool = False) -> Any:
    """Import TensorFlow and Keras quietly, GPU memory growing as needed, and return the keras module.

    Keras is left without what only other programs would use of it, unless they are to have the `whole` of it.
    """
    with _IMPORTING:  # one thread may have begun with it while files are hashed
        return _import_keras(() if whole else _OPTIONAL)


def _import_keras(hidden: Sequence[str]) -> Any:
    if "tensorflow" not in sys.modules:
        environment.disregard("tensorflow")
        environment.tell()
        machine.require_room("TensorFlow", _ADDRESS_SPACE, 4 * machine.usable_cores() + 8)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    if not machine.driver_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # or TensorFlow looks for one and reports a failure
    if not hidden:
        import_matplotlib()  # as Keras does, without what ends it
    if "keras" not in sys.modules:
        # TensorFlow's libraries greet on stderr before any of their settings is read.
        with hold_back("TensorFlow"), _uncollected() if hidden else contextlib.nullcontext(), without(*hidden):
            _find_keras()
    import keras
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # several small models in one process make it warn of retracing
    _set_defaults(keras, tf)
    if not tf.config.threading.get_intra_op_parallelism_threads():  # nobody has said how many
        limit_threads(machine.usable_cores(), machine.usable_cores())
    for gpu in tf.config.list_physical_devices("GPU"):
        # Refused once the GPU is in use, which it can only be with the setting already made.
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)
    return keras


def _find_keras() -> None:
    try:
        importlib.import_module("keras")
    except (ValueError, AttributeError, TypeError, OSError) as error:  # as it takes a file that makes no sense
        path = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
        if not path.exists() or (isinstance(error, OSError) and error.filename != str(path)):
            raise
        raise IceboxError(f"Keras does not start ({error}): correct or remove its settings in {path}") from error


def _set_defaults(keras: Any, tf: Any) -> None:
    """Have both compute as they do by themselves: neither a keras.json nor the program around decides a number."""
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    if (policy := keras.config.dtype_policy().name) != "float32":
        logger.warning("the dtype policy of Keras was %s; Icebox computes in float32, and has set it to that", policy)
        keras.config.set_dtype_policy("float32")
    if not tf.config.experimental.tensor_float_32_execution_enabled():
        logger.warning("TensorFloat-32 was off; Icebox computes float32 on GPUs with it, and has turned it on")
        tf.config.experimental.enable_tensor_float_32_execution(True)


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
