"""A network as Keras builds it, with its weights."""

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
_DEVIATION = (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, as a literal in Keras


def build(
    backbone: str, precision: str = "float32", input_size: int | None = None, network: Path | None = None
) -> KerasModel:
    """Return the whole network without top, untrained, computing in `precision` on float32 variables.

    It is the graph that Keras builds for its ImageNet weights. Input (n, size, size, 3) float32, scaled as the
    backbone's row says; output the last feature tensor. Without an `input_size` it is the row's. `network` is the file
    with an own network's architecture.

    Raises
    ------
    SpecError
        If the network does not take that size.
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
    except ValueError as error:  # Keras' own, and what its layers say of an image that has become too small
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
    """Return the graph that Keras builds for ImageNet's weights, which it would download."""
    # Not by our name: some builders choose blocks and preprocessing by the name they are given.
    builder = partial(getattr(keras.applications, row.application), include_top=False, input_shape=(size, size, 3))
    if row.application not in _RESCALED:
        return builder(weights=None)
    with keras.StatelessScope(initialize_variables=False):  # layers without numbers: only their graph is taken
        model = builder(weights=None)
    inputs = keras.Input((size, size, 3))
    return keras.models.clone_model(model, inputs, call_function=partial(_call_rescaled, keras))


def _call_rescaled(keras: Any, layer: Any, *inputs: Any, **options: Any) -> Any:
    """Call a layer; after the normalization, the one layer that EfficientNet has for ImageNet's weights alone.

    See keras/src/applications/efficientnet.py: those weights were trained on pixels divided by the variance.
    """
    output = layer(*inputs, **options)
    if not isinstance(layer, keras.layers.Normalization):
        return output
    return keras.layers.Rescaling([1.0 / math.sqrt(deviation) for deviation in _DEVIATION])(output)


def _number_anew(model: KerasModel) -> None:
    """Give the layers the names they have in the first model that a process builds: Keras counts on and on.

    Operations that are no layers, as those of `x + 3`, are counted with them.
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
    """Raise WeightsError if a weights file is not plain numbers; the file of an own network is checked when opened."""
    if path is not None and not (backbone.startswith(OWN) and keras_archive.is_archive(path)):
        weights_file.check(path)


def load_weights(model: KerasModel, identity: str, path: Path | None) -> None:
    """Give `model` the weights that a spec names: from the file at `path`, or drawn from the untrained recipe.

    Raises
    ------
    WeightsError
        If the file does not hold weights of this network.
    SpecError
        If this version does not have the untrained recipe.
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
        # Keras raises whichever of these its reader stumbles into.
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(f"{path} does not hold weights of {model.name} without top: {reason}") from error
