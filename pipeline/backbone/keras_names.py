"""The names of an architecture's layers: those that Keras counts on and on begin from the start in each model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import SpecError

TENSOR = "__keras_tensor__"


def snake_case(name: str) -> str:
    """Return the name that Keras gives the first layer of a class."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()


def tensor(history: list[Any]) -> dict[str, Any]:
    """Return Keras' notation for a tensor, `history` being its [layer, call, output]; Keras notes a shape beside it."""
    return {"class_name": TENSOR, "config": {"shape": [], "dtype": "float32", "keras_history": history}}


def new_names(layers: list[tuple[str, str]]) -> dict[str, str]:
    """Return name → new name of layers, given as (class, name); other names than running ones stay."""
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
    """Return layers under their new names, the tensors they are called on renamed too."""
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
    """Return a structure of [layer, call, output] with the new names. Raises SpecError if there is no such layer."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        if value[0] not in names or not all(type(index) is int and index >= 0 for index in value[1:]):
            raise SpecError(f"refers to a layer {value[0]!r:.60} that it does not have")
        return [names[value[0]], *value[1:]]
    if isinstance(value, dict):
        return {key: renamed_ends(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [renamed_ends(each, names) for each in value]
    raise SpecError(f"refers to {value!r:.60}, expected a layer")
