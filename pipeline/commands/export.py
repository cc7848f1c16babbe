"""`export`: a run as one deployable model."""

from __future__ import annotations

from typing import Unpack

import typer

from pipeline.api.deployment_options import ExportOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, RunArgument, icebox, show


@takes(ExportOptions)
def export(
    context: typer.Context,
    run: RunArgument,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[ExportOptions],
) -> None:
    """Write a deployable model: pixels in, probabilities out."""
    with icebox(context, quiet=quiet) as box:
        done = box.export(run, **options)
    show(done, as_json, f"kept in {done.path}")
