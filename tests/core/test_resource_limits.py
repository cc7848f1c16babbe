"""What control groups and resource limits leave to a process, and who asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import ROOT, environment

from pipeline.core import machine, resource_limits
from pipeline.images.loader import decoding_pool
from pipeline.training.sweep import on_dask

GB = 10**9
V1_NONE = str(2**63 - 4096)  # how the kernel writes that there is no limit


@dataclass
class Groups:
    """A tree of control groups that stands in for the system's."""

    root: Path

    def member(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def mounted(self, *mounts: tuple[str, str, str]) -> None:
        """Say what is mounted: (the group that stands there, the folder, type and options)."""
        lines = [f"30 23 0:27 {group} {place} rw,nosuid shared:9 - {kind}" for group, place, kind in mounts]
        self.write("proc/self/mountinfo", "\n".join(["21 1 8:1 / / rw - ext4 /dev/sda1 rw", *lines]))

    def write(self, path: str, text: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def memory(self, folder: str, most: object, used: int, file_cache: int = 0, version: int = 2) -> None:
        names = ("max", "current", "inactive_file") if version == 2 else ("limit_in_bytes", "usage_in_bytes", None)
        self.write(f"{folder}/memory.{names[0]}", most)
        self.write(f"{folder}/memory.{names[1]}", used)
        self.write(f"{folder}/memory.stat", f"anon 7\n{names[2] or 'total_inactive_file'} {file_cache}")

    def time(self, folder: str, quota: object, period: int = 100_000, version: int = 2) -> None:
        if version == 2:
            self.write(f"{folder}/cpu.max", f"{quota} {period}")
            return
        self.write(f"{folder}/cpu.cfs_quota_us", quota)
        self.write(f"{folder}/cpu.cfs_period_us", period)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """No control group at first, on a machine of 64 cores and 256 GB of which 200 are free."""
    monkeypatch.setattr(resource_limits, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=256 * GB, available=200 * GB))
    return Groups(tmp_path)


def found() -> tuple[int, int, int]:
    """Return cores, GB in all, GB left."""
    return machine.usable_cores(), machine.total_memory() // GB, machine.available_memory() // GB


def test_without_control_groups_it_is_the_machine(groups: Groups) -> None:
    assert found() == (64, 256, 200)


def test_mounts_whose_names_are_not_utf_8_are_passed_over(groups: Groups) -> None:
    groups.member("0::/")
    groups.mounted(("/", "/sys/fs/cgroup", "cgroup2 cgroup rw"))
    with (groups.root / "proc/self/mountinfo").open("ab") as file:
        file.write(b"31 21 8:2 / /media/caf\xe9 rw - vfat /dev/sdb1 rw\n")
    groups.time("sys/fs/cgroup", 200_000)
    assert found() == (2, 256, 200)


def test_version_2_in_a_container_that_sees_its_group_as_the_root(groups: Groups) -> None:
    groups.member("0::/")
    groups.mounted(("/", "/sys/fs/cgroup", "cgroup2 cgroup rw"))
    groups.time("sys/fs/cgroup", 200_000)
    groups.memory("sys/fs/cgroup", 4 * GB, used=3 * GB, file_cache=GB)
    assert found() == (2, 4, 2)


def test_the_tightest_of_nested_groups_counts(groups: Groups) -> None:
    groups.member("0::/kubepods/pod/container")
    groups.mounted(("/", "/sys/fs/cgroup", "cgroup2 cgroup rw"))
    groups.time("sys/fs/cgroup/kubepods/pod/container", "max")
    groups.time("sys/fs/cgroup/kubepods/pod", 350_000)
    groups.time("sys/fs/cgroup/kubepods", 3_200_000)
    groups.memory("sys/fs/cgroup/kubepods/pod/container", "max", used=GB)
    groups.memory("sys/fs/cgroup/kubepods/pod", 16 * GB, used=2 * GB)
    groups.memory("sys/fs/cgroup/kubepods", 64 * GB, used=60 * GB)
    assert found() == (4, 16, 4), "half a core more is one that may be kept busy"
    groups.write("sys/fs/cgroup/kubepods/pod/memory.high", 3 * GB)
    assert found() == (4, 3, 1)


def test_version_1_where_the_group_is_mounted_as_the_root(groups: Groups) -> None:
    """Docker without namespaces of groups: the path is the host's, and only the group itself can be seen."""
    groups.member("5:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc", "1:name=systemd:/docker/abc")
    groups.mounted(
        ("/docker/abc", "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory"),
        ("/docker/abc", "/sys/fs/cgroup/cpu,cpuacct", "cgroup cgroup rw,cpu,cpuacct"),
    )
    groups.memory("sys/fs/cgroup/memory", 2 * GB, used=GB, version=1)
    groups.time("sys/fs/cgroup/cpu,cpuacct", 50_000, version=1)
    assert found() == (1, 2, 1)


def test_version_1_nested_and_without_limits_of_its_own(groups: Groups) -> None:
    groups.member("5:memory:/slurm/job/step", "4:cpu:/slurm/job/step")
    groups.mounted(
        ("/", "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory"), ("/", "/my\\040groups", "cgroup cgroup rw,cpu")
    )
    groups.memory("sys/fs/cgroup/memory/slurm/job/step", V1_NONE, used=GB, version=1)
    groups.memory("sys/fs/cgroup/memory/slurm/job", 32 * GB, used=30 * GB, file_cache=10 * GB, version=1)
    groups.memory("sys/fs/cgroup/memory", V1_NONE, used=50 * GB, version=1)
    groups.time("my groups/slurm/job/step", -1, version=1)
    groups.time("my groups/slurm/job", 800_000, version=1)
    assert found() == (8, 32, 12)


def test_both_versions_at_once(groups: Groups) -> None:
    """As systemd's hybrid layout has it: version 2 is there, its controllers are not."""
    groups.member("4:memory:/user", "1:cpu:/", "0::/user")
    groups.mounted(
        ("/", "/sys/fs/cgroup/unified", "cgroup2 cgroup2 rw"),
        ("/", "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory"),
        ("/", "/sys/fs/cgroup/cpu", "cgroup cgroup rw,cpu"),
    )
    groups.memory("sys/fs/cgroup/memory/user", 8 * GB, used=GB, version=1)
    groups.time("sys/fs/cgroup/cpu", -1, version=1)
    assert found() == (64, 8, 7)


@pytest.mark.parametrize("path", ["/../../elsewhere", "/of/the/host"])
def test_a_group_that_cannot_be_seen_is_the_one_that_is_mounted(path: str, groups: Groups) -> None:
    groups.member(f"0::{path}")
    groups.mounted(("/" if ".." in path else "/other", "/sys/fs/cgroup", "cgroup2 cgroup rw"))
    groups.time("sys/fs/cgroup", 300_000)
    groups.time("elsewhere", 100_000)
    assert found() == (3, 256, 200)


def test_what_is_no_limit(groups: Groups) -> None:
    groups.member("0::/")
    groups.mounted(("/", "/sys/fs/cgroup", "cgroup2 cgroup rw"))
    groups.time("sys/fs/cgroup", 200_000, period=0)
    groups.write("sys/fs/cgroup/memory.max", 4 * GB)  # but not what is taken of it
    assert found() == (64, 256, 200)
    groups.time("sys/fs/cgroup", 12_800_000)
    groups.memory("sys/fs/cgroup", 512 * GB, used=0)
    assert found() == (64, 256, 200), "more than there is"
    groups.time("sys/fs/cgroup", 1_000)
    groups.memory("sys/fs/cgroup", GB, used=2 * GB)
    assert found() == (1, 1, 0)


def test_a_limit_of_address_space_counts() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9))\n"
        "from pipeline.core import machine\n"
        "print(machine.total_memory(), machine.available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    total, left = map(int, done.stdout.split())
    assert total <= 6 * GB
    assert left < total


def test_libraries_are_told_where_they_would_not_see_it(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine._THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    before = dict(os.environ)
    machine.limit_libraries()
    assert dict(os.environ) == before, "they see for themselves which cores there are"
    groups.member("0::/")
    groups.mounted(("/", "/sys/fs/cgroup", "cgroup2 cgroup rw"))
    groups.time("sys/fs/cgroup", 200_000)
    for name in machine._THREADS:
        monkeypatch.setenv(name, "")  # so that they are taken away afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    machine.limit_libraries()
    told = {name: os.environ[name] for name in machine._THREADS}
    assert told == {**dict.fromkeys(machine._THREADS, "2"), "MKL_NUM_THREADS": "7"}, "what a person said stays"
    assert machine.reading_threads() == 6
    with decoding_pool() as pool:
        assert pool._max_workers == 2


def test_linear_algebra_computes_in_no_more_threads_than_it_was_told() -> None:
    import scipy.linalg  # noqa: F401  which brings one
    from threadpoolctl import threadpool_info

    def most() -> int:
        return max(each["num_threads"] for each in threadpool_info())

    before = most()
    with machine.computing_threads(1):
        assert most() == 1
        with machine.computing_threads(64):
            assert most() == 1
    assert most() == before


CHILD = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pipeline.core import machine
from pipeline.backbone.frozen import streams
from pipeline.backbone.keras_start import import_keras
keras = import_keras()
import tensorflow as tf
print(machine.usable_cores(), streams(), tf.config.threading.get_intra_op_parallelism_threads(),
      tf.config.threading.get_inter_op_parallelism_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity on this system")
def test_a_process_of_one_core_computes_on_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", "1", "1", "1"], done.stderr


def test_workers_of_one_machine_share_its_memory(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"tcp://10.0.0.1:4711": 2, "tcp://10.0.0.1:4712": 2, "tcp://[::1]:4713": 2}
    assert on_dask._together(SimpleNamespace(nthreads=lambda: addresses)) == 2
    worker: Any = SimpleNamespace(memory_manager=SimpleNamespace(memory_limit=None))
    monkeypatch.setattr("distributed.get_worker", lambda: worker)
    assert on_dask._available(4) == 50 * GB
    worker.memory_manager.memory_limit = 3 * GB
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: SimpleNamespace(rss=GB))
    assert on_dask._available(4) == round(on_dask._SHARE_OF_LIMIT * 3 * GB) - GB
