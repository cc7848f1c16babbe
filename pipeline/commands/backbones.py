"""`backbones`: the table of networks, with what they cost on this machine."""

from __future__ import annotations

from typing import Annotated, Unpack

import typer

from pipeline.api.inspection_options import BackbonesOptions
from pipeline.commands.completion import backbone_names
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, icebox, show


@takes(BackbonesOptions)
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
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[BackbonesOptions],
) -> None:
    """List the networks: input size, parameters, bytes a row, images/s on this machine."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        done = box.backbones(names or (), **options)
    if as_json:
        show(done, as_json)
        return
    headers, rows = done.table()
    console.table(rows, headers)
    if any(each.bytes_per_row is None and each.uncompressed for each in done.backbones):
        console.say("bytes a row: ~ before compression, as none are cached yet", "dim")
    if any(each.images_per_second is None for each in done.backbones):
        console.say(f"images/s at {done.precision}: measured by `features`, or by `backbones --measure [NAME]…`", "dim")
