"""Build and fit the dense heads `flatten` and `gap`: small Keras models after a fixed normalisation per channel."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone import weights_file
from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core import files, machine
from pipeline.core.errors import DatasetError, DoNotFitError, RunError
from pipeline.core.files import write_json
from pipeline.core.spec import HeadSpec
from pipeline.core.units import size_text
from pipeline.training.batches import Shuffled
from pipeline.training.heads.base import JSON_FILE, Data, Fitted, class_weights, measure, not_numbers, require_numbers
from pipeline.training.heads.logreg import LogregHead
from pipeline.training.heads.parts import dense_in_parts, gradients_in_bfloat16
from pipeline.training.loop import NotFiniteError, TrainingContext, rebuild_normalization, train
from pipeline.training.rows import Rows, blocks

logger = logging.getLogger(__name__)

_WEIGHTS_FILE = "head.weights.h5"
TENSORFLOW = 700_000_000  # bytes that TensorFlow itself takes, measured on a CPU
_COPIES = 6  # of the parameters in training: weights, gradients, Adam's two moments, best weights, a temporary copy

# Least standard deviation of a channel, as a share of the median channel's. Without it, normalisation would amplify
# channels that hardly vary over the training rows.
_LEAST_DEVIATION = 0.01
_NEVER = -1e4  # a logit whose probability is 0
_LARGE = 2**22  # weights of a layer whose update dominates the time of a step, and whose memory is logged


class DenseHead:
    """A small Keras model over rows."""

    def __init__(self, model: KerasModel, spec: HeadSpec) -> None:
        self.model = model
        self.spec = spec

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32."""
        return np.concatenate([self.model.predict_on_batch(some) for _, some in blocks(rows)])

    def save(self, directory: Path) -> None:
        """Write the Keras weights and `head.json`."""
        weights_file.save(self.model, directory / _WEIGHTS_FILE)
        about = self.spec.to_dict()
        made = {
            "head": about.pop("head"),
            "settings": about,
            "input_shape": list(self.model.input_shape[1:]),
            "classes": self.model.output_shape[-1],
            "sha256": files.sha256_file(directory / _WEIGHTS_FILE),
        }
        write_json(directory / JSON_FILE, made)

    @classmethod
    def load(cls, directory: Path, made: Mapping[str, Any]) -> DenseHead:
        """Return the head that `save` wrote, rebuilt from `made`, the content of `head.json`, and plain arrays.

        Raises RunError if the weights file is not the one that was saved.
        """
        if files.sha256_file(directory / _WEIGHTS_FILE) != made["sha256"]:
            raise RunError(f"{_WEIGHTS_FILE} is not the file that was saved")
        spec = HeadSpec.make(made["head"], **made["settings"])
        model = build(spec, tuple(made["input_shape"]), made["classes"])
        weights_file.load(model, directory / _WEIGHTS_FILE)
        return cls(model, spec)

    @property
    def kind(self) -> str:
        """The head's name."""
        return self.spec.head

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(int(np.prod(weight.shape)) for weight in self.model.trainable_weights)


def build(spec: HeadSpec, input_shape: tuple[int, ...], classes: int, quick: bool = False) -> KerasModel:
    """Return an untrained dense head.

    `input_shape` is (h, w, c) or, for `gap`, also (c,): rows that are already pooled. With `quick`, large layers are
    built in the form that trains fastest on this machine, with the same initial weights, instead of as Keras' own.
    """
    layers = (keras := import_keras()).layers
    settings = spec.settings

    def first(number: int) -> Any:
        return keras.initializers.GlorotUniform(_seed(settings["seed"], number))

    inputs = output = keras.Input(input_shape, name="features")
    if spec.head == "gap" and len(input_shape) == 3:
        output = layers.GlobalAveragePooling2D(name="pool")(output)
    if settings["normalize"]:
        output = layers.Normalization(name="normalize")(output)
    if spec.head == "flatten":
        output = layers.Flatten(name="flatten")(output)
    for i, units in enumerate(settings["hidden"], 1):
        suffix = f"_{i}" if i > 1 else ""
        large = quick and output.shape[-1] * units >= _LARGE and not machine.gpu_count()
        made = dense_in_parts() if large else layers.Dense
        output = made(units, activation="relu", kernel_initializer=first(2 * i), name=f"hidden{suffix}")(output)
        if settings["dropout"]:
            drop = layers.Dropout(settings["dropout"], seed=_seed(settings["seed"], 2 * i + 1), name=f"dropout{suffix}")
            output = drop(output)
    output = layers.Dense(classes, "softmax", kernel_initializer=first(0), name="probabilities")(output)
    return keras.Model(inputs, output, name=f"{spec.head}_head")


def _seed(seed: int, number: int) -> int:
    """Return the seed of the random layer or initializer `number`, independent of other draws in the process."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def memory_needed(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> int:
    """Return about how many bytes training takes beside the rows."""
    return TENSORFLOW + _COPIES * 4 * _count_parameters(spec, row_shape, classes)


def _count_parameters(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> int:
    inputs = row_shape[-1] if spec.head == "gap" else math.prod(row_shape)
    return sum((a + 1) * b for a, b in itertools.pairwise([inputs, *spec.settings["hidden"], classes]))


def require_memory(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> None:
    """Log the parameters and the memory of a large head before it is built.

    Raises
    ------
    DoNotFitError
        If training takes more memory than is free on this machine.
    """
    if (count := _count_parameters(spec, row_shape, classes)) < _LARGE:
        return
    needed, free = memory_needed(spec, row_shape, classes), machine.available_memory()
    rows = "x".join(map(str, row_shape))
    told = (
        f"the {spec.head} head over rows of {rows} has {count:,} parameters, training takes about {size_text(needed)}"
    )
    if needed > free:
        raise DoNotFitError(
            f"{told} of memory, and {size_text(free)} are free; take fewer units (--hidden), a later --layer, or "
            f"--head gap or logreg, which read the means of the {row_shape[-1]:,} channels"
        )
    logger.info("%s of memory", told)


def channel_statistics(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of each channel (c,) float32 over blocks of rows (n, …, c), in one pass.

    Raises
    ------
    DatasetError
        If a row holds NaN or infinity.
    """
    count = 0
    mean, squares = np.zeros(1), np.zeros(1)
    for block in blocks:
        # Merge means and squared deviations, which loses no digits to cancellation: Chan, Golub and LeVeque (1983).
        values = block.reshape(-1, block.shape[-1]).astype(np.float32)
        n, some = len(values), values.mean(axis=0, dtype=np.float64)
        delta = some - mean
        squares = squares + values.var(axis=0, dtype=np.float64) * n + delta**2 * (count * n / (count + n))
        count += n
        mean = mean + delta * (n / count)
    if not np.isfinite(squares).all():
        raise DatasetError(not_numbers("the training split"))
    variance = squares / count
    deviations = np.sqrt(variance[variance > 0])
    floor = (_LEAST_DEVIATION * np.median(deviations)) ** 2 if len(deviations) else 1.0
    return mean.astype(np.float32), np.maximum(variance, floor).astype(np.float32)


def fit_dense(spec: HeadSpec, data: Data, watch: TrainingContext) -> Fitted:
    """Train a new dense head, or resume it from the checkpoint in `watch`."""
    settings, shape = spec.settings, data.train.shape[1:]
    model = build(spec, shape, data.classes, quick=True)
    if settings["normalize"]:
        normalise(model, (block for _, block in blocks(data.train)))
    head = DenseHead(model, spec)
    try:
        trained = train(
            model,
            Shuffled(data.train, data.train_labels, settings["batch_size"], settings["seed"]),
            lambda: measure(head.predict(data.val), data.val_labels),
            settings,
            class_weights(data.train_labels, data.classes, settings["class_weight"]),
            watch,
        )
    except NotFiniteError:
        for rows, where in ((data.train, "the training split"), (data.val, "the validation split")):
            require_numbers(rows, where)
        raise
    alone = DenseHead(_plain(model, spec, data.classes), spec)
    best = min(trained.history, key=lambda entry: entry["val_loss"])
    facts: dict[str, float | bool] = {"best_epoch": best["epoch"], "bfloat16_gradients": gradients_in_bfloat16(model)}
    return Fitted(alone, trained.history, "epoch", trained.seconds_per_epoch, facts, trained.seconds_before)


def _plain(model: KerasModel, spec: HeadSpec, classes: int) -> KerasModel:
    """Return the trained head as a model of Keras' own layers, without the optimizer, which is twice its size."""
    plain = build(spec, model.input_shape[1:], classes)
    for layer in plain.layers:
        trained = model.get_layer(layer.name)
        layer.set_weights(trained.whole() if hasattr(trained, "whole") else trained.get_weights())
    rebuild_normalization(plain)
    return plain


def normalise(model: KerasModel, blocks: Iterable[np.ndarray]) -> None:
    """Set the normalisation of `model` from blocks of rows: mean 0 and variance 1 / (h · w) for each channel.

    With variance 1 at each of the h · w positions, Adam's first steps overshoot: each weight moves by the learning
    rate, all 131,072 at once. `blocks` are rows (n, h, w, c), or (n, c) for a head that pools.
    """
    layer = model.get_layer("normalize")
    mean, variance = channel_statistics(blocks)
    places = math.prod(layer.input.shape[1:-1])  # h · w; 1 for pooled rows
    _set_normalization(layer, mean, variance * places)


def _set_normalization(layer: Any, mean: np.ndarray, variance: np.ndarray) -> None:
    layer.set_weights([mean, variance, np.zeros((), "int64")])
    layer.finalize_state()


def from_logreg(head: LogregHead, row_shape: tuple[int, ...]) -> DenseHead:
    """Return a logistic regression as a `gap` head without hidden layers, over rows of `row_shape` (h, w, c).

    A class without training rows keeps the probability 0.
    """
    scaler, regression = head.pipeline
    spec = HeadSpec.make("gap", hidden="none")
    model = build(spec, row_shape, head.classes)
    _set_normalization(model.get_layer("normalize"), scaler.mean_, scaler.scale_**2)
    coefficients, intercept = regression.coef_, regression.intercept_
    if len(coefficients) == 1:  # for two classes, scikit-learn keeps only the second one's logit
        coefficients = np.concatenate([0 * coefficients, coefficients])
        intercept = np.concatenate([0 * intercept, intercept])
    kernel = np.zeros((row_shape[-1], head.classes), np.float32)
    bias = np.full(head.classes, _NEVER, np.float32)
    kernel[:, regression.classes_], bias[regression.classes_] = coefficients.T, intercept
    model.get_layer("probabilities").set_weights([kernel, bias])
    return DenseHead(model, spec)


def average(heads: Sequence[DenseHead]) -> DenseHead:
    """Return one head whose probabilities are the mean of those of `heads`, all over the same rows."""
    if len(heads) == 1:
        return heads[0]
    keras = import_keras()
    inputs = keras.Input(heads[0].model.input_shape[1:], name="features")
    # Keras requires a different name for each model.
    models = [keras.Model(head.model.inputs, head.model.output, name=f"head_{i}") for i, head in enumerate(heads, 1)]
    output = keras.layers.Average(name="mean")([model(inputs) for model in models])
    return DenseHead(keras.Model(inputs, output, name="mean_of_heads"), heads[0].spec)
