"""Build the Keras model of a backbone (`build`) and load its weights (`load_weights`)."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.backbone import keras_archive, own, weights_file
from pipeline.backbone.keras_names import snake_case
from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.backbone.table import BACKBONES, Backbone
from pipeline.core.errors import SpecError, WeightsError
from pipeline.core.spec import OWN

_KERAS_POLICY = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}

_RESCALED = {f"EfficientNetB{i}" for i in range(8)}
_DEVIATION = (0.229, 0.224, 0.225)  # standard deviations of ImageNet's red, green and blue, as written in Keras' code


def build(
    backbone: str, precision: str = "float32", input_size: int | None = None, network: Path | None = None
) -> KerasModel:
    """Return the whole network without top and without its weights, computing in `precision` on float32 variables.

    It is the graph that Keras builds for its ImageNet weights. The input is (n, size, size, 3) float32 with the scaling
    of the backbone's row, the output is the last feature tensor. Without an `input_size`, the size is the row's.
    `network` is the file with an own network's architecture.

    Raises
    ------
    SpecError
        If the network does not accept this size; for an own network, as in `own.build_expected`.
    WeightsError, UsageError
        For an own network, as in `own.build_expected`.
    """
    if backbone.startswith(OWN):
        return own.build_expected(backbone, precision, input_size, network)
    keras = import_keras()
    row = BACKBONES[backbone]
    size = input_size or row.input_size
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_KERAS_POLICY[precision])
    try:
        model = _without_top(keras, row, size)
    except ValueError as error:  # raised by Keras for a refused size, and by its layers for too small feature maps
        reason = " ".join(str(error).split()).split(";")[0][:200]
        raise SpecError(
            f"{row.name} does not take images of {size}x{size} pixels ({reason}); its own size is {row.input_size}"
        ) from error
    finally:
        keras.config.set_dtype_policy(before)
    model.name = row.name
    _number_anew(model)
    return model


def _without_top(keras: Any, row: Backbone, size: int) -> KerasModel:
    """Return the graph that Keras builds for ImageNet's weights, without downloading these weights."""
    # The builder gets no `name` argument: some builders choose blocks and preprocessing by it.
    builder = partial(getattr(keras.applications, row.application), include_top=False, input_shape=(size, size, 3))
    if row.application not in _RESCALED:
        return builder(weights=None)
    with keras.StatelessScope(initialize_variables=False):  # no memory for weights: only the graph is used
        model = builder(weights=None)
    inputs = keras.Input((size, size, 3))
    return keras.models.clone_model(model, inputs, call_function=partial(_call_rescaled, keras))


def _call_rescaled(keras: Any, layer: Any, *inputs: Any, **options: Any) -> Any:
    """Call a layer of EfficientNet; after the Normalization layer, also add the Rescaling layer for ImageNet's weights.

    Keras adds this Rescaling layer only with ImageNet's weights, which were trained on pixels divided by the variance
    (see keras/src/applications/efficientnet.py).
    """
    output = layer(*inputs, **options)
    if not isinstance(layer, keras.layers.Normalization):
        return output
    return keras.layers.Rescaling([1.0 / math.sqrt(deviation) for deviation in _DEVIATION])(output)


def _number_anew(model: KerasModel) -> None:
    """Rename the layers as in the first model of a process: Keras continues its numbering over all models.

    Operations that are not layers, such as that of `x + 3`, are renamed too.
    """
    numbered: dict[str, list[tuple[int, Any]]] = {}
    for layer in model.operations:
        kind = snake_case(type(layer).__name__)
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", layer.name):
            numbered.setdefault(kind, []).append((int(match[1] or 0), layer))
    for kind, layers in numbered.items():
        for rank, (_, layer) in enumerate(sorted(layers, key=lambda each: each[0])):
            layer.name = f"{kind}_{rank}" if rank else kind


def check_weights(backbone: str, path: Path | None) -> None:
    """Raise WeightsError if the weights file at `path` contains anything other than numbers.

    The `.keras` file of an own network is not checked here, but when it is opened.
    """
    if path is not None and not (backbone.startswith(OWN) and keras_archive.is_archive(path)):
        weights_file.check(path)


def load_weights(model: KerasModel, identity: str, path: Path | None) -> None:
    """Load the weights `identity` into `model`: from the file at `path`, or drawn by the untrained recipe.

    `identity` is "sha256:DIGEST" or "untrained:RECIPE:SEED", as in a feature spec.

    Raises
    ------
    WeightsError
        If the file does not hold weights of this network.
    SpecError
        If this version does not have the untrained recipe, or if a `.keras` file was not saved by Keras 3.
    """
    if identity.startswith("untrained:"):
        from pipeline.backbone.untrained import initialise

        recipe, seed = identity.removeprefix("untrained:").rsplit(":", 1)
        initialise(model, recipe, int(seed))
        return
    if path is not None and keras_archive.is_archive(path):
        own.load_expected(model, identity, path)
        return
    try:
        if path is None:
            raise ValueError(f"no file is known for {identity}")
        weights_file.load(model, path)
    except WeightsError:
        raise
    except (UserWarning, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Keras raises different exceptions, depending on where its reader fails.
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(f"{path} does not hold weights of {model.name} without top: {reason}") from error
