"""The graph of a network: where it can be cut, what comes after a layer, how much work a layer is."""

from __future__ import annotations

import math
import re
from typing import Any

from pipeline.errors import SpecError, did_you_mean
from pipeline.keras_start import KerasModel, import_keras


def cut(model: KerasModel, layer: str) -> KerasModel:
    """Return the network up to `layer`, whose output alone must carry the network on.

    Raises
    ------
    SpecError
        If there is no such layer, or a path from input to output goes around it; the text names those nearest.
    """
    names = [each.name for each in model.layers]
    if layer not in names:
        mixed = ", ".join(name for name in names if re.fullmatch(r"mixed\d+", name))
        near = did_you_mean(layer, names)
        raise SpecError(f"{model.name} has no layer {layer!r} (`summary` lists them, often used: {mixed}){near}")
    if layer not in (cuts := cut_layers(model)):
        at = names.index(layer)
        before, after = [name for name in cuts if names.index(name) < at], [n for n in cuts if names.index(n) > at]
        nearest = " or ".join([*before[-1:], *after[:1]])
        raise SpecError(
            f"the output of {layer!r} does not carry {model.name} on by itself: other branches run beside it; "
            f"the nearest layers that work: {nearest}"
        )
    return import_keras().Model(model.inputs, model.get_layer(layer).output, name=f"{model.name}_to_{layer}")


def cut_layers(model: KerasModel) -> list[str]:
    """Return the names of the layers, but the input, through which every path from input to output passes, in order.

    Going through the layers in their order, which is one that `model` could be computed in: a layer's output carries
    the network on alone if nothing computed so far, but that output, is still needed by what comes after.
    """
    order = {id(layer): i for i, layer in enumerate(model.layers)}
    last_use = [0] * len(model.layers)
    for i, layer in enumerate(model.layers):
        for node in layer._inbound_nodes[:1]:
            for parent in node.parent_nodes:
                before = order[id(parent.operation)]
                last_use[before] = max(last_use[before], i)
    found, needed_until = [], 0  # the furthest layer that needs what was computed before this one
    for i, layer in enumerate(model.layers):
        if i > 0 and needed_until <= i:
            found.append(layer.name)
        needed_until = max(needed_until, last_use[i])
    return found


def multiplications(layer: Any) -> int:
    """Return how many multiplications with weights a layer does for one image."""
    kernel = getattr(layer, "kernel", None)
    if kernel is None:
        return 0
    places = math.prod(layer.output.shape[1:-1])  # where a convolution's kernel is laid; 1 for a dense layer
    return places * math.prod(kernel.shape)


def rest_of(model: KerasModel, layer: str) -> KerasModel | None:
    """Return what of `model` comes after `layer`; None if nothing does."""
    if layer == model.layers[-1].name:
        return None
    return import_keras().Model(model.get_layer(layer).output, model.output)
