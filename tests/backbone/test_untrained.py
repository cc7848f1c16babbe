"""Untrained weights are the same everywhere, and features under them have ordinary magnitudes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import ROOT

from pipeline.backbone import moments
from pipeline.backbone.build import build, load_weights
from pipeline.backbone.moments import Moments
from pipeline.backbone.untrained import initialise, recipe_of
from pipeline.core.errors import SpecError

layers: Any = keras.layers
RECIPE = "unit_variance_1"


def residual(x: Any, activation: str) -> Any:
    """Widen, look around by a depthwise convolution, gate each channel, narrow, add: the block of mobile networks."""
    channels = x.shape[-1]
    y = layers.Conv2D(3 * channels, 1, use_bias=False)(x)
    y = layers.Activation(activation)(layers.BatchNormalization()(y))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
    y = layers.Activation(activation)(layers.BatchNormalization(gamma_initializer="zeros")(y))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = layers.Conv2D(8, 1, activation=activation)(gate)
    gate = layers.Conv2D(3 * channels, 1, activation="sigmoid", bias_initializer="ones")(gate)
    y = layers.Conv2D(channels, 1, use_bias=False)(layers.Multiply()([y, gate]))
    return layers.Add()([x, y])


def mobile(activation: str = "silu", blocks: int = 6) -> Any:
    x = start = keras.Input((48, 48, 3))
    x = layers.Activation(activation)(layers.Conv2D(32, 3, strides=2)(layers.Rescaling(1 / 127.5, -1)(x)))
    for _ in range(blocks):
        x = residual(x, activation)
    return keras.Model(start, x)


def mixed() -> Any:
    """One layer of each kind that has weights, a model within the model, and bare operations."""
    x = start = keras.Input((48, 48, 3))
    x = layers.PReLU(shared_axes=[1, 2])(
        layers.Conv2D(32, 3, strides=2)(keras.ops.divide(keras.ops.subtract(x, 127.5), 127.5))
    )
    x = layers.ReLU(6.0)(layers.Conv2D(32, 3, groups=4)(x))
    x = layers.Conv2D(32, 3, groups=32)(x)
    x = keras.Sequential([layers.SeparableConv2D(48, 3, activation="relu"), layers.GroupNormalization(8)])(x)
    x = layers.Concatenate()([x, keras.ops.relu(x)])
    x = layers.Conv2DTranspose(32, 3, activation="gelu")(x)
    x = layers.LayerNormalization()(layers.Dense(24)(x))
    return keras.Model(start, layers.Conv2D(16, 1, activation="relu")(x))


def plain(depth: int = 40) -> Any:
    x = start = keras.Input((48, 48, 3))
    for _ in range(depth):
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    return keras.Model(start, x)


NETWORKS = {
    "mobile": mobile,
    "hard": lambda: mobile("hard_silu"),
    "tanh": lambda: mobile("tanh"),
    "mixed": mixed,
    "plain": plain,
}


def digest(model: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in model.get_weights())).hexdigest()


def small_digests() -> list[str]:
    """Return the digests of networks of all kinds, each of few layers."""
    activations = ("silu", "hard_silu", "tanh")
    models = [*(mobile(each, blocks=1) for each in activations), mixed(), plain(depth=3)]
    for model in models:
        initialise(model, RECIPE, 0)
    return [digest(model) for model in models]


def drawn(name: str, seed: int = 0) -> Any:
    model = NETWORKS[name]()
    initialise(model, RECIPE, seed)
    return model


def pictures(count: int = 4) -> np.ndarray:
    """Smooth noise with detail, another in each picture, (count, 48, 48, 3) float32 in 0 … 255."""
    random = np.random.default_rng(5)
    coarse = random.uniform(0, 255, (count, 6, 6, 3)).repeat(8, 1).repeat(8, 2)
    return np.clip(coarse + random.normal(0, 20, (count, 48, 48, 3)), 0, 255).astype(np.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_have_ordinary_magnitudes_and_tell_images_apart(name: str) -> None:
    rows = np.asarray(drawn(name)(pictures(), training=False)).mean(axis=(1, 2))  # (4, c)
    assert 1e-2 < rows.std() < 1e2
    for i in range(1, 4):
        assert np.linalg.norm(rows[i] - rows[0]) > 0.03 * np.linalg.norm(rows[0])


@pytest.mark.parametrize("activation", ["silu", "hard_silu", "gelu"])
def test_features_of_little_contrast_are_no_smaller_than_their_pixels(activation: str) -> None:
    model = mobile(activation, blocks=16)
    initialise(model, RECIPE, 0)
    bright = pictures(1)
    rows = np.asarray(model(np.concatenate([bright, 127.5 + (bright - 127.5) / 8]), training=False))
    assert 5 < rows[0].std() / rows[1].std() < 12


def test_rounding_does_not_grow_in_residual_blocks() -> None:
    model = mobile("relu", blocks=24)
    initialise(model, RECIPE, 0)
    images = pictures(1)
    rows = np.asarray(model(np.concatenate([images, images * 1.0001]), training=False))
    assert np.linalg.norm(rows[1] - rows[0]) < 2e-3 * np.linalg.norm(rows[0])


def test_pixels_count_as_large_as_the_network_takes_them() -> None:
    assert moments.pixels("vgg16").variance == 64**2
    assert moments.pixels("mobilenet_v2") == moments.pixels("own_network") == moments.PIXELS


def test_weights_are_bit_equal_in_another_process_with_other_threads() -> None:
    code = "import test_untrained as t; print(*t.small_digests())"
    threads = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}
    places = os.pathsep.join(map(str, (Path(__file__).parent, ROOT / "tests", ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | threads | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == small_digests()


def test_weights_hang_on_the_seed_and_on_nothing_that_was_there_before() -> None:
    model = drawn("mobile", 1)
    assert digest(model) != digest(drawn("mobile"))
    model.set_weights([each + 1 for each in model.get_weights()])
    initialise(model, RECIPE, 0)
    assert digest(model) == digest(drawn("mobile"))


def test_kernels_are_centred_and_those_of_depthwise_convolutions_keep_the_mean() -> None:
    model = drawn("mobile")
    wide = model.get_layer(index=2).kernel.numpy()  # (3, 3, 3, 32)
    np.testing.assert_allclose(wide.sum(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose((wide**2).sum(axis=(0, 1, 2)), 32**2, rtol=1e-5)
    (deep, *_) = (each.kernel.numpy() for each in model.layers if isinstance(each, layers.DepthwiseConv2D))
    sums = deep.sum(axis=(0, 1))
    assert sums[0, 0] > 1
    np.testing.assert_allclose(sums, sums[0, 0], rtol=1e-5)


def test_the_recipe_of_inception_v3_draws_the_bits_it_always_drew() -> None:
    model = build("inception_v3")
    load_weights(model, f"untrained:{recipe_of('inception_v3')}:0", None)
    kernels = [layer.kernel.numpy().tobytes() for layer in model.layers if type(layer).__name__ == "Conv2D"]
    found = [hashlib.sha256(kernels[i]).hexdigest()[:16] for i in (0, 1, -1)]
    assert found == ["4ccae9ee3f2009f2", "70d367d36750cea0", "ab9225da41d723eb"]


def test_other_networks_have_a_recipe_of_their_own() -> None:
    assert recipe_of("inception_v3") == "glorot_centred_1"
    assert recipe_of("mobilenet_v2") == recipe_of("own:" + "0" * 64) == RECIPE


def test_a_recipe_of_another_version_is_refused() -> None:
    with pytest.raises(SpecError, match=r"another version of Icebox.*'unit_variance_9'"):
        load_weights(plain(1), "untrained:unit_variance_9:0", None)


@pytest.mark.parametrize(("name", "mean", "variance"), [("relu", 0.3989, 0.3408), ("tanh", 0, 0.394), ("linear", 0, 1)])
def test_moments_behind_an_activation_are_those_of_a_normal_distribution(
    name: str, mean: float, variance: float
) -> None:
    assert moments.activated(Moments(0.0, 1.0), name) == pytest.approx((mean, variance), abs=0.01)
