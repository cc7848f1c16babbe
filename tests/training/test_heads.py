"""The heads: sizes, normalisation, training by the seed, early stopping, and what may be loaded from disk."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.backbone.keras_start import import_keras
from pipeline.core import machine
from pipeline.core.errors import DoNotFitError, RunError
from pipeline.core.spec import HEAD_DEFAULTS, HEADS, HeadSpec
from pipeline.training import heads
from pipeline.training.batches import Shuffled
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.heads import READS, Data, Fitted, TrainingContext, dense, fit, load, parts
from pipeline.training.heads.dense import DenseHead, build, channel_statistics, normalise
from pipeline.training.heads.parts import gradients_in_bfloat16
from pipeline.training.loop import OtherCheckpointError, optimizer

SHAPES = {"flatten": (2, 2, 8), "gap": (8,), "logreg": (8,)}
DTYPES = {"flatten": np.float16, "gap": np.float32, "logreg": np.float32}  # as the cache stores them
COLUMNS = ("loss", "accuracy", "val_loss", "val_accuracy")


def separable(head: str, n: int, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Rows in which the channel numbered as the class is higher than the others, and their labels."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % classes).astype(np.int32)
    rows = rng.random((n, *SHAPES[head]), np.float32)
    rows[np.arange(n), ..., labels] += 2
    return rows.astype(DTYPES[head]), labels


def labelled(head: str, train: int = 90, val: int = 30, classes: int = 3) -> Data:
    return Data(*separable(head, train, 1, classes), *separable(head, val, 2, classes), classes)


def make(head: str, **settings: Any) -> HeadSpec:
    few = {} if head == "logreg" else {"epochs": 4, "learning_rate": 0.01, "batch_size": 16}
    return HeadSpec.make(head, **{**few, **settings})


@pytest.fixture(scope="module", params=HEADS)
def fitted(request: pytest.FixtureRequest) -> tuple[str, Fitted]:
    """Each head, trained once; tests only read it."""
    return request.param, fit(make(request.param), labelled(request.param), TrainingContext())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a saved `gap` head and one with a saved `logreg` head."""
    folders = {head: tmp_path_factory.mktemp(head) for head in ("gap", "logreg")}
    for head, folder in folders.items():
        fit(make(head), labelled(head), TrainingContext()).head.save(folder)
    return folders


# Sizes


@pytest.mark.parametrize(
    ("head", "shape", "parameters"),
    [("flatten", (8, 8, 2048), 33_557_258), ("gap", (8, 8, 2048), 131_786), ("gap", (2048,), 131_786)],
)
def test_the_heads_have_the_sizes_the_design_states(head: str, shape: tuple[int, ...], parameters: int) -> None:
    spec = HeadSpec.make(head)
    assert DenseHead(build(spec, shape, 10), spec).parameters == parameters


def test_parameters_of_a_regression_are_coefficients_and_intercepts(fitted: tuple[str, Fitted]) -> None:
    head, done = fitted
    expected = {"flatten": 32 * 256 + 256 + 256 * 3 + 3, "gap": 8 * 64 + 64 + 64 * 3 + 3, "logreg": 3 * (8 + 1)}
    assert done.head.parameters == expected[head]


def test_gap_says_the_same_of_full_tensors_and_of_their_means() -> None:
    rng = np.random.default_rng(3)
    tensors = rng.random((20, 4, 4, 8), np.float32)
    spec = HeadSpec.make("gap")
    on_tensors, on_means = build(spec, (4, 4, 8), 3), build(spec, (8,), 3)
    normalise(on_means, [tensors.mean(axis=(1, 2))])
    on_tensors.set_weights(on_means.get_weights())
    for model in (on_tensors, on_means):
        model.get_layer("normalize").finalize_state()
    said = DenseHead(on_tensors, spec).predict(tensors)
    assert said.std(axis=0).min() > 1e-3  # the answers do depend on the rows
    assert np.allclose(said, DenseHead(on_means, spec).predict(tensors.mean(axis=(1, 2))), atol=1e-6)


# Normalisation


@pytest.mark.parametrize("shape", [(700, 2, 3, 5), (700, 5)])
def test_channel_statistics_over_several_blocks_are_numpys(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(4).normal(3, 2, shape).astype(np.float16)
    rows[500:] += np.float16(4)  # blocks differ, so that merging them wrongly shows
    flat = rows.reshape(-1, 5).astype(np.float64)
    mean, variance = channel_statistics(rows)
    assert mean.dtype == variance.dtype == np.float32
    assert np.allclose(mean, flat.mean(axis=0), rtol=1e-6)
    assert np.allclose(variance, flat.var(axis=0), rtol=1e-6)


def test_channel_statistics_do_not_cancel_digits() -> None:
    rows = np.random.default_rng(5).normal(1000, 0.01, (1000, 3)).astype(np.float32)
    assert np.allclose(channel_statistics(rows)[1], rows.astype(np.float64).var(axis=0), rtol=1e-5)


def test_normalisation_is_learned_from_the_training_rows_alone() -> None:
    train, labels = separable("gap", 90, 1)
    strange, strange_labels = separable("gap", 30, 2)
    done = fit(make("gap", epochs=1), Data(train, labels, strange * 50 + 7, strange_labels, 3), TrainingContext())
    layer = done.head.model.get_layer("normalize")  # pyright: ignore[reportAttributeAccessIssue]
    mean, variance = (np.asarray(weight).ravel() for weight in layer.get_weights()[:2])
    assert np.allclose(mean, train.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert np.allclose(variance, train.var(axis=0, dtype=np.float64), rtol=1e-6)


def test_normalisation_acts_on_what_the_hidden_layer_sees() -> None:
    """The layer is given its weights after it was built: they must not just be stored."""
    train, labels = separable("gap", 90, 1)
    done = fit(make("gap", epochs=1), Data(train * 20 + 100, labels, train, labels, 3), TrainingContext())
    model: Any = done.head.model  # pyright: ignore[reportAttributeAccessIssue]
    seen = np.asarray(model.get_layer("normalize")(train * 20 + 100))
    assert np.allclose(seen.mean(axis=0), 0, atol=1e-4)
    assert np.allclose(seen.std(axis=0), 1, atol=1e-4)


def test_a_channel_of_a_flattened_tensor_has_variance_one_over_all_its_places() -> None:
    tensors = np.random.default_rng(3).normal(5, 3, (200, 2, 4, 6)).astype(np.float16)
    labels = np.arange(200) % 3
    done = fit(make("flatten", epochs=1), Data(tensors, labels, tensors, labels, 3), TrainingContext())
    layer: Any = done.head.model.get_layer("normalize")  # pyright: ignore[reportAttributeAccessIssue]
    energy = (np.asarray(layer(tensors), np.float64) ** 2).sum(axis=(1, 2)).mean(axis=0)
    assert np.allclose(energy, 1, rtol=0.01)


def test_a_channel_dead_in_training_does_not_blow_up() -> None:
    train, labels = separable("gap", 90, 1)
    train[:, 7] = 0.25
    done = fit(make("gap"), Data(train, labels, *separable("gap", 30, 2), 3), TrainingContext())
    model: Any = done.head.model  # pyright: ignore[reportAttributeAccessIssue]
    stirred = train + np.float32(0.01)
    change = np.asarray(model.get_layer("normalize")(stirred)) - np.asarray(model.get_layer("normalize")(train))
    assert 0 < change[:, 7].max() < 10  # by its own deviation, 0, it would be divided by Keras' 1e-7
    assert np.isfinite(done.head.predict(stirred)).all()
    variance = channel_statistics(train)[1]
    assert variance[7] == pytest.approx((0.01 * np.median(np.sqrt(variance[:7]))) ** 2, rel=1e-4)


def test_rows_that_are_all_alike_have_variance_one() -> None:
    assert channel_statistics(np.full((10, 2, 2, 4), 0.5, np.float16))[1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("head", ["flatten", "gap"])
def test_without_normalisation_there_is_no_such_layer(head: str) -> None:
    names = {flag: [layer.name for layer in build(make(head, normalize=flag), (2, 2, 8), 3).layers] for flag in (0, 1)}
    assert set(names[1]) - set(names[0]) == {"normalize"}


def test_a_head_without_normalisation_learns_too() -> None:
    done = fit(make("gap", normalize=False, epochs=12), labelled("gap"), TrainingContext())
    assert done.history[-1]["val_accuracy"] > 0.95


def test_the_scaler_of_the_regression_sees_the_training_rows_alone() -> None:
    train, labels = separable("logreg", 90, 1)
    done = fit(make("logreg"), Data(train, labels, train * 50 + 7, labels, 3), TrainingContext())
    scaler = done.head.pipeline[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert np.allclose(scaler.mean_, train.mean(axis=0, dtype=np.float64))
    assert np.allclose(scaler.var_, train.var(axis=0, dtype=np.float64))


# Training


def test_every_head_learns_a_separable_problem(fitted: tuple[str, Fitted]) -> None:
    head, done = fitted
    rows, labels = separable(head, 60, seed=9)
    assert (done.head.predict(rows).argmax(axis=1) == labels).mean() > 0.95


def test_the_history_has_an_entry_for_each_epoch_or_fit(fitted: tuple[str, Fitted]) -> None:
    head, done = fitted
    if head == "logreg":
        assert done.x == "C"
        assert [entry["C"] for entry in done.history] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10]
        assert all(entry.keys() == {"C", *COLUMNS, "iterations", "converged", "temperature"} for entry in done.history)
        assert done.seconds_per_epoch is None
    else:
        assert done.x == "epoch"
        assert [entry["epoch"] for entry in done.history] == [1, 2, 3, 4]
        assert all(entry.keys() == {"epoch", *COLUMNS} for entry in done.history)
        assert done.seconds_per_epoch is not None
        assert 0 < done.seconds_per_epoch < 60
    assert all(type(value) in (int, float, bool) for entry in done.history for value in entry.values())


def test_the_history_says_of_validation_what_the_head_says(fitted: tuple[str, Fitted]) -> None:
    head, done = fitted
    data = labelled(head)
    said = done.head.predict(data.val)
    best = min(done.history, key=lambda entry: entry["val_loss"])
    assert best["val_accuracy"] == pytest.approx((said.argmax(axis=1) == data.val_labels).mean())
    assert best["val_loss"] == pytest.approx(cross_entropy(said, data.val_labels), rel=1e-3, abs=1e-6)


def test_progress_advances_once_for_each_step(fitted: tuple[str, Fitted]) -> None:
    head, _ = fitted
    steps: list[float] = []
    fit(make(head), labelled(head), TrainingContext(steps.append))
    assert sum(steps) == pytest.approx(heads.steps(make(head)))
    assert heads.steps(make(head)) == (7 if head == "logreg" else 4)


def test_a_seed_decides_the_training() -> None:
    def train(seed: int) -> tuple[list[dict[str, float]], list[np.ndarray]]:
        done = fit(make("flatten", epochs=2, hidden=16, seed=seed), labelled("flatten"), TrainingContext())
        return done.history, done.head.model.get_weights()  # pyright: ignore[reportAttributeAccessIssue]

    (once, first), (again, second), (other, third) = train(5), train(5), train(6)
    assert [list(entry.values()) for entry in once] == [pytest.approx(list(entry.values())) for entry in again]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))
    assert abs(once[0]["loss"] - other[0]["loss"]) > 1e-4
    assert not np.allclose(first[-2], third[-2], atol=1e-2)


class Watched:
    """Rows that remember in which order they were asked for."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.shape = rows.shape
        self.request: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        self.request.append(indices)
        return self.rows[indices]


def test_every_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    rows, labels = np.arange(50)[:, None], np.arange(50) * 2
    batches = Shuffled(rows, labels, 16, 7)
    epochs = [list(batches.epoch(number)) for number in (1, 2, 3)]
    orders = [np.concatenate([x[:, 0] for x, _ in epoch]).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(50))}) == 4
    assert all((y == 2 * x[:, 0]).all() for epoch in epochs for x, y in epoch)
    assert [len(x) for x, _ in epochs[0]] == [16, 16, 16, 2]
    assert len(batches) == 4
    assert [x.tolist() for x, _ in batches.epoch(2)] == [x.tolist() for x, _ in epochs[1]]  # by its number alone


def test_training_takes_each_row_once_an_epoch() -> None:
    rows, labels = separable("gap", 90, 1)
    watched = Watched(rows)
    fit(make("gap", epochs=3), Data(watched, labels, *separable("gap", 30, 2), 3), TrainingContext())
    batches = watched.request[-18:]  # before: statistics
    for epoch in (batches[:6], batches[6:12], batches[12:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(90))


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels] + 1e-12).mean())


@pytest.fixture(scope="module")
def unlearnable() -> Data:
    """Validation labels that have nothing to do with the rows: its loss soon rises."""
    val, labels = separable("gap", 60, 2)
    return Data(*separable("gap", 90, 1), val, np.random.default_rng(8).permutation(labels), 3)


def test_early_stopping_stops_and_keeps_the_best_epoch(unlearnable: Data) -> None:
    done = fit(make("gap", epochs=60, patience=3), unlearnable, TrainingContext())
    losses = [entry["val_loss"] for entry in done.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 3 < 60
    assert cross_entropy(done.head.predict(unlearnable.val), unlearnable.val_labels) == pytest.approx(
        losses[best], rel=1e-3
    )
    assert losses[-1] > losses[best] * 1.01  # the last epoch's weights would have failed the line above


def test_without_patience_every_epoch_is_run_and_the_best_is_kept(unlearnable: Data) -> None:
    done = fit(make("gap", epochs=12, patience=0), unlearnable, TrainingContext())
    losses = [entry["val_loss"] for entry in done.history]
    assert len(losses) == 12
    said = done.head.predict(unlearnable.val)
    assert cross_entropy(said, unlearnable.val_labels) == pytest.approx(min(losses), rel=1e-3)
    assert losses[-1] > min(losses) * 1.01
    assert done.facts["best_epoch"] == int(np.argmin(losses)) + 1


def test_no_larger_c_is_tried_after_two_that_were_worse() -> None:
    (train, labels), (val, truth) = separable("logreg", 90, 1), separable("logreg", 60, 2)
    noisy = np.random.default_rng(8).integers(0, 3, 60)
    data = Data(train, labels, val, np.where(np.arange(60) % 2, truth, noisy), 3)  # sure of itself is often wrong
    steps: list[float] = []
    spec = make("logreg", calibrate=False)
    done = fit(spec, data, TrainingContext(steps.append))
    losses = [entry["val_loss"] for entry in done.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 2 < 7
    assert done.facts["C"] == done.history[best]["C"]
    assert sum(steps) == heads.steps(spec)
    by_folds = fit(make("logreg", calibrate=False, select="cv"), data, TrainingContext())
    assert len(by_folds.history) == 7, "folds have been fitted at each by then"


def test_a_learning_rate_may_be_a_whole_number() -> None:
    assert len(fit(make("gap", epochs=1, learning_rate=1), labelled("gap"), TrainingContext()).history) == 1


# Logistic regression


def test_a_class_without_training_rows_is_given_probability_zero() -> None:
    rows, labels = separable("logreg", 90, 1, classes=4)
    some = labels != 2
    done = fit(make("logreg"), Data(rows[some], labels[some], rows, labels, 4), TrainingContext())
    said = done.head.predict(rows)
    assert said.shape == (90, 4)
    assert said.dtype == np.float32
    assert (said[:, 2] == 0).all()
    assert np.allclose(said.sum(axis=1), 1, atol=1e-6)
    assert (said.argmax(axis=1) == labels)[some].all()


def test_two_classes_that_are_not_the_first_keep_their_numbers() -> None:
    rows, labels = separable("logreg", 90, 1, classes=4)
    some = labels % 2 == 1
    done = fit(make("logreg"), Data(rows[some], labels[some], rows[some], labels[some], 4), TrainingContext())
    said = done.head.predict(rows[some])
    assert (said.argmax(axis=1) == labels[some]).all()
    assert (said[:, [0, 2]] == 0).all()


def test_a_regression_that_does_not_converge_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pipeline.training.heads"), warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make("logreg", max_iter=2, C=1), labelled("logreg"), TrainingContext())
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("pipeline.training.heads.logreg", "WARNING")
    ]
    assert "did not converge in 2 iterations" in caplog.text
    assert "--max-iter" in caplog.text


def test_a_regression_that_converges_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make("logreg", C="0.1,1"), labelled("logreg"), TrainingContext())
    assert "converge" not in caplog.text


def test_the_penalty_is_the_one_asked_for() -> None:
    def largest(c: float) -> float:
        head: Any = fit(make("logreg", C=c, calibrate=False), labelled("logreg"), TrainingContext()).head
        return np.abs(head.pipeline[-1].coef_).max()

    assert largest(1e-3) < largest(1.0) < largest(100.0)


# On disk


def test_what_is_loaded_says_the_same(fitted: tuple[str, Fitted], tmp_path: Path) -> None:
    head, done = fitted
    rows = separable(head, 600, seed=9)[0]  # more than one block
    said = done.head.predict(rows)
    done.head.save(tmp_path)
    loaded = load(tmp_path)
    assert said.shape == (600, 3)
    assert said.dtype == np.float32
    assert np.allclose(said.sum(axis=1), 1, atol=1e-5)
    assert said.std(axis=0).min() > 0.1
    assert np.abs(loaded.predict(rows) - said).max() < 1e-6
    assert loaded.parameters == done.head.parameters
    kept = {"logreg": ["head.json", "head.skops"]}.get(head, ["head.json", "head.weights.h5"])
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_head_with_other_settings_is_rebuilt_as_it_was(tmp_path: Path) -> None:
    spec = make("flatten", hidden=16, dropout=0.0, normalize=False, epochs=1)
    data = labelled("flatten")
    done = fit(spec, data, TrainingContext())
    done.head.save(tmp_path)
    loaded = load(tmp_path)
    assert np.abs(loaded.predict(data.val) - done.head.predict(data.val)).max() < 1e-6
    assert loaded.spec == spec  # pyright: ignore[reportAttributeAccessIssue]


def test_the_weights_file_holds_no_optimizer_state(saved: dict[str, Path]) -> None:
    sizes: dict[str, int] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            sizes[name] = int(np.prod(item.shape))

    with h5py.File(saved["gap"] / "head.weights.h5") as file:
        file.visititems(note)
    assert not [name for name in sizes if "optimizer" in name]
    assert sum(sizes.values()) == (8 * 64 + 64 + 64 * 3 + 3) + (8 + 8 + 1)  # the normalisation: mean, variance, count


class Foreign:
    """A type that neither scikit-learn nor skops knows."""


def set_json(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        made = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps({**made, **values}))

    return change


def cut(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def sign(folder: Path, name: str) -> None:
    """Let head.json vouch for the file, as whoever can write the folder could: the checks behind must hold too."""
    made = json.loads((folder / "head.json").read_text())
    made["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "head.json").write_text(json.dumps(made))


def put(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        skops.io.dump(value, folder / "head.skops")
        sign(folder, "head.skops")

    return change


def cut_signed(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        cut(name, share)(folder)
        sign(folder, name)

    return change


def drop_layer(folder: Path) -> None:
    with h5py.File(folder / "head.weights.h5", "a") as file:
        del file["layers/dense"]
    sign(folder, "head.weights.h5")


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / "head.skops").read_bytes())
    data[len(data) // 3] ^= 255
    (folder / "head.skops").write_bytes(bytes(data))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no json": ("gap", remove("head.json"), "head.json"),
    "cut json": ("gap", cut("head.json", 0.5), ""),
    "json of another kind": ("gap", write("head.json", "[1, 2]"), ""),
    "no such head": ("gap", set_json(head="svm"), "svm"),
    "other number of channels": ("gap", set_json(input_shape=[9]), ""),
    "other number of classes": ("gap", set_json(classes=4), ""),
    "classes that are no number": ("gap", set_json(classes="ten"), "ten"),
    "no weights": ("gap", remove("head.weights.h5"), ""),
    "cut weights": ("gap", cut_signed("head.weights.h5", 0.7), "truncated"),
    "other bytes than were saved": ("gap", cut("head.weights.h5", 0.99), "not the file that was saved"),
    "empty weights": ("gap", cut("head.weights.h5", 0), ""),
    "text for weights": ("gap", write("head.weights.h5", "hello" * 1000), ""),
    "a layer gone": ("gap", drop_layer, ""),
    "no skops": ("logreg", remove("head.skops"), "head.skops"),
    "cut skops": ("logreg", cut("head.skops", 0.7), ""),
    "empty skops": ("logreg", cut("head.skops", 0), ""),
    "flipped skops": ("logreg", flip_byte, ""),
    "foreign type": ("logreg", put(Foreign()), "Foreign"),
    "foreign type inside": ("logreg", put(make_pipeline(StandardScaler(), Foreign())), "Foreign"),
    "trusted, but a list": ("logreg", put([1, 2]), "logistic regression"),
    "trusted, but another model": ("logreg", put(LinearRegression()), "logistic regression"),
    "fewer classes than fitted": ("logreg", set_json(classes=2), "logistic regression"),
    "no classes": ("logreg", set_json(classes=None), ""),
}


@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_a_head_is_refused_in_one_line(damage: str, saved: dict[str, Path], tmp_path: Path) -> None:
    head, change, hint = DAMAGES[damage]
    for path in saved[head].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load(tmp_path).parameters > 0
    change(tmp_path)
    with pytest.raises(RunError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert hint in text
    assert "\n" not in text
    assert len(text) < 600


def test_loading_a_foreign_type_does_not_run_it(tmp_path: Path) -> None:
    """What `joblib` would do: call the function a file names."""
    victim = tmp_path / "touched"
    write("head.json", json.dumps({"head": "logreg", "classes": 3}))(tmp_path)
    put({"f": Path.touch, "x": victim})(tmp_path)
    with pytest.raises(RunError):
        load(tmp_path)
    assert not victim.exists()


def test_a_fitted_pipeline_from_elsewhere_that_is_a_logistic_regression_loads(tmp_path: Path) -> None:
    rows, labels = separable("logreg", 90, 1)
    write("head.json", json.dumps({"head": "logreg", "classes": 3}))(tmp_path)
    put(make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, labels))(tmp_path)
    assert (load(tmp_path).predict(rows).argmax(axis=1) == labels).all()


def test_every_head_reads_a_dataset_that_shards_have() -> None:
    assert set(READS) == set(HEADS)
    assert set(READS.values()) <= {"features", "pooled"}


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_a_layer_in_parts_is_the_layer(precision: str, rounding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "best_precision", lambda: precision)
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(dense, "_LARGE", 100)
    monkeypatch.setattr(parts, "_PART", 300)
    keras = import_keras()
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(64, 2, 2, 30)).astype(np.float32), np.eye(3)[rng.integers(0, 3, 64)]
    spec = HeadSpec.make("flatten", hidden="16,8", dropout=0.0, normalize=False)
    plain, quick = (dense.build(spec, (2, 2, 30), 3, quick=quick) for quick in (False, True))
    assert [len(quick.get_layer(name).parts) for name in ("hidden", "hidden_2")] == [7, 1]
    assert gradients_in_bfloat16(quick) == (precision == "bfloat16")
    assert not gradients_in_bfloat16(plain)
    before = plain.get_weights()
    for again, first in zip(dense._plain(quick, spec, 3).get_weights(), before, strict=True):
        assert np.array_equal(again, first), "it begins with the weights of the plain one"
    assert np.allclose(quick.predict_on_batch(rows), plain.predict_on_batch(rows), atol=1e-6)
    for model in (plain, quick):
        model.compile(keras.optimizers.SGD(1.0), "categorical_crossentropy", jit_compile=False)
        model.train_on_batch(rows, labels)
    trained = dense._plain(quick, spec, 3).get_weights()
    for ours, theirs, first in zip(trained, plain.get_weights(), before, strict=True):
        step = np.abs(theirs - first).max()
        assert np.abs(ours - theirs).max() <= rounding * step + 1e-7, "the gradient is the same but for rounding"


def test_a_layer_in_parts_goes_on_from_its_checkpoint_and_no_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(dense, "_LARGE", 100)
    monkeypatch.setattr(parts, "_PART", 100)
    data = labelled("flatten")
    short, long = (HeadSpec.make("flatten", hidden=16, epochs=epochs, seed=1) for epochs in (2, 4))
    fit(short, data, TrainingContext(checkpoint=Checkpoint(tmp_path)))
    whole, resumed = (
        fit(long, data, TrainingContext()),
        fit(long, data, TrainingContext(checkpoint=Checkpoint(tmp_path))),
    )
    assert resumed.history == whole.history
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)  # where there are no parts
    with pytest.raises(OtherCheckpointError, match=r"checkpoint\.npz is not of .*model has other shapes"):
        fit(long, data, TrainingContext(checkpoint=Checkpoint(tmp_path)))


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adam_in_one_kernel_is_adam(decay: float) -> None:
    """Keras' own beside it, over a falling learning rate."""
    keras = import_keras()
    rng = np.random.default_rng(0)
    x, y = rng.random((128, 20), np.float32), np.eye(3, dtype=np.float32)[rng.integers(0, 3, 128)]
    settings = {
        **HEAD_DEFAULTS["gap"],
        "learning_rate": 0.01,
        "schedule": "cosine",
        "weight_decay": decay,
        "epochs": 50,
    }
    theirs = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 50), weight_decay=decay or None)
    if decay:
        theirs.exclude_from_weight_decay(var_names=["bias"])
    weights = []
    for adam in (optimizer(settings, 1), theirs):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3, "softmax")])
        model.compile(adam, "categorical_crossentropy", jit_compile=False)
        before = model.get_weights()
        for _ in range(50):
            model.train_on_batch(x, y)
        weights.append(model.get_weights())
    for ours, keras_own, first in zip(*weights, before, strict=True):
        assert np.abs(ours - keras_own).max() < 1e-5 < np.abs(ours - first).max()


def test_a_regression_whose_tables_do_not_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.machine.available_memory", lambda: 1_339)
    rows, labels = np.zeros((40, 8), np.float32), np.arange(40) % 3
    data = Data(rows, labels, rows, labels, 3)
    with pytest.raises(DoNotFitError, match=r"logreg of 40 rows and 3 classes takes 1.44 kB of memory, and 1.34 kB"):
        fit(make("logreg"), data, TrainingContext())


def test_what_a_large_head_takes_is_reported_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 20 * 10**9)
    flatten, gap = HeadSpec.make("flatten"), HeadSpec.make("gap")
    with caplog.at_level(logging.INFO):
        heads.require_memory(flatten, (7, 7, 512), 10)  # VGG16
        heads.require_memory(gap, (37, 37, 2560), 10)
        heads.require_memory(HeadSpec.make("logreg"), (37, 37, 2560), 10)
        heads.require_memory(flatten, (1, 1, 1280), 10)
    (told,) = caplog.messages
    assert (
        told == "the flatten head over rows of 7x7x512 has 6,425,354 parameters, training takes about 854 MB of memory"
    )
    with pytest.raises(
        DoNotFitError, match=r"37x37x2560 has 897,190,666 parameters, .* 22.2 GB .* means of the 2,560 ch"
    ):
        heads.require_memory(flatten, (37, 37, 2560), 10)


def test_the_parameters_are_those_of_the_head() -> None:
    for spec, shape in ((HeadSpec.make("flatten", hidden="8,4"), (2, 3, 5)), (HeadSpec.make("gap"), (2, 3, 5))):
        assert dense._count_parameters(spec, shape, 3) == DenseHead(build(spec, shape, 3), spec).parameters
