"""The heads: build, fit, save and load. Each maps cached rows to class probabilities.

`flatten` reads full tensors (n, h, w, c), `gap` and `logreg` their spatial means (n, c). `flatten` and `gap`
stand behind a fixed per-channel normalisation learned from the training rows.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.backbone import KerasModel, import_keras
from pipeline.cache import storage
from pipeline.errors import RunError
from pipeline.rows import Rows, blocks
from pipeline.runs import write_json
from pipeline.spec import HeadSpec

logger = logging.getLogger(__name__)

READS = {"flatten": "features", "gap": "pooled", "logreg": "pooled"}

_WEIGHTS_FILE = "head.weights.h5"
_SKOPS_FILE = "head.skops"
_JSON_FILE = "head.json"

# A channel that hardly varies over the training rows must not be blown up: its deviation counts as at least
# this share of the median channel's.
_LEAST_DEVIATION = 0.01


class Head(Protocol):
    """A fitted head."""

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32."""
        ...

    def save(self, directory: Path) -> None:
        """Write the head into a run directory."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers were learned by gradient or solver."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A head and how it came about: one history entry an epoch (or a solver's fit), over the key `x`."""

    head: Head
    history: list[dict[str, float]]
    x: str
    seconds_per_epoch: float | None


@dataclass(frozen=True)
class Data:
    """What a head is fitted on: rows and (n,) int labels of the training and validation splits."""

    train: Rows
    train_labels: np.ndarray
    val: Rows
    val_labels: np.ndarray
    classes: int


def fit(spec: HeadSpec, data: Data, advance: Callable[[int], None]) -> Fitted:
    """Train a new head; `advance(1)` is called after each epoch, or fit of the solver."""
    return _fit_logreg(spec, data, advance) if spec.head == "logreg" else _fit_dense(spec, data, advance)


def steps(spec: HeadSpec) -> int:
    """Return how often `fit` advances at most."""
    return len(_LOGREG_FRACTIONS) if spec.head == "logreg" else spec.settings["epochs"]


def load(directory: Path) -> Head:
    """Return the head that `save` wrote.

    It is rebuilt from our own JSON and filled with plain arrays; nothing in the file can run code.

    Raises
    ------
    RunError
        If the files are missing, or are not what the JSON says.
    """
    try:
        made = json.loads((directory / _JSON_FILE).read_text())
        file = _SKOPS_FILE if made["head"] == "logreg" else _WEIGHTS_FILE
        if storage.sha256_file(directory / file) != made["sha256"]:
            raise RunError(f"{file} is not the file that was saved")
        if made["head"] == "logreg":
            return LogregHead.load(directory, made["classes"])
        spec = HeadSpec.make(made["head"], **made["settings"])
        model = build(spec, tuple(made["input_shape"]), made["classes"])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras only warns where a file lacks or adds layers
            model.load_weights(directory / _WEIGHTS_FILE)
    except Exception as error:
        # JSON, Keras, HDF5, zip and skops readers raise many kinds, some of them over dozens of lines.
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RunError(f"no head can be loaded from {directory}: {reason}") from error
    return DenseHead(model, spec)


# Dense heads


class DenseHead:
    """A small Keras model over rows."""

    def __init__(self, model: KerasModel, spec: HeadSpec) -> None:
        self.model = model
        self.spec = spec

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32."""
        return np.concatenate([self.model.predict_on_batch(rows[block]) for block in blocks(rows)])

    def save(self, directory: Path) -> None:
        """Write Keras weights and our JSON."""
        self.model.save_weights(directory / _WEIGHTS_FILE)
        made = {
            "head": self.spec.head,
            "settings": dict(self.spec.settings),
            "input_shape": list(self.model.input_shape[1:]),
            "classes": self.model.output_shape[-1],
            "sha256": storage.sha256_file(directory / _WEIGHTS_FILE),
        }
        write_json(directory / _JSON_FILE, made)

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(int(np.prod(weight.shape)) for weight in self.model.trainable_weights)


def build(spec: HeadSpec, input_shape: tuple[int, ...], classes: int) -> KerasModel:
    """Return an untrained dense head.

    `input_shape` is (h, w, c) or, for `gap`, also (c,): rows that were pooled already.
    """
    layers = (keras := import_keras()).layers
    inputs = output = keras.Input(input_shape, name="features")
    if spec.head == "gap" and len(input_shape) == 3:
        output = layers.GlobalAveragePooling2D(name="pool")(output)
    if spec.settings["normalize"]:
        output = layers.Normalization(name="normalize")(output)
    if spec.head == "flatten":
        output = layers.Flatten(name="flatten")(output)
    output = layers.Dense(spec.settings["hidden"], "relu", name="hidden")(output)
    if spec.settings["dropout"]:
        output = layers.Dropout(spec.settings["dropout"], seed=spec.settings["seed"], name="dropout")(output)
    output = layers.Dense(classes, "softmax", name="probabilities")(output)
    return keras.Model(inputs, output, name=f"{spec.head}_head")


def channel_statistics(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of each channel (c,) float32, in one pass with bounded memory."""
    count = 0
    mean, squares = np.zeros(rows.shape[-1]), np.zeros(rows.shape[-1])
    for block in blocks(rows):
        # Chan, Golub and LeVeque (1983): merging means and squared deviations does not cancel digits.
        values = rows[block].reshape(-1, rows.shape[-1]).astype(np.float32)
        n, some = len(values), values.mean(axis=0, dtype=np.float64)
        delta = some - mean
        squares += values.var(axis=0, dtype=np.float64) * n + delta**2 * (count * n / (count + n))
        count += n
        mean += delta * (n / count)
    variance = squares / count
    deviations = np.sqrt(variance[variance > 0])
    floor = (_LEAST_DEVIATION * np.median(deviations)) ** 2 if len(deviations) else 1.0
    return mean.astype(np.float32), np.maximum(variance, floor).astype(np.float32)


def _fit_dense(spec: HeadSpec, data: Data, advance: Callable[[int], None]) -> Fitted:
    keras = import_keras()
    settings = spec.settings
    keras.utils.set_random_seed(settings["seed"])
    model = build(spec, data.train.shape[1:], data.classes)
    if settings["normalize"]:
        _set_normalization(model.get_layer("normalize"), data.train)
    model.compile(
        keras.optimizers.Adam(float(settings["learning_rate"])),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # compiling takes longer than a small head trains
    )
    times = _EpochTimes(advance)
    model.fit(
        _batches(data.train, data.train_labels, settings["batch_size"], settings["seed"]),
        validation_data=_batches(data.val, data.val_labels, 256, None),
        epochs=settings["epochs"],
        shuffle=False,  # the batches shuffle themselves, by the seed
        callbacks=[times.callback(), *_early_stopping(settings["patience"])],
        verbose=0,
    )
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    columns = zip(*(model.history.history[name] for name in names), strict=True)
    history = [
        {"epoch": epoch, **{name: float(value) for name, value in zip(names, values, strict=True)}}
        for epoch, values in enumerate(columns, 1)
    ]
    # Without the optimizer, whose state is twice the size of the head.
    head = DenseHead(keras.Model(model.inputs, model.outputs), spec)
    return Fitted(head, history, "epoch", times.median())


def _set_normalization(layer: Any, rows: Rows) -> None:
    """Bring each channel to mean 0 and, over all the places where an image shows it, to variance 1 together.

    At variance 1 in each of h · w places, the first steps of Adam overshoot: each weight moves by the learning
    rate, all of 131,072 at once.
    """
    mean, variance = channel_statistics(rows)
    places = math.prod(rows.shape[1:-1])  # h · w; 1 for pooled rows
    layer.set_weights([mean, variance * places, np.zeros((), "int64")])
    layer.finalize_state()


def _early_stopping(patience: int) -> list[Any]:
    if not patience:
        return []
    callbacks = import_keras().callbacks
    return [callbacks.EarlyStopping("val_loss", patience=patience, restore_best_weights=True)]


def _batches(rows: Rows, labels: np.ndarray, size: int, seed: int | None) -> Any:
    """Return batches for Keras, in a new order each epoch drawn from `seed`, or in row order if it is None."""

    class Batches(import_keras().utils.PyDataset):
        def __init__(self) -> None:
            super().__init__(workers=1, max_queue_size=4)
            self._random = np.random.default_rng(seed)
            self._shuffle()

        def __len__(self) -> int:
            return -(-len(rows) // size)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            at = self._order[index * size : (index + 1) * size]
            return rows[at], labels[at]

        def on_epoch_end(self) -> None:
            self._shuffle()

        def _shuffle(self) -> None:
            self._order = np.arange(len(rows)) if seed is None else self._random.permutation(len(rows))

    return Batches()


class _EpochTimes:
    """Times epochs without validation; the first one, which compiles, counts only if it stays alone."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._started = 0.0
        self._last_batch = 0.0
        self._seconds: list[float] = []

    def callback(self) -> Any:
        return import_keras().callbacks.LambdaCallback(
            on_epoch_begin=self._begin, on_train_batch_end=self._batch, on_epoch_end=self._end
        )

    def median(self) -> float:
        return float(np.median(self._seconds[1:] or self._seconds))

    def _begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self._started = time.perf_counter()

    def _batch(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self._last_batch = time.perf_counter()

    def _end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self._seconds.append(self._last_batch - self._started)
        self._advance(1)


# Logistic regression

# Shares of the training rows to fit on: what more images would bring. The last one is the head itself.
_LOGREG_FRACTIONS = (0.1, 0.25, 0.5, 1.0)


class LogregHead:
    """Standardisation and multinomial logistic regression over pooled rows."""

    def __init__(self, pipeline: Any, classes: int) -> None:
        self.pipeline = pipeline
        self.classes = classes

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32; 0 for a class that had no training row."""
        probabilities = np.zeros((len(rows), self.classes), np.float32)
        for block in blocks(rows):
            probabilities[np.ix_(block, self.pipeline.classes_)] = self.pipeline.predict_proba(rows[block])
        return probabilities

    def save(self, directory: Path) -> None:
        """Write a skops file and our JSON."""
        import skops.io

        skops.io.dump(self.pipeline, directory / _SKOPS_FILE)
        digest = storage.sha256_file(directory / _SKOPS_FILE)
        write_json(directory / _JSON_FILE, {"head": "logreg", "classes": self.classes, "sha256": digest})

    @classmethod
    def load(cls, directory: Path, classes: int) -> LogregHead:
        """Return the head in `directory`; a file that holds any type but scikit-learn's own is refused."""
        import skops.io
        from sklearn.pipeline import Pipeline

        path = directory / _SKOPS_FILE
        if strange := skops.io.get_untrusted_types(file=path):
            raise RunError(f"{path} holds types that a logistic regression does not: {', '.join(strange)}")
        pipeline = skops.io.load(path, trusted=[])
        if not isinstance(pipeline, Pipeline) or not max(pipeline.classes_) < classes:
            raise RunError(f"{path} does not hold a logistic regression over {classes} classes")
        return cls(pipeline, classes)

    @property
    def parameters(self) -> int:
        """Coefficients and intercepts."""
        regression = self.pipeline[-1]
        return regression.coef_.size + regression.intercept_.size


def _fit_logreg(spec: HeadSpec, data: Data, advance: Callable[[int], None]) -> Fitted:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = _class_balanced_order(data.train_labels)
    history: list[dict[str, float]] = []
    model: Any = None
    for fraction in _LOGREG_FRACTIONS:
        some = np.sort(order[: max(data.classes, round(fraction * len(order)))])
        rows, labels = data.train[some], data.train_labels[some]
        model = make_pipeline(StandardScaler(), LogisticRegression(**spec.settings))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in our own words
            model.fit(rows, labels)
        history.append(_accuracies(LogregHead(model, data.classes), rows, labels, data))
        advance(1)
    regression = model[-1]
    if max(regression.n_iter_) >= regression.max_iter:
        logger.warning("the regression did not converge in %d iterations: raise --max-iter", regression.max_iter)
    return Fitted(LogregHead(model, data.classes), history, "train_rows", None)


def _accuracies(head: LogregHead, rows: np.ndarray, labels: np.ndarray, data: Data) -> dict[str, float]:
    return {
        "train_rows": len(rows),
        "accuracy": float((head.predict(rows).argmax(axis=1) == labels).mean()),
        "val_accuracy": float((head.predict(data.val).argmax(axis=1) == data.val_labels).mean()),
    }


def _class_balanced_order(labels: np.ndarray) -> np.ndarray:
    """Return an order of the rows whose every beginning holds the classes as evenly as it can, else mixed."""
    random = np.random.default_rng(0)  # datasets list like beside like: the first of a class are no fair sample
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        at = random.permutation(np.flatnonzero(labels == label))
        rank[at] = np.arange(len(at))
    return np.lexsort((labels, rank))
