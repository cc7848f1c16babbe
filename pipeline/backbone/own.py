"""Own networks: read the `.keras` file that Keras 3 saves, check it without Keras, and rebuild the model from it.

Keras never reads the `.keras` file itself. `keras_config` checks and normalises the architecture, and a new model is
built from the result. The weights are loaded from an HDF5 file that `keras_archive` extracts. `read_network` returns
the identity of a network, `build` the untrained model, and `load_weights` loads its weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backbone import keras_archive, keras_config, weights_file
from pipeline.backbone.graph import output_shapes
from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core import files
from pipeline.core.errors import SpecError, UsageError, WeightsError

MOST_STORED = 2**26  # bytes of the JSON that is stored with a run
_TAKEN = ("gap_head", "flatten_head", "vector_as_row", "pixels", "full_model")
_MOST_NUMBERS = 2**29  # weights of a network: 2 GiB in float32, the limit of `weights_file`
_MOST_VALUES = 2**28  # values of a layer's output for one image: 1 GiB in float32

# Exceptions that Keras raises for an architecture that it cannot build, in addition to TensorFlow's own errors.
_NOT_BUILT = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    OSError,
    MemoryError,
)


@dataclass(frozen=True)
class OwnNetwork:
    """Identity and architecture of a network that was read from a `.keras` file.

    `name` is "own:" followed by the SHA-256 of the canonical JSON of `config`, the checked architecture; `keras_config`
    lists what is left out of it. `weights` is "sha256:" followed by the SHA-256 of the variables' paths, shapes, dtypes
    and values (see `keras_archive.identity_of_weights`). Neither depends on the file's name, folder, dates or layout.

    `input_size` is in pixels, None if the network takes images of any size. `default_layer` is the name of the layer
    that gives the network's output.
    """

    path: Path
    name: str
    weights: str
    input_size: int | None
    default_layer: str
    config: dict[str, Any]


def read_network(path: Path) -> OwnNetwork:
    """Return the identity and the architecture of the network in the `.keras` file at `path`, without TensorFlow.

    Raises
    ------
    SpecError
        If the file was not saved by Keras 3, or its layers are not Keras' own. Also if the network does not have one
        RGB image as input and one output.
    WeightsError
        If the weights are damaged, or contain anything other than numbers.
    """
    config = architecture(path)
    with keras_archive.extracted_weights(path) as plain:
        weights = keras_archive.identity_of_weights(plain)
    size, layer = keras_config.input_size(config), keras_config.output_layer(config)
    return OwnNetwork(path, keras_config.identity(config), weights, size, layer, config)


def count_parameters(path: Path) -> int:
    """Return the number of values in the weights of the `.keras` file at `path`.

    Raises
    ------
    SpecError
        If the file was not saved by Keras 3.
    WeightsError
        If the weights are damaged, or contain anything other than numbers.
    """
    with keras_archive.extracted_weights(path) as plain:
        return sum(math.prod(shape) for shape in keras_archive.variables(plain).values())


def architecture(path: Path) -> dict[str, Any]:
    """Return the checked architecture in the `.keras` file at `path`, as plain JSON values.

    Raises
    ------
    SpecError
        In the same cases as in `read_network`.
    """
    try:
        return keras_config.parse(keras_archive.read_config(path))
    except SpecError as error:
        if str(error).startswith(str(path)):
            raise
        raise SpecError(f"the network in {path} {error}") from error


def checked_architecture(path: Path) -> dict[str, Any]:
    """Return the checked architecture in a `.keras` file, or in the JSON stored with a run of an own network.

    Raises
    ------
    SpecError
        If the file contains no architecture, or one that `keras_config.check` refuses.
    """
    if keras_archive.is_archive(path):
        return architecture(path)
    try:
        stored = json.loads(files.read_small(path, MOST_STORED))["architecture"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError(f"{path} holds no architecture of a network ({error})") from error
    return keras_config.check(stored)


def identity_of(config: dict[str, Any]) -> str:
    """Return the identity "own:…" of an architecture, which is checked first. Raises SpecError if it is refused."""
    return keras_config.identity(keras_config.check(config))


def build(path: Path, precision: str = "float32", input_size: int | None = None) -> KerasModel:
    """Return the network in the `.keras` file at `path` without its weights.

    It computes in `precision` on float32 variables. Its input is (n, size, size, 3) float32, its output (n, h, w, c) or
    (n, c). Without an `input_size`, the size is the one that the network was saved for.

    Raises
    ------
    SpecError
        In the same cases as in `read_network`; also if Keras cannot build the network for this size, or if its output
        is not one feature map or vector of known size.
    WeightsError
        If the weights in the file are damaged, or belong to another network.
    UsageError
        If the network takes images of any size, and no `input_size` is given.
    """
    return _build_filled(architecture(path), path, precision, input_size)


def build_expected(identity: str, precision: str, input_size: int | None, path: Path | None) -> KerasModel:
    """Return the network `identity` ("own:…") from the file at `path`, a `.keras` file or the JSON stored with a run.

    Raises
    ------
    SpecError
        If `path` is None, or the file contains another network; otherwise as in `build`.
    WeightsError, UsageError
        As in `build`.
    """
    if path is None:
        raise SpecError(f"the network {identity} is known by its hash alone; give its file: --backbone FILE.keras")
    config = checked_architecture(path)
    if (found := keras_config.identity(config)) != identity:
        raise SpecError(f"{path} is the network {found}, expected {identity}; give that file: --backbone FILE.keras")
    if not keras_archive.is_archive(path):
        return build_from(config, precision, input_size)
    return _build_filled(config, path, precision, input_size)


def _build_filled(config: dict[str, Any], path: Path, precision: str, input_size: int | None) -> KerasModel:
    with keras_archive.extracted_weights(path) as plain:
        held = sum(math.prod(shape) for shape in keras_archive.variables(plain).values())

    def require_held(numbers: int) -> None:
        if numbers != held:
            raise WeightsError(
                f"the weights in {path} are of another network: they are {held:,} numbers, its architecture claims "
                f"{numbers:,}; save it anew: model.save('name.keras')"
            )

    return _build(config, precision, input_size, require_held, str(path))


def build_from(config: dict[str, Any], precision: str = "float32", input_size: int | None = None) -> KerasModel:
    """Return the network of a stored architecture, which is checked again, without weights.

    Parameters and output are those of `build`; so are the exceptions, except those that concern the file.
    """
    return _build(keras_config.check(config), precision, input_size, _require_bounded, "the architecture")


def load_weights(model: KerasModel, path: Path) -> str:
    """Load the weights in the `.keras` file at `path` into `model`, and return their identity "sha256:…".

    Raises
    ------
    WeightsError
        If the weights do not fit the model, or if variables are missing or left over.
    SpecError
        If the file was not saved by Keras 3.
    """
    with keras_archive.extracted_weights(path) as plain:
        found = keras_archive.variables(plain)
        numbers = sum(math.prod(shape) for shape in found.values())
        if (len(found), numbers) != (len(model.weights), model.count_params()):
            raise WeightsError(
                f"the weights in {path} are of another network: {len(found)} variables of {numbers:,} numbers, "
                f"expected {len(model.weights)} of {model.count_params():,}"
            )
        try:
            weights_file.load(model, plain)
        except WeightsError:
            raise
        except (UserWarning, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"the weights in {path} do not fit its architecture: {_reason(error)}") from error
        return keras_archive.identity_of_weights(plain)


def load_expected(model: KerasModel, identity: str, path: Path) -> None:
    """Load the weights `identity` ("sha256:…") from the `.keras` file at `path` into `model`.

    Raises
    ------
    WeightsError
        If the file contains other weights; otherwise as in `load_weights`.
    SpecError
        As in `load_weights`.
    """
    if (found := load_weights(model, path)) != identity:
        raise WeightsError(f"{path} holds the weights {found}, expected {identity}; give the file that holds those")


def _require_bounded(numbers: int) -> None:
    if numbers > _MOST_NUMBERS:
        raise SpecError(f"the architecture claims {numbers:,} weights, more than {_MOST_NUMBERS:,}")


def _build(
    config: dict[str, Any], precision: str, input_size: int | None, require: Callable[[int], None], what: str
) -> KerasModel:
    size = input_size or keras_config.input_size(config)
    if size is None:
        raise UsageError(f"{what} takes images of any size: say which by --input-size N")
    keras = import_keras()
    import tensorflow as tf

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    try:
        model = _allocated_if(require, keras_config.at_size(config, size))
    except (SpecError, WeightsError):
        raise
    except (*_NOT_BUILT, tf.errors.OpError) as error:
        raise SpecError(f"Keras cannot build {what} for images of {size} pixels: {_reason(error)}") from error
    finally:
        keras.config.set_dtype_policy(before)
    _require_features(model, what)
    return model


def _allocated_if(require: Callable[[int], None], config: dict[str, Any]) -> KerasModel:
    """Return the model that Keras builds from `config`.

    `require` is called with the number of weights before memory for them is allocated. It raises to refuse the model.
    """
    import keras  # import_keras would reset the dtype policy
    from keras.src.backend.common import global_state

    try:
        with keras.StatelessScope(initialize_variables=False):
            model: KerasModel = keras.saving.deserialize_keras_object(config, safe_mode=True)
            require(sum(math.prod(weight.shape) for weight in model.weights))
    except BaseException:
        global_state.set_global_attribute("uninitialized_variables", [])  # else the next model would allocate them
        raise
    with keras.StatelessScope():
        pass  # at the end of this scope, Keras initialises the variables created above
    return model


def _require_features(model: KerasModel, what: str) -> None:
    """Raise SpecError if the model cannot be used as a backbone.

    Its output must be (h, w, c) or (c,) of known size, with one row for each image, and differ from its input. No layer
    may give more than 2**28 values for one image, or have a name that Icebox uses for its own layers.
    """
    if model.output is model.input:
        raise SpecError(f"{what} gives the images as they are: its output is its input")
    for name, shape in output_shapes(model):
        if math.prod(size or 1 for size in shape) > _MOST_VALUES:
            raise SpecError(f"{what} has an output of {shape} at {name!r}, too large for one image")
    if taken := next((layer.name for layer in model.layers if layer.name in _TAKEN), None):
        raise SpecError(
            f"{what} has a layer named {taken!r}, as the program names one of its own; save it under another"
        )
    shape = tuple(model.output.shape[1:])
    if None in shape:
        raise SpecError(f"{what} has an output of {shape}, expected one of known size: (h, w, c) or (c,)")
    if len(shape) not in (1, 3):
        raise SpecError(
            f"{what} has an output of {shape}, expected a feature map (h, w, c) or a vector (c,); reshape or pool it, "
            "and save that model"
        )
    pair = import_keras().KerasTensor((2, *model.input.shape[1:]), model.input.dtype)
    if (rows := model.compute_output_spec(pair).shape[0]) != 2:
        raise SpecError(f"{what} gives {rows} rows for 2 images: it mixes images with one another; save a model of one")


def _reason(error: BaseException) -> str:
    # For an error inside a layer, Keras puts a long introduction before the error's own message.
    text = str(error).rpartition("Exception encountered: ")[2].strip()
    return text.split("\n")[0][:200] or type(error).__name__
