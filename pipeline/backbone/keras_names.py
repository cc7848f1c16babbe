"""Rename the layers of an architecture, so that the numbers in generated names start anew in each model.

Keras continues the numbers over all models of a process. `new_names` gives the new names, `renamed_layers` and
`renamed_ends` apply them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import SpecError

TENSOR = "__keras_tensor__"


def snake_case(name: str) -> str:
    """Return the name that Keras gives the first layer of the class `name`, such as "conv2d" for "Conv2D"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()


def tensor(history: list[Any]) -> dict[str, Any]:
    """Return Keras' JSON notation for the tensor with the `history` [layer, call, output].

    Keras also stores the shape and dtype; here they are constants.
    """
    return {"class_name": TENSOR, "config": {"shape": [], "dtype": "float32", "keras_history": history}}


def new_names(layers: list[tuple[str, str]]) -> dict[str, str]:
    """Return name → new name for `layers`, given as (class, name); only names that Keras generated are changed.

    Raises SpecError if two layers have the same name, before or after renaming.
    """
    if len({name for _, name in layers}) < len(layers):
        raise SpecError("has two layers of the same name")
    numbered: dict[str, list[tuple[int, str]]] = {}
    for kind, name in layers:
        if match := re.fullmatch(rf"{snake_case(kind)}(?:_(\d{{1,9}}))?", name):
            numbered.setdefault(snake_case(kind), []).append((int(match[1] or 0), name))
    names = {name: name for _, name in layers}
    for kind, some in numbered.items():
        for rank, (_, name) in enumerate(sorted(some)):
            names[name] = f"{kind}_{rank}" if rank else kind
    if len(set(names.values())) < len(names):
        raise SpecError("has layers whose names are hard to tell apart; name them otherwise")
    return names


def renamed_layers(layers: list[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return `layers` with their new names, also in the tensors that the layers are called on.

    Without `names`, they are computed by `new_names`.
    """
    names = names or new_names([(each["class_name"], each["config"]["name"]) for each in layers])
    renamed = []
    for layer in layers:
        name = names[layer.get("name", layer["config"]["name"])]
        layer = {**layer, "config": {**layer["config"], "name": name}}
        if "inbound_nodes" in layer:
            layer |= {"name": name, "inbound_nodes": _renamed_tensors(layer["inbound_nodes"], names)}
        renamed.append(layer)
    return renamed


def _renamed_tensors(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed_tensors(each, names) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_name") == TENSOR:
        return tensor(renamed_ends(value["config"]["keras_history"], names))
    return {key: _renamed_tensors(each, names) for key, each in value.items()}


def renamed_ends(value: Any, names: Mapping[str, str]) -> Any:
    """Return a nested structure of [layer, call, output] with the new names.

    Raises SpecError if `names` lacks a layer of it.
    """
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        if value[0] not in names or not all(type(index) is int and index >= 0 for index in value[1:]):
            raise SpecError(f"refers to a layer {value[0]!r:.60} that it does not have")
        return [names[value[0]], *value[1:]]
    if isinstance(value, dict):
        return {key: renamed_ends(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [renamed_ends(each, names) for each in value]
    raise SpecError(f"refers to {value!r:.60}, expected a layer")
