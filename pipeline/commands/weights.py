"""`weights`: where the weights of a network come from."""

from __future__ import annotations

from typing import Unpack

import typer

from pipeline.api.inspection_options import WeightsOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, icebox, show


@takes(WeightsOptions)
def weights_command(
    context: typer.Context,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[WeightsOptions],
) -> None:
    """Show where the weights of a network come from; with --weights, make them ready."""
    with icebox(context, quiet=quiet) as box:
        done = box.weights(**options)
    show(done, as_json)
