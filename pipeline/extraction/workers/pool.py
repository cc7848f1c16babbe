"""Run shard tasks on Dask workers: check each worker, assign tasks to it, and repeat the tasks of a lost worker.

Dask transports tasks and results, and lists the workers. `DaskPool` decides which worker gets which task, a few at a
time: of millions of tasks few are in memory, and the tasks of a lost worker are known.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from pipeline.core import files, machine
from pipeline.core.errors import IceboxError, InterruptedComputationError, UnfitWorkerError
from pipeline.core.progress import Advance
from pipeline.core.units import counted, size_text
from pipeline.dataset import Dataset
from pipeline.extraction import shard_task
from pipeline.extraction.compute import ComputeStats, Settle
from pipeline.extraction.shard_task import AT_ONCE, ImageOutcome, ShardResult, ShardTask, TaskSetup, There
from pipeline.extraction.workers import scheduler_client
from pipeline.extraction.workers.connect import ClusterChoice
from pipeline.extraction.workers.members import AssignedTask, Worker
from pipeline.extraction.workers.scheduler_client import LostError, SchedulerClient
from pipeline.extraction.workers.worker import Requirements, check_worker, run_task

logger = logging.getLogger(__name__)

_MOST_LOSSES = 3  # workers lost with a task, before the task runs alone; if that loses a worker too, it is halved
_SAMPLES = 3
_GRACE_S = 5.0  # to wait for more workers if all are unfit, and for a file that a worker wrote to become visible here
_FATAL = "reading or decoding it ended the worker, again and again"


@contextmanager
def open_dask_pool(
    choice: ClusterChoice, setup: TaskSetup, dataset: Dataset, stats: ComputeStats
) -> Iterator[DaskPool]:
    """Give a pool of the fit workers of a cluster, once at least one of them is ready.

    Raises
    ------
    UsageError
        If no scheduler answers.
    IceboxError
        If none of its workers can do the work; the message gives the reasons.
    """
    kinds = {tuple(part.partition("://")[0] for part in url.split("::")): url for url in dataset.urls()}
    versions = machine.versions(machine.FEATURE_PACKAGES)
    samples, topic = _samples(dataset), f"icebox-{uuid4().hex}"
    requirements = Requirements(setup, versions, samples, tuple(kinds.values()), choice.threads, topic)
    with DaskPool(choice, requirements, stats) as pool:
        yield pool


class DaskPool:
    """The workers of a scheduler, as a `WorkerPool`."""

    def __init__(self, choice: ClusterChoice, requirements: Requirements, stats: ComputeStats) -> None:
        self._link = SchedulerClient(choice, requirements.topic)
        self._requirements = requirements
        self._effort = stats
        self._workers: dict[str, Worker] = {}
        self._again: deque[ShardTask] = deque()  # taken back from a worker
        self._next: ShardTask | None = None  # to be assigned next
        self._numbers = iter(range(2**63))
        self._looked = self._lonely_since = float("-inf")
        self._row_shape: tuple[int, ...] | None = None

    def __enter__(self) -> DaskPool:
        self._link.open()
        try:
            self._lonely_since = time.monotonic()
            while self._row_shape is None:
                try:
                    self._look()
                    self._wait()
                except InterruptedComputationError as error:
                    self._workers.clear()
                    error.recover()
        except BaseException:
            self._link.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            if worker.rows:
                self._report(worker)
        self._link.close()

    @property
    def size(self) -> int:
        """The number of workers that are fit or not checked yet."""
        return sum(worker.fit is not False for worker in self._workers.values())

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one image's features, (h, w, c)."""
        if self._row_shape is None:
            raise RuntimeError("no worker is ready yet")
        return self._row_shape

    @property
    def batch_size(self) -> int:
        """The number of images in a batch of a worker's model."""
        return self._requirements.setup.batch_of(self.row_shape)

    def run(self, tasks: Iterator[ShardTask], settle: Settle, advance: Advance, there: There) -> None:
        """Run all tasks on the workers; see `WorkerPool`.

        Raises
        ------
        InterruptedComputationError
            If the scheduler is lost.
        IceboxError
            If a task fails for a reason that is not one worker's own, or no fit worker is left; the message names it.
        """
        self._settle, self._advance, self._tasks = settle, advance, tasks
        self._unseen = None if there is shard_task.no_known_rows else uuid4().hex
        self._lonely_since = time.monotonic()
        try:
            while True:
                self._look()
                self._hand_out()
                if not any(worker.hands for worker in self._workers.values()) and not self._hold_next():
                    return
                self._wait()
        except InterruptedComputationError:
            self._workers.clear()
            raise
        finally:
            self._drop_all()

    # The list of workers

    def _look(self) -> None:
        """Update the list of workers: new ones, lost ones, and silent ones without a heartbeat."""
        now = time.monotonic()
        if now - self._looked < scheduler_client.LOOK_EVERY_S:
            return
        self._looked = now
        there, alive = self._link.workers()
        for address in self._workers.keys() - alive:
            self._lose(self._workers[address], "is gone" if address not in there else "does not answer any more")
        for address in alive - self._workers.keys():
            self._meet(address, there[address])
        for worker in self._workers.values():
            problem = self._link.health.problem(worker.address, there[worker.address])
            if problem is not None and worker.fit is not False:
                self._dismiss(worker, problem)

    def _meet(self, address: str, about: dict[str, Any]) -> None:
        host = address.split("://")[-1].rsplit(":", 1)[0]
        name = str(about["name"])
        worker = Worker(address, f"{name} on {host}" if host not in name else name, "GPU" in about["resources"], about)
        self._workers[address] = worker
        if self._link.health.problem(address, about) is None:
            worker.vetting = self._link.submit(address, check_worker, self._requirements)

    def _lose(self, worker: Worker, how: str) -> None:
        """Remove a lost worker and take back its tasks."""
        del self._workers[worker.address]
        full = self._link.health.ended_for_memory(worker.address)
        if full:
            how = f"came near its memory limit of {size_text(worker.about['memory_limit'])} and was ended"
        elif worker.vetting is not None:
            how = f"{how}, before it could say what it has: does its environment have Icebox? See its log"
        if full or worker.vetting is not None:
            self._link.health.lost(worker.address, worker.about)
        elif worker.hands:
            self._link.health.lost(worker.address, worker.about, at_work=True)
        if worker.fit is not False:
            redone = "; what it had in hand is computed again" if worker.hands else ""
            logger.warning("the worker %s %s%s", worker.name, how, redone)
        if worker.vetting is not None:
            worker.vetting.cancel(force=True)
        self._take_back(worker, lost=not full)  # the memory limit is no sign of a bad image
        if worker.rows:
            self._report(worker)

    def _take_back(self, worker: Worker, *, lost: bool) -> None:
        for hand in worker.hands.values():
            hand.future.cancel(force=True)
            self._put_back(hand, lost=lost)
        worker.hands.clear()

    def _put_back(self, hand: AssignedTask, *, lost: bool) -> None:
        """Queue a task again: halved if it was `alone` on a lost worker, or failed if such a task has one image."""
        self._advance(-hand.advanced)
        self._effort.lost += round(hand.advanced)
        task = replace(hand.task, losses=hand.task.losses + lost)
        middle = len(task.origin) // 2
        if not (lost and hand.alone):
            self._again.append(task)
        elif middle:
            at = int(np.searchsorted(task.images, middle))
            self._again += task.part(slice(0, at)), task.part(slice(at, None))
        else:
            self._settle(task, ShardResult(None, [ImageOutcome(0, None, _FATAL)], 0.0))
            self._advance(len(task))

    def _dismiss(self, worker: Worker, reason: str) -> None:
        """Mark a worker as unfit and take back its tasks; no more are assigned to it."""
        logger.warning("the worker %s is not used: it %s", worker.name, reason)
        if worker.vetting is not None:
            worker.vetting.cancel(force=True)
            worker.vetting = None
        worker.fit, worker.reason = False, reason
        self._take_back(worker, lost=False)

    def _drop_all(self) -> None:
        for worker in self._workers.values():
            for hand in worker.hands.values():
                hand.future.cancel(force=True)
            worker.hands.clear()
        self._again.clear()
        self._next = None

    # The tasks of the workers

    def _hand_out(self) -> None:
        fit = [worker for worker in self._workers.values() if worker.fit]
        if any(worker.gpu for worker in fit):  # without a GPU a worker would finish last
            fit = [worker for worker in fit if worker.gpu]
        while fit and self._hold_next() and self._next is not None:
            worker, alone = min(fit, key=Worker.load), self._next.losses >= _MOST_LOSSES
            if worker.load() >= (1 if alone else AT_ONCE):
                return
            number, task = next(self._numbers), self._next
            self._next = None
            share = worker.gpu and 1 / AT_ONCE
            future = self._link.submit(
                worker.address, run_task, task, self._requirements, number, self._unseen, gpu=share
            )
            worker.hands[number] = AssignedTask(task, future, alone)

    def _hold_next(self) -> bool:
        """Return whether there is a task to assign; tasks that were taken back come last."""
        if self._next is None:
            self._next = next(self._tasks, None)
        if self._next is None and self._again:
            self._next = self._again.popleft()
        return self._next is not None

    def _wait(self) -> None:
        """Wait for one event, a second at most, and handle it."""
        self._require_somebody()
        kind, about = self._link.wait()
        if kind == "reported":
            self._advanced(about["task"], about["rows"])
        if kind != "done":
            return
        for worker in list(self._workers.values()):
            if worker.vetting is about:
                worker.vetting = None
                self._vetted(worker, about)
            for number, hand in list(worker.hands.items()):
                if hand.future is about:
                    del worker.hands[number]
                    self._finished(worker, hand)

    def _require_somebody(self) -> None:
        """Raise IceboxError if there has been no fit or unchecked worker for a while."""
        workers, now = self._workers.values(), time.monotonic()
        if any(worker.fit is not False for worker in workers):
            self._lonely_since = now
            return
        if workers and now - self._lonely_since > _GRACE_S:
            reasons = "; ".join(f"{worker.name} {worker.reason}" for worker in list(workers)[:5])
            raise IceboxError(f"no worker of {self._link.name} can do the work: {reasons}")
        if not workers and now - self._lonely_since > scheduler_client.PATIENCE_S:
            raise IceboxError(
                f"{self._link.name} has had no worker for {scheduler_client.PATIENCE_S:.0f} s; start some by "
                "`dask worker ADDRESS` and run the command again: what was computed is kept"
            )

    def _vetted(self, worker: Worker, future: Any) -> None:
        shape, error = self._link.outcome(future)
        if error is None:
            worker.fit, worker.since, self._row_shape = True, time.monotonic(), shape
        elif isinstance(error, LostError):
            worker.fit, worker.reason = False, "was lost"  # the next `_look` removes the lost worker
            self._link.health.lost(worker.address, worker.about)
        elif isinstance(error, IceboxError) and not isinstance(error, UnfitWorkerError):
            raise error
        elif "deserialization of the task graph" in str(error):
            text = (
                f"the Dask scheduler of {self._link.name} cannot read tasks; start it in the environment of the workers"
            )
            raise IceboxError(f"{text} ({' '.join(str(error.__cause__ or error).split()):.200})") from error
        else:
            self._dismiss(worker, _reason(error))

    def _finished(self, worker: Worker, hand: AssignedTask) -> None:
        done, error = self._link.outcome(hand.future)
        if error is None:
            self._accept(worker, hand, done)
        elif isinstance(error, LostError):
            self._put_back(hand, lost=True)
        elif isinstance(error, UnfitWorkerError):
            self._put_back(hand, lost=False)
            self._dismiss(worker, _reason(error))
        elif isinstance(error, (IceboxError, OSError)):
            raise IceboxError(f"on the worker {worker.name}: {error}") from error
        else:
            raise error

    def _accept(self, worker: Worker, hand: AssignedTask, done: ShardResult) -> None:
        """Accept the result of a task; queue again the images that only this worker could not read."""
        task, setup = hand.task, self._requirements.setup
        if done.shard is not None and not _published(setup.directory / f"{done.shard.name}.h5", done.shard.bytes):
            self._put_back(hand, lost=False)
            self._dismiss(worker, f"publishes to another folder than {setup.directory} is here")
            return
        misread = [met for met in done.met if met.key is None and _readable(task.dataset.path(met.i))]
        if misread and task.losses + 1 < _MOST_LOSSES:
            images = {met.i for met in misread}
            rows = np.flatnonzero(np.isin(task.images, list(images)))
            self._again.append(replace(task.part(rows), losses=task.losses + 1))
            self._advance(-len(rows))
            done = replace(done, met=[met for met in done.met if met.i not in images])
        self._link.health.worked(worker.address, worker.about)
        worker.rows += done.rows
        worker.model_seconds += done.model_seconds
        self._settle(task, done)
        if len(misread) > len(done.met):
            name = task.dataset.path(misread[0].i)
            self._dismiss(worker, f"cannot read {name}, which can be read here ({misread[0].reason})")

    def _advanced(self, number: int, rows: float) -> None:
        for worker in self._workers.values():
            if hand := worker.hands.get(number):
                hand.advanced += rows
                worker.advanced += rows
                self._advance(rows, self._rates())

    def _rates(self) -> str:
        rates = sorted(worker.rate for worker in self._workers.values() if worker.fit)
        if not rates:
            return ""
        each = f"{rates[0]:.1f}/s" if len(rates) == 1 else f"{rates[0]:.1f} to {rates[-1]:.1f}/s each"
        return f"{counted(len(rates), 'worker')}, {each}"

    def _report(self, worker: Worker) -> None:
        busy = time.monotonic() - worker.since
        self._effort.worker_seconds += busy
        self._effort.workers.append(
            {
                "worker": worker.name,
                "rows": worker.rows,
                "images_per_second": round(worker.rate, 2),
                "model_share": round(min(1.0, worker.model_seconds / busy), 3),
            }
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, IceboxError):
        return str(error)
    if isinstance(error, ImportError):
        return f"lacks a package ({error}); install there what is installed here"
    return f"fails by {type(error).__name__}: {' '.join(str(error).split()):.200}"


def _samples(dataset: Dataset) -> tuple[Path, ...]:
    """Return at most `_SAMPLES` image files that this process can read; each worker must read them too."""
    found = (dataset.path(i) for i in range(min(len(dataset), 100)))
    return tuple(path.absolute() for path in found if path is not None and _readable(path))[:_SAMPLES]


def _readable(path: Path | None) -> bool:
    if path is None:
        return False
    try:
        files.try_to_read(path)
    except OSError:
        return False
    return True


def _published(path: Path, size: int) -> bool:
    """Return whether a shard file of `size` bytes exists; a network file system may show it some seconds late."""
    start = time.monotonic()
    while True:
        with suppress(OSError):
            return files.size(path) == size
        if time.monotonic() - start > _GRACE_S:
            return False
        time.sleep(0.2)
