"""Variables of the environment that decide numbers in the libraries below: taken away before these read them.

What decides a feature or a head is asked for by options and is recorded; a variable that somebody's shell sets for
another program is neither. Those that say how much of the machine may be used, where files lie and what is logged stay.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

logger = logging.getLogger(__name__)

# By library. Terraform's begin with TF_ too; OPENBLAS_CORETYPE stays, which says what the processor is where OpenBLAS
# cannot see it. docs/configuration.md has the list for people.
_DECIDING = {
    "tensorflow": re.compile(
        r"TF_(ENABLE|DISABLE|USE|SET|ONEDNN|MKL_OPTIMIZE|XLA|JITRT|AUTO_MIXED|AUTOTUNE|MATMUL|CONV2D|FP16|CUDNN|CUBLAS|CUFFT"
        r"|DEBUG_CUDNN|DETERMINISTIC|DATA_EXPERIMENT)\w*"
        r"|(TF2|ONEDNN|DNNL|MLIR)_\w+|TENSORFLOW_USE_CUSTOM_CONTRACTION_KERNEL|XLA_FLAGS"
        r"|NVIDIA_TF32_OVERRIDE|CUBLAS(LT)?_WORKSPACE_\w+|KERAS_(?!HOME|BACKEND)\w+"
    ),
    "opencv": re.compile(r"OPENCV_(?!LOG_|TEMP_PATH|FOR_THREADS_NUM)\w+"),
    "numpy": re.compile(r"NPY_\w+|SCIPY_ARRAY_API|SKLEARN_\w+"),
    "hdf5": re.compile(r"HDF5_(DRIVER|DRIVER_CONFIG|TEST_DRIVER|VOL_CONNECTOR|VDS_PREFIX|EXTFILE_PREFIX)|BLOSC_\w+"),
}
_OF_TENSORFLOW = {"TF2_BEHAVIOR": "1"}  # what it sets itself when it is imported, for programs that are started then
_WHERE_CUDA_LIES = "--xla_gpu_cuda_data_dir"  # which XLA has no other variable for
_taken: list[str] = []  # and not told yet


def isolate() -> None:
    """Take away all of it, in a process of our own that has imported none of the libraries yet."""
    disregard(*_DECIDING)
    if any(option.startswith("error") for option in sys.warnoptions):
        _show_warnings()


def disregard(*libraries: str) -> None:
    """Take away what would decide numbers in libraries that this process has not imported yet."""
    for library in libraries:
        for name in [name for name in os.environ if _DECIDING[library].fullmatch(name)]:
            value = os.environ[name]
            if _OF_TENSORFLOW.get(name) == value:
                continue
            del os.environ[name]
            kept = [flag for flag in value.split() if name == "XLA_FLAGS" and flag.startswith(_WHERE_CUDA_LIES)]
            if kept:
                os.environ[name] = " ".join(kept)
            if value.split() != kept:
                _taken.append(f"{name}={value}")


def allow_pixels(most: int) -> None:
    """Let OpenCV, not imported yet, decode images of so many pixels: what `--max-pixels` says is the limit."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max(2**30, most))  # by itself it takes 2**30


def tell() -> None:
    """Say once what was taken away."""
    if _taken:
        logger.warning("not heeded, as no variable decides numbers here: %s (docs/configuration.md)", ", ".join(_taken))
    _taken.clear()


def _show_warnings() -> None:
    """Show warnings as Python does by itself, here and in programs started from here: somebody made errors of them."""
    sys.warnoptions.clear()
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
