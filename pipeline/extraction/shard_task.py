"""One shard, from images to a published file, in whatever process.

Threads decode ahead, the model works, and a file is written while the next task has the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.backbone.frozen import FrozenBackbone, images_within, streams
from pipeline.cache.index import row_mark
from pipeline.cache.shard import RowBuffer, Rows, ShardInfo, write_shard
from pipeline.core import files
from pipeline.core.errors import CacheError
from pipeline.core.spec import PLAIN_VIEW, FeatureSpec, Views
from pipeline.core.units import size_text
from pipeline.dataset import Dataset, remote
from pipeline.images import augment, decoding
from pipeline.images.loader import Decoders, Loaded, Loader, batched, decoding_pool, in_threads

There = Callable[[bytes, int], bool]  # whether the row of this key and view need not be computed

AT_ONCE = 2  # tasks a process has in hand: one has the model, the other decodes ahead or writes


def no_known_rows(key: bytes, view: int) -> bool:
    """Return that a row is yet to be computed."""
    return False


class KnownRows:
    """Which rows a space has, or gets from this computation; may be asked from any thread.

    Only who does not know beforehand which images these are has to ask: what was unseen may be a copy of any other.
    """

    def __init__(self, before: np.ndarray) -> None:
        """Begin with the `row_mark` of each row that is there, sorted: (n,) uint64."""
        self._before = before
        self._since = set[int]()
        self._lock = threading.Lock()

    def __call__(self, key: bytes, view: int) -> bool:
        """Return whether the row was asked for or there before."""
        mark = row_mark(key, view)
        at = int(np.searchsorted(self._before, np.uint64(mark)))
        if at < len(self._before) and int(self._before[at]) == mark:
            return True
        with self._lock:
            known = mark in self._since
            self._since.add(mark)
        return known


@dataclass(frozen=True)
class TaskSetup:
    """What all tasks of a computation share, and a process keeps ready between them; picklable.

    `weights` is None where they are drawn. Of `views` the recipe counts, which augmented views are made by.
    """

    spec: FeatureSpec
    weights: Path | None
    batch_size: int
    directory: Path  # of the shards
    max_pixels: int = decoding.DEFAULT_MAX_PIXELS
    views: Views = PLAIN_VIEW
    strict: bool = False  # stop at the first image that cannot be decoded
    connections: int = remote.DEFAULT_CONNECTIONS  # requests of one process at once
    network: Path | None = None  # where the architecture of an own network stands
    batch_bytes: int | None = None  # that the features of a batch may take: of large rows fewer images are in one

    def batch_of(self, row_shape: tuple[int, ...]) -> int:
        """Return how many images the model is given at once, of which a row is (h, w, c)."""
        if self.batch_bytes is None:
            return self.batch_size
        return min(self.batch_size, images_within(self.batch_bytes, row_shape, self.spec))


@dataclass(frozen=True, eq=False)
class ShardTask:
    """Rows to be published as one shard; picklable.

    Parameters
    ----------
    dataset
        The k images they are of, and no others.
    origin
        (k,) int64, what each is in the dataset that it was taken from, ascending.
    images, views
        (m,) int64, for each row its image, 0 ≤ image < k, ascending, and the number of its view.
    expected
        How many rows the whole computation has, in its first tasks; 0 in others.
    """

    dataset: Dataset
    origin: np.ndarray
    images: np.ndarray
    views: np.ndarray
    expected: int = 0
    losses: int = field(default=0)  # how often whoever had it in hand was lost

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: slice | np.ndarray) -> ShardTask:
        """Return the task of some of the rows."""
        some, images = np.unique(self.images[rows], return_inverse=True)
        part = self.dataset.take(some), self.origin[some], images, self.views[rows]
        return ShardTask(*part, losses=self.losses)


@dataclass(frozen=True)
class ImageOutcome:
    """How image `i` of a task was found: its key, None if it could not be read; why it has no row, "" if it has."""

    i: int
    key: bytes | None
    reason: str
    validator: str | None = None  # what the server said of an image behind an address
    peak: int = 0  # the largest value of a file with 16 bits a channel


@dataclass(frozen=True)
class ShardResult:
    """What came of a task.

    `shard` is None if no image could be decoded; `met` are the images met, all unless it was stopped; the model worked
    for `model_seconds`.
    """

    shard: ShardInfo | None
    met: list[ImageOutcome]
    model_seconds: float

    @property
    def rows(self) -> int:
        """How many rows were published."""
        return len(self.shard.keys) if self.shard else 0


class _Busy:
    """Adds up the seconds in which at least one thread is inside of its context."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside, self._since = 0, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._since


class ShardWorker:
    """Runs tasks of one setup, `AT_ONCE` of them in threads at a time. Leaving the context ends decoding processes."""

    def __init__(self, setup: TaskSetup, threads: int | None = None) -> None:
        """Load the model. Raises WeightsError and SpecError.

        It and the decoding get `threads` cores, which TensorFlow has to itself then; None: all there are, with
        TensorFlow's threads as they are.
        """
        self.setup = setup
        remote.limit_connections(setup.connections)
        self._model = FrozenBackbone(setup.spec, setup.weights, setup.batch_size, threads, setup.network)
        if setup.batch_bytes is not None:
            self._model.bound_batch(setup.batch_bytes)
        depth = decoding.depth_of(setup.spec.decode)
        self._decoders = Decoders(setup.spec.input_size, setup.spec.fit, setup.max_pixels, depth)
        self._pool = decoding_pool(threads)
        self._streams = streams(threads)
        self._models = ThreadPoolExecutor(self._streams, "model")
        self._turn = threading.Lock()

    def __enter__(self) -> ShardWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self._models.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
        self._decoders.__exit__(*error)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one image's features, (h, w, c)."""
        return self._model.row_shape

    @property
    def batch_size(self) -> int:
        """How many images the model is given at once."""
        return self._model.batch_size

    def choose_batch(self, rows: int, most: int) -> None:
        """Change to a faster batch size of at most `most`, if for `rows` rows it pays to look for one."""
        if self.setup.batch_bytes is not None:
            most = min(most, images_within(self.setup.batch_bytes, self.row_shape, self.setup.spec))
        self._model.choose_batch(rows, most)

    def run(
        self,
        task: ShardTask,
        advance: Callable[[float], None],
        stopped: Callable[[], bool],
        there: There = no_known_rows,
    ) -> ShardResult:
        """Compute the rows of `task` that are not `there`, and publish them; once `stopped()` those computed so far.

        Raises
        ------
        CacheError
            If the shard cannot be written, or what is expected does not fit on the disk.
        """
        met, made, busy = list[ImageOutcome](), RowBuffer(len(task), self.setup.views.recipes), _Busy()
        with closing(self._decoded(task, met, advance, stopped, there)) as decoded:
            batches = batched(decoded, self._model.batch_size)
            first = [batch for batch in [next(batches, None)] if batch]  # decoded before it is our turn
            with (
                closing(self._in_turn(chain(first, batches))) as ours,
                closing(in_threads(self._models, partial(self._compute, busy), ours, self._streams)) as computed,
            ):
                for rows in computed:
                    made.add(rows)
                    advance(len(rows))
        shard = self._publish(made.rows(), task.expected) if len(made) else None
        return ShardResult(shard, met, busy.seconds)

    def _decoded(
        self,
        task: ShardTask,
        met: list[ImageOutcome],
        advance: Callable[[float], None],
        stopped: Callable[[], bool],
        there: There,
    ) -> Generator[Loaded]:
        """Yield every image in its views; note how each was met."""
        setup = self.setup
        load = Loader(task.dataset, setup.spec.input_size, setup.spec.fit, setup.max_pixels, self._decoders)
        first = np.flatnonzero(np.diff(task.images, prepend=-1))
        wanted = dict(zip(task.images[first].tolist(), np.split(task.views, first[1:]), strict=True))
        # As many images ahead as make two batches.
        ahead = max(2, 2 * self._model.batch_size * len(wanted) // len(task))
        loaded = load.stream(self._pool, wanted, lambda image: self._views(image, wanted[image.i].tolist()), ahead)
        with closing(loaded):
            for views in loaded:
                if stopped():
                    return
                image = views[0]
                met.append(ImageOutcome(image.i, image.key, image.reason, image.validator, image.peak))
                if image.pixels is not None:
                    lacking = [each for each in views if each.key and not there(each.key, each.view)]
                    yield from lacking
                    if len(lacking) < len(views):
                        advance(len(views) - len(lacking))
                elif setup.strict:
                    return
                else:
                    advance(len(views))

    def _views(self, plain: Loaded, views: Sequence[int]) -> list[Loaded]:
        """Return a plain image in each of `views`, in all alike if it could not be decoded."""
        recipe = self.setup.views.recipe
        if plain.pixels is None or plain.key is None:
            return [replace(plain, view=view) for view in views]
        return [
            replace(plain, view=view, pixels=augment.warp(plain.pixels, recipe, augment.draws(plain.key, view)))
            if view
            else plain
            for view in views
        ]

    def _in_turn(self, batches: Iterator[list[Loaded]]) -> Generator[list[Loaded]]:
        """Yield batches, no other task having the model until the last one was taken."""
        with self._turn:
            yield from batches

    def _compute(self, busy: _Busy, batch: list[Loaded]) -> Rows:
        with busy:
            features, pooled = self._model(np.stack([image.pixels for image in batch if image.pixels is not None]))
        keys = np.frombuffer(b"".join(image.key for image in batch if image.key is not None), np.uint8)
        views = np.array([image.view for image in batch], np.int64)
        return Rows(features, pooled, keys.reshape(-1, 32), views, self.setup.views.recipes)

    def _publish(self, rows: Rows, expected: int) -> ShardInfo:
        def check(size: int) -> None:
            check_room(self.setup.directory, expected, size / len(rows))

        return write_shard(self.setup.directory, rows, self.setup.spec, check)


def check_room(directory: Path, count: int, row_bytes: float) -> None:
    """Refuse what cannot fit: `count` rows of `row_bytes` each.

    Raises
    ------
    CacheError
        If they need more than is free.
    """
    free = files.free_bytes(directory)
    if row_bytes * count > free:
        raise CacheError(
            f"{count:,} rows need about {size_text(row_bytes * count)} in {directory}, {size_text(free)} are free; "
            "make room, or put the data elsewhere by --data-dir"
        )
