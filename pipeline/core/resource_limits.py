"""Limits on this process's CPU time and memory, set by its control groups (cgroups) and resource limits.

Control groups of versions 1 and 2 are read, also where both are in use. Cpusets are not read, as the system includes
them in a process's affinity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNLIMITED = 2**60  # bytes; version 1 has a value near 2**63 if there is no limit


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of `most` bytes, of which `left` are free."""

    most: int
    left: int


def cpu_quotas() -> Iterator[float]:
    """Yield the CPU quota of each control group of this process, in cores; all processes of the group share it."""
    for folder in _groups("cpu", version=2):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        yield from _share(quota, period)
    for folder in _groups("cpu", version=1):
        yield from _share(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def memory_limits() -> Iterator[MemoryLimit]:
    """Yield the memory limits of each control group of this process, and the limit of its address space."""
    for folder in _groups("memory", version=2):
        for name in ("memory.max", "memory.high"):  # above memory.high a process is slowed down severely
            yield from _memory_limit(folder / name, folder / "memory.current", "inactive_file")
    for folder in _groups("memory", version=1):
        used = folder / "memory.usage_in_bytes"
        yield from _memory_limit(folder / "memory.limit_in_bytes", used, "total_inactive_file")
    yield from _address_space()


def _share(quota: str, period: str) -> Iterator[float]:
    if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean no quota
        yield int(quota) / int(period)


def _memory_limit(limit: Path, used: Path, file_cache: str) -> Iterator[MemoryLimit]:
    most, taken = _text(limit), _text(used)
    if not most.isdigit() or not taken.isdigit() or int(most) >= _UNLIMITED:
        return
    counts = dict(line.split(maxsplit=1) for line in _text(limit.parent / "memory.stat").splitlines() if " " in line)
    returned = int(counts.get(file_cache, 0))  # the system frees this part of the file cache when memory is needed
    yield MemoryLimit(int(most), max(0, int(most) - int(taken) + returned))


def _address_space() -> Iterator[MemoryLimit]:
    import psutil

    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # as on macOS, which does not enforce this limit
        return
    most, _ = process.rlimit(psutil.RLIMIT_AS)
    if most != psutil.RLIM_INFINITY:
        yield MemoryLimit(most, max(0, most - process.memory_info().vms))


def _groups(controller: str, version: int) -> Iterator[Path]:
    """Yield the folder of this process's control group, and those of its visible parent groups."""
    for place, path in _mounts(controller, version):
        for own in _memberships(controller, version):
            # In a container, the own group may be mounted as the root, while its listed path is not visible.
            below = own.relative_to(path) if own.is_relative_to(path) and ".." not in own.parts else PurePosixPath()
            for group in (below, *below.parents):
                yield place / group


def _memberships(controller: str, version: int) -> Iterator[PurePosixPath]:
    """Yield the path of this process's control group in the hierarchy of `controller`, such as "cpu" or "memory"."""
    for line in _text(_ROOT / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") if version == 1 else not controllers:
            yield PurePosixPath(path)


def _mounts(controller: str, version: int) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield the mount point of the hierarchy of `controller`, and the path of the group that is mounted there."""
    for line in _text(_ROOT / "proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.partition(" ")
        fits = kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split()[-1].split(",")
        if fits:
            group, place = (_unescaped(field) for field in mount.split()[3:5])
            yield _ROOT / place.lstrip("/"), PurePosixPath(group)


def _unescaped(field: str) -> str:
    """Return a path of mountinfo with its octal escapes (of space, tab, line break, backslash) decoded."""
    for letter in " \t\n\\":
        field = field.replace(f"\\{ord(letter):03o}", letter)
    return field


def _text(path: Path) -> str:
    """Return the text of a system file; "" if it is missing or unreadable, which means no limit."""
    try:
        return os.fsdecode(path.read_bytes()).strip()  # mount points may have names in any encoding
    except OSError:
        return ""
