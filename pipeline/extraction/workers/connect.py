"""Connect to Dask workers: processes started on this machine for one command, or those of a running scheduler."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from pipeline.core import machine
from pipeline.core.errors import IceboxError, UsageError, exhausted

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_PLACE = r"(\[[0-9a-fA-F:.%]+\]|[^/\s:\[\]]+):(\d{1,5})"  # host and port
_ADDRESS = re.compile(rf"((tcp|tls)://)?{_PLACE}")
_DASHBOARD = re.compile(_PLACE)
_TIMEOUT_S = 10  # to find the scheduler

Client = Any  # distributed.Client; most of its methods have no type hints


@dataclass(frozen=True)
class ClusterChoice:
    """Which workers compute: `workers` new processes on this machine, or those of a running `scheduler`.

    `scheduler` is an address such as tcp://10.0.0.1:8786; `tls_ca`, `tls_cert` and `tls_key` are PEM files for an
    address tls://…. `dashboard` is the HOST:PORT of the dashboard of a scheduler started here. Raises UsageError if
    the values do not fit together, or there are fewer GPUs than `workers`.
    """

    workers: int | None = None
    scheduler: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    dashboard: str | None = None

    def __post_init__(self) -> None:
        if (self.workers is None) == (self.scheduler is None):
            raise UsageError("give either --workers N or --scheduler ADDRESS")
        tls = {"--tls-ca": self.tls_ca, "--tls-cert": self.tls_cert, "--tls-key": self.tls_key}
        if self.dashboard is not None and not _is_place(_DASHBOARD, self.dashboard):
            raise UsageError(f"--dashboard takes HOST:PORT, such as 0.0.0.0:8787, found {self.dashboard!r:.60}")
        if self.scheduler is None:
            if given := [name for name, value in tls.items() if value is not None]:
                raise UsageError(f"{given[0]} goes with --scheduler tls://…")
            gpus = machine.gpu_count()
            if gpus and self.workers and self.workers > gpus:
                raise UsageError(f"--workers {self.workers}, but each takes a GPU and there are {gpus}")
            return
        if self.dashboard is not None:
            raise UsageError("--dashboard is of a scheduler started here, so it goes with --workers only")
        if not _is_place(_ADDRESS, self.scheduler):
            raise UsageError(f"--scheduler takes an address such as tcp://127.0.0.1:8786, found {self.scheduler!r:.60}")
        for name, path in tls.items():
            if path is not None and not self.scheduler.startswith("tls://"):
                raise UsageError(f"{name} goes with --scheduler tls://…, found {self.scheduler}")
            if path is not None and not path.is_file():
                raise UsageError(f"{name}: there is no file {path}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key go together")

    def at_most(self, count: int) -> ClusterChoice:
        """Return the choice with at most `count` new workers: more would have no task."""
        return replace(self, workers=min(self.workers, max(1, count))) if self.workers else self

    @property
    def name(self) -> str:
        """The name of the cluster in messages."""
        return self.scheduler or "this machine"

    @property
    def threads(self) -> int | None:
        """The number of cores of a new worker, an equal share of this machine's.

        None for workers of a running scheduler: each uses as many cores as Dask gave it threads.
        """
        return max(1, machine.usable_cores() // self.workers) if self.workers else None


def _is_place(pattern: re.Pattern[str], text: str) -> bool:
    found = pattern.fullmatch(text)
    return found is not None and int(found[found.lastindex or 0]) < 2**16


@contextmanager
def connected(choice: ClusterChoice) -> Iterator[Client]:
    """Give a client of the scheduler of the chosen workers; workers that were started end with the context.

    Raises
    ------
    UsageError
        If no scheduler answers, or workers cannot be started.
    IceboxError
        If a limit of this process leaves too little for new workers.
    """
    from distributed import Client as DaskClient

    # Icebox reports lost connections itself, in one line. Importing distributed sets log levels, so this comes after.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if choice.workers is not None:
        with _started(choice.workers, choice.dashboard) as cluster, DaskClient(cluster, set_as_default=False) as client:
            _say_dashboard(client)
            yield client
        return
    with _found(choice) as client:
        _say_dashboard(client)
        yield client


def _found(choice: ClusterChoice) -> Client:
    from distributed import Client as DaskClient
    from distributed.security import Security

    tls = {"tls_ca_file": choice.tls_ca, "tls_client_cert": choice.tls_cert, "tls_client_key": choice.tls_key}
    given = {name: str(path) for name, path in tls.items() if path is not None}
    address = str(choice.scheduler)
    try:
        security = Security(**given)  # Dask's own configuration fills in what is not given
        if address.startswith("tls://") and not security.get_connection_args("client").get("ssl_context"):
            raise UsageError("--scheduler tls://… needs --tls-ca, --tls-cert and --tls-key, or Dask's own settings")
        return DaskClient(address, timeout=_TIMEOUT_S, set_as_default=False, security=security)
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"no Dask scheduler answers at {address!r} ({why:.200}); see --scheduler") from error


def _started(count: int, dashboard: str | None) -> Any:
    """Return a cluster of a scheduler and `count` worker processes, which are restarted when they are killed.

    Raises
    ------
    UsageError
        If they cannot be started, for example because the dashboard's port is in use.
    IceboxError
        If a limit of this process leaves too little for them.
    """
    from distributed import Nanny, Scheduler, SpecCluster

    options = {"host": LOOPBACK, "port": 0, "dashboard": True, "dashboard_address": dashboard or f"{LOOPBACK}:0"}
    with _interrupts_kept_here(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Port .* is already in use")  # else the dashboard would listen at another port
        try:
            return SpecCluster(
                scheduler={"cls": Scheduler, "options": options},
                workers={i: {"cls": Nanny, "options": _worker_options(i)} for i in range(count)},
                silence_logs=logging.CRITICAL,  # type: ignore[arg-type]  # a level, as in LocalCluster
                name="icebox",
            )
        except (RuntimeError, OSError, UserWarning) as error:
            cause = error.__cause__ or error
            if text := exhausted(cause):
                raise IceboxError(f"workers cannot be started: {text}") from error
            where = f" with the dashboard at {dashboard}" if dashboard else ""
            raise UsageError(f"workers cannot be started{where}: {' '.join(str(cause).split()):.200}") from error


@contextmanager
def _interrupts_kept_here() -> Iterator[None]:
    """Block SIGINT in threads started inside the context, and in every process that these threads start later.

    On Ctrl-C the terminal sends SIGINT to all these processes, but Icebox ends its workers itself.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # new Python processes import no modules from the current folder
    resource_tracker.ensure_running()  # started inside, it would unblock SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_options(number: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "host": LOOPBACK,
        "nthreads": 2,  # one runs the model while the other decodes ahead or writes
        "memory_limit": 0,  # none: tasks take bounded memory, and a task of an ended worker is computed again
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    if devices := _devices():
        options |= {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": devices[number]}}
    return options


def _devices() -> list[str]:
    """Return the CUDA names of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible and machine.gpu_count() else [str(i) for i in range(machine.gpu_count())]


def _say_dashboard(client: Client) -> None:
    services = client.scheduler_info()["services"]
    if "dashboard" in services:
        plots = "" if importlib.util.find_spec("bokeh") else f"; its plots need bokeh: {machine.installs('dashboard')}"
        logger.info("dashboard of the scheduler: %s%s", client.dashboard_link, plots)
