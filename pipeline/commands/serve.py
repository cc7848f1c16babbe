"""`serve`: a run over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import typer

from pipeline.api.deployment_options import ServeOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, RunArgument, icebox

if TYPE_CHECKING:
    from pipeline.api.deployment_results import ServeResult


@takes(ServeOptions)
def serve(
    context: typer.Context,
    run: RunArgument,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[ServeOptions],
) -> None:
    """Serve a run over HTTP: an upload page and a JSON endpoint."""
    from pipeline.core import console

    def on_ready(served: ServeResult) -> None:
        if as_json:
            console.emit_json(served.to_dict())

    with icebox(context, quiet=quiet) as box:
        box.serve(run, on_ready=on_ready, **options)
