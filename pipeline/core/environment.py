"""Remove environment variables that change the results of TensorFlow, OpenCV, NumPy or HDF5 before these load.

Everything that decides a feature or a head is an option, and is recorded. A variable set for another program is
neither, so it must not have an effect. Variables for resources, file locations and logging are kept.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

logger = logging.getLogger(__name__)

# Patterns of the variables, by library. TF_ alone is no pattern, as Terraform's variables begin with TF_ too.
# OPENBLAS_CORETYPE is kept: it names the processor where OpenBLAS cannot detect it. docs/configuration.md has the list.
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
_OF_TENSORFLOW = {"TF2_BEHAVIOR": "1"}  # set by TensorFlow's import, and so inherited by child processes
_WHERE_CUDA_LIES = "--xla_gpu_cuda_data_dir"  # the XLA flag for the CUDA folder, which no other variable can set
_taken: list[str] = []  # removed variables, as NAME=VALUE, that `tell` has not reported yet


def isolate() -> None:
    """Remove all such variables, in a process of Icebox that has imported none of the libraries yet."""
    disregard(*_DECIDING)
    if any(option.startswith("error") for option in sys.warnoptions):
        _show_warnings()


def disregard(*libraries: str) -> None:
    """Remove the variables that change results of `libraries`, which this process must not have imported yet."""
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
    """Raise OpenCV's limit for decoding to `most` pixels, the value of `--max-pixels`, before OpenCV is imported."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max(2**30, most))  # OpenCV's default is 2**30


def tell() -> None:
    """Log a warning with the removed variables, once."""
    if _taken:
        logger.warning("not heeded, as no variable decides numbers here: %s (docs/configuration.md)", ", ".join(_taken))
    _taken.clear()


def _show_warnings() -> None:
    """Reset Python's warnings to its defaults, here and in child processes, as the user has turned them into errors."""
    sys.warnoptions.clear()
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
