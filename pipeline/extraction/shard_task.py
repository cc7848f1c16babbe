"""Run one shard task: read and decode images, compute their features, and publish them as one shard.

`ShardWorker` does this in any process, here or in a Dask worker. Its threads decode ahead of the model, and a shard is
written while the next task uses the model.
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

There = Callable[[bytes, int], bool]  # whether the row of this key and view exists and need not be computed

AT_ONCE = 2  # tasks of a process: one uses the model, the other decodes ahead or writes


def no_known_rows(key: bytes, view: int) -> bool:
    """Return False: every row must be computed."""
    return False


class KnownRows:
    """The rows that a space has, or gets from this computation; thread-safe.

    Ask only when image hashes are unknown in advance (remote images): two of them may turn out to be the same image.
    """

    def __init__(self, before: np.ndarray) -> None:
        """Start with the `row_mark` of each existing row, `before` (n,) uint64, sorted."""
        self._before = before
        self._since = set[int]()
        self._lock = threading.Lock()

    def __call__(self, key: bytes, view: int) -> bool:
        """Return whether the row exists or was asked for before; from now on it counts as asked for."""
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
    """What all tasks of a computation share; picklable. A process keeps the model of one setup loaded between tasks.

    `weights` is the weights file, None for untrained weights, which are drawn at random. Of `views` only the recipe of
    augmented views matters: each task lists its own view numbers.
    """

    spec: FeatureSpec
    weights: Path | None
    batch_size: int
    directory: Path  # of the shards
    max_pixels: int = decoding.DEFAULT_MAX_PIXELS
    views: Views = PLAIN_VIEW
    strict: bool = False  # stop at the first image that cannot be decoded
    connections: int = remote.DEFAULT_CONNECTIONS  # parallel requests of one process
    network: Path | None = None  # the file with the architecture of an own network
    batch_bytes: int | None = None  # limit of a batch's features; large rows make batches smaller

    def batch_of(self, row_shape: tuple[int, ...]) -> int:
        """Return the number of images in a batch of the model, whose rows have the shape (h, w, c)."""
        if self.batch_bytes is None:
            return self.batch_size
        return min(self.batch_size, images_within(self.batch_bytes, row_shape, self.spec))


@dataclass(frozen=True, eq=False)
class ShardTask:
    """Rows to compute and publish as one shard; picklable.

    Parameters
    ----------
    dataset
        The k images of these rows, and no others.
    origin
        (k,) int64, ascending: the index of each image in the dataset of the whole computation.
    images, views
        (m,) int64: for each row its image, 0 ≤ image < k, ascending, and the number of its view.
    expected
        Number of rows of the whole computation, in its first tasks; 0 in the others.
    losses
        How many workers were lost while they had this task.
    """

    dataset: Dataset
    origin: np.ndarray
    images: np.ndarray
    views: np.ndarray
    expected: int = 0
    losses: int = field(default=0)

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: slice | np.ndarray) -> ShardTask:
        """Return a task of the given `rows` only."""
        some, images = np.unique(self.images[rows], return_inverse=True)
        part = self.dataset.take(some), self.origin[some], images, self.views[rows]
        return ShardTask(*part, losses=self.losses)


@dataclass(frozen=True)
class ImageOutcome:
    """The outcome of image `i` of a task.

    `key` is None if the image could not be read. `reason` says why it has no row, "" if it has one.
    """

    i: int
    key: bytes | None
    reason: str
    validator: str | None = None  # the HTTP validator that the server sent for a remote image
    peak: int = 0  # the largest pixel value of a file with 16 bits a channel


@dataclass(frozen=True)
class ShardResult:
    """The result of a task.

    `shard` is None if no row was computed. `met` has the outcome of each image that was handled: all of them, unless
    the task was stopped. The model worked for `model_seconds` seconds.
    """

    shard: ShardInfo | None
    met: list[ImageOutcome]
    model_seconds: float

    @property
    def rows(self) -> int:
        """The number of rows published."""
        return len(self.shard.keys) if self.shard else 0


class _Busy:
    """A context manager that adds up the seconds in which at least one thread is inside."""

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
    """Runs tasks of one setup, in up to `AT_ONCE` threads at a time.

    Leaving the context ends its threads and the decoding processes.
    """

    def __init__(self, setup: TaskSetup, threads: int | None = None) -> None:
        """Load the model. Raises WeightsError and SpecError.

        The model and the decoding use `threads` cores, and TensorFlow's threads are limited to these for the whole
        process. None: use all cores, and leave TensorFlow's threads as they are.
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
        """The number of images in a batch of the model."""
        return self._model.batch_size

    def choose_batch(self, rows: int, most: int) -> None:
        """Change to a faster batch size of at most `most`, if the search for one pays off for `rows` rows."""
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
        """Compute the rows of `task` that do not exist yet, and publish them as one shard.

        `advance(n)` is called after every n rows. Once `stopped()` is true, the rows computed so far are published.
        A row for which `there(key, view)` is true is not computed.

        Raises
        ------
        CacheError
            If the shard cannot be written, or the expected rows do not fit on the disk.
        """
        met, made, busy = list[ImageOutcome](), RowBuffer(len(task), self.setup.views.recipes), _Busy()
        with closing(self._decoded(task, met, advance, stopped, there)) as decoded:
            batches = batched(decoded, self._model.batch_size)
            first = [batch for batch in [next(batches, None)] if batch]  # decoded while another task uses the model
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
        """Yield each decodable image in the views that have no row; add the outcome of every image to `met`."""
        setup = self.setup
        load = Loader(task.dataset, setup.spec.input_size, setup.spec.fit, setup.max_pixels, self._decoders)
        first = np.flatnonzero(np.diff(task.images, prepend=-1))
        wanted = dict(zip(task.images[first].tolist(), np.split(task.views, first[1:]), strict=True))
        # Decode so many images ahead that their rows fill two batches.
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
        """Return an image in each of `views`, without pixels in all of them if it could not be decoded."""
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
        """Yield batches while this task holds the model: another task gets it after the last batch was taken."""
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
    """Check that `count` rows of `row_bytes` bytes each fit on the disk of `directory`.

    Raises
    ------
    CacheError
        If they need more bytes than are free.
    """
    free = files.free_bytes(directory)
    if row_bytes * count > free:
        raise CacheError(
            f"{count:,} rows need about {size_text(row_bytes * count)} in {directory}, {size_text(free)} are free; "
            "make room, or put the data elsewhere by --data-dir"
        )
