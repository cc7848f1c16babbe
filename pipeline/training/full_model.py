"""Build, freeze, cut, save and load full models: a whole backbone with a head on top.

`FullModel` is the network, `compile_model` makes a compiled predictor of it, and `to_dense_head` converts a head
that was trained on cached rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone import own, weights_file
from pipeline.backbone.build import build as build_backbone
from pipeline.backbone.build import check_weights, load_weights
from pipeline.backbone.frozen import features_of
from pipeline.backbone.graph import (
    allow_any_names,
    cut,
    cut_layers,
    cut_tensor,
    layer_names,
    layers_after,
    share_of_work,
)
from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.backbone.scaling import scale
from pipeline.backbone.weights import Weights
from pipeline.core import files
from pipeline.core.errors import IceboxError, RunError, SpecError, UsageError, did_you_mean
from pipeline.core.files import write_json
from pipeline.core.spec import FREEZE_UNTIL, FeatureSpec
from pipeline.training import heads
from pipeline.training.heads.dense import DenseHead, average, build, from_logreg
from pipeline.training.heads.logreg import LogregHead
from pipeline.training.loop import rebuild_normalization
from pipeline.training.rows import Rows, read_ahead

WEIGHTS_FILE = "backbone.weights.h5"
JSON_FILE = "network.json"
BatchPredictor = Callable[
    [np.ndarray], np.ndarray
]  # pixels (n, size, size, 3) uint8 RGB → probabilities (n, k) float32

_MOST_BYTES = own.MOST_STORED  # largest size of a network.json
# Least share of multiplications that train by default. InceptionV3's last two blocks have 12%, VGG16's last one 9%.
_SHARE_TRAINED = 0.08
_HEAD_SEEDS = 1_000  # a head derives its own seeds from smaller numbers
_MOST_AT_ONCE = 32  # rows in a batch of predictions: larger batches are no faster, and a short batch is padded


class FullModel:
    """A backbone, computing as `spec` says up to its layer, and a dense head over that layer's tensors.

    Parameters
    ----------
    spec
        Gives the network's `precision` and `layer`; `load_backbone` loads the weights.
    make_head
        Function that takes a row shape (h, w, c) and returns a head over rows of that shape.
    architecture
        The file that holds the architecture of an own network.
    """

    def __init__(
        self, spec: FeatureSpec, make_head: Callable[[tuple[int, ...]], DenseHead], architecture: Path | None = None
    ) -> None:
        self.spec = spec
        self.whole = build_backbone(spec.backbone, spec.precision, spec.input_size, architecture)
        self._architecture = architecture
        allow_any_names(self.whole)
        self.below = cut(self.whole, spec.layer)
        self._frozen = ""  # the last layer where the network can be cut and up to which all layers are frozen
        features = self.below.output
        self.head = make_head(tuple(features.shape[1:]))
        self.model: KerasModel = import_keras().Model(self.whole.inputs, self.head.model(features), name="full_model")

    def load_backbone(self, identity: str, path: Path | None) -> None:
        """Load the weights `identity` into the backbone. Raises WeightsError if the file holds other weights."""
        check_weights(self.spec.backbone, path)
        load_weights(self.whole, identity, path)

    @property
    def cuts(self) -> list[str]:
        """The names of the layers where the network can be cut, in order: all later layers need only their output."""
        layers = set(self.layers)
        return [name for name in cut_layers(self.whole) if name in layers]

    @property
    def layers(self) -> list[str]:
        """The names of the backbone's layers, in order, up to the layer whose output the head reads."""
        names = layer_names(self.whole)
        return names[: names.index(self.spec.layer) + 1]

    def work(self, after: str = "") -> tuple[int, int]:
        """Return the multiplications per image after the layer `after`, and how many of them are in trained layers."""
        calls = [*share_of_work(self.below, after), *share_of_work(self.head.model)]
        trains = next(i for i, (layer, _) in enumerate(calls) if getattr(layer, "trainable_weights", []))
        counts = [count for _, count in calls]
        return sum(counts), sum(counts[trains:])

    def freeze(self, until: int, *, batch_norm: bool) -> None:
        """Freeze the backbone's layers up to index `until`, -1 for none, and all batch norms unless `batch_norm`.

        A frozen batch norm runs in inference mode: its statistics do not change either. All layers up to the last cut
        in the frozen part run in inference mode too, so `on_pixels` trains what `after` that cut trains. A nested
        model counts as one layer.
        """
        normalises = import_keras().layers.BatchNormalization
        names = self.layers
        frozen = set(names[: until + 1])
        # Frozen layers come last, so that an inner layer shared by a trained and a frozen one ends frozen.
        for layer in sorted(self.whole.layers, key=lambda each: each.name in frozen):
            # Set each inner layer: Keras passes `trainable` on only where the outer layer's value changes.
            for inner in layer._flatten_layers():
                inner.trainable = layer.name not in frozen and (batch_norm or not isinstance(inner, normalises))
        self._frozen = next((name for name in reversed(self.cuts) if name in frozen), "")

    def seed(self, seed: int) -> None:
        """Seed the backbone's layers that draw random numbers during training, such as Dropout."""
        states = [each for each in self.whole.variables if each.name == "seed_generator_state"]
        for number, state in enumerate(states):
            drawn = np.random.SeedSequence([seed, _HEAD_SEEDS + number]).generate_state(1)[0]
            state.assign([int(drawn), 0])

    @property
    def trains(self) -> list[str]:
        """The names of the layers with trainable weights, in order."""
        layers = [*self.below.layers, *self.head.model.layers]
        return [layer.name for layer in layers if layer.trainable_weights]

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(int(np.prod(weight.shape)) for weight in self.model.trainable_weights)

    def on_pixels(self) -> KerasModel:
        """Return the model with preprocessing inside: (n, size, size, 3) uint8 RGB → (n, k) probabilities."""
        if not self._frozen:
            return self._from_pixels(self.model)
        rest = self.after(self._frozen)
        frozen = _in_inference_mode(cut(self.whole, self._frozen))
        return self._from_pixels(lambda images: rest(frozen(images)))

    def features_of_pixels(self) -> KerasModel:
        """Return the part below the head: (n, size, size, 3) uint8 RGB → (n, h, w, c)."""
        return self._from_pixels(self.below)

    def _from_pixels(self, model: Callable[[Any], Any]) -> KerasModel:
        keras = import_keras()
        inputs = keras.Input((self.spec.input_size, self.spec.input_size, 3), dtype="uint8", name="pixels")
        return keras.Model(inputs, model(scale(keras.ops.cast(inputs, "float32"), self.spec.scaling)))

    def after(self, layer: str) -> KerasModel:
        """Return the part after `layer`, sharing the weights: rows (n, h, w, c) → probabilities (n, k)."""
        return layers_after(self.model, layer, name=f"after_{layer}")

    def features_after(self, layer: str) -> KerasModel | None:
        """Return the part between `layer` and the head; None if the head reads `layer` itself."""
        return None if layer == self.spec.layer else layers_after(self.below, layer)

    def save(self, directory: Path) -> str:
        """Write backbone, head and `network.json`; return the identity of the backbone's weights for a FeatureSpec."""
        weights_file.save(self.whole, directory / WEIGHTS_FILE)
        digest = files.sha256_file(directory / WEIGHTS_FILE)
        self.head.save(directory)
        about: dict[str, Any] = {
            "backbone": self.spec.backbone,
            "layer": self.spec.layer,
            "precision": self.spec.precision,
        }
        if self._architecture is not None:  # so that loading does not need the own network's file
            about |= {"architecture": own.checked_architecture(self._architecture)}
        write_json(directory / JSON_FILE, {**about, "sha256": digest})
        return f"sha256:{digest}"

    @classmethod
    def load(cls, directory: Path, spec: FeatureSpec, precision: str | None = None) -> FullModel:
        """Return the network that `save` wrote, rebuilt from `network.json` and filled with plain arrays.

        It computes in `precision` if given, else in the precision of its training.

        Raises
        ------
        RunError
            If files are missing or differ from those that were saved.
        """
        try:
            made = _described(directory)
            if (made["backbone"], made["layer"], made["precision"]) != (spec.backbone, spec.layer, spec.precision):
                raise RunError(f"{JSON_FILE} is of another network than run.json says")
            _require_saved(directory, made)
            head = heads.load(directory)
            if not isinstance(head, DenseHead):
                raise RunError("its head is not one of a full model")
            architecture = directory / JSON_FILE if "architecture" in made else None
            network = cls(replace(spec, precision=precision or spec.precision), lambda shape: head, architecture)
            network.load_backbone("sha256:" + made["sha256"], directory / WEIGHTS_FILE)
        except RunError as error:
            raise RunError(f"no model can be loaded from {directory}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise RunError(f"no model can be loaded from {directory}: {reason}") from error
        return network


def _in_inference_mode(model: KerasModel) -> Any:
    """Return a layer that calls `model` in inference mode even while the outer model trains."""

    class InferenceMode(import_keras().layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def call(self, inputs: Any) -> Any:
            return self.model(inputs, training=False)

    return InferenceMode()


def _described(directory: Path) -> dict[str, Any]:
    return json.loads(files.read_small(directory / JSON_FILE, _MOST_BYTES))


def _require_saved(directory: Path, made: dict[str, Any]) -> None:
    if files.sha256_file(directory / WEIGHTS_FILE) != made["sha256"]:
        raise RunError(f"{directory / WEIGHTS_FILE} is not the file that was saved")


def saved_weights(directory: Path) -> Weights:
    """Return the backbone weights that `FullModel.save` wrote. Raises RunError if the file differs from the saved."""
    try:
        made = _described(directory)
        _require_saved(directory, made)
    except RunError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"the model in {directory} cannot be read ({error})") from error
    architecture = directory / JSON_FILE if "architecture" in made else None
    return Weights("file", f"sha256:{made['sha256']}", directory / WEIGHTS_FILE, architecture)


def frozen_until(layers: Sequence[str], until: str) -> int:
    """Return the index of the last frozen layer; -1 if `until` is "none".

    Parameters
    ----------
    layers
        Names of the backbone's layers, up to the one that the head reads.
    until
        A layer's name, its index as a decimal number, or "none".

    Raises
    ------
    UsageError
        If there is no such layer.
    """
    if until == "none":
        return -1
    if until in layers:
        return layers.index(until)
    if until.isascii() and until.isdecimal() and (int(until) < len(layers) or until == FREEZE_UNTIL):
        return min(int(until), len(layers) - 1)  # the default index may be too large: freeze all
    raise UsageError(
        f"--freeze-until takes a layer's name, its number from 0 to {len(layers) - 1}, or none, found "
        f"{until!r:.60} (`summary --backbone B --all` lists them){did_you_mean(until, layers)}"
    )


def default_freeze_until(whole: KerasModel, layer: str) -> str:
    """Return the name of the last layer of the backbone `whole` that is frozen by default; the head reads `layer`.

    At least 8% of the multiplications up to `layer` come after the returned layer, so about the last block trains.
    It is the last such layer where the network can be cut. If that cut leaves more than half of the multiplications,
    because the last blocks have no cut inside, it is the last such layer, cut or not. If the first cut leaves less
    than 8%, it is the first cut.

    Raises
    ------
    SpecError
        If no head can read `layer`.
    """
    calls = share_of_work(cut(whole, layer))
    names = layer_names(whole)
    names = names[: names.index(layer) + 1]
    cuts = [name for name in cut_layers(whole) if name in names]
    left = total = sum(count for _, count in calls)
    behind = {}  # multiplications after the last call of each layer
    for operation, count in calls:
        left -= count
        behind[operation.name] = left
    enough = [name for name in names if behind[name] >= _SHARE_TRAINED * total]
    at_cut = next((name for name in reversed(cuts) if name in enough), cuts[0])
    return at_cut if behind[at_cut] <= total / 2 else enough[-1]


def cut_at(layers: Sequence[str], cuts: Sequence[str], until: int) -> str:
    """Return the last of `cuts`, the layers where the network can be cut, up to index `until` of `layers`.

    Raises
    ------
    SpecError
        If there is no such cut: then no features can be cached.
    """
    found = [name for name in cuts if layers.index(name) <= until]
    if not found:
        raise SpecError("--from-cache needs a frozen part to cache; name a layer to freeze by --freeze-until")
    return found[-1]


def predict(
    answer: Callable[[np.ndarray], Any], rows: Rows, size: int, advance: Callable[[int], None] = lambda n: None
) -> Iterator[np.ndarray]:
    """Yield the outputs of `answer`, such as a model's `predict_on_batch`, for batches of at most `size` rows.

    Outputs are float32. A short batch is padded to the common shape, so that `answer` compiles only once.
    `advance` is called with the number of rows after each batch.
    """
    size = min(size, _MOST_AT_ONCE)
    parts = [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    for part, some in zip(parts, read_ahead(rows, parts), strict=True):
        padded = np.pad(some, [(0, size - len(part)), *[(0, 0)] * (some.ndim - 1)]) if len(part) < size else some
        yield np.asarray(answer(padded)[: len(part)], np.float32)
        advance(len(part))


def probabilities(
    answer: Callable[[np.ndarray], Any], rows: Rows, size: int, advance: Callable[[int], None] = lambda n: None
) -> np.ndarray:
    """Return the outputs of `predict` as one array: class probabilities (n, k) float32."""
    return np.concatenate(list(predict(answer, rows, size, advance)))


def to_dense_head(head: heads.Head, row_shape: tuple[int, ...], classes: int) -> DenseHead:
    """Return a trainable dense head over tensors of `row_shape` (h, w, c), made from a head trained on cached rows.

    A logistic regression becomes a `gap` head without hidden layers: its scaler becomes the normalisation, its
    coefficients the weights of the softmax layer. An ensemble becomes one model that averages its members.

    Raises
    ------
    ValueError
        If the head was trained on rows of another shape, or with another number of classes.
    """
    if isinstance(head, heads.Ensemble):
        return average([to_dense_head(member, row_shape, classes) for member in head.members])
    if isinstance(head, LogregHead):
        if head.classes != classes:
            raise ValueError("other classes")
        return from_logreg(head, row_shape)
    if not isinstance(head, DenseHead) or head.model.output_shape[-1] != classes:
        raise ValueError("other classes")
    model: Any = build(head.spec, row_shape, classes)
    model.set_weights(head.model.get_weights())
    rebuild_normalization(model)
    return DenseHead(model, head.spec)


def compile_model(network: FullModel, after: str | None = None) -> BatchPredictor:
    """Return `network` as a compiled function: pixels (n, size, size, 3) uint8 RGB → probabilities (n, k) float32.

    It computes features exactly as the cached ones are computed, and compiles once for any number of images. With
    `after`, a layer where the network can be cut, the function takes that layer's rows (n, h, w, c) in the storage
    type instead. The function raises IceboxError if a probability is NaN or infinite.
    """
    import tensorflow as tf

    head, spec = network.head.model, network.spec
    shape, kind = (spec.input_size, spec.input_size, 3), "uint8"
    if after is not None:
        tensor = cut_tensor(network.whole, after)
        shape, kind = (*(1, 1)[: 4 - len(tensor.shape)], *tensor.shape[1:]), spec.storage

    @tf.function(input_signature=[tf.TensorSpec((None, *shape), kind)], autograph=False)
    def run(inputs: tf.Tensor) -> tf.Tensor:
        features = features_of(network.below, inputs, spec, after)
        return tf.cast(head(features, training=False), tf.float32)

    def answer(inputs: np.ndarray) -> np.ndarray:
        said = run(tf.constant(inputs)).numpy()
        if not np.isfinite(said).all():
            raise IceboxError(f"answers are not numbers (NaN or infinite): {spec.precision} overflows")
        return said

    return answer
