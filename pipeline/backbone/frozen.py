"""The frozen network up to the requested layer, compiled once as a function from pixels to features.

`FrozenBackbone` builds the model, compiles it for one batch shape and computes the features. `streams` gives the number
of batches computed at the same time, `best_batch` finds the fastest batch size by measuring.
"""

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


# The graph that computes the features: "keras" is Keras' own, used by feature spaces of the first version; "folded" has
# batch norms folded into the convolutions. The two round differently, so each engine has its own feature spaces.
ENGINES = ("keras", "folded")
ENGINE = "folded"  # for new feature spaces
_MOST_STREAMS = 4

# Measuring one batch size takes some seconds, so the search runs only for at least so many rows and seconds of work.
_WORTH_ROWS = 2_000
_WORTH_SECONDS = 300.0
_MOST_MIXED = 1e-3  # largest rounding difference between batches, relative to the row's largest absolute value
_MEASURED_SECONDS = 1.5
_LEAST_BATCH = 8
_FASTER = 1.03  # smallest ratio of rates that is not measurement noise


def streams(cores: int | None = None) -> int:
    """Return how many batches a model computes at the same time on `cores` cores (default: all usable cores).

    On a CPU each stream has a few cores of its own, ideally one. Cores that share the work of a layer wait for the
    slowest of them at the end of the layer. Each stream takes some 200 MB. With a GPU the result is 2: the features of
    one batch are copied back while the next batch is computed (not measured).
    """
    if machine.gpu_count():
        return 2
    cores = cores or machine.usable_cores()
    # Every stream gets the same number of cores; choose the count that leaves the fewest cores unused.
    return max(range(min(2, cores), min(cores, _MOST_STREAMS) + 1), key=lambda n: (cores // n * n, n))


class FrozenBackbone:
    """Function from images to features, compiled once for one batch shape.

    Short batches are padded to this shape, so a row depends on its image alone, not on the other images of the batch.

    `weights` is the weights file, and `network` the file with an own network's architecture. TensorFlow is limited to
    `threads` cores; None leaves its thread settings unchanged.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        weights: Path | None,
        batch_size: int,
        threads: int | None = None,
        network: Path | None = None,
    ) -> None:
        """Build the network and load its weights.

        Raises
        ------
        SpecError
            If the engine is unknown, or the network, its size or its layer cannot be used.
        WeightsError
            If the weights are not those of this network.
        """
        if spec.engine not in ENGINES:
            raise SpecError(f"these features were made by another version of Icebox, its engine {spec.engine!r:.40}")
        check_weights(spec.backbone, weights)  # before importing TensorFlow, which takes seconds
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
        self.row_shape: tuple[int, ...] = tuple(self._model.output_shape[1:])  # (h, w, c): the features of one image
        _require_room(spec.layer, self.row_shape)
        if spec.backbone.startswith(OWN):
            _require_rows_of_their_own(self._model, spec)
        self._take(batch_size)

    def _take(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._run = _compiled(self._model, self.spec, batch_size)

    def bound_batch(self, most_bytes: int) -> None:
        """Reduce the batch size if the features of a batch take more than `most_bytes` bytes in the storage type."""
        if (most := images_within(most_bytes, self.row_shape, self.spec)) < self.batch_size:
            self._take(most)

    def choose_batch(self, rows: int, most: int) -> None:
        """Change to the fastest batch size on this machine, between 8 and `most` images.

        Nothing changes if there are fewer than 2,000 rows, or if all `rows` take less than 300 s: measuring would take
        longer than it saves.
        """
        if rows < _WORTH_ROWS or (rate := self.rate()) * _WORTH_SECONDS > rows:
            return
        fastest = best_batch(self.batch_size, most, rate, self._rate_of)
        if fastest != self.batch_size:
            self._take(fastest)

    def _rate_of(self, batch_size: int) -> float:
        """Return the images/s at another batch size, 0 if the memory is too small for this size."""
        import tensorflow as tf

        self._take(batch_size)
        try:
            return self.rate()
        except tf.errors.ResourceExhaustedError:
            return 0.0

    def rate(self) -> float:
        """Return the images/s of all streams together, the median of measurements over a few seconds."""
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
        """Return the features (n, h, w, c) in the storage type, and their float32 spatial means (n, c).

        `images` is (n, size, size, 3) uint8 RGB, with 1 ≤ n ≤ batch_size.

        Raises
        ------
        IceboxError
            If a feature is not finite, or outside the range of the storage type.
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
    """Return the number of images, at least 1, whose features fit into `most_bytes` bytes in the storage type."""
    return max(1, most_bytes // (math.prod(row_shape) * np.dtype(spec.storage).itemsize))


def _require_room(layer: str, row_shape: tuple[int, ...]) -> None:
    if (size := 4 * math.prod(row_shape)) > MAX_ROW_BYTES:
        raise SpecError(
            f"{layer!r} gives {row_shape} numbers an image, {size / 2**20:.0f} MiB as float32, of "
            f"at most {MAX_ROW_BYTES / 2**20:.0f}; cut at a later layer (`summary --backbone B --all` lists them)"
        )


def _require_rows_of_their_own(model: KerasModel, spec: FeatureSpec) -> None:
    """Raise SpecError if the row of an image depends on its position in the batch or on the other images.

    Differences up to `_MOST_MIXED` are taken as rounding.
    """
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
    """Return the fastest batch size near `size`, at most `most`.

    `rate` is the images/s at `size`, and `rate_of` measures the rate at another size. Half of `size`, if that is at
    least 8, is chosen if it is as fast: smaller batches take less memory and waste less of the last batch. Otherwise
    the size is doubled as long as the rate grows by more than 3%, which is not measurement noise.
    """
    if (half := size // 2) >= _LEAST_BATCH and (as_fast := rate_of(half)) >= rate:
        logger.info("batches of %d images: %.1f a second, of %d %.1f", half, as_fast, size, rate)
        return half
    while (twice := 2 * size) <= most and (faster := rate_of(twice)) > rate * _FASTER:
        size, rate = twice, faster
    logger.info("batches of %d images: %.1f a second", size, rate)
    return size


def _compiled(model: KerasModel, spec: FeatureSpec, batch_size: int) -> Any:
    """Return the compiled graph from uint8 pixels to features, spatial means and a flag "is finite" for each image.

    Scaling is part of the graph: uint8 pixels are a quarter of the bytes of float32 to copy.
    """
    import tensorflow as tf

    shape = (batch_size, spec.input_size, spec.input_size, 3)

    def run(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        exact = tf.cast(features_of(model, images, spec), tf.float32)  # (B, h, w, c)
        stored = tf.cast(exact, spec.storage)
        finite = tf.reduce_all(tf.math.is_finite(stored), axis=[1, 2, 3])  # (B,)
        return stored, tf.reduce_mean(exact, axis=[1, 2]), finite

    # XLA is slower on a CPU; on a GPU it fuses the operations between convolutions into them.
    xla = bool(tf.config.list_physical_devices("GPU"))
    # No layer branches on values, so AutoGraph is off: its search for branches takes as long as the rest of tracing.
    graph = tf.function(run, [tf.TensorSpec(shape, tf.uint8)], autograph=False, jit_compile=xla)
    return graph.get_concrete_function()


def features_of(model: KerasModel, inputs: Any, spec: FeatureSpec, after: str | None = None) -> Any:
    """Return the output of a frozen `model` for pixels (n, h, w, 3) uint8, computed with the engine of `spec`.

    With `after`, `inputs` are rows (n, h, w, c) of that layer, where the model must be possible to cut. Call it inside
    a `tf.function`.
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
