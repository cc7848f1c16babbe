"""Import TensorFlow and Keras once, without messages on stderr, and set their threads, memory and defaults.

`import_keras` returns the keras module, `limit_threads` sets the number of threads.
"""

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
_ADDRESS_SPACE = 2_500_000_000  # bytes; measured: 1.7 GB for importing Keras, 0.4 GB for its first operation

# Packages that Keras imports if they are installed, for wrappers, plots and tables that Icebox does not use.
# They take a third of the import time.
_OPTIONAL = ("matplotlib", "pandas", "sklearn")


def import_keras(*, whole: bool = False) -> Any:
    """Import TensorFlow and Keras without their messages on stderr, and return the keras module.

    GPU memory is allocated as needed. matplotlib, pandas and scikit-learn are hidden from Keras during the import,
    unless `whole` is true: another program in the same process may use the parts of Keras that need them.

    Raises
    ------
    IceboxError
        If Keras refuses its keras.json, or if limits leave TensorFlow too little memory or too few threads.
    """
    with _IMPORTING:  # another thread may already import Keras while files are hashed
        return _import_keras(() if whole else _OPTIONAL)


def _import_keras(hidden: Sequence[str]) -> Any:
    if "tensorflow" not in sys.modules:
        environment.disregard("tensorflow")
        environment.tell()
        machine.require_room("TensorFlow", _ADDRESS_SPACE, 4 * machine.usable_cores() + 8)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    if not machine.driver_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # else TensorFlow searches for a GPU and reports a failure
    if not hidden:
        import_matplotlib()  # Keras imports it too, and fails if MPLBACKEND names a missing backend
    if "keras" not in sys.modules:
        # TensorFlow's libraries write to stderr before they read any settings.
        with hold_back("TensorFlow"), _uncollected() if hidden else contextlib.nullcontext(), without(*hidden):
            _find_keras()
    import keras
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # else several small models in one process cause warnings about retracing
    _set_defaults(keras, tf)
    if not tf.config.threading.get_intra_op_parallelism_threads():  # 0: the number of threads has not been set
        limit_threads(machine.usable_cores(), machine.usable_cores())
    for gpu in tf.config.list_physical_devices("GPU"):
        # TensorFlow refuses the setting once the GPU is in use; an earlier call has made the setting then.
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)
    return keras


def _find_keras() -> None:
    try:
        importlib.import_module("keras")
    except (ValueError, AttributeError, TypeError, OSError) as error:  # raised by Keras for an invalid keras.json
        path = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
        if not path.exists() or (isinstance(error, OSError) and error.filename != str(path)):
            raise
        raise IceboxError(f"Keras does not start ({error}): correct or remove its settings in {path}") from error


def _set_defaults(keras: Any, tf: Any) -> None:
    """Set Keras and TensorFlow to their defaults, so that no keras.json or calling program changes the features."""
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
    """Let TensorFlow compute `layers` layers at the same time, each with `of_a_layer` threads.

    This has no effect once TensorFlow has computed anything in this process.
    """
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # too late to change the threads: perhaps slower, but the same results
        tf.config.threading.set_intra_op_parallelism_threads(of_a_layer)
        tf.config.threading.set_inter_op_parallelism_threads(layers)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Switch off the garbage collector during an import, and exclude all objects that exist then from later collection.

    The imported modules are about a million objects that stay until the process ends. Do not use this context inside
    another program: the program's own objects would be excluded too.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
