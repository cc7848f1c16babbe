"""`report`: runs to look at, each as one page that opens offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands.completion import run_names
from pipeline.commands.shared import (
    MAX_PIXELS,
    JsonOption,
    MaxPixelsOption,
    QuietOption,
    finish,
    opened,
    program,
    typed,
)

_SHOWN = (
    "page",
    "bytes",
    "images",
    "likely_wrong_labels",
    "near_copies",
    "near_copies_across_splits",
    "best",
    "seconds",
)


_IMAGES = {"projection": "--map", "max_pixels": "--max-pixels"}


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
    compare: Annotated[bool, typer.Option("--compare", help="Compare several runs on one page.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="RUN is a sweep: a page about all its settings.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page.  [default: reports/NAME.html in the data directory]"),
    ] = None,
    projection: Annotated[
        Literal["tsne", "pca"] | None,
        typer.Option("--map", help="How the map is made.  [default: tsne up to 5,000 images, else pca]"),
    ] = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a page of a run, or of several, to look at in a browser.

    Mistakes, classes, a map of the images, doubtful labels, near copies; the file opens offline.
    """
    from pipeline.core.errors import UsageError
    from pipeline.report.run_report import require_target

    if compare and sweep:
        raise UsageError("--compare is of runs, --sweep of a sweep; leave one of them out")
    if names and len(names) > 1 and not compare:
        raise UsageError("several runs make one page with --compare only")
    if (compare or sweep) and (others := sorted(_IMAGES.keys() & typed(context))):
        raise UsageError(f"{_IMAGES[others[0]]} is of one run's images; it goes with neither --compare nor --sweep")
    chosen = names[0] if names else "latest"
    start = time.perf_counter()
    with opened(context) as workspace:
        reports = workspace.root / "reports"
        if compare or sweep:
            from pipeline.report import comparison as pages

            folder = pages.find_sweep(chosen, workspace.sweeps) if sweep else None
            target = out or reports / f"{folder.name if folder else 'compare'}.html"
            result = (
                pages.report_sweep(folder, target)
                if folder
                else pages.report_comparison(names or [], workspace, target)
            )
        else:
            from pipeline.report.run_report import write_report
            from pipeline.training.open_run import open_run

            run = open_run(workspace.runs, chosen)
            target = out or reports / f"{run.name}.html"
            require_target(target)
            result = write_report(run, workspace, target, program(context), max_pixels=max_pixels, method=projection)
    result["seconds"] = round(time.perf_counter() - start, 3)
    finish(result, as_json, _SHOWN, note="; ".join(result.get("left_out", [])) or None)
