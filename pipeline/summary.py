"""Layers and parameter counts of the backbone and of a head on top."""

from __future__ import annotations

from typing import Any

from pipeline.backbone import BACKBONES, DEFAULT_BACKBONE, build, carries_alone, cut
from pipeline.heads.dense import build as build_head
from pipeline.spec import HeadSpec


def summarize(head: str, classes: int, layer: str | None = None) -> dict[str, Any]:
    """Return the layers up to `layer` and how many parameters would train with and without the backbone.

    Without a `layer` it is the backbone's default.
    """
    layer = layer or BACKBONES[DEFAULT_BACKBONE].default_layer
    whole = build(DEFAULT_BACKBONE)
    backbone = cut(whole, layer)
    on_top = build_head(HeadSpec.make(head), tuple(backbone.output.shape[1:]), classes)
    in_backbone, in_head = _trainable(backbone), _trainable(on_top)
    return {
        "layers": [_describe(i, each, backbone) for i, each in enumerate(backbone.layers)],
        "backbone": DEFAULT_BACKBONE,
        "layer": layer,
        "feature_shape": list(backbone.output.shape[1:]),
        "backbone_parameters": backbone.count_params(),
        "head": head,
        "classes": classes,
        "head_parameters": in_head,
        "trainable_all": in_backbone + in_head,
        "trainable_backbone_frozen": in_head,
    }


def _describe(index: int, layer: Any, model: Any) -> dict[str, Any]:
    return {
        "index": index,
        "name": layer.name,
        "type": type(layer).__name__,
        "shape": list(layer.output.shape[1:]),
        "parameters": layer.count_params(),
        "cut": index > 0 and carries_alone(model, layer.name),
    }


def _trainable(model: Any) -> int:
    return sum(int(weight.shape.num_elements()) for weight in model.trainable_weights)
