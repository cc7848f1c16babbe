"""Dask schedulers and workers as a person starts them by hand: processes of their own, which can really be killed."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import warm
from conftest import environment, wait_until
from distributed import Client
from served import free_ports


@dataclass
class Cluster:
    """A scheduler at `address`, and processes of it that are running."""

    address: str
    scratch: Path
    processes: list[warm.Process] = field(default_factory=list)
    options: tuple[str, ...] = ()

    def start_scheduler(self) -> warm.Process:
        port = self.address.rsplit(":", 1)[1]
        return self._start("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show")

    def start_worker(self, memory_limit: str = "0", **env: str) -> warm.Process:
        limits = ("--nthreads", "2", "--memory-limit", memory_limit)
        folder = ("--local-directory", str(self.scratch))
        return self._start("worker", self.address, *limits, *folder, "--no-dashboard", **env)

    def _start(self, program: str, *arguments: str, **env: str) -> warm.Process:
        with (self.scratch / f"{program}-{len(self.processes)}.log").open("wb") as log:
            started = warm.Process(
                [program, *arguments, *self.options],
                program="dask_process",
                env=environment(no_proxy="127.0.0.1", **env),
                stdout=log,
                stderr=log,
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
        with Client(self.address, set_as_default=False, timeout=300) as client:
            client.wait_for_workers(count)

    def worker_pids(self, count: int) -> list[int]:
        """Return the process numbers of all workers once there are `count`: a nanny takes a while to start one."""

        def pids() -> list[int] | None:
            found = list(dict[str, int](client.run(os.getpid)).values())  # type: ignore[arg-type]
            return found if len(found) >= count else None

        with Client(self.address, set_as_default=False, timeout=300) as client:
            return wait_until(pids, 300)

    def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def by_hand(scratch: Path, workers: int, protocol: str = "tcp", options: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """A scheduler and its workers, which start while the test goes on."""
    scratch.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    cluster = Cluster(f"{protocol}://127.0.0.1:{port}", scratch, options=options)
    try:
        cluster.start_scheduler()
        for _ in range(workers):
            cluster.start_worker()
        wait_until(lambda: _listens(cluster), 300)
        yield cluster
    finally:
        cluster.stop()


def _listens(cluster: Cluster) -> bool:
    host, port = cluster.address.split("//")[1].rsplit(":", 1)
    with suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False
