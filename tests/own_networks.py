"""Small networks of different kinds, saved by Keras, as people have them of their own."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from conftest import ROOT, SPEC, make_once, write_picture

from pipeline.backbone import own
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.core.spec import FeatureSpec
from pipeline.extraction.feature_choice import FeatureChoice

SIZE = 32
SCALING = "127,128"


def own_choice(path: Path) -> FeatureChoice:
    """Return the choice of the features of a network in a file, computed and stored in float32."""
    return FeatureChoice(backbone=str(path), scaling=SCALING, precision="float32", storage="float32")


def write_sides(root: Path, counts: tuple[int, int, int] = (12, 4, 4)) -> Path:
    """Write a dataset of two classes, so many images to train on, to validate and to test; return its folder."""
    for number, (side, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        for i in range(count):
            write_picture(root / side / ("cats" if i % 2 else "dogs") / f"{i}.png", seed=100 * number + i)
    return root


@functools.cache
def tiny() -> Path:
    """Return the network that tests use where none of Keras' own is needed: 32 pixels, rows of (4, 4, 64).

    It is kept beside what pytest keeps, so that it is built once, not once for each process and each run.
    """
    made_by = Path(__file__).read_bytes() + importlib.metadata.version("keras").encode()
    folder = ROOT / ".pytest_cache" / "networks" / hashlib.sha256(made_by).hexdigest()[:16]
    return make_once(folder / "tiny.keras", lambda path: write_network(path, "tiny"))


def tiny_options() -> tuple[str, ...]:
    """Return the options that have a command compute with the tiny network, in float32."""
    return ("--backbone", str(tiny()), "--scaling", SCALING, "--precision", "float32")


def tiny_choice() -> FeatureChoice:
    """Return the choice of the features that `tiny_options` name."""
    return FeatureChoice(backbone=str(tiny()), scaling=SCALING, precision="float32")


def tiny_spec() -> FeatureSpec:
    """Return the space of those features in float32."""
    network = own.read_network(tiny())
    return replace(SPEC, backbone=network.name, weights=network.weights, layer="top", input_size=SIZE, scaling=SCALING)


def frozen_tiny(batch_size: int, **change: Any) -> FrozenBackbone:
    """Return the tiny network as rows are computed with it, by `tiny_spec` with changes."""
    return FrozenBackbone(replace(tiny_spec(), **change), tiny(), batch_size, network=tiny())


class StandIn:
    """What a network is to a cache, at no cost: rows of (2, 2, 3) that tell a picture from another. Counts its images.

    It takes the place of `FrozenBackbone`.
    """

    row_shape = (2, 2, 3)
    computed = 0

    def __init__(
        self, spec: object, weights: object, batch_size: int, threads: object = None, network: object = None
    ) -> None:
        self.batch_size = batch_size

    def bound_batch(self, most: int) -> None:
        """Its rows are small."""

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        StandIn.computed += len(pixels)
        features = self.features_of(pixels)
        return features, features.astype(np.float32).mean((1, 2))

    @staticmethod
    def features_of(pixels: np.ndarray) -> np.ndarray:
        """Return (n, 2, 2, 3) float16 of (n, size, size, 3)."""
        shrunk = [cv2.resize(each, (2, 2), interpolation=cv2.INTER_AREA) for each in pixels]
        return np.stack(shrunk).astype(np.float16) + 0.5


def _tiny(layers: Any, x: Any) -> Any:
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, 2, "same", use_bias=False)(x)))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.ReLU(name="early")(layers.BatchNormalization()(x))
    x = layers.BatchNormalization()(layers.Conv2D(32, 3, 2, "same", use_bias=False)(x))
    x = layers.ReLU(name="middle")(x)
    x = layers.BatchNormalization()(layers.Conv2D(64, 3, 2, "same", use_bias=False)(x))
    return layers.ReLU(name="top")(x)


def _depthwise(layers: Any, x: Any) -> Any:
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, 2, "same", use_bias=False)(x)))
    x = layers.BatchNormalization(name="middle")(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
    x = layers.Dropout(0.2)(layers.ReLU(6.0)(x))
    return layers.BatchNormalization()(layers.Conv2D(12, 3, 2, use_bias=False)(x))


def _norm_first(layers: Any, x: Any) -> Any:
    start = layers.Conv2D(8, 3, 4, "same", name="middle")(x)
    x = layers.Conv2D(8, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(start)))
    return layers.ReLU()(layers.BatchNormalization()(layers.Add()([start, x])))


def _plain(layers: Any, x: Any) -> Any:
    x = layers.MaxPooling2D(4, name="middle")(layers.Conv2D(8, 3, activation="relu")(x))
    return layers.Conv2D(12, 3, activation="relu")(x)


def _vector(layers: Any, x: Any) -> Any:
    return layers.GlobalAveragePooling2D()(_depthwise(layers, x))


def _bare(layers: Any, x: Any) -> Any:
    x = layers.Conv2D(8, 3, 4, name="middle")(x)
    x = layers.BatchNormalization()(layers.Conv2D(12, 3, use_bias=False)(x))
    return x * layers.ReLU(6.0)(x + 3.0) / 6.0


def _nested(layers: Any, x: Any) -> Any:
    import keras

    block = [layers.Conv2D(8, 3, 4), layers.BatchNormalization(), layers.ReLU()]
    x = keras.Sequential(block, name="middle")(x)
    again = keras.Input(x.shape[1:])
    return keras.Model(again, layers.ReLU()(layers.Conv2D(12, 3)(again)), name="last")(x)


def _shared(layers: Any, x: Any) -> Any:
    twice = layers.Conv2D(8, 3, padding="same", activation="relu")
    x = layers.BatchNormalization(name="middle")(layers.Conv2D(8, 3, 4)(x))
    return twice(twice(x))


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "tiny": _tiny,
    "depthwise": _depthwise,
    "norm_first": _norm_first,
    "plain": _plain,
    "vector": _vector,
    "bare": _bare,
    "nested": _nested,
    "shared": _shared,
}


def write_network(path: Path, kind: str, seed: int = 1, size: int | None = SIZE) -> Path:
    """Save a network whose weights and statistics are all drawn, none being 0 or 1; return its path.

    Each has a layer "middle" where it can be cut.
    """
    from pipeline.backbone.keras_start import import_keras

    keras = import_keras()
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((size, size, 3))
    model: Any = keras.Model(inputs, KINDS[kind](keras.layers, inputs))
    draw_statistics(model, seed)
    model.save(path)
    return path


def draw_statistics(model: Any, seed: int) -> None:
    """Give all variables but kernels values as after training, none being 0 or 1."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name in ("beta", "bias", "moving_mean"):
            weight.assign(rng.normal(0, 0.5, weight.shape))
