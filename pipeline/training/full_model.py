"""The full model: the whole backbone with a head on top. What is frozen of it, where it is cut, how it is kept."""

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

_MOST_BYTES = own.MOST_STORED  # of a network.json
# Of the multiplications, at least, by default. InceptionV3 has 12% in its last two blocks, VGG16 9% in its last one.
_SHARE_TRAINED = 0.08
_HEAD_SEEDS = 1_000  # numbers that a head's own seeds are derived by come before
_MOST_AT_ONCE = 32  # rows that are answered together: more are no quicker, and a short batch is padded


class FullModel:
    """A backbone, computing as `spec` says up to its layer, and a dense head over that layer's tensors.

    Parameters
    ----------
    spec
        Its `precision` and `layer` are those of the network; the weights are loaded by `load_backbone`.
    make_head
        Makes of (h, w, c) a head over rows of that shape.
    architecture
        The file in which the architecture of an own network stands.
    """

    def __init__(
        self, spec: FeatureSpec, make_head: Callable[[tuple[int, ...]], DenseHead], architecture: Path | None = None
    ) -> None:
        self.spec = spec
        self.whole = build_backbone(spec.backbone, spec.precision, spec.input_size, architecture)
        self._architecture = architecture
        allow_any_names(self.whole)
        self.below = cut(self.whole, spec.layer)
        self._frozen = ""  # the last layer up to which all is frozen and where the network can be cut
        features = self.below.output
        self.head = make_head(tuple(features.shape[1:]))
        self.model: KerasModel = import_keras().Model(self.whole.inputs, self.head.model(features), name="full_model")

    def load_backbone(self, identity: str, path: Path | None) -> None:
        """Give the backbone the weights that a spec names. Raises WeightsError if the file is not of them."""
        check_weights(self.spec.backbone, path)
        load_weights(self.whole, identity, path)

    @property
    def cuts(self) -> list[str]:
        """The names of those of its layers whose output alone carries the network on, in their order."""
        layers = set(self.layers)
        return [name for name in cut_layers(self.whole) if name in layers]

    @property
    def layers(self) -> list[str]:
        """The names of the backbone's layers, in their order, up to the one the head stands on."""
        names = layer_names(self.whole)
        return names[: names.index(self.spec.layer) + 1]

    def work(self, after: str = "") -> tuple[int, int]:
        """Return how many multiplications of an image come after the layer `after`, and how many of them train."""
        calls = [*share_of_work(self.below, after), *share_of_work(self.head.model)]
        trains = next(i for i, (layer, _) in enumerate(calls) if getattr(layer, "trainable_weights", []))
        counts = [count for _, count in calls]
        return sum(counts), sum(counts[trains:])

    def freeze(self, until: int, *, batch_norm: bool) -> None:
        """Freeze the backbone's layers up to index `until`, -1 for none, and all batch norms unless `batch_norm`.

        A frozen batch norm is in inference mode: its statistics, too, stay as they are. So are all layers up to the
        last cut in the frozen part: `on_pixels` trains what `after` that cut trains. A nested model is one layer.
        """
        normalises = import_keras().layers.BatchNormalization
        names = self.layers
        frozen = set(names[: until + 1])
        for layer in sorted(self.whole.layers, key=lambda each: each.name in frozen):  # a layer in both stays frozen
            # One by one: Keras passes a value on to the layers inside only where it changes that of the outer one.
            for inner in layer._flatten_layers():
                inner.trainable = layer.name not in frozen and (batch_norm or not isinstance(inner, normalises))
        self._frozen = next((name for name in reversed(self.cuts) if name in frozen), "")

    def seed(self, seed: int) -> None:
        """Have the backbone's layers that draw random numbers as they train, as Dropout does, draw them from `seed`."""
        states = [each for each in self.whole.variables if each.name == "seed_generator_state"]
        for number, state in enumerate(states):
            drawn = np.random.SeedSequence([seed, _HEAD_SEEDS + number]).generate_state(1)[0]
            state.assign([int(drawn), 0])

    @property
    def trains(self) -> list[str]:
        """The names of the layers that training changes, in order."""
        layers = [*self.below.layers, *self.head.model.layers]
        return [layer.name for layer in layers if layer.trainable_weights]

    @property
    def trainable_parameters(self) -> int:
        """How many numbers training changes."""
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
        """Return what comes after `layer`, with the same weights: its rows (n, h, w, c) → (n, k) probabilities."""
        return layers_after(self.model, layer, name=f"after_{layer}")

    def features_after(self, layer: str) -> KerasModel | None:
        """Return what lies between `layer` and the head; None if nothing does."""
        return None if layer == self.spec.layer else layers_after(self.below, layer)

    def save(self, directory: Path) -> str:
        """Write backbone, head and our JSON; return the identity of the backbone's weights, as a spec names them."""
        weights_file.save(self.whole, directory / WEIGHTS_FILE)
        digest = files.sha256_file(directory / WEIGHTS_FILE)
        self.head.save(directory)
        about: dict[str, Any] = {
            "backbone": self.spec.backbone,
            "layer": self.spec.layer,
            "precision": self.spec.precision,
        }
        if self._architecture is not None:  # of an own network, whose file need not be at hand then
            about |= {"architecture": own.checked_architecture(self._architecture)}
        write_json(directory / JSON_FILE, {**about, "sha256": digest})
        return f"sha256:{digest}"

    @classmethod
    def load(cls, directory: Path, spec: FeatureSpec, precision: str | None = None) -> FullModel:
        """Return the network that `save` wrote, rebuilt from our own JSON and filled with plain arrays.

        It computes in another `precision` than it was trained in, if one is given.

        Raises
        ------
        RunError
            If the files are missing, or not those that were saved.
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
    """Return a layer that calls `model` in inference mode also while what is around it trains."""

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
    """Return the weights of the backbone that `Network.save` wrote. Raises RunError if they are not those."""
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
    """Return the index of the last frozen layer: that of the layer `until`, the number it says, or -1 for "none".

    `layers` are the backbone's, up to the one the head stands on.

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
        return min(int(until), len(layers) - 1)  # the default freezes all of a part that ends before it
    raise UsageError(
        f"--freeze-until takes a layer's name, its number from 0 to {len(layers) - 1}, or none, found "
        f"{until!r:.60} (`summary --backbone B --all` lists them){did_you_mean(until, layers)}"
    )


def default_freeze_until(whole: KerasModel, layer: str) -> str:
    """Return the name of the layer of `whole`, a backbone, up to which all is frozen by default; a head is on `layer`.

    At least 8% of the multiplications up to `layer` come after it, so that about the last block trains. It is the
    last such layer where the network can be cut; where that leaves more than half, as no cut lies inside of the last
    blocks, it is the last such layer of all. Where the first cut leaves less than 8%, it is the first cut.

    Raises
    ------
    SpecError
        If no head can stand on `layer`.
    """
    calls = share_of_work(cut(whole, layer))
    names = layer_names(whole)
    names = names[: names.index(layer) + 1]
    cuts = [name for name in cut_layers(whole) if name in names]
    left = total = sum(count for _, count in calls)
    behind = {}  # after the last call of each layer
    for operation, count in calls:
        left -= count
        behind[operation.name] = left
    enough = [name for name in names if behind[name] >= _SHARE_TRAINED * total]
    at_cut = next((name for name in reversed(cuts) if name in enough), cuts[0])
    return at_cut if behind[at_cut] <= total / 2 else enough[-1]


def cut_at(layers: Sequence[str], cuts: Sequence[str], until: int) -> str:
    """Return the last of `cuts`, layers whose output alone carries the network on, up to index `until` of `layers`.

    Raises
    ------
    SpecError
        If there is none: then nothing can be cached.
    """
    found = [name for name in cuts if layers.index(name) <= until]
    if not found:
        raise SpecError("--from-cache needs a frozen part to cache; name a layer to freeze by --freeze-until")
    return found[-1]


def predict(
    answer: Callable[[np.ndarray], Any], rows: Rows, size: int, advance: Callable[[int], None] = lambda n: None
) -> Iterator[np.ndarray]:
    """Yield what `answer`, as a model's `predict_on_batch`, says of rows, at most `size` at a time.

    Each batch is padded to one shape, so that it is compiled once.
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
    """Return what `predict` yields as one array: class probabilities (n, k) float32."""
    return np.concatenate(list(predict(answer, rows, size, advance)))


def to_dense_head(head: heads.Head, row_shape: tuple[int, ...], classes: int) -> DenseHead:
    """Return a head that was trained on cached rows as one over tensors of `row_shape` (h, w, c), ready to be trained.

    A logistic regression becomes a `gap` head without hidden layers: its scaler is the normalisation, its
    coefficients the weights of the softmax layer. An ensemble becomes the mean of its members.

    Raises
    ------
    ValueError
        If it reads other rows, or tells other classes apart.
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
    """Return a network as a function, compiled once for any number of images, that computes as cached features are.

    With `after` it takes rows of that layer, (n, h, w, c) in the storage type, instead of pixels; its output must carry
    the network on alone. It raises IceboxError if an answer is not a number.
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
