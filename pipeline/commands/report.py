"""`report`: a page about a run, several runs, or a sweep, that opens offline."""

from __future__ import annotations

from typing import Annotated, Unpack, cast

import typer

from pipeline.api.deployment_options import ReportOptions
from pipeline.commands.completion import run_names
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, icebox, show, typed


@takes(ReportOptions)
def report(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN…",
            help="A run as `runs ls` lists it, a path, latest, or best (by validation, on the dataset of the latest)."
            "  [default: latest; with --compare all runs on its dataset]",
            autocompletion=run_names,
        ),
    ] = None,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[ReportOptions],
) -> None:
    """Write a page about a run, or several, to look at in a browser.

    Mistakes, classes, a map of the images, doubtful labels, near copies; the file opens offline.
    """
    with icebox(context, quiet=quiet) as box:
        done = box.report(names or None, **_without_unused(context, options))
    show(done, as_json, "; ".join(done.left_out or ()) or None)


def _without_unused(context: typer.Context, options: ReportOptions) -> ReportOptions:
    """Return the options without what is of one run's images, if it was not typed: a file says it for such pages."""
    unused = {"map", "max_pixels"}.difference(typed(context))
    return (
        cast(ReportOptions, {name: value for name, value in options.items() if name not in unused})
        if (options.get("compare") or options.get("sweep"))
        else options
    )
