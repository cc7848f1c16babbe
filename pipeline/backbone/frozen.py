"""The function from pixels to features, compiled once: the frozen network up to its layer."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone import fold_batch_norm
from pipeline.backbone.build import build, check_weights, load_weights
from pipeline.backbone.graph import allow_any_names, cut, layers_after
from pipeline.backbone.keras_start import KerasModel, import_keras, limit_threads
from pipeline.backbone.scaling import scale
from pipeline.cache.shard import MAX_ROW_BYTES
from pipeline.core import machine
from pipeline.core.errors import IceboxError, SpecError
from pipeline.core.spec import OWN, FeatureSpec

logger = logging.getLogger(__name__)


# Which graph computes the features: Keras' own, as in spaces of the first version, or one with batch norm folded into
# the convolutions. They round differently, so that each has its spaces.
ENGINES = ("keras", "folded")
ENGINE = "folded"  # of new spaces
_MOST_STREAMS = 4

# A batch size is looked for where computing takes long: each one that is tried takes some seconds.
_WORTH_ROWS = 2_000
_WORTH_SECONDS = 300.0
_MOST_MIXED = 1e-3  # of a row's largest number: what rounding may make of it beside another image
_MEASURED_SECONDS = 1.5
_LEAST_BATCH = 8
_FASTER = 1.03  # a difference that is not chance


def streams(cores: int | None = None) -> int:
    """Return how many batches a model computes at a time on so many cores, by default on all there are.

    On a CPU each has a few cores, at best one, to itself: two that share the work of a layer wait for each other at
    its end, and for whatever else one of them has to do. Each stream takes some 200 MB. On a GPU, untried, the
    features of one batch travel back while the other is computed.
    """
    if machine.gpu_count():
        return 2
    cores = cores or machine.usable_cores()
    # As many as leave the fewest cores over, each having as many as the others.
    return max(range(min(2, cores), min(cores, _MOST_STREAMS) + 1), key=lambda n: (cores // n * n, n))


class FrozenBackbone:
    """The function from images to features, compiled once for one batch shape.

    One shape only, short batches padded: a row then depends on its image alone, not on its neighbours.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        weights: Path | None,
        batch_size: int,
        threads: int | None = None,
        network: Path | None = None,
    ) -> None:
        """Build and load it. Raises WeightsError and SpecError.

        TensorFlow is told to use `threads` cores for this alone; None leaves its threads as they are.
        """
        if spec.engine not in ENGINES:
            raise SpecError(f"these features were made by another version of Icebox, its engine {spec.engine!r:.40}")
        check_weights(spec.backbone, weights)  # before TensorFlow, which takes its time
        import_keras()
        self._streams = streams(threads)
        if threads is not None:
            limit_threads(max(1, threads // self._streams), self._streams)
        import tensorflow as tf

        if spec.precision == "float16" and not tf.config.list_physical_devices("GPU"):
            logger.warning("float16 is asked for, but TensorFlow sees no GPU: this will be slow")
        whole = build(spec.backbone, spec.precision, spec.input_size, network)
        load_weights(whole, spec.weights, weights)
        allow_any_names(whole)
        self._model = cut(whole, spec.layer)
        self.spec = spec
        self.row_shape: tuple[int, ...] = tuple(self._model.output_shape[1:])  # of one image's features, (h, w, c)
        _require_room(spec.layer, self.row_shape)
        if spec.backbone.startswith(OWN):
            _require_rows_of_their_own(self._model, spec)
        self._take(batch_size)

    def _take(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._run = _compiled(self._model, self.spec, batch_size)

    def bound_batch(self, most_bytes: int) -> None:
        """Change to a smaller batch size if the features of a batch take more than `most_bytes` as they are stored."""
        if (most := images_within(most_bytes, self.row_shape, self.spec)) < self.batch_size:
            self._take(most)

    def choose_batch(self, rows: int, most: int) -> None:
        """Change to the batch size that computes fastest here, if `rows` rows take so long that measuring pays.

        At least 8 images, at most `most`.
        """
        if rows < _WORTH_ROWS or (rate := self.rate()) * _WORTH_SECONDS > rows:
            return
        fastest = best_batch(self.batch_size, most, rate, self._rate_of)
        if fastest != self.batch_size:
            self._take(fastest)

    def _rate_of(self, batch_size: int) -> float:
        """Return the images/s at another batch size; 0 if the memory is too small for it."""
        import tensorflow as tf

        self._take(batch_size)
        try:
            return self.rate()
        except tf.errors.ResourceExhaustedError:
            return 0.0

    def rate(self) -> float:
        """Return images/s, all streams together: the median of what is measured now in a few seconds."""
        images = np.zeros((self.batch_size, self.spec.input_size, self.spec.input_size, 3), np.uint8)
        self(images)  # the first call optimises the graph
        count = self._streams
        with ThreadPoolExecutor(count) as pool:
            begun, seconds = time.perf_counter(), list[float]()
            while sum(seconds) < _MEASURED_SECONDS:
                list(pool.map(self, [images] * count))
                seconds.append(time.perf_counter() - begun - sum(seconds))
        return count * self.batch_size / statistics.median(seconds)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the features (n, h, w, c) in the storage type and their float32 spatial means (n, c).

        `images` is (n, size, size, 3) uint8 RGB, 1 ≤ n ≤ batch_size.

        Raises
        ------
        IceboxError
            If a feature is not finite, or not within the storage type.
        """
        n = len(images)
        if n < self.batch_size:
            padding = [(0, self.batch_size - n), (0, 0), (0, 0), (0, 0)]
            images = np.pad(images, padding)
        features, pooled, finite = (np.asarray(output)[:n] for output in self._run(images))
        if not finite.all():
            raise IceboxError(
                f"features are not finite at precision {self.spec.precision}, storage {self.spec.storage}; "
                "check the weights, or take --precision float32 --storage float32"
            )
        return features, pooled


def images_within(most_bytes: int, row_shape: tuple[int, ...], spec: FeatureSpec) -> int:
    """Return of how many images, at least one, the features take no more than `most_bytes` as they are stored."""
    return max(1, most_bytes // (math.prod(row_shape) * np.dtype(spec.storage).itemsize))


def _require_room(layer: str, row_shape: tuple[int, ...]) -> None:
    if (size := 4 * math.prod(row_shape)) > MAX_ROW_BYTES:
        raise SpecError(
            f"{layer!r} gives {row_shape} numbers an image, {size / 2**20:.0f} MiB as float32, of "
            f"at most {MAX_ROW_BYTES / 2**20:.0f}; cut at a later layer (`summary --backbone B --all` lists them)"
        )


def _require_rows_of_their_own(model: KerasModel, spec: FeatureSpec) -> None:
    """Raise SpecError unless the row of an image is the same at each place of a batch, beside any other images."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    image, *others = random.integers(0, 256, (5, spec.input_size, spec.input_size, 3), np.uint8)
    first: np.ndarray | None = None
    for beside, place in itertools.product((others[:2], others[2:]), range(3)):
        batch = np.insert(np.stack(beside), place, image, axis=0)
        row = tf.cast(features_of(model, batch, spec)[place], tf.float32).numpy()
        first = row if first is None else first
        if np.isfinite(first).all() and not np.abs(row - first).max() <= _MOST_MIXED * np.abs(first).max():
            raise SpecError("the network mixes images with one another: a row depends on those computed beside it")


def best_batch(size: int, most: int, rate: float, rate_of: Callable[[int], float]) -> int:
    """Return the batch size that is fastest, a larger one only if that is not chance; `rate` is that of `size`.

    A smaller one takes less memory, and wastes less of the last batch.
    """
    if (half := size // 2) >= _LEAST_BATCH and (as_fast := rate_of(half)) >= rate:
        logger.info("batches of %d images: %.1f a second, of %d %.1f", half, as_fast, size, rate)
        return half
    while (twice := 2 * size) <= most and (faster := rate_of(twice)) > rate * _FASTER:
        size, rate = twice, faster
    logger.info("batches of %d images: %.1f a second", size, rate)
    return size


def _compiled(model: KerasModel, spec: FeatureSpec, batch_size: int) -> Any:
    """Return the graph: uint8 in, so that a quarter of the bytes travel; scaling inside."""
    import tensorflow as tf

    shape = (batch_size, spec.input_size, spec.input_size, 3)

    def run(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        exact = tf.cast(features_of(model, images, spec), tf.float32)  # (B, h, w, c)
        stored = tf.cast(exact, spec.storage)
        finite = tf.reduce_all(tf.math.is_finite(stored), axis=[1, 2, 3])  # (B,)
        return stored, tf.reduce_mean(exact, axis=[1, 2]), finite

    # On a CPU XLA makes it slower; on a GPU it melts what stands between the convolutions into them.
    xla = bool(tf.config.list_physical_devices("GPU"))
    # Nothing in it branches on values, and to look for that in all its layers takes as long as the rest of tracing.
    graph = tf.function(run, [tf.TensorSpec(shape, tf.uint8)], autograph=False, jit_compile=xla)
    return graph.get_concrete_function()


def features_of(model: KerasModel, inputs: Any, spec: FeatureSpec, after: str | None = None) -> Any:
    """Return what a frozen `model` makes of pixels (n, h, w, 3) uint8, inside a `tf.function`, by the spec's engine.

    With `after`, of rows (n, h, w, c) of that layer, whose output must carry the network on alone.
    """
    import tensorflow as tf

    if after is None:
        inputs = scale(tf.cast(inputs, tf.float32), spec.scaling)
    if spec.engine != "keras":
        return fold_batch_norm.run_folded(model, inputs, after)
    if after == spec.layer:
        return inputs
    rest = model if after is None else layers_after(model, after)
    return rest(inputs, training=False)
