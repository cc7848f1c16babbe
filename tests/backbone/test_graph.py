"""Networks of every shape: walked, folded and cut, they give what Keras' own call gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SPEC
from own_networks import draw_statistics

from pipeline.backbone import fold_batch_norm
from pipeline.backbone import frozen as frozen_module
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.backbone.graph import (
    activations,
    allow_any_names,
    cut,
    cut_layers,
    layer_names,
    layers_after,
    multiplications,
    share_of_work,
)
from pipeline.core.errors import SpecError

layers: Any = keras.layers
ops: Any = keras.ops
SIZE = 12


def network(body: Callable[[Any], Any], policy: str = "float32", seed: int = 1) -> Any:
    """Return a network on (12, 12, 3) whose weights and statistics are all drawn, none being 0 or 1."""
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((SIZE, SIZE, 3))
        model: Any = keras.Model(inputs, body(inputs))
    finally:
        keras.config.set_dtype_policy("float32")
    draw_statistics(model, seed)
    return model


def images(count: int = 4) -> Any:
    return tf.constant(np.random.default_rng(0).uniform(-1, 1, (count, SIZE, SIZE, 3)), tf.float32)


def run(model: Any, inputs: Any, after: str | None = None) -> tuple[np.ndarray, Counter[str]]:
    """Return what the walk gives, and which operations of TensorFlow it is made of."""
    graph = tf.function(
        lambda given: fold_batch_norm.run_folded(model, given, after), autograph=False
    ).get_concrete_function(inputs)
    return tf.cast(graph(inputs), tf.float32).numpy(), Counter(each.type for each in graph.graph.get_operations())


def expected(model: Any, inputs: Any) -> np.ndarray:
    return tf.cast(model(inputs, training=False), tf.float32).numpy()


def conv_norm(convolution: Any, **norm: Any) -> Callable[[Any], Any]:
    return lambda x: layers.ReLU()(layers.BatchNormalization(**norm)(convolution(layers.Conv2D(4, 3)(x))))


FOLDED = {
    "plain": lambda: layers.Conv2D(6, 3, strides=2, padding="same"),
    "unequal": lambda: layers.Conv2D(6, (3, 1), strides=(2, 1), use_bias=False),
    "dilated": lambda: layers.Conv2D(6, 3, dilation_rate=2),
    "grouped": lambda: layers.Conv2D(6, 3, groups=2),
    "grouped by channel": lambda: layers.Conv2D(8, 3, groups=4, strides=2, padding="same"),
    "grouped by channel, unequal": lambda: layers.Conv2D(8, 3, groups=4, strides=(2, 1)),
    "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same", use_bias=False),
    "depthwise strides": lambda: layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
    "depthwise dilated": lambda: layers.DepthwiseConv2D(3, dilation_rate=2, depth_multiplier=3),
    "separable": lambda: layers.SeparableConv2D(6, 3, strides=2, depth_multiplier=2),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_convolutions_take_up_the_batch_norm_behind_them(kind: str) -> None:
    model = network(conv_norm(FOLDED[kind]()))
    found, kinds = run(model, images())
    np.testing.assert_allclose(found, expected(model, images()), rtol=1e-4, atol=1e-5)
    assert not {"Rsqrt", "FusedBatchNormV3"} & kinds.keys()


@pytest.mark.parametrize("more", [{}, {"activation": "relu"}, {"use_bias": False, "dilation_rate": 2}])
def test_a_convolution_grouped_by_channel_is_a_depthwise_one(more: dict[str, Any]) -> None:
    model = network(lambda x: layers.Conv2D(6, 3, groups=3, **more)(x))
    found, kinds = run(model, images())
    np.testing.assert_allclose(found, expected(model, images()), rtol=1e-4, atol=1e-5)
    assert kinds["DepthwiseConv2dNative"] == 1


NOT_FOLDED = {
    "its activation comes first": conv_norm(layers.Conv2D(6, 3, activation="relu")),
    "over another axis": conv_norm(layers.Conv2D(6, 3), axis=1),
    "padding between": conv_norm(lambda x: layers.ZeroPadding2D(1)(layers.Conv2D(6, 3)(x))),
    "taken twice": lambda x: (y := layers.Conv2D(6, 3)(x)) + layers.BatchNormalization()(y),
    "transposed": conv_norm(layers.Conv2DTranspose(6, 3)),
    "before the convolution": lambda x: layers.Conv2D(4, 3)(layers.ReLU()(layers.BatchNormalization()(x))),
}


@pytest.mark.parametrize("kind", NOT_FOLDED)
def test_all_other_batch_norms_stay_as_keras_has_them(kind: str) -> None:
    model = network(NOT_FOLDED[kind])
    found, kinds = run(model, images())
    np.testing.assert_allclose(found, expected(model, images()), rtol=1e-4, atol=1e-5)
    assert kinds["Rsqrt"] + kinds["FusedBatchNormV3"] == 1


def hard_swish(x: Any) -> Any:
    return x * layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)


def shared(x: Any) -> Any:
    conv, norm = layers.Conv2D(3, 3, padding="same", name="twice"), layers.BatchNormalization()
    return layers.Add(name="sum")([norm(conv(x)), norm(conv(layers.ReLU()(x)))])


def by_keyword(x: Any) -> Any:
    convolved = layers.Conv2D(4, 3)(inputs=x)
    again = keras.Input(convolved.shape[1:])
    inner = keras.Model(again, layers.BatchNormalization()(layers.DepthwiseConv2D(3)(again)))
    return inner(inputs=layers.BatchNormalization()(inputs=convolved))


def nested(x: Any) -> Any:
    inner = keras.Sequential(
        [keras.Input((SIZE, SIZE, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Dropout(0.5)],
        name="inner",
    )
    return layers.Conv2D(2, 1, name="last")(inner(layers.Rescaling(0.5)(x)))


BODIES = {
    "bare operations": lambda x: hard_swish(layers.BatchNormalization()(layers.Conv2D(4, 3)(x))),
    "keywords": lambda x: ops.clip(layers.Conv2D(4, 3)(x), x_min=-0.5, x_max=0.5),
    "layers called by keyword": by_keyword,
    "several outputs": lambda x: ops.concatenate(ops.split(layers.Conv2D(4, 3)(x), 2, axis=-1)[::-1], axis=-1),
    "a layer called twice": shared,
    "a nested model": nested,
    "fixed in training mode": lambda x: layers.Dropout(0.5)(layers.Conv2D(4, 3)(x), training=True),
    "layers in float32": lambda x: layers.Softmax(dtype="float32")(layers.Conv2D(4, 3)(layers.Rescaling(2.0)(x))),
    "batch norm in float32": lambda x: layers.BatchNormalization(dtype="float32")(layers.Conv2D(4, 3)(x)),
}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", BODIES)
def test_networks_of_any_kind_give_what_keras_gives(kind: str, policy: str) -> None:
    model = network(BODIES[kind], policy)
    exact = 1e-5 if policy == "float32" else 0.05
    found, _ = run(model, images())
    np.testing.assert_allclose(found, expected(model, images()), rtol=exact, atol=exact)
    assert found.std() > 1e-3


def test_a_nested_model_is_folded_too() -> None:
    _, kinds = run(network(nested), images())
    assert not {"Rsqrt", "FusedBatchNormV3"} & kinds.keys()


@pytest.mark.parametrize("kind", BODIES)
def test_rows_of_a_cut_go_on_to_the_same_output(kind: str) -> None:
    model = network(BODIES[kind])
    for layer in cut_layers(model):
        rows, _ = run(cut(model, layer), images())
        np.testing.assert_allclose(rows, expected(cut(model, layer), images()), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(run(model, tf.constant(rows), layer)[0], expected(model, images()), atol=1e-5)
        if layer != layer_names(model)[-1]:
            np.testing.assert_allclose(expected(layers_after(model, layer), rows), expected(model, images()), atol=1e-5)


def test_a_row_of_a_convolution_is_not_convolved_again() -> None:
    model = network(lambda x: layers.BatchNormalization()(layers.Conv2D(3, 1, name="conv")(x)))
    rows, _ = run(cut(model, "conv"), images())
    np.testing.assert_allclose(run(model, tf.constant(rows), "conv")[0], expected(model, images()), atol=1e-5)


def test_layers_that_are_called_twice_or_beside_others_are_no_cuts() -> None:
    model = network(shared)
    assert cut_layers(model) == ["sum"]
    with pytest.raises(SpecError, match=r"'twice' does not carry .* it is called 2 times; the nearest layers .* sum"):
        cut(model, "twice")


def test_the_last_operation_is_a_cut_whatever_it_is() -> None:
    model = network(lambda x: hard_swish(layers.Conv2D(4, 3, name="conv")(x)))
    last = model.outputs[0]._keras_history.operation.name
    assert cut_layers(model) == ["conv", last]
    assert layer_names(model)[-1] == last
    np.testing.assert_array_equal(cut(model, last)(images()), model(images()))


def test_a_layer_that_is_not_there_has_others_proposed() -> None:
    model = network(nested)
    with pytest.raises(SpecError, match=r"no layer 'lasd' .* the last to cut at: .*, inner, last\); did you mean last"):
        cut(model, "lasd")


def test_vectors_are_rows_of_one_place() -> None:
    def body(x: Any) -> Any:
        pooled = layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(5, 3)(x))
        return layers.Dense(4, name="dense")(pooled)

    model = network(body)
    for layer, channels in (("pool", 5), ("dense", 4)):
        rows, _ = run(cut(model, layer), images())
        assert rows.shape == (4, 1, 1, channels)
        assert np.allclose(run(cut(model, "dense"), tf.constant(rows), layer)[0][:, 0, 0], model(images()), atol=1e-6)
    rest = layers_after(model, "pool")
    np.testing.assert_allclose(rest(run(cut(model, "pool"), images())[0]), model(images()), atol=1e-6)


ODD = ["a b", "ünï", "a:b", "-x", "_y", "层"]


@pytest.mark.parametrize("name", ODD)
def test_layers_may_be_called_anything(name: str) -> None:
    def body(x: Any) -> Any:
        inner = keras.Sequential([layers.Conv2D(3, 1, name=name)], name=f"{name} too")
        return layers.ReLU()(layers.DepthwiseConv2D(3, name=name)(inner(x)))

    model = network(body)
    allow_any_names(model)
    below = cut(model, name)
    rows, _ = run(below, images())
    np.testing.assert_allclose(below.predict_on_batch(images()), rows, atol=1e-6)
    rest = layers_after(model, name, name=f"after_{name}")
    np.testing.assert_allclose(rest.predict_on_batch(rows), expected(model, images()), atol=1e-6)


def test_what_cannot_be_computed_is_named() -> None:
    model = network(lambda x: layers.ReLU()(layers.Conv2D(3, 3, name="broken")(x)))
    model.get_layer("broken").strides = "no strides"
    with pytest.raises(SpecError, match="its Conv2D 'broken' fails: "):
        run(model, images())


def test_a_sequential_network_is_one_like_others() -> None:
    model: Any = keras.Sequential([keras.Input((SIZE, SIZE, 3)), layers.Conv2D(4, 3, name="conv")])
    model.add(layers.BatchNormalization())
    model.add(layers.GlobalAveragePooling2D(name="pool"))
    assert cut_layers(model) == layer_names(model)[1:]
    rows, _ = run(cut(model, "pool"), images())
    np.testing.assert_allclose(rows[:, 0, 0], model(images()), atol=1e-6)
    np.testing.assert_allclose(run(model, images())[0], model(images()), atol=1e-6)


def test_multiplications_are_those_of_the_layer() -> None:
    kinds = {
        "plain": (layers.Conv2D(6, 3), 10 * 10 * 3 * 3 * 3 * 6),
        "grouped": (layers.Conv2D(6, 3, groups=3), 10 * 10 * 3 * 3 * 1 * 6),
        "depthwise": (layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2), 5 * 5 * 3 * 3 * 3 * 2),
        "separable": (layers.SeparableConv2D(6, 3), 10 * 10 * (3 * 3 * 3 + 3 * 6)),
        "transposed": (layers.Conv2DTranspose(6, 3, strides=2), 12 * 12 * 3 * 3 * 3 * 6),
        "dense on a map": (layers.Dense(5), 12 * 12 * 3 * 5),
        "none": (layers.ReLU(), 0),
        "nested": (keras.Sequential([layers.Conv2D(6, 3), layers.Conv2D(2, 1)]), 10 * 10 * (27 * 6 + 6 * 2)),
        "of any size": (keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(6, 3)]), 10 * 10 * 27 * 6),
    }
    for kind, (layer, count) in kinds.items():
        network(lambda x, layer=layer: layer(x))
        assert multiplications(layer) == count, kind
    model = network(shared)
    assert sum(count for _, count in share_of_work(model)) == 2 * 144 * 27 * 3
    assert sum(count for _, count in share_of_work(model, cut_layers(model)[-1])) == 0
    assert activations(network(lambda x: layers.ReLU()(layers.Conv2D(2, 3)(x)))) == 144 * 3 + 100 * 2 * 2


def frozen_of(monkeypatch: pytest.MonkeyPatch, model: Any, layer: str, **more: Any) -> FrozenBackbone:
    monkeypatch.setattr(frozen_module, "build", lambda *given, **named: model)
    monkeypatch.setattr(frozen_module, "load_weights", lambda *given: None)
    more = {"layer": layer, "input_size": SIZE, "storage": "float32", **more}
    return FrozenBackbone(replace(SPEC, **more), None, batch_size=4)


def test_rows_are_computed_at_the_networks_own_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frozen_module, "_MEASURED_SECONDS", 1e-6)
    body = lambda x: layers.GlobalMaxPooling2D(name="max")(layers.Conv2D(5, 3, name="conv")(x))  # noqa: E731
    model = network(body)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    for layer, shape in (("conv", (10, 10, 5)), ("max", (1, 1, 5))):
        frozen = frozen_of(monkeypatch, model, layer)
        features, pooled = frozen(pixels)
        whole = np.asarray(cut(model, layer)(pixels / 127.5 - 1.0))
        assert frozen.row_shape == features.shape[1:] == shape
        np.testing.assert_allclose(features, whole, atol=1e-5)
        np.testing.assert_allclose(pooled, whole.mean(axis=(1, 2)), atol=1e-5)
        assert frozen.rate() > 0


def test_a_layer_too_large_for_a_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(lambda x: layers.GlobalMaxPooling2D()(layers.UpSampling2D(700, name="large")(x)))
    with pytest.raises(SpecError, match=r"'large' gives \(8400, 8400, 3\) numbers an image, 807 MiB .* at most 128"):
        frozen_of(monkeypatch, model, "large")
