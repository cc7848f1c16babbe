"""Images → published shards, as a line of three: threads decode ahead, the model works, a thread writes behind.

The queues between them are bounded, so memory does not grow with the dataset.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from pipeline import images, machine
from pipeline.backbone import FrozenBackbone
from pipeline.cache import storage
from pipeline.cache.digests import Identities, digest, unreadable
from pipeline.cache.index import Index
from pipeline.cache.shard import Rows, ShardInfo, file_size
from pipeline.cache.space import FeatureSpace
from pipeline.dataset import Dataset
from pipeline.errors import CacheError, DecodeError
from pipeline.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

DEFAULT_SHARD_ROWS = 256
DEFAULT_BATCH_SIZE = 32
_ANNOUNCED_FROM = 100  # images; fewer are done before one has read an estimate


@dataclass(frozen=True)
class ComputeOptions:
    """What changes how features are computed, but not their values."""

    shard_rows: int = DEFAULT_SHARD_ROWS
    batch_size: int = DEFAULT_BATCH_SIZE
    max_pixels: int = images.DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class Job:
    """All a computation needs. `identities` is corrected where a file changed or vanished since it was hashed."""

    dataset: Dataset
    identities: Identities
    space: FeatureSpace
    backbone: FrozenBackbone
    index: Index
    options: ComputeOptions
    progress: Progress


def compute(job: Job, todo: Sequence[int]) -> float:
    """Compute and publish the rows of the images `todo`; the caller holds the space's lock.

    Returns the seconds from the first batch asked of the model to the last shard published. On Ctrl-C the
    rows computed so far are published before the interrupt goes on.
    """
    batch_size = job.backbone.batch_size
    load = _Loader(job.dataset, job.space.spec.input_size, job.space.spec.fit, job.options.max_pixels)
    with (
        ThreadPoolExecutor(machine.usable_cores()) as pool,
        job.progress("computing features", len(todo)) as advance,
    ):
        start = time.perf_counter()
        good = _sort_out(_ordered(pool, load, todo, ahead=2 * batch_size), job, advance)
        # Closed also on Ctrl-C: what was computed is kept.
        with closing(_Publisher(job.space, job.options.shard_rows)) as publisher:
            for number, batch in enumerate(_batches(good, batch_size)):
                asked = time.perf_counter()
                rows = _run_model(job.backbone, batch)
                if number == 1 and len(todo) >= _ANNOUNCED_FROM:  # the first batch compiles the graph
                    _announce(rows, time.perf_counter() - asked, len(todo), job)
                publisher.add(*rows)
                advance(len(batch))
        return time.perf_counter() - start


@dataclass(frozen=True)
class _Loaded:
    """One image, read and decoded, or the reason why not; `key` is None if it could not even be read."""

    i: int
    key: bytes | None
    pixels: np.ndarray | None
    reason: str = ""


@dataclass(frozen=True)
class _Loader:
    """Reads, hashes and decodes one image; the hash is taken of the very bytes that are decoded."""

    dataset: Dataset
    size: int
    fit: str
    max_pixels: int

    def __call__(self, i: int) -> _Loaded:
        try:
            data = self.dataset.read(i)
        except OSError as error:
            return _Loaded(i, None, None, unreadable(error))
        key = digest(data)
        try:
            pixels = images.decode(data, size=self.size, fit=cast(images.Fit, self.fit), max_pixels=self.max_pixels)
        except DecodeError as error:
            return _Loaded(i, key, None, str(error))
        except MemoryError as error:
            # The machine's fault, not the image's: without a key it is not remembered.
            return _Loaded(i, None, None, f"cannot be read: {error or 'out of memory'}")
        return _Loaded(i, key, pixels)


def _ordered(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Map in threads, in order, at most `ahead` results waiting: `Executor.map` would run through all."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _sort_out(loaded: Iterable[_Loaded], job: Job, advance: Callable[[int], None]) -> Iterator[_Loaded]:
    """Pass on what was decoded; note what was not, and who turned out to be somebody else."""
    for image in loaded:
        job.identities.keys[image.i] = image.key
        if image.pixels is not None:
            yield image
            continue
        if image.key is None:
            job.identities.unread[image.i] = image.reason
        else:
            reasons = {image.key: image.reason}
            job.index.remember_quarantined(reasons, images.decoder_version(), job.options.max_pixels)
        advance(1)


def _batches(loaded: Iterable[_Loaded], size: int) -> Iterator[list[_Loaded]]:
    batch: list[_Loaded] = []
    for image in loaded:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _run_model(backbone: FrozenBackbone, batch: list[_Loaded]) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    features, pooled = backbone(np.stack([image.pixels for image in batch if image.pixels is not None]))
    return features, pooled, [image.key for image in batch if image.key is not None]


class _Publisher:
    """Collects batches into shards; a thread writes them, this one tells the index."""

    _MOST_WAITING = 2  # shards in memory behind the one being filled

    def __init__(self, space: FeatureSpace, shard_rows: int) -> None:
        self._space = space
        self._shard_rows = shard_rows
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[ShardInfo]] = deque()
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._keys: list[bytes] = []

    def add(self, features: np.ndarray, pooled: np.ndarray, keys: list[bytes]) -> None:
        """Add a batch of rows, no larger than a shard."""
        if len(self._keys) + len(keys) > self._shard_rows:
            self._flush()
        self._batches.append((features, pooled))
        self._keys.extend(keys)

    def close(self) -> None:
        """Publish what is left and wait until all is on disk and known."""
        try:
            self._flush()
            while self._waiting:
                self._settle()
        finally:
            self._pool.shutdown()

    def _flush(self) -> None:
        if not self._keys:
            return
        while len(self._waiting) >= self._MOST_WAITING:
            self._settle()
        features, pooled = (np.concatenate(part) for part in zip(*self._batches, strict=True))
        rows = make_rows(features, pooled, self._keys)
        self._batches, self._keys = [], []
        self._waiting.append(self._pool.submit(self._space.write, rows))

    def _settle(self) -> None:
        self._space.register(self._waiting.popleft().result())


def make_rows(features: np.ndarray, pooled: np.ndarray, keys: Sequence[bytes]) -> Rows:
    """Return rows of the plain view."""
    stacked = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    return Rows(features, pooled, stacked, np.zeros(len(keys), np.int64))


def _announce(batch: tuple[np.ndarray, np.ndarray, list[bytes]], took: float, images: int, job: Job) -> None:
    """Say how long all `images` will take and how large they get, by one batch; refuse if they cannot fit."""
    rows, path = make_rows(*batch), job.space.path
    seconds = took / len(rows) * images
    size = file_size(rows, job.space.spec) / len(rows) * images
    free = storage.free_bytes(path)
    if size > free:
        raise CacheError(
            f"{images:,} rows need about {_size(size)} in {path.parent}, {_size(free)} are free; "
            "make room, or put the data elsewhere by --data-dir"
        )
    logger.info(
        "%s images to compute: about %s, %s on disk (%s free)",
        f"{images:,}",
        _duration(seconds),
        _size(size),
        _size(free),
    )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
