"""The hardware of this machine, and the share of it that this process may use, found without TensorFlow.

All numbers of threads and bytes of memory come from here. The module also checks installed packages and limits.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import platform
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import resource_limits
from pipeline.core.errors import MORE_MEMORY, MORE_THREADS, IceboxError, UsageError
from pipeline.core.units import size_text

# Packages whose versions decide the values of rows and the files they are written to.
FEATURE_PACKAGES = ("icebox", "tensorflow", "keras", "opencv-python", "pillow", "h5py", "hdf5plugin")

# Variables from which NumPy's and SciPy's linear algebra, scikit-learn, Arrow and OpenCV take their number of threads.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")

# Flags of /proc/cpuinfo of processors on which oneDNN multiplies bfloat16 in hardware.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Machine:
    """The hardware that decisions depend on, and the share of it that this process may use; memory is in bytes."""

    cpu: str
    cores: int
    machine_cores: int
    bfloat16: bool
    gpus: int
    memory: int
    machine_memory: int
    available_memory: int


def inspect_machine() -> Machine:
    """Return the present hardware and limits."""
    import psutil

    model, flags = _cpu()
    return Machine(
        cpu=model,
        cores=usable_cores(),
        machine_cores=os.cpu_count() or 1,
        bfloat16=bool(flags & _BFLOAT16_FLAGS),
        gpus=gpu_count(),
        memory=total_memory(),
        machine_memory=psutil.virtual_memory().total,
        available_memory=available_memory(),
    )


def total_memory() -> int:
    """Return the largest number of bytes this process may use: the machine's memory, or a lower limit."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit.most for limit in resource_limits.memory_limits())])


def available_memory() -> int:
    """Return how many more bytes this process may use: the machine's free memory, or less if a limit leaves less."""
    import psutil

    return min([psutil.virtual_memory().available, *(limit.left for limit in resource_limits.memory_limits())])


def expand_home(path: str) -> Path:
    """Return `path` with a leading ~ replaced by the home folder, as a shell does."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  the Path method raises on "~nobody"


def usable_cores() -> int:
    """Return how many cores this process may keep busy.

    That is the number of cores in its affinity, or the CPU quota of its control group, rounded up, if lower.
    """
    return max(1, min([_cores_to_run_on(), *map(math.ceil, resource_limits.cpu_quotas())]))


def _cores_to_run_on() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_libraries() -> None:
    """Limit the threads of libraries that are loaded later to `usable_cores`, unless the user has set a number.

    These libraries respect a process's affinity, but not the CPU quota of its control group.
    """
    if (cores := usable_cores()) < _cores_to_run_on():
        for name in _THREADS:
            os.environ.setdefault(name, str(cores))


def reading_threads() -> int:
    """Return how many threads read and hash files: a few more than cores, as threads wait for the disk."""
    return min(32, usable_cores() + 4)


@contextmanager
def computing_threads(most: int) -> Iterator[None]:
    """Limit the linear algebra of NumPy and SciPy to `most` threads; a lower limit that is set already stays."""
    from threadpoolctl import threadpool_info, threadpool_limits

    with threadpool_limits({each["prefix"]: min(most, each["num_threads"]) for each in threadpool_info()}):
        yield


def best_precision() -> str:
    """Return the precision for a new feature space: the fastest one that this machine supports in hardware."""
    if gpu_count():
        return "float16"
    return "bfloat16" if _cpu()[1] & _BFLOAT16_FLAGS else "float32"


def gpu_count() -> int:
    """Return how many GPUs TensorFlow could use: the driver's number, or 0 without TensorFlow's CUDA libraries."""
    count = driver_gpus()  # first, as this returns at once without a driver
    return count if count and tensorflow_has_cuda() else 0


def driver_gpus() -> int:
    """Return how many GPUs the CUDA driver lists; 0 without a driver."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    usable = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if usable else 0


def tensorflow_has_cuda() -> bool:
    """Return whether the CUDA libraries TensorFlow loads are installed, by the `gpu` extra or system-wide."""
    if any(name.startswith("nvidia-cudnn") for name in _distributions()):
        return True
    try:
        ctypes.CDLL("libcudnn.so.9")
    except OSError:
        return False
    return True


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the version of each package, None if it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distributions() -> set[str]:
    return {(found.metadata["Name"] or "").lower() for found in importlib.metadata.distributions()}


def _cpu() -> tuple[str, set[str]]:
    """Return the processor's name and its feature flags, an empty set if the system does not list them."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in listing.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.machine()
    return model, set(fields.get("flags", fields.get("Features", "")).split())


def require_packages(what: str, packages: Sequence[str], extra: str) -> None:
    """Raise UsageError, naming the `extra` to install, unless the packages that `what` needs are installed."""
    if lacking := [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]:
        raise UsageError(f"{what} needs {' and '.join(lacking)}: {installs(extra)}")


def require_room(what: str, address_space: int, threads: int) -> None:
    """Raise IceboxError if limits leave less address space (bytes) or fewer threads than `what` needs.

    Without this check TensorFlow would crash, and NumPy's linear algebra would end the process by SIGINT, as Ctrl-C.
    """
    import resource

    import psutil

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        _require_threads(what, threads)  # not under a limit, as each thread keeps address space until the process ends
    elif (left := most - psutil.Process().memory_info().vms) < address_space:
        raise IceboxError(
            f"{what} takes {size_text(address_space)} of address space, and {size_text(max(0, left))} are left of the "
            f"{size_text(most)} that this process may have: {MORE_MEMORY}"
        )


def _require_threads(what: str, count: int) -> None:
    enough, started = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(count):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise IceboxError(
            f"{what} starts threads, and of {count} only {len(started)} may be: {MORE_THREADS}"
        ) from error
    finally:
        enough.set()
        for thread in started:
            thread.join()


def installs(extra: str) -> str:
    """Return the command that installs an extra in the same way as Icebox was installed."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'icebox[{extra}]'"
    if Path(sys.prefix).resolve() == (root / ".venv").resolve():  # the environment that `make setup` creates
        return f"make setup EXTRAS={extra}"
    return f"pip install --editable {shlex.quote(f'{root}[{extra}]')}"
