"""Dask schedulers and workers as a person starts them by hand: processes of their own, which can really be killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
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
            client.wait_for_workers(count, timeout=300)

    def worker_pids(self, count: int) -> dict[str, int]:
        """Return address → process number of all workers once there are `count`: a nanny takes a while to start one."""
        with Client(self.address, set_as_default=False, timeout=300) as client:

            def pids() -> dict[str, int] | None:
                found = dict[str, int](client.run(os.getpid))  # type: ignore[arg-type]
                return found if len(found) >= count else None

            return wait_until(pids, 300)

    def has_started(self) -> bool:
        """Wait until the scheduler listens; return whether it does, False if its port was taken."""
        scheduler, port = self.processes[0], int(self.address.rsplit(":", 1)[1])
        wait_until(lambda: scheduler.poll() is not None or port in _listening(scheduler.pid), 300)
        if scheduler.poll() is None:
            return True
        log = (self.scratch / "scheduler-0.log").read_text()
        assert "Address already in use" in log, log
        return False

    def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(300)


def _listening(pid: int) -> set[int]:
    """Return the ports that a process listens at."""
    with suppress(psutil.Error):  # it has just ended
        connections = psutil.Process(pid).net_connections("tcp")
        return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return set()


@contextmanager
def by_hand(scratch: Path, workers: int, protocol: str = "tcp", options: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """A scheduler and its workers, which start while the test goes on."""
    scratch.mkdir(parents=True, exist_ok=True)
    for port in free_ports(4):  # which somebody else may take meanwhile
        cluster = Cluster(f"{protocol}://127.0.0.1:{port}", scratch, options=options)
        try:
            cluster.start_scheduler()
            for _ in range(workers):
                cluster.start_worker()
            if cluster.has_started():
                yield cluster
                return
        finally:
            cluster.stop()
    raise AssertionError("each of four ports was taken")
