"""What the system lets this process use: time on cores and memory, by its control groups and resource limits.

Control groups are read in versions 1 and 2, also where both are in use. Cpusets need no reading: the system makes them
part of a process's affinity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNLIMITED = 2**60  # bytes; version 1 says about 2**63 where there is no limit


@dataclass(frozen=True)
class MemoryLimit:
    """At most `most` bytes, of which `left` are not taken yet."""

    most: int
    left: int


def cpu_quotas() -> Iterator[float]:
    """Yield how many cores' time each control group gives this process and those it shares the group with."""
    for folder in _groups("cpu", version=2):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        yield from _share(quota, period)
    for folder in _groups("cpu", version=1):
        yield from _share(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def memory_limits() -> Iterator[MemoryLimit]:
    """Yield the limits of each control group this process is in, and of its address space."""
    for folder in _groups("memory", version=2):
        for name in ("memory.max", "memory.high"):  # beyond the second it is slowed down until it hardly runs
            yield from _memory_limit(folder / name, folder / "memory.current", "inactive_file")
    for folder in _groups("memory", version=1):
        used = folder / "memory.usage_in_bytes"
        yield from _memory_limit(folder / "memory.limit_in_bytes", used, "total_inactive_file")
    yield from _address_space()


def _share(quota: str, period: str) -> Iterator[float]:
    if quota.isdigit() and period.isdigit() and int(period):  # not "max", nor -1
        yield int(quota) / int(period)


def _memory_limit(limit: Path, used: Path, file_cache: str) -> Iterator[MemoryLimit]:
    most, taken = _text(limit), _text(used)
    if not most.isdigit() or not taken.isdigit() or int(most) >= _UNLIMITED:
        return
    counts = dict(line.split(maxsplit=1) for line in _text(limit.parent / "memory.stat").splitlines() if " " in line)
    returned = int(counts.get(file_cache, 0))  # what is kept of files that were read is given up when memory is wanted
    yield MemoryLimit(int(most), max(0, int(most) - int(taken) + returned))


def _address_space() -> Iterator[MemoryLimit]:
    import psutil

    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # as on macOS, which does not heed it either
        return
    most, _ = process.rlimit(psutil.RLIMIT_AS)
    if most != psutil.RLIM_INFINITY:
        yield MemoryLimit(most, max(0, most - process.memory_info().vms))


def _groups(controller: str, version: int) -> Iterator[Path]:
    """Yield the folder of the control group this process is in, and those of the groups around it as far as visible."""
    for place, path in _mounts(controller, version):
        for own in _memberships(controller, version):
            # A container may be shown its own group as the root, under a path that it cannot see.
            below = own.relative_to(path) if own.is_relative_to(path) and ".." not in own.parts else PurePosixPath()
            for group in (below, *below.parents):
                yield place / group


def _memberships(controller: str, version: int) -> Iterator[PurePosixPath]:
    """Yield the path of this process's group in the hierarchy of a controller."""
    for line in _text(_ROOT / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") if version == 1 else not controllers:
            yield PurePosixPath(path)


def _mounts(controller: str, version: int) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield where the hierarchy of a controller is mounted, and which of its groups stands there."""
    for line in _text(_ROOT / "proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.partition(" ")
        fits = kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split()[-1].split(",")
        if fits:
            group, place = (_unescaped(field) for field in mount.split()[3:5])
            yield _ROOT / place.lstrip("/"), PurePosixPath(group)


def _unescaped(field: str) -> str:
    """Return a path of mountinfo, where blanks, tabs, line breaks and backslashes stand as octal numbers."""
    for letter in " \t\n\\":
        field = field.replace(f"\\{ord(letter):03o}", letter)
    return field


def _text(path: Path) -> str:
    """Return what a file of the system says; "" if it does not exist, or may not be read, which is no limit."""
    try:
        return os.fsdecode(path.read_bytes()).strip()  # other mounts may have names in any encoding
    except OSError:
        return ""
