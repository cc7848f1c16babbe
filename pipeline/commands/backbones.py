"""`backbones`: the table of networks, with what they cost on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.completion import backbone_names
from pipeline.commands.shared import JsonOption, PrecisionOption, QuietOption, opened

if TYPE_CHECKING:
    from pipeline.extraction.backbone_list import BackboneInfo


def backbones(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|FILE",
            help="Only these networks, or .keras files of your own.  [default: all]",
            autocompletion=backbone_names,
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure images/s on this machine first, with untrained weights.")
    ] = False,
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the networks: input size, parameters, bytes a row, images/s on this machine."""
    from pipeline.commands import terminal
    from pipeline.core import machine
    from pipeline.extraction.backbone_list import list_backbones

    here = machine.best_precision() if precision == "auto" else precision
    with opened(context) as workspace:
        if measure:
            from pipeline.extraction.measure_backbone import measure as measure_speed

            measure_speed(names or [], workspace, here)
        listed = list_backbones(names or [], workspace, here)
    if as_json:
        terminal.emit_json({"precision": here, "backbones": [asdict(each) for each in listed]})
        return
    headers = ("backbone", "pixels", "parameters", "mult. (G)", "bytes a row", "images/s", "weights")
    terminal.table(map(_row, listed), headers)
    if any(each.bytes_per_row is None and each.uncompressed for each in listed):
        terminal.say("bytes a row: ~ before compression, as none are cached yet", "dim")
    if any(each.images_per_second is None for each in listed):
        terminal.say(f"images/s at {here}: measured by `features`, or by `backbones --measure [NAME]…`", "dim")


def _row(each: BackboneInfo) -> tuple[str, ...]:
    from pipeline.core.units import size_text

    stored, memory = each.bytes_per_row, each.uncompressed
    return (
        each.name,
        f"{each.input_size or 'any':>6}",
        f"{each.parameters / 1e6:8.1f} M" if each.parameters else "",
        f"{each.multiplications / 1e9:9.2f}" if each.multiplications else "",
        f"{size_text(stored) if stored else f'~ {size_text(memory)}' if memory else '':>11}",
        f"{each.images_per_second:8,.1f}" if each.images_per_second else "",
        each.weights,
    )
