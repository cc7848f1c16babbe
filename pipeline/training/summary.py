"""Summarize the layers and parameter counts of a backbone and of a head on top."""

from __future__ import annotations

import math
from typing import Any

from pipeline.backbone.build import build
from pipeline.backbone.graph import cut, cut_layers, nodes, share_of_work
from pipeline.backbone.source import architecture
from pipeline.core.spec import HeadSpec
from pipeline.training.heads.dense import build as build_head


def summarize(
    head: str, classes: int, layer: str | None = None, backbone: str | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Return the layers of `backbone` up to `layer`, and how many parameters train with and without a frozen backbone.

    `layer` is by default that of the backbone. For each layer where the network can be cut, "bytes" is the size of its
    output as uncompressed float16, and "share_after" the share of the multiplications that come after the layer.

    Raises
    ------
    UsageError
        If there is no such backbone.
    SpecError
        If the backbone cannot be cut at `layer`.
    """
    found = architecture(backbone)
    layer = layer or found.default_layer
    below = cut(build(found.name, input_size=input_size or found.input_size, network=found.file), layer)
    on_top = build_head(HeadSpec.make(head), tuple(below.output.shape[1:]), classes)
    in_backbone, in_head = _trainable(below), _trainable(on_top)
    return {
        "layers": _layers(below, _multiplications(on_top)),
        "backbone": found.label,
        "layer": layer,
        "feature_shape": list(below.output.shape[1:]),
        "backbone_parameters": below.count_params(),
        "multiplications": _multiplications(below) + _multiplications(on_top),
        "head": head,
        "classes": classes,
        "head_parameters": in_head,
        "trainable_all": in_backbone + in_head,
        "trainable_backbone_frozen": in_head,
    }


def _layers(backbone: Any, in_head: int) -> list[dict[str, Any]]:
    cuts = set(cut_layers(backbone))
    outputs = {backbone.layers[0]: backbone.inputs[0], **{node.operation: node.outputs[0] for node in nodes(backbone)}}
    total, described = _multiplications(backbone) + in_head, []
    for i, each in enumerate(backbone.layers):
        shape = list(outputs[each].shape[1:])
        at_cut = each.name in cuts
        described.append(
            {
                "index": i,
                "name": each.name,
                "type": type(each).__name__,
                "shape": shape,
                "parameters": each.count_params(),
                "cut": at_cut,
                "bytes": 2 * math.prod(shape) if at_cut else None,
                "share_after": (_multiplications(backbone, each.name) + in_head) / total if at_cut else None,
            }
        )
    return described


def _multiplications(model: Any, after: str = "") -> int:
    return sum(count for _, count in share_of_work(model, after))


def _trainable(model: Any) -> int:
    return sum(int(weight.shape.num_elements()) for weight in model.trainable_weights)
