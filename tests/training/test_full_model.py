"""The full model: what of it trains, where it is cut, how it is kept, and heads that are put on top."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import SPEC
from own_networks import SIZE, tiny_choice

from pipeline.backbone.build import build as build_backbone
from pipeline.backbone.build import load_weights
from pipeline.backbone.frozen import ENGINES, FrozenBackbone
from pipeline.backbone.graph import cut, layer_names
from pipeline.backbone.source import resolve
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import RunError, SpecError, UsageError, WeightsError
from pipeline.core.spec import HeadSpec
from pipeline.extraction.feature_choice import resolve_choice
from pipeline.training import full_model, heads
from pipeline.training.full_model import FullModel
from pipeline.training.heads import Data, TrainingContext, fit
from pipeline.training.heads.dense import DenseHead, build

CLASSES = 10
GAP, FLATTEN = HeadSpec.make("gap"), HeadSpec.make("flatten")


def made(spec: HeadSpec = GAP, precision: str = "float32") -> FullModel:
    new = FullModel(replace(SPEC, precision=precision), lambda shape: DenseHead(build(spec, shape, CLASSES), spec))
    new.load_backbone(SPEC.weights, None)
    return new


@pytest.fixture(scope="module")
def gap() -> FullModel:
    return made()


# What trains


def test_as_many_numbers_train_as_the_design_says(gap: FullModel) -> None:
    gap.freeze(-1, batch_norm=True)
    assert gap.trainable_parameters == 21_900_138
    gap.freeze(250, batch_norm=True)
    assert gap.trainable_parameters == 10_672_778
    gap.freeze(len(gap.layers) - 1, batch_norm=False)
    assert (gap.trainable_parameters, gap.trains) == (131_786, ["hidden", "probabilities"])
    assert gap.work()[1] == gap.work("mixed10")[0] == 2048 * 64 + 64 * 10


def test_a_flatten_head_trains_as_many_as_the_design_says() -> None:
    flatten = made(FLATTEN)
    flatten.freeze(len(flatten.layers) - 1, batch_norm=False)
    assert flatten.trainable_parameters == 33_557_258


def test_batch_norms_stay_as_they_are_unless_asked_otherwise(gap: FullModel) -> None:
    gap.freeze(gap.layers.index("mixed9"), batch_norm=False)
    assert gap.trains[0] == "conv2d_89"
    assert not [name for name in gap.trains if name.startswith("batch_normalization")]
    gap.freeze(gap.layers.index("mixed9"), batch_norm=True)
    assert len([name for name in gap.trains if name.startswith("batch_normalization")]) == 9
    assert not [name for name in gap.trains if name in gap.layers[: gap.layers.index("mixed9") + 1]]


@pytest.mark.parametrize(
    ("until", "index"), [("none", -1), ("0", 0), ("250", 250), ("310", 310), ("mixed8", 248), ("conv2d_80", 249)]
)
def test_a_layer_is_named_by_name_or_number(gap: FullModel, until: str, index: int) -> None:
    assert full_model.frozen_until(gap.layers, until) == index


def test_the_default_freezes_all_of_a_part_that_ends_before_it(gap: FullModel) -> None:
    assert full_model.frozen_until(gap.layers[:249], "250") == 248
    with pytest.raises(UsageError, match="from 0 to 248"):
        full_model.frozen_until(gap.layers[:249], "249")


@pytest.mark.parametrize("until", ["311", "-1", "2.5", "mixed11", "", "None", "٣"])
def test_what_is_no_layer_is_refused(gap: FullModel, until: str) -> None:
    with pytest.raises(UsageError, match=r"--freeze-until takes a layer's name, its number from 0 to 310, or none"):
        full_model.frozen_until(gap.layers, until)


@pytest.mark.parametrize(
    ("until", "cut"), [(250, "mixed8"), (248, "mixed8"), (247, "mixed7"), (310, "mixed10"), (1, "conv2d")]
)
def test_it_is_cut_where_one_tensor_carries_everything_on(gap: FullModel, until: int, cut: str) -> None:
    assert full_model.cut_at(gap.layers, gap.cuts, until) == cut


def test_without_a_frozen_part_there_is_nothing_to_cut(gap: FullModel) -> None:
    for until in (-1, 0):
        with pytest.raises(SpecError, match="--from-cache needs a frozen part"):
            full_model.cut_at(gap.layers, gap.cuts, until)


def test_layers_have_the_same_names_in_every_model_that_a_process_builds(gap: FullModel) -> None:
    again = [layer.name for layer in build_backbone("inception_v3", "bfloat16").layers]
    assert again == gap.layers
    assert again[249] == "conv2d_80"


def test_the_two_halves_are_the_whole(gap: FullModel) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 299, 299, 3), np.uint8)
    whole = full_model.probabilities(gap.on_pixels().predict_on_batch, pixels, 3)
    rows = cut(gap.whole, "mixed9").predict_on_batch(pixels.astype(np.float32) / 127.5 - 1)
    assert np.allclose(full_model.probabilities(gap.after("mixed9").predict_on_batch, rows, 2), whole, atol=1e-5)
    between: Any = gap.features_after("mixed9")
    features = full_model.probabilities(gap.features_of_pixels().predict_on_batch, pixels, 3)
    assert np.allclose(full_model.probabilities(between.predict_on_batch, rows, 3), features, rtol=1e-3, atol=1e-3)
    assert gap.features_after("mixed10") is None
    assert whole.std(axis=0).max() > 1e-6, "the images are told apart"


def test_it_answers_in_bfloat16_as_cached_features_do(gap: FullModel) -> None:
    """The same steps as for rows of the cache: another order of them would be off by a hundredth."""
    spec = replace(gap.spec, precision="bfloat16")
    half = FullModel(spec, lambda shape: gap.head)
    half.load_backbone(spec.weights, None)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 299, 299, 3), np.uint8)
    rows, _ = FrozenBackbone(spec, None, 4)(pixels)
    expected = gap.head.model.predict_on_batch(rows)
    assert np.abs(full_model.compile_model(half)(pixels) - expected).max() < 1e-5
    below, _ = FrozenBackbone(replace(spec, layer="mixed8"), None, 4)(pixels)
    assert np.abs(full_model.compile_model(half, "mixed8")(below) - expected).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_it_answers_in_bfloat16_by_either_engine_as_features_cached_by_it_do(engine: str, workspace: Workspace) -> None:
    resolved = resolve_choice(workspace, tiny_choice())
    weights = resolve(resolved.source, "auto", workspace)
    spec = replace(resolved.new_spec(weights), precision="bfloat16", engine=engine)
    half = FullModel(spec, lambda shape: DenseHead(build(GAP, shape, CLASSES), GAP), weights.network)
    half.load_backbone(spec.weights, weights.path)
    pixels = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)

    def rows(layer: str) -> np.ndarray:
        return FrozenBackbone(replace(spec, layer=layer), weights.path, 4, network=weights.network)(pixels)[0]

    expected = half.head.model.predict_on_batch(rows("top"))
    assert np.abs(full_model.compile_model(half)(pixels) - expected).max() < 1e-5
    for layer in ("early", "middle", "top"):
        assert np.abs(full_model.compile_model(half, layer)(rows(layer)) - expected).max() < 1e-5


# Networks of other kinds

layers: Any = keras.layers


def mobile(inputs: Any) -> Any:
    """Return features (n, 4, 4, 12): depthwise convolutions, dropout below and above the cut `sum`, no bare names."""
    x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3, strides=2, padding="same")(inputs)))
    x = layers.Dropout(0.5, name="drop_below")(layers.Conv2D(8, 1)(x))
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.Add(name="sum")([x, layers.Dropout(0.5)(y)]) * 0.5
    x = layers.Conv2D(12, 3, strides=2, padding="same", name="above")(x)
    x = layers.Dropout(0.5, noise_shape=(None, 1, 1, 1), name="drop_above")(layers.BatchNormalization()(x))
    return layers.Conv2D(12, 1, name="last")(x)


def norm_first(inputs: Any) -> Any:
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="stem")(inputs)
    x = layers.BatchNormalization(name="sum")(x)
    x = layers.Conv2D(12, 3, strides=2, padding="same", name="above")(layers.ReLU()(x))
    return layers.ReLU(name="last")(layers.BatchNormalization()(x))


def no_norm(inputs: Any) -> Any:
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="sum")(inputs)
    x = layers.Conv2D(12, 3, strides=2, padding="same", activation="relu", name="above")(x)
    return layers.LayerNormalization(name="last")(layers.Dense(12, activation="gelu")(x))


def in_one(inputs: Any) -> Any:
    below = keras.Sequential([keras.Input((16, 16, 3)), layers.Conv2D(8, 3, strides=2)], name="sum")
    below.add(layers.BatchNormalization())
    below.add(layers.Dropout(0.5))
    above = keras.Sequential([keras.Input((7, 7, 8)), layers.Conv2D(12, 3)], name="above")
    above.add(layers.BatchNormalization())
    above.add(layers.Dropout(0.5))
    return layers.ReLU(name="last")(above(below(inputs)))


def vectors(inputs: Any) -> Any:
    x = layers.GlobalAveragePooling2D(name="sum")(layers.Conv2D(16, 3, activation="relu")(inputs))
    return layers.Dense(12, activation="relu", name="last")(layers.Dropout(0.5)(layers.Dense(16, name="above")(x)))


def bare_end(inputs: Any) -> Any:
    x = layers.Conv2D(8, 3, name="sum")(inputs)
    return layers.Conv2D(8, 3, name="above")(x) * 2.0


def bare_vector(inputs: Any) -> Any:
    return keras.ops.mean(bare_end(inputs), axis=(1, 2))


ENDS = {"bare end": bare_end, "bare vector": bare_vector}
BODIES = {"depthwise": mobile, "norm first": norm_first, "no norm": no_norm, "nested": in_one, "vectors": vectors}


def network_of(body: Any, monkeypatch: pytest.MonkeyPatch, layer: str | None = "last") -> FullModel:
    """Return a network of a small backbone, the same each time but for what Keras draws when it is built."""
    inputs = keras.Input((16, 16, 3))
    whole: Any = keras.Model(inputs, body(inputs))
    rng = np.random.default_rng(1)
    for weight in whole.weights:
        least = 0.5 if weight.name in ("gamma", "moving_variance") else -0.3
        weight.assign(rng.uniform(least, least + 0.6, weight.shape))
    monkeypatch.setattr(full_model, "build_backbone", lambda *given, **named: whole)
    layer = layer or layer_names(whole)[-1]
    spec = replace(SPEC, input_size=16, layer=layer, storage="float32")
    made = FullModel(spec, lambda shape: DenseHead(build(GAP, shape, CLASSES), GAP))
    made.freeze(made.layers.index("sum"), batch_norm=False)
    made.seed(7)
    return made


def losses(model: Any, rows: np.ndarray) -> list[float]:
    model.compile(keras.optimizers.SGD(0.05), loss="sparse_categorical_crossentropy")
    return [float(model.train_on_batch(rows, np.arange(len(rows)) % CLASSES)) for _ in range(4)]


PIXELS = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)


def rows_of(made: FullModel, layer: str) -> np.ndarray:
    return cut(made.whole, layer).predict_on_batch(PIXELS.astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("kind", BODIES)
def test_both_ways_train_alike_whatever_the_network(
    kind: str, batch_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (network_of(BODIES[kind], monkeypatch) for _ in range(2))
    for made in (one, other):
        made.freeze(made.layers.index("sum"), batch_norm=batch_norm)
    rows = rows_of(other, "sum")
    from_images, from_rows = losses(one.on_pixels(), PIXELS), losses(other.after("sum"), rows)
    np.testing.assert_allclose(from_images, from_rows, rtol=1e-4)
    assert len(set(np.round(from_rows, 4))) == 4, "it trains"
    assert np.allclose(rows_of(one, "sum"), rows, atol=1e-6), "what is frozen has not changed"
    for before, after in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("kind", [*BODIES, *ENDS])
def test_any_network_answers_as_the_head_on_its_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network_of({**BODIES, **ENDS}[kind], monkeypatch, None if kind in ENDS else "last")
    last = made.spec.layer
    said = full_model.compile_model(made)(PIXELS)
    np.testing.assert_allclose(made.on_pixels().predict_on_batch(PIXELS), said, atol=1e-5)
    assert made.below.output.shape[1:] == made.head.model.input_shape[1:]
    for layer in made.cuts:
        rows = rows_of(made, layer)
        np.testing.assert_allclose(full_model.compile_model(made, layer)(rows), said, atol=1e-5)
        np.testing.assert_allclose(made.after(layer).predict_on_batch(rows), said, atol=1e-5)
        between = made.features_after(layer)
        features = rows if between is None else between.predict_on_batch(rows)
        np.testing.assert_allclose(features, rows_of(made, last), atol=1e-5)


def test_batch_norms_inside_of_nested_models_stay_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network_of(in_one, monkeypatch)
    assert made.trains == ["above", "hidden", "probabilities"]
    assert [weight.path.split("/")[-1] for weight in made.whole.trainable_weights] == ["kernel", "bias"]
    made.freeze(made.layers.index("sum"), batch_norm=True)
    trained = [weight.path.split("/")[-1] for weight in made.whole.trainable_weights]
    assert trained == ["kernel", "bias", "gamma", "beta"]
    made.freeze(-1, batch_norm=False)
    assert made.trains[0] == "sum"
    assert made.work()[1] == made.work()[0] == 7 * 7 * 27 * 8 + 5 * 5 * 72 * 12 + 12 * 64 + 64 * CLASSES


def test_what_is_drawn_above_the_cut_is_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (7, 7, 8):
        made = network_of(mobile, monkeypatch)
        made.seed(seed)
        found.append(losses(made.after("sum"), rows_of(made, "sum")))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert not np.allclose(found[0], found[2], rtol=1e-3)


def chain(*filters: int) -> Any:
    def body(x: Any) -> Any:
        for i, count in enumerate(filters):
            x = layers.Conv2D(count, 1, use_bias=False, name=f"conv{i}")(x)
        return x

    return body


def beside(inputs: Any) -> Any:
    """Return what no layer but first and last carries on alone: the input is needed until the end."""
    x = stem = layers.Conv2D(8, 1, name="stem")(inputs)
    for i in range(10):
        x = layers.Conv2D(8, 1, name=f"conv{i}")(x)
    return layers.Add(name="end")([x, stem])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chain(8, 8, 8, 8, 8, 8), "conv4"),
        (chain(8, 8, 8, 8, 32, 1), "conv3"),  # conv5 has 32 of 504
        (chain(64, 1), "conv0"),
        (chain(8, 64, 1), "conv1"),  # 64 of 600
        (chain(64), "conv0"),  # no layer leaves any: the first that can be cut
        (beside, "conv8"),
    ],
)
def test_by_default_about_the_last_block_trains(body: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = keras.Input((4, 4, 3))
    whole: Any = keras.Model(inputs, body(inputs))
    assert full_model.default_freeze_until(whole, whole.layers[-1].name) == expected


def test_by_default_inceptions_last_blocks_train(gap: FullModel) -> None:
    assert full_model.default_freeze_until(gap.whole, "mixed10") == "mixed8"
    assert full_model.cut_at(gap.layers, gap.cuts, full_model.frozen_until(gap.layers, "mixed8")) == "mixed8"


# How it is kept


@pytest.fixture(scope="module")
def saved(gap: FullModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    gap.save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_what_is_saved_is_read_back(gap: FullModel, saved: Path) -> None:
    again = FullModel.load(saved, gap.spec)
    for before, after in zip(gap.model.get_weights(), again.model.get_weights(), strict=True):
        assert np.array_equal(before, after)


def test_its_backbone_is_a_weights_file_like_any_other(gap: FullModel, saved: Path) -> None:
    other = build_backbone("inception_v3")
    load_weights(other, "sha256:00", saved / full_model.WEIGHTS_FILE)
    assert np.array_equal(other.get_weights()[0], gap.whole.get_weights()[0])


def test_a_backbone_that_is_another_file_is_refused(gap: FullModel, copy: Path) -> None:
    content = bytearray((copy / full_model.WEIGHTS_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    replaced(copy / full_model.WEIGHTS_FILE, bytes(content))
    with pytest.raises(RunError, match=r"no model can be loaded .* is not the file that was saved"):
        FullModel.load(copy, gap.spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "'backbone'"),
        (b"[]", "list indices"),
        (b"{", "Expecting"),
        (b'{"backbone": "inception_v3", "layer": "mixed9", "precision": "float32"}', "of another network"),
    ],
)
def test_a_description_that_is_none_is_refused(gap: FullModel, copy: Path, content: bytes, message: str) -> None:
    replaced(copy / full_model.JSON_FILE, content)
    with pytest.raises(RunError, match=message) as caught:
        FullModel.load(copy, gap.spec)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_kind_is_refused(gap: FullModel, copy: Path) -> None:
    about = json.loads((copy / "head.json").read_text())
    replaced(copy / "head.json", json.dumps({**about, "head": "flatten"}).encode())
    with pytest.raises(RunError, match="no model can be loaded"):
        FullModel.load(copy, gap.spec)


def test_weights_that_are_none_are_refused(tmp_path: Path, gap: FullModel) -> None:
    (tmp_path / "w.h5").write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match="pickle"):
        gap.load_backbone("sha256:00", tmp_path / "w.h5")


# Heads that were trained from the cache, put on top

SHAPE = (2, 3, 8)


def tensors(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = random.random((count, *SHAPE), np.float32)
    rows[np.arange(count), :, :, labels] += 0.5
    return rows, labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("head", ["flatten", "gap", "logreg"])
def test_a_head_says_of_tensors_what_it_said_of_cached_rows(head: str, classes: int) -> None:
    rows, labels = tensors(90, classes)
    read = rows if head == "flatten" else rows.mean(axis=(1, 2))
    more = {} if head == "logreg" else {"epochs": 2, "hidden": "16,8", "batch_size": 16}
    fitted = fit(HeadSpec.make(head, **more), Data(read, labels, read, labels, classes), TrainingContext()).head
    on_top = full_model.to_dense_head(fitted, SHAPE, classes)
    expected = fitted.predict(read)
    assert expected.std(axis=0).min() > 1e-3
    assert np.allclose(on_top.predict(rows), expected, atol=1e-5)


def test_a_class_that_a_regression_never_saw_stays_impossible() -> None:
    rows, labels = tensors(60, 2)
    pooled = rows.mean(axis=(1, 2))
    fitted = fit(HeadSpec.make("logreg"), Data(pooled, labels * 2, pooled, labels * 2, 4), TrainingContext()).head
    said = full_model.to_dense_head(fitted, SHAPE, 4).predict(rows)
    assert np.allclose(said, fitted.predict(pooled), atol=1e-5)
    assert not said[:, [1, 3]].any()


def test_an_ensemble_is_put_on_top_as_its_mean() -> None:
    members = [DenseHead(build(spec, (8,), 3), spec) for spec in (GAP, HeadSpec.make("gap", seed=5), GAP)]
    rows = np.random.default_rng(0).random((4, *SHAPE), np.float32)
    made = full_model.to_dense_head(heads.Ensemble(members), SHAPE, 3)
    expected = np.mean([member.predict(rows.mean(axis=(1, 2))) for member in members], axis=0)
    assert np.allclose(made.predict(rows), expected, atol=1e-6)


def test_a_short_batch_is_padded_and_its_padding_thrown_away() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    rows = np.random.default_rng(0).random((11, 4), np.float32)
    expected = np.asarray(model(rows))
    for size in (1, 4, 11, 64):
        steps: list[float] = []
        said = np.concatenate(list(full_model.predict(model, rows, size, steps.append)))
        assert np.allclose(said, expected, atol=1e-6)
        assert sum(steps) == 11
