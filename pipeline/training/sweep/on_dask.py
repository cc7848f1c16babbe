"""Run the trials of a sweep on Dask workers. The workers must see the same files under the same paths."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.backbone.keras_start import import_keras, limit_threads
from pipeline.core import machine
from pipeline.core.errors import IceboxError, UsageError
from pipeline.core.spec import HeadSpec
from pipeline.core.units import size_text
from pipeline.extraction.workers import scheduler_client
from pipeline.extraction.workers.connect import Client, ClusterChoice
from pipeline.extraction.workers.health import WorkerHealth
from pipeline.training.heads import Data
from pipeline.training.rows import StoredRows, load_or_stream_all

_SHARE_OF_LIMIT = 0.8  # of a worker's memory limit; above this share Dask pauses the worker
_LEAST_ROWS = 16  # least number of rows that must fit in a read
_ONE = threading.Lock()  # a process trains one head at a time, however many threads its worker has
_held: dict[str, Data] = {}  # in a worker: the rows of the current trials, so that they are read only once

Work = Callable[[HeadSpec, Data, Path], None]


def run_on_dask(
    client: Client,
    cluster: ClusterChoice,
    work: Work,
    tasks: Mapping[str, tuple[HeadSpec, str]],
    data: Data,
    memory: int | None,
    needed: int,
) -> Iterator[str]:
    """Call `work(spec, data, folder)` on Dask workers for each of `tasks`, and yield the tasks' names as they finish.

    `client` is connected to the scheduler of `cluster`. `data` holds `StoredRows`; each worker process reads them by
    `load_or_stream_all`, with the given `memory` and `needed` bytes. If a worker dies, its task is given to another
    worker, which resumes from the files in the task's folder.

    Raises
    ------
    UsageError
        If the scheduler has no workers.
    IceboxError
        If a task raises it, or the scheduler or all workers are lost.
    """
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    try:
        watch = _Watch(client, cluster)
        if not _registered(client):
            raise UsageError(f"the Dask scheduler at {cluster.name} has no workers; start some: dask worker ADDRESS")
        token = uuid4().hex  # not an id(): other rows may get the same one later, or in another program
        # Submit the data as a task instead of scattering it: the scheduler can recompute a task if a worker dies.
        shared = client.submit(_same, data, pure=False)
        together = _together(client)
        futures = {
            client.submit(
                _task, work, spec, folder, shared, token, memory, needed, cluster.threads, together, pure=False
            ): name
            for name, (spec, folder) in tasks.items()
        }
        done = queue.SimpleQueue[Any]()
        for future in futures:
            future.add_done_callback(done.put)
        for _ in futures:
            future = _next(done, watch)
            watch.worked()
            if future.status in ("cancelled", "lost"):
                raise CancelledError("it knows nothing of what it was given")
            future.result()
            yield futures[future]
    except KilledWorker as error:
        last = error.last_worker
        why = f", whose memory limit is {size_text(last.memory_limit)}" if last.memory_limit else ""
        raise IceboxError(
            f"the worker of a trial died again and again, the last one {last.address}{why}; see its log"
        ) from error
    except (CancelledError, CommClosedError, TimeoutError) as error:
        raise IceboxError(f"the Dask scheduler of {cluster.name} is gone; start it again") from error


def _together(client: Client) -> int:
    """Return the largest number of workers on one machine."""
    return max(Counter(address.rpartition(":")[0] for address in client.nthreads()).values(), default=1)


def _registered(client: Client) -> dict[str, Any]:
    """Return address → the scheduler's information on each worker. Raises CommClosedError if the scheduler is lost."""
    from distributed.comm import CommClosedError

    try:
        if client.status == "running":
            return client.scheduler_info(n_workers=-1)["workers"]
    except OSError as error:
        raise CommClosedError(str(error)) from error
    raise CommClosedError("the connection was lost")


class _Watch:
    """Watch of the workers' health while their tasks run."""

    def __init__(self, client: Client, cluster: ClusterChoice) -> None:
        self._client = client
        self._name = cluster.name
        self._there: dict[str, Any] = {}
        self.worked()

    def worked(self) -> None:
        """Reset the watch, after a task has finished."""
        self._lonely_since = time.monotonic()
        self._health = WorkerHealth()
        self._health.listen(self._client)

    def look(self) -> None:
        """Check the workers. Raises IceboxError if none can do the work, CommClosedError if the scheduler is lost."""
        before, self._there = self._there, _registered(self._client)
        for address in before.keys() - self._there.keys():
            self._health.lost(address, before[address])
        problems = {at: self._health.problem(at, about) for at, about in self._there.items()}
        if problems and all(problems.values()):
            reasons = "; ".join(f"{self._there[at]['name']} {problem}" for at, problem in list(problems.items())[:5])
            raise IceboxError(f"no worker of {self._name} can do the work: {reasons}")
        now = time.monotonic()
        if self._there:
            self._lonely_since = now
        elif now - self._lonely_since > scheduler_client.PATIENCE_S:
            raise IceboxError(
                f"{self._name} has had no worker for {scheduler_client.PATIENCE_S:.0f} s; "
                "start some by `dask worker ADDRESS`"
            )


def _next(done: queue.SimpleQueue[Any], watch: _Watch) -> Any:
    """Return the next finished future, checking the workers while waiting. Raises what `look` does."""
    while True:
        with suppress(queue.Empty):
            return done.get(timeout=scheduler_client.LOOK_EVERY_S)
        watch.look()


def _same(data: Data) -> Data:
    return data


def _task(
    work: Work,
    spec: HeadSpec,
    folder: str,
    data: Data,
    token: str,
    memory: int | None,
    needed: int,
    threads: int | None,
    together: int,
) -> None:
    from distributed import get_worker

    if not Path(folder).parent.is_dir():
        raise UsageError(f"a worker does not see {Path(folder).parent}; it needs the same files under the same paths")
    most = threads or get_worker().state.nthreads
    with _ONE, machine.computing_threads(most):
        if spec.head != "logreg":
            import_keras()
            limit_threads(most, most)
        if token not in _held:
            _held.clear()
            _held[token] = _read(data, memory, needed, together)
        work(spec, _held[token], Path(folder))


def _available(together: int) -> int:
    """Return the bytes of memory that this worker may still take.

    It is an equal share for `together` workers on the machine, at most what the worker's own limit leaves.
    """
    import psutil
    from distributed import get_worker

    share, limit = machine.available_memory() // together, get_worker().memory_manager.memory_limit
    if not limit:
        return share
    return min(share, max(0, round(_SHARE_OF_LIMIT * limit) - psutil.Process().memory_info().rss))


def _read(data: Data, memory: int | None, needed: int, together: int) -> Data:
    stored: list[Any] = [data.train, data.val]
    if not all(isinstance(rows, StoredRows) for rows in stored):
        raise TypeError("rows that are not on disk")
    # Allow at least the room for a few rows. If a worker lacks it, Dask kills it, and the error names its limit.
    available = max(_available(together), needed + 2 * stored[0].least_room(_LEAST_ROWS))
    train, val = load_or_stream_all(stored, memory=memory, needed=needed, available=available)
    return replace(data, train=train, val=val)
