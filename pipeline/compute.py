"""Images → published shards, as a line of three: threads decode ahead, the model works, a thread writes behind.

The queues between them are bounded, so memory does not grow with the dataset.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline import augment, images
from pipeline.backbone import FrozenBackbone
from pipeline.cache import storage
from pipeline.cache.digests import Identities
from pipeline.cache.index import Index
from pipeline.cache.shard import Rows, ShardInfo, file_size
from pipeline.cache.space import FeatureSpace
from pipeline.dataset import Dataset
from pipeline.decoder import Loaded, Loader, batched, decoding_pool
from pipeline.errors import CacheError, DecodeError
from pipeline.progress import Progress
from pipeline.spec import PLAIN_VIEW, Augmentation, Views

logger = logging.getLogger(__name__)

DEFAULT_SHARD_ROWS = 256
DEFAULT_BATCH_SIZE = 32
MAX_BATCH_SIZE = 512
_REMEMBERED_AT_ONCE = 256  # digests of what was fetched
_ANNOUNCED_FROM = 100  # images; fewer are done before one has read an estimate


@dataclass(frozen=True)
class ComputeOptions:
    """What changes how features are computed, but not their values."""

    shard_rows: int = DEFAULT_SHARD_ROWS
    batch_size: int = DEFAULT_BATCH_SIZE
    max_pixels: int = images.DEFAULT_MAX_PIXELS
    strict: bool = False  # end at the first image that cannot be decoded


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
    views: Views = PLAIN_VIEW  # whose recipe augmented views are made by


def compute(job: Job, todo: Mapping[int, Sequence[int]]) -> tuple[int, float]:
    """Compute and publish rows, `todo` being image → numbers of its views; the caller holds the space's lock.

    Returns how many were computed, and the seconds from the first batch asked of the model to the last shard
    published. An image that nobody had read is not computed if it turns out to have its rows. On Ctrl-C the
    rows computed so far are published before the interrupt goes on.

    Raises
    ------
    CacheError
        If the rows do not fit on the disk, or cannot be written.
    DecodeError
        With `options.strict`, at the first image that cannot be read or decoded.
    """
    batch_size = job.backbone.batch_size
    spec, rows_todo = job.space.spec, sum(map(len, todo.values()))
    ahead = max(2, 2 * batch_size * len(todo) // rows_todo)  # images whose views are made while two batches wait
    with (
        Loader(job.dataset, spec.input_size, spec.fit, job.options.max_pixels) as load,
        decoding_pool() as pool,
        job.progress("computing features", rows_todo) as advance,
    ):
        start, size, count = time.perf_counter(), 0.0, 0
        views = load.stream(pool, todo, lambda image: _views(image, todo[image.i], job.views.recipe), ahead)
        # Closed also on Ctrl-C: what was computed is kept.
        with (
            closing(_Publisher(job.space, job.options.shard_rows, job.views.recipes)) as publisher,
            closing(_sort_out(views, job, advance)) as good,
        ):
            for number, batch in enumerate(batched(good, batch_size)):
                asked = time.perf_counter()
                rows = _run_model(job.backbone, batch)
                if number == 0:
                    size = file_size(make_rows(*rows, job.views.recipes), spec) / len(batch)
                    check_room(job.space, rows_todo, size)
                elif number == 1 and rows_todo >= _ANNOUNCED_FROM:  # the first batch compiles the graph
                    _announce((time.perf_counter() - asked) / len(batch), size, rows_todo, job.space)
                publisher.add(*rows)
                advance(len(batch))
                count += len(batch)
        return count, time.perf_counter() - start


def _views(plain: Loaded, views: Sequence[int], recipe: Augmentation) -> list[Loaded]:
    """Return a plain image in each of `views`, in all alike if it could not be decoded."""
    if plain.pixels is None or plain.key is None:
        return [replace(plain, view=view) for view in views]
    return [
        replace(plain, view=view, pixels=augment.warp(plain.pixels, recipe, augment.draws(plain.key, view)))
        if view
        else plain
        for view in views
    ]


def _sort_out(
    loaded: Iterable[list[Loaded]], job: Job, advance: Callable[[int], None]
) -> Generator[Loaded, None, None]:
    """Pass on what was decoded; note what was not, and who turned out to be somebody else."""
    # Rows on their way to a shard, which the space does not know of yet; and more, as that costs little.
    under_way: deque[tuple[bytes | None, int]] = deque(maxlen=8 * job.options.shard_rows)
    doubtful = bool(job.identities.unseen)  # what nobody has read may be a copy of another image, or have its rows
    try:
        for views in loaded:
            image = views[0]
            if image.pixels is None:
                note_bad(image, job.dataset, job.identities, job.index, job.options.max_pixels)
                if job.options.strict:
                    raise refusal(job.dataset.names[image.i], image.reason)
                advance(len(views))
                continue
            note_key(image, job.dataset, job.identities, job.index)
            if doubtful:
                wanted = [each for each in views if (each.key, each.view) not in under_way and not _is_there(each, job)]
            else:
                wanted = views
            under_way.extend((each.key, each.view) for each in wanted)
            yield from wanted
            advance(len(views) - len(wanted))
            if len(job.identities.fetched) >= _REMEMBERED_AT_ONCE:
                job.identities.remember_fetched(job.index)
    finally:
        job.identities.remember_fetched(job.index)


def _is_there(image: Loaded, job: Job) -> bool:
    return image.key is not None and bool(job.space.locate([image.key], [image.view]).found[0])


def note_bad(image: Loaded, dataset: Dataset, identities: Identities, index: Index, max_pixels: int) -> None:
    """Remember that an image could not be decoded, or note that it could not be read, which is not remembered."""
    note_key(image, dataset, identities, index)
    if image.key is not None:
        index.remember_quarantined({image.key: image.reason}, images.decoder_version(), max_pixels)


def note_key(image: Loaded, dataset: Dataset, identities: Identities, index: Index) -> None:
    """Correct who an image is. The digest that was remembered is not to be trusted if its bytes are others now; that
    of an address waits in `identities.fetched` to be remembered.
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


def refusal(name: str, reason: str, more: int = 0) -> DecodeError:
    """Return the error for people who want no image to be set aside."""
    others = f" (and {more:,} more)" if more else ""
    return DecodeError(f"{name}: {reason}{others}; mend or remove it, or leave out --on-error fail")


def _run_model(backbone: FrozenBackbone, batch: list[Loaded]) -> tuple[np.ndarray, np.ndarray, list[bytes], list[int]]:
    features, pooled = backbone(np.stack([image.pixels for image in batch if image.pixels is not None]))
    return features, pooled, [image.key for image in batch if image.key is not None], [image.view for image in batch]


class _Publisher:
    """Collects batches into shards; a thread writes them, this one tells the index."""

    _MOST_WAITING = 2  # shards in memory behind the one being filled

    def __init__(self, space: FeatureSpace, shard_rows: int, recipes: Mapping[int, Any]) -> None:
        self._space = space
        self._shard_rows = shard_rows
        self._recipes = recipes
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[ShardInfo]] = deque()
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._keys: list[bytes] = []
        self._views: list[int] = []

    def add(self, features: np.ndarray, pooled: np.ndarray, keys: list[bytes], views: list[int]) -> None:
        """Add a batch of rows, no larger than a shard."""
        if len(self._keys) + len(keys) > self._shard_rows:
            self._flush()
        self._batches.append((features, pooled))
        self._keys.extend(keys)
        self._views.extend(views)

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
        rows = make_rows(features, pooled, self._keys, self._views, self._recipes)
        self._batches, self._keys, self._views = [], [], []
        self._waiting.append(self._pool.submit(self._space.write, rows))

    def _settle(self) -> None:
        self._space.register(self._waiting.popleft().result())


def make_rows(
    features: np.ndarray, pooled: np.ndarray, keys: Sequence[bytes], views: Sequence[int], recipes: Mapping[int, Any]
) -> Rows:
    """Return rows as the cache takes them; `recipes` says what each of `views` is."""
    stacked = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    return Rows(features, pooled, stacked, np.array(views, np.int64), recipes)


def check_room(space: FeatureSpace, count: int, row_bytes: float | None = None) -> None:
    """Refuse what cannot fit: `count` rows, of `row_bytes` each or as large as those the space has.

    Raises
    ------
    CacheError
        If they need more than is free.
    """
    if row_bytes is None:
        totals = space.totals()
        row_bytes = totals.bytes / totals.rows if totals.rows else 0
    free = storage.free_bytes(space.path)
    if row_bytes * count > free:
        raise CacheError(
            f"{count:,} rows need about {_size(row_bytes * count)} in {space.path.parent}, {_size(free)} are free; "
            "make room, or put the data elsewhere by --data-dir"
        )


def _announce(row_seconds: float, row_bytes: float, count: int, space: FeatureSpace) -> None:
    """Say how long all will take and how large they get."""
    logger.info(
        "%s images to compute: about %s, %s on disk (%s free)",
        f"{count:,}",
        duration(row_seconds * count),
        _size(row_bytes * count),
        _size(storage.free_bytes(space.path)),
    )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Return how long that is, as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
