"""`runs`: the trained heads and full models there are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import typer

from pipeline.commands.shared import JsonOption, QuietOption, icebox, program

runs_app = typer.Typer(help="Look at the trained heads.", rich_markup_mode=None)


@runs_app.command("ls")
def runs_ls(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the trained heads and their accuracies, the oldest first."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        found = box.runs()
    if as_json:
        console.emit_json(found.to_dict())
        return
    if found.runs:
        _list_runs(found.runs)
    else:
        console.say("there are no runs; `train-head` makes them")
    for name, command in (*found.resumed_by.items(), *((name, "sweep") for name in found.unfinished_sweeps)):
        console.warn(f"stopped, go on by: {shlex.join([*program(context), command])} --resume {name}")


def _list_runs(runs: list[dict[str, Any]]) -> None:
    from pipeline.core import console
    from pipeline.runs.run_dataset import distinct_names

    datasets = distinct_names([each["dataset_path"] or each["dataset"] for each in runs])
    rows = [_run_row(each, name) for each, name in zip(runs, datasets, strict=True)]
    headers = ["run", "head", "dataset", "accuracy", "95% interval", "val", "seconds", "weights"]
    console.insert_column(rows, headers, 2, "backbone", [each["backbone"] for each in runs])
    console.table(rows, headers)


def _run_row(summary: Mapping[str, Any], dataset: str) -> list[object]:
    from pipeline.core import console

    return [
        summary["run"],
        summary["head"] if summary.get("stage", "head") == "head" else f"{summary['head']}, {summary['stage']}",
        dataset,
        f"{summary['accuracy']:.3f}",
        console.interval(summary["accuracy_interval"]),
        f"{summary['val_accuracy']:.3f}",
        f"{summary['seconds']:.1f}",
        summary["weights"],
    ]
