"""What this machine has, asked without TensorFlow."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import MORE_MEMORY, MORE_THREADS, IceboxError, UsageError
from pipeline.progress import size_text

# What decides a row's value, and how it is written.
FEATURE_PACKAGES = ("icebox", "tensorflow", "keras", "opencv-python", "pillow", "h5py", "hdf5plugin")

# Flags of /proc/cpuinfo under which oneDNN multiplies bfloat16 in hardware.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Machine:
    """The hardware, as far as choices depend on it; memory in bytes."""

    cpu: str
    cores: int
    bfloat16: bool
    gpus: int
    memory: int
    available_memory: int


def look() -> Machine:
    """Return what this machine has now."""
    import psutil

    memory = psutil.virtual_memory()
    model, flags = _cpu()
    return Machine(
        cpu=model,
        cores=usable_cores(),
        bfloat16=bool(flags & _BFLOAT16_FLAGS),
        gpus=gpu_count(),
        memory=memory.total,
        available_memory=available_memory(),
    )


def available_memory() -> int:
    """Return the bytes this process may still take: what the system has left, or its control group if less."""
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _left_in_groups(root: Path, membership: Path) -> list[int]:
    """Return what each control group (version 2) that this process is in, or one above it, leaves under its limit."""
    if not membership.exists():
        return []
    path = next((line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")), "/")
    group, left = root / path.lstrip("/"), []
    for folder in (group, *group.parents):
        if (folder / "memory.max").exists() and (most := (folder / "memory.max").read_text().strip()) != "max":
            used = int((folder / "memory.current").read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(max(0, int(most) - used + int(counts.get("inactive_file", 0))))  # a file's cache is given back
        if folder == root:
            break
    return left


def at_home(path: str) -> Path:
    """Return the path with the home folder that a leading ~ means, as a shell hands it over."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  the Path method raises on "~nobody"


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_precision() -> str:
    """Return the precision for a new feature space: the fastest one this machine computes in hardware."""
    if gpu_count():
        return "float16"
    return "bfloat16" if _cpu()[1] & _BFLOAT16_FLAGS else "float32"


def gpu_count() -> int:
    """Return how many GPUs TensorFlow could use: those the driver shows, if TensorFlow's CUDA parts are there."""
    count = driver_gpus()  # first, as without a driver that is known at once
    return count if count and tensorflow_has_cuda() else 0


def driver_gpus() -> int:
    """Return how many GPUs the CUDA driver shows; 0 without a driver."""
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
    """Return the version of each package that is installed, None for those that are not."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distributions() -> set[str]:
    return {(found.metadata["Name"] or "").lower() for found in importlib.metadata.distributions()}


def _cpu() -> tuple[str, set[str]]:
    """Return the processor's name and its feature flags; no flags where the system does not list them."""
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
    """Raise UsageError, naming the `extra` to install, unless the packages that `what` needs are there."""
    if lacking := [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]:
        raise UsageError(f"{what} needs {' and '.join(lacking)}: {installs(extra)}")


def require_room(what: str, address_space: int, threads: int) -> None:
    """Raise IceboxError where limits leave less address space (bytes) or fewer threads than `what` takes.

    TensorFlow would crash, and NumPy's linear algebra end the process by a signal that looks like Ctrl-C.
    """
    import resource

    import psutil

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        _require_threads(what, threads)  # which take address space for as long as the process lives
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
    """Return the command that installs an extra the way Icebox itself was installed."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'icebox[{extra}]'"
    if Path(sys.prefix).resolve() == (root / ".venv").resolve():  # which `make setup` works on
        return f"make setup EXTRAS={extra}"
    return f"pip install --editable {shlex.quote(f'{root}[{extra}]')}"
