"""`weights` and `summary`: what the backbone is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from pipeline.commands.network import BackboneOption, InputSizeOption
from pipeline.commands.shared import (
    JsonOption,
    LayerOption,
    QuietOption,
    finish,
    opened,
)


def weights_command(
    context: typer.Context,
    backbone: BackboneOption = None,
    weights: Annotated[
        str | None, typer.Option(help="Get these weights ready: imagenet, untrained[:SEED], or a file.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tell where weights come from; with --weights, get them."""
    from pipeline.backbone.source import describe

    with opened(context) as workspace:
        result = describe(backbone, weights, workspace)
    finish(result, as_json, tuple(result))


def summary(
    backbone: BackboneOption = None,
    input_size: InputSizeOption = None,
    head: Annotated[Literal["flatten", "gap"], typer.Option(help="The head on top.")] = "gap",
    classes: Annotated[int, typer.Option(help="How many classes it tells apart.", min=2)] = 10,
    layer: LayerOption = None,
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer, not only those where to cut.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the layers and count the parameters of backbone and head."""
    from pipeline.commands import terminal
    from pipeline.training.summary import summarize

    terminal.begin(quiet=quiet)
    result = summarize(head, classes, layer, backbone, input_size)
    layers = result["layers"] if as_json else result.pop("layers")
    if not as_json:
        listed = [each for each in layers if every_layer or each["cut"]]
        headers = ("index", "layer", "type", "output", "parameters", "KiB an image", "work after it")
        terminal.table([_layer_row(each) for each in listed], headers)
    finish(result, as_json, tuple(result))


def _layer_row(layer: dict[str, Any]) -> tuple[object, ...]:
    shape = "x".join(map(str, layer["shape"]))
    stored, after = (f"{layer['bytes'] / 1024:,.0f}", f"{layer['share_after']:.1%}") if layer["cut"] else ("", "")
    return layer["index"], layer["name"], layer["type"], shape, layer["parameters"], stored, after
