"""A network as Keras builds it, with its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.backbone import weights_file
from pipeline.backbone.table import BACKBONES
from pipeline.errors import WeightsError
from pipeline.keras_start import KerasModel, import_keras

_KERAS_POLICY = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def build(backbone: str, precision: str = "float32") -> KerasModel:
    """Return the whole network without top, untrained, computing in `precision` on float32 variables.

    Input (n, size, size, 3) float32 in -1 … 1; output the last feature tensor.
    """
    keras = import_keras()
    row = BACKBONES[backbone]
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_KERAS_POLICY[precision])
    try:
        builder = getattr(keras.applications, row.application)
        shape = (row.input_size, row.input_size, 3)
        model = builder(include_top=False, weights=None, input_shape=shape, name=row.name)
    finally:
        keras.config.set_dtype_policy(before)
    _number_anew(model)
    return model


def _number_anew(model: KerasModel) -> None:
    """Give the layers the names they have in the first model that a process builds: Keras counts on and on."""
    numbered: dict[str, list[tuple[int, Any]]] = {}
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", layer.name):
            numbered.setdefault(kind, []).append((int(match[1] or 0), layer))
    for kind, layers in numbered.items():
        for rank, (_, layer) in enumerate(sorted(layers, key=lambda each: each[0])):
            layer.name = f"{kind}_{rank}" if rank else kind


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()


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
