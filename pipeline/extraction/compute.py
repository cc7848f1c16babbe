"""Compute missing rows: cut them into tasks of a shard each, run the tasks, and record the results in the index.

Tasks run in this process (`LocalPool`) or in Dask workers, both behind the protocol `WorkerPool`. Tasks never write to
the index: `compute` records their shards and failed images.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from pipeline.cache.digests import Identities
from pipeline.cache.index import Index
from pipeline.cache.shard import SHARD_BYTES
from pipeline.cache.space import FeatureSpace
from pipeline.core import files, machine
from pipeline.core.errors import DecodeError, DoNotFitError
from pipeline.core.progress import Advance, Progress
from pipeline.core.spec import FeatureSpec
from pipeline.core.units import counted, duration, size_text
from pipeline.dataset import Dataset
from pipeline.extraction.shard_task import (
    AT_ONCE,
    ImageOutcome,
    KnownRows,
    ShardResult,
    ShardTask,
    ShardWorker,
    TaskSetup,
    There,
    no_known_rows,
)
from pipeline.images import decoding
from pipeline.images.loader import Loaded

logger = logging.getLogger(__name__)

DEFAULT_SHARD_ROWS = 256
DEFAULT_BATCH_SIZE = 32
MAX_BATCH_SIZE = 512
_ANNOUNCED_FROM = 100  # rows; fewer are computed too quickly for an estimate to be of use
_WORTH_SAYING = 2**31  # bytes of memory for unfinished shards, above which a warning is logged
_TASKS_EACH = 4  # tasks for each of several processes, at least

Settle = Callable[[ShardTask, ShardResult], None]


class WorkerPool(Protocol):
    """Runs tasks in one or more processes that have loaded the model."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one image's features, (h, w, c)."""
        ...

    @property
    def batch_size(self) -> int:
        """The number of images in a batch of the model."""
        ...

    @property
    def size(self) -> int:
        """The number of processes in the pool now."""
        ...

    def run(self, tasks: Iterator[ShardTask], settle: Settle, advance: Advance, there: There) -> None:
        """Run all tasks, and pass each with its result to `settle`, in the calling thread.

        A row for which `there(key, view)` is true exists and need not be computed. A process that cannot call `there`,
        a Dask worker, knows only the rows that it computed itself.
        """
        ...


@dataclass
class ComputeStats:
    """The time a computation took, and what else was measured.

    `seconds` counts from the first task to the last published shard. `worker_seconds` is the sum over all processes
    that computed, and `model_seconds` the part of it in which their models worked. `lost` counts rows that were
    computed again because their worker was lost or dismissed.
    """

    seconds: float = 0.0
    worker_seconds: float = 0.0
    model_seconds: float = 0.0
    lost: int = 0
    peak: int = 0  # the largest pixel value of images with 16 bits a channel
    workers: list[dict[str, Any]] = field(default_factory=list)  # one entry for each Dask worker

    @property
    def model_share(self) -> float | None:
        """The share of their time that processes spent in the model; None if nothing was computed."""
        return round(min(1.0, self.model_seconds / self.worker_seconds), 3) if self.worker_seconds else None


class LocalPool:
    """Runs tasks in this process."""

    size = 1

    def __init__(self, worker: ShardWorker, stats: ComputeStats) -> None:
        self._worker = worker
        self._effort = stats

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one image's features, (h, w, c)."""
        return self._worker.row_shape

    @property
    def batch_size(self) -> int:
        """The number of images in a batch of the model."""
        return self._worker.batch_size

    def run(self, tasks: Iterator[ShardTask], settle: Settle, advance: Advance, there: There) -> None:
        """Run the tasks. On Ctrl-C the rows computed so far are published before KeyboardInterrupt is raised again."""
        stopped, waiting = threading.Event(), deque[tuple[ShardTask, Future[ShardResult]]]()
        start = time.perf_counter()

        def settle_first() -> None:
            task, future = waiting[0]
            settle(task, future.result())
            waiting.popleft()

        with ThreadPoolExecutor(AT_ONCE, "shard") as pool:
            try:
                for task in tasks:
                    waiting.append((task, pool.submit(self._worker.run, task, advance, stopped.is_set, there)))
                    if len(waiting) >= AT_ONCE:
                        settle_first()
                while waiting:
                    settle_first()
            except KeyboardInterrupt:
                stopped.set()
                while waiting:
                    settle_first()
                raise
            finally:
                stopped.set()
                self._effort.worker_seconds += time.perf_counter() - start


@dataclass(frozen=True)
class ComputeOptions:
    """Options of a computation that do not change the values of features."""

    shard_rows: int | None = None  # rows of a shard; None: 256, or fewer that fit into SHARD_BYTES
    batch_size: int | None = None  # None: that of the space, or the fastest
    max_pixels: int = decoding.DEFAULT_MAX_PIXELS
    strict: bool = False  # stop at the first image that cannot be decoded
    threads: int | None = None  # cores to compute with; they limit TensorFlow in this whole process

    def model_batch(self, before: int | None = None, *, of_cluster: bool = False) -> int:
        """Return the batch size to start with, at most the rows of a shard.

        `before` is the batch size that the space was created with: the same size rounds all its rows alike. For a
        cluster the default is `DEFAULT_BATCH_SIZE`, because the hardware of its workers is not known here.
        """
        usual = DEFAULT_BATCH_SIZE if of_cluster else default_batch()
        return min(self.batch_size or before or usual, self.shard_rows or DEFAULT_SHARD_ROWS)

    def task_rows(self, batch: int, row_bytes: int) -> int:
        """Return the number of rows of a shard: whole batches, at least one. A row takes `row_bytes` in memory."""
        most = self.shard_rows or min(DEFAULT_SHARD_ROWS, SHARD_BYTES // row_bytes)
        return max(1, most // batch) * batch


def require_memory(rows: int, row_shape: tuple[int, ...], spec: FeatureSpec, processes: int = 1) -> None:
    """Check that shards of `rows` rows fit into memory, and warn if they take more than 2 GiB.

    Each process has two shards in memory: one is computed while the other is written.

    Raises
    ------
    DoNotFitError
        If they take more memory than is free on this machine.
    """
    row = row_bytes(row_shape, spec)
    needed, free = 2 * processes * rows * row, machine.available_memory()
    each = (
        f"shards of {rows:,} rows take about {size_text(needed)} of memory, {2 * processes} of {size_text(rows * row)}"
    )
    if needed > free:
        fit = max(1, free // (2 * processes * row))
        raise DoNotFitError(f"{each} at a time, and {size_text(free)} are free; at most --shard-rows {fit:,} fit")
    if needed > _WORTH_SAYING:
        logger.warning("%s at a time; a smaller --shard-rows takes less", each)


def row_bytes(row_shape: tuple[int, ...], spec: FeatureSpec) -> int:
    """Return the bytes of a row in memory: features (h, w, c) in their stored dtype, and spatial means in float32."""
    return math.prod(row_shape) * np.dtype(spec.storage).itemsize + 4 * row_shape[-1]


def default_batch() -> int:
    """Return the batch size of a new space: 32 with a GPU, 16 without.

    On a CPU larger batches are not faster, and more of the last batch is padding.
    """
    return DEFAULT_BATCH_SIZE if machine.gpu_count() else DEFAULT_BATCH_SIZE // 2


def batch_of(space: FeatureSpace | None) -> int | None:
    """Return the batch size that a space was created with, None if it is not recorded.

    It is at most 512, and at most 64 if the space was created with a GPU and this machine has none: an image of a batch
    takes some 10 MB of memory, and a CPU computes several batches at a time.
    """
    about = space.provenance if space else {}
    stored = about.get("batch_size")
    if not isinstance(stored, int) or stored <= 0:
        return None
    smaller = about.get("gpus") and not machine.gpu_count()
    return min(stored, 2 * DEFAULT_BATCH_SIZE if smaller else MAX_BATCH_SIZE)


def largest_batch_to_try() -> int:
    """Return the largest batch size to measure.

    On a CPU it is the default: no larger batch was ever faster, and only measuring it would already take more memory.
    """
    return MAX_BATCH_SIZE if machine.gpu_count() else default_batch()


@dataclass(frozen=True)
class Job:
    """What a computation needs.

    `identities` is corrected where a file changed or vanished since it was hashed. `task_rows` is the number of rows of
    a task.
    """

    dataset: Dataset
    identities: Identities
    space: FeatureSpace
    index: Index
    setup: TaskSetup
    task_rows: int
    progress: Progress
    stats: ComputeStats = field(default_factory=ComputeStats)


def compute(job: Job, rows_of: np.ndarray, views: np.ndarray, pool: WorkerPool) -> None:
    """Compute and publish rows. The caller must hold the lock of the space.

    Parameters
    ----------
    rows_of, views
        (m,) int64: for each row the index of its image in the dataset, ascending, and the number of its view.

    Raises
    ------
    CacheError
        If the rows do not fit on the disk, or cannot be written.
    DecodeError
        With `strict`, at the first image that cannot be read or decoded.
    """
    start, total = time.perf_counter(), len(rows_of)
    advanced, announced = 0.0, total < _ANNOUNCED_FROM

    def settle(task: ShardTask, result: ShardResult) -> None:
        nonlocal announced
        _note(job, task, result)
        if not announced and result.shard is not None and advanced < total:
            _announce(job, (time.perf_counter() - start) / advanced, result.shard.bytes / result.rows, total)
        announced = True

    def count(n: float, /, note: str = "") -> None:
        nonlocal advanced
        advanced += n
        advance(n, note)

    try:
        with job.progress("computing features", total) as advance:
            there = _rows_there(job.space) if job.identities.unseen else no_known_rows
            pool.run(_tasks(job, rows_of, views, _task_rows(job, total, pool)), settle, count, there)
    finally:
        job.stats.seconds += time.perf_counter() - start


def _rows_there(space: FeatureSpace) -> KnownRows:
    return KnownRows(np.sort(space.index.row_marks(space.name)))


def _task_rows(job: Job, total: int, pool: WorkerPool) -> int:
    """Return the number of rows of a task: those of a shard, or fewer if there are several processes.

    With at least `_TASKS_EACH` tasks for each process, none waits long for the last task.
    """
    if (processes := pool.size) <= 1:
        return job.task_rows
    batch = pool.batch_size
    return min(job.task_rows, max(1, total // (_TASKS_EACH * processes * batch)) * batch)


def _tasks(job: Job, rows_of: np.ndarray, views: np.ndarray, task_rows: int) -> Iterator[ShardTask]:
    """Yield the tasks one at a time, so that of millions of rows only a few are in memory."""
    for start in range(0, len(rows_of), task_rows):
        part = slice(start, start + task_rows)
        origin, at = np.unique(rows_of[part], return_inverse=True)
        # Tasks that run at once do not know of each other: each of the first checks the room for all rows.
        expected = len(rows_of) if start < AT_ONCE * task_rows else 0
        yield ShardTask(job.dataset.take(origin), origin, at, views[part], expected)


def _note(job: Job, task: ShardTask, done: ShardResult) -> None:
    """Record the result of a task in the index: its shard, corrected keys, and images that have no row."""
    if done.shard is not None:
        job.space.register(done.shard)
    job.stats.model_seconds += done.model_seconds
    for met in done.met:
        job.stats.peak = max(job.stats.peak, met.peak)
        image = replace(met, i=int(task.origin[met.i]))
        if not met.reason:
            record_key(image, job.dataset, job.identities, job.index)
            continue
        record_failure(image, job.dataset, job.identities, job.index, job.setup.max_pixels)
        if job.setup.strict:
            raise strict_error(job.dataset.names[image.i], image.reason)
    job.identities.remember_fetched(job.index)


def record_failure(
    image: ImageOutcome | Loaded, dataset: Dataset, identities: Identities, index: Index, max_pixels: int
) -> None:
    """Record an image without a row.

    An image that cannot be decoded is quarantined in the index. A failure to read it is noted in `identities` only.
    """
    record_key(image, dataset, identities, index)
    if image.key is not None:
        index.remember_quarantined({image.key: image.reason}, decoding.decoder_version(), max_pixels)


def record_key(image: ImageOutcome | Loaded, dataset: Dataset, identities: Identities, index: Index) -> None:
    """Correct the key of an image in `identities` to that of the bytes that were just read.

    If a file's bytes have changed, the index forgets its stored digest. The digest of a remote image is put into
    `identities.fetched`, from where it is stored later.
    """
    planned, path, url = identities.keys[image.i], dataset.path(image.i), dataset.url(image.i)
    if image.key is not None and image.key != planned and path is not None:
        index.forget_digests([path.absolute()])
    if image.key is not None and url is not None:
        identities.fetched[url] = image.validator, image.key
    for i in (image.i, *identities.twins.pop(image.i, ())):
        identities.keys[i] = image.key
        identities.unseen.discard(i)
        if image.key is None:
            identities.unread[i] = image.reason


def strict_error(name: str, reason: str, more: int = 0) -> DecodeError:
    """Return the error of `--on-error fail` for an image; `more` others failed too."""
    others = f" (and {more:,} more)" if more else ""
    return DecodeError(f"{name}: {reason}{others}; mend or remove it, or leave out --on-error fail")


def _announce(job: Job, row_seconds: float, row_bytes: float, count: int) -> None:
    """Log how long the computation of `count` rows will take, and their size on disk."""
    logger.info(
        "%s to compute: about %s, %s on disk (%s free)",
        counted(count, "image"),
        duration(row_seconds * count),
        size_text(row_bytes * count),
        size_text(files.free_bytes(job.space.path)),
    )
