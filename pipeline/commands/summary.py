"""`summary`: the layers of a network, and the parameters of it and of a head."""

from __future__ import annotations

from typing import Annotated, Unpack

import typer

from pipeline.api.inspection_options import SummaryOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, icebox, show


@takes(SummaryOptions)
def summary(
    context: typer.Context,
    *,
    every_layer: Annotated[
        bool, typer.Option("--all", help="List every layer, not only those where the network can be cut.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[SummaryOptions],
) -> None:
    """List the layers of a network, and count the parameters of network and head."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        done = box.summary(**options)
    if not as_json:
        headers, rows = done.table(every_layer=every_layer)
        console.table(rows, headers)
    show(done, as_json)
