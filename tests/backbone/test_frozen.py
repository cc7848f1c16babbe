"""The frozen network gives what Keras' own gives, and a row depends on its image alone."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SPEC, picture
from own_networks import frozen_tiny

from pipeline.backbone import fold_batch_norm
from pipeline.backbone import frozen as frozen_module
from pipeline.backbone.build import build, load_weights
from pipeline.backbone.frozen import FrozenBackbone, best_batch, streams
from pipeline.backbone.graph import cut, cut_layers
from pipeline.backbone.scaling import scale
from pipeline.core import machine
from pipeline.core.errors import IceboxError, SpecError, WeightsError
from pipeline.core.spec import HeadSpec
from pipeline.images import decoding


@pytest.fixture(scope="module")
def whole() -> Any:
    """The whole network in float32 with the untrained weights of seed 0."""
    model = build("inception_v3")
    load_weights(model, SPEC.weights, None)
    return model


@pytest.fixture(scope="module")
def spare() -> Any:
    """A second network, whose weights each test sets itself."""
    return build("inception_v3")


@pytest.fixture(scope="module")
def frozen() -> FrozenBackbone:
    return FrozenBackbone(SPEC, None, batch_size=4)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Six images of several kinds, (6, 299, 299, 3) uint8."""
    noise = np.random.default_rng(0).integers(0, 256, (299, 299, 3), np.uint8)
    made = [decoding.resize(picture(i), 299, "squash") for i in range(3)]
    return np.stack([*made, noise, np.zeros_like(noise), np.full_like(noise, 255)])


def test_float32_rows_equal_keras_within_float16_rounding(
    whole: Any, frozen: FrozenBackbone, pixels: np.ndarray
) -> None:
    build: Any = keras.applications.InceptionV3
    reference = build(include_top=False, weights=None, input_shape=(299, 299, 3))
    reference.set_weights(whole.get_weights())
    scaled = keras.applications.inception_v3.preprocess_input(pixels.astype(np.float32))
    expected = np.asarray(reference(scaled, training=False))  # (6, 8, 8, 2048)
    features, pooled = frozen(pixels[:4])
    assert features.shape == (4, 8, 8, 2048)
    assert features.dtype == np.float16
    # Half a unit in float16's last place; the rest is float32's own rounding, in another graph, at another shape.
    np.testing.assert_allclose(features, expected[:4], rtol=2**-11, atol=2**-14)
    np.testing.assert_allclose(pooled, expected[:4].mean(axis=(1, 2)), rtol=1e-4, atol=2**-16)
    assert features.max() > 0.05, "magnitudes are ordinary"


def folded(model: Any) -> Any:
    """Return the function of TensorFlow that computes the model with its batch norms folded."""
    return tf.function(lambda images: fold_batch_norm.run_folded(model, images), autograph=False)


def test_folding_batch_norm_changes_nothing_but_rounding(whole: Any, spare: Any, pixels: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    for weights, drawn in zip(spare.weights, whole.get_weights(), strict=True):
        # Statistics as after training, where none is 0 or 1.
        spread = {"moving_mean": 0.1, "beta": 0.1}.get(weights.name)
        weights.assign(drawn + rng.normal(0, spread, drawn.shape) if spread else drawn)
    scaled = tf.constant(scale(pixels[:4].astype(np.float32), SPEC.scaling))
    expected = spare(scaled, training=False).numpy()
    found = folded(spare)(scaled).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    assert np.linalg.norm(expected) > 1


def test_every_batch_norm_of_the_network_is_folded(whole: Any) -> None:
    graph = folded(whole).get_concrete_function(tf.TensorSpec((2, 299, 299, 3))).graph
    kinds = Counter(operation.type for operation in graph.get_operations())
    assert kinds["Conv2D"] == kinds["BiasAdd"] == 94
    assert not {kind for kind in kinds if "BatchNorm" in kind or kind in ("Rsqrt", "Mul", "Sub")}


@pytest.mark.parametrize("layer", ["conv2d", "batch_normalization_1", "activation_2", "mixed3"])
def test_a_network_cut_anywhere_is_folded_too(whole: Any, pixels: np.ndarray, layer: str) -> None:
    below = cut(whole, layer)
    scaled = tf.constant(scale(pixels[:2].astype(np.float32), SPEC.scaling))
    found = folded(below)(scaled).numpy()
    expected = below(scaled, training=False).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


def test_spaces_of_the_first_version_are_computed_as_keras_does(whole: Any, pixels: np.ndarray) -> None:
    scaled = scale(pixels[:2].astype(np.float32), SPEC.scaling)
    expected = np.asarray(whole(scaled, training=False)).astype(np.float16)
    features, _ = FrozenBackbone(replace(SPEC, engine="keras"), None, batch_size=2)(pixels[:2])
    np.testing.assert_allclose(features, expected, rtol=2**-10, atol=2**-14)
    with pytest.raises(SpecError, match=r"another version .* engine 'openvino'"):
        FrozenBackbone(replace(SPEC, engine="openvino"), None, batch_size=2)


def test_a_row_does_not_depend_on_its_neighbours_or_place(frozen: FrozenBackbone, pixels: np.ndarray) -> None:
    together, pooled = frozen(pixels[:4])
    alone, alone_pooled = frozen(pixels[2:3])  # padded to the same shape
    moved, _ = frozen(pixels[[2, 5, 4]])
    np.testing.assert_array_equal(together[2], alone[0])
    np.testing.assert_array_equal(together[2], moved[0])
    np.testing.assert_array_equal(pooled[2], alone_pooled[0])


def test_bfloat16_rows_keep_no_noise_below_bfloat16(pixels: np.ndarray, frozen: FrozenBackbone) -> None:
    half = FrozenBackbone(replace(SPEC, precision="bfloat16"), None, batch_size=4)
    features, _ = half(pixels[:4])
    normal = features[np.abs(features) > 2.0**-14]
    assert not (normal.view(np.uint16) & 0b111).any(), "float16 has three bits more than bfloat16: all must be 0"
    exact, _ = frozen(pixels[:4])
    difference = np.linalg.norm(features.astype(np.float32) - exact) / np.linalg.norm(exact.astype(np.float32))
    assert 0 < difference < 0.1


def small_pixels(count: int) -> np.ndarray:
    return np.stack([decoding.resize(picture(i), 32, "squash") for i in range(count)])


def test_features_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(model: Any, identity: str, path: Path | None) -> None:
        load_weights(model, identity, path)
        model.weights[0].assign(model.weights[0] * 1e12)

    monkeypatch.setattr(frozen_module, "load_weights", loaded)
    model = frozen_tiny(2)
    with pytest.raises(IceboxError, match="not finite"):
        model(small_pixels(2))


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({16: 101, 32: 101, 64: 200}, 16),  # a smaller one does as well, and nobody looks further
        ({16: 99, 32: 100, 64: 102}, 32),  # as on a CPU
        ({16: 50, 32: 100, 64: 102, 128: 300}, 32),
        ({16: 50, 32: 100, 64: 150, 128: 180, 256: 181}, 128),
        ({16: 50, 32: 100, 64: 150, 128: 180, 256: 0}, 128),  # no memory for 256
        ({16: 50, 32: 100, 64: 150, 128: 180, 256: 240, 512: 300}, 256),  # a shard holds no more
    ],
)
def test_the_batch_is_the_fastest_and_larger_only_for_a_reason(rates: dict[int, float], best: int) -> None:
    assert best_batch(32, 256, rates[32], rates.__getitem__) == best


def test_a_batch_is_looked_for_where_computing_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_module, "_LEAST_BATCH", 1)
    monkeypatch.setattr(frozen_module, "_MEASURED_SECONDS", 1e-6)
    model, pixels = frozen_tiny(2), small_pixels(4)
    model.choose_batch(1_999, 4)
    assert model.batch_size == 2, "it would take longer than it could save"
    monkeypatch.setattr(frozen_module, "_WORTH_SECONDS", 1e-6)
    assert model.rate() > 0
    monkeypatch.setattr(FrozenBackbone, "rate", lambda model: float(model.batch_size))
    model.choose_batch(2_000, 4)
    assert model.batch_size == 4, "the larger, the faster"
    features, _ = model(pixels[:3])
    np.testing.assert_allclose(features, frozen_tiny(4)(pixels[:3])[0], rtol=2**-10, atol=2**-14)
    monkeypatch.setattr(FrozenBackbone, "rate", lambda model: 1.0)
    model.choose_batch(2_000, 4)
    assert model.batch_size == 2, "half is as fast"


@pytest.mark.parametrize("layer", ["mixed8", "mixed9", "mixed10"])
def test_the_cut_carries_the_rest_of_the_network(whole: Any, layer: str) -> None:
    assert cut(whole, layer).output.shape[-1] == whole.get_layer(layer).output.shape[-1]


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 3), (8, 4), (9, 3), (16, 4)]
)
def test_batches_at_a_time_share_the_cores_evenly(cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    assert streams(cores) == expected
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    assert streams() == expected


def test_only_layers_where_branches_meet_can_be_cut(whole: Any) -> None:
    assert cut_layers(whole)[17:] == [f"mixed{i}" for i in range(11)]
    branch = whole.layers[245].name
    with pytest.raises(SpecError, match=r"does not carry .* nearest layers that work: mixed7 or mixed8"):
        cut(whole, branch)
    with pytest.raises(SpecError, match="no layer 'mixed11'"):
        cut(whole, "mixed11")


@pytest.mark.parametrize("name", ["as_saved.weights.h5", "renamed.h5"])
def test_a_weights_file_gives_the_network_back_whatever_it_is_called(
    whole: Any, spare: Any, tmp_path: Path, name: str
) -> None:
    whole.save_weights(tmp_path / "w.weights.h5")
    path = (tmp_path / "w.weights.h5").rename(tmp_path / name)
    for each in spare.weights:
        each.assign(np.full(each.shape, 7.0))
    load_weights(spare, "sha256:00", path)
    for expected, found in zip(whole.get_weights(), spare.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, found)


def test_weights_of_another_network_are_refused(spare: Any, tmp_path: Path) -> None:
    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    small.save_weights(tmp_path / "small.weights.h5")
    (tmp_path / "text.weights.h5").write_text("no weights at all")
    for name in ("small.weights.h5", "text.weights.h5"):
        with pytest.raises(WeightsError, match="does not hold weights"):
            load_weights(spare, "sha256:00", tmp_path / name)


def test_untrained_weights_are_the_seeds_and_differ_between_seeds(whole: Any, spare: Any) -> None:
    load_weights(spare, "untrained:glorot_centred_1:1", None)
    assert not np.array_equal(whole.get_weights()[0], spare.get_weights()[0])
    load_weights(spare, "untrained:glorot_centred_1:0", None)
    for expected, found in zip(whole.get_weights(), spare.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, found)


def test_a_head_on_the_cached_row_is_the_full_model_on_the_image(
    whole: Any, frozen: FrozenBackbone, pixels: np.ndarray
) -> None:
    from pipeline.training.heads.dense import build as build_head

    row, pooled = frozen(pixels[:4])
    on_tensor = build_head(HeadSpec.make("gap"), (8, 8, 2048), 5)
    on_pooled = build_head(HeadSpec.make("gap"), (2048,), 5)
    on_pooled.set_weights(on_tensor.get_weights())
    full = keras.Model(whole.input, on_tensor(whole.output))
    expected = np.asarray(full(scale(pixels[:4].astype(np.float32), SPEC.scaling), training=False))
    np.testing.assert_allclose(on_tensor.predict_on_batch(row), expected, atol=1e-3)
    np.testing.assert_allclose(on_pooled.predict_on_batch(pooled), expected, atol=1e-5)


def test_parameter_counts_of_the_known_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import summary
    from pipeline.training.summary import summarize

    monkeypatch.setattr(summary, "build", functools.cache(build))
    counts = summarize("gap", 10, "mixed10")
    assert counts["trainable_all"] == 21_900_138
    assert counts["backbone"] == "inception_v3"
    other = summarize("gap", 10, backbone="mobilenet")
    assert (other["layer"], other["feature_shape"]) == ("conv_pw_13_relu", [7, 7, 1024])
    assert other["backbone_parameters"] == 3_228_864
    assert counts["trainable_backbone_frozen"] == 131_786
    assert summarize("flatten", 10, "mixed10")["head_parameters"] == 33_557_258
