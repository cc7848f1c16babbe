"""Dask schedulers and workers as a person starts them by hand: processes of their own, which can really be killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, environment
from distributed import Client


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Cluster:
    """A scheduler at `address`, and processes of it that are running."""

    address: str
    scratch: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    options: tuple[str, ...] = ()

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        port = self.address.rsplit(":", 1)[1]
        return self._start("dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show")

    def start_worker(self, memory_limit: str = "0", **env: str) -> subprocess.Popen[bytes]:
        more = (
            "--nthreads",
            "2",
            "--memory-limit",
            memory_limit,
            "--local-directory",
            str(self.scratch),
            "--no-dashboard",
        )
        return self._start("dask_worker", self.address, *more, **env)

    def _start(self, program: str, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with (self.scratch / f"{program}-{len(self.processes)}.log").open("wb") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{program}", *arguments, *self.options],
                stdout=log,
                stderr=log,
                env=environment(PYTHONPATH=paths, no_proxy="127.0.0.1", **env),
                start_new_session=True,
            )
        self.processes.append(started)
        return started

    def start_anew(self) -> None:
        """Kill all, then start a scheduler at the same address and a worker."""
        self.stop()
        self.start_scheduler()
        self.start_worker()

    def wait_for_workers(self, count: int) -> None:
        with Client(self.address, set_as_default=False, timeout=60) as client:
            client.wait_for_workers(count)

    def worker_pids(self) -> list[int]:
        with Client(self.address, set_as_default=False, timeout=30) as client:
            return list(dict[str, int](client.run(os.getpid)).values())  # type: ignore[arg-type]

    def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def by_hand(scratch: Path, workers: int, protocol: str = "tcp", options: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """A scheduler and its workers, which start while the test goes on."""
    scratch.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(f"{protocol}://127.0.0.1:{free_port()}", scratch, options=options)
    try:
        cluster.start_scheduler()
        for _ in range(workers):
            cluster.start_worker()
        _wait_for(cluster)
        yield cluster
    finally:
        cluster.stop()


def _wait_for(cluster: Cluster) -> None:
    host, port = cluster.address.split("//")[1].rsplit(":", 1)
    for _ in range(600):
        with suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.1)
    raise TimeoutError("the scheduler did not start")
