"""`runs`: the trained heads and models there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from pipeline.commands.shared import (
    JsonOption,
    QuietOption,
    opened,
)

runs_app = typer.Typer(help="Look at the trained heads.", rich_markup_mode=None)


@runs_app.command("ls")
def runs_ls(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the trained heads and their accuracies, the oldest first."""
    from pipeline.commands import terminal
    from pipeline.runs import store
    from pipeline.runs.request import resume_commands
    from pipeline.runs.run_dataset import distinct_names

    with opened(context) as workspace:
        again = workspace.command
        found, stopped = store.list_datasets(workspace.runs), store.unfinished(workspace.runs)
        commands = resume_commands(workspace.runs, stopped)
        sweeps = store.unfinished(workspace.sweeps)
    if as_json:
        listed = [
            {
                "dataset": each.name,
                "dataset_path": each.path,
                "backbone": store.backbone_of(each.about),
                **each.about["summary"],
                "created": each.created,
            }
            for each in found
        ]
        terminal.emit_json({"runs": listed, "unfinished": stopped, "unfinished_sweeps": sweeps})
        return
    if not found:
        terminal.say("there are no runs; `train-head` makes them")
    else:
        datasets = distinct_names([each.path or each.name for each in found])
        rows = [_run_row(each.about["summary"], name) for each, name in zip(found, datasets, strict=True)]
        headers = ["run", "head", "dataset", "accuracy", "95% interval", "val", "seconds", "weights"]
        terminal.insert_column(rows, headers, 2, "backbone", [store.backbone_of(each.about) for each in found])
        terminal.table(rows, headers)
    for name, command in (*commands.items(), *((name, "sweep") for name in sweeps)):
        terminal.warn(f"stopped, go on by: {again(command)} --resume {name}")


def _run_row(summary: Mapping[str, Any], dataset: str) -> list[object]:
    from pipeline.commands import terminal

    return [
        summary["run"],
        summary["head"] if summary.get("stage", "head") == "head" else f"{summary['head']}, {summary['stage']}",
        dataset,
        f"{summary['accuracy']:.3f}",
        terminal.interval(summary["accuracy_interval"]),
        f"{summary['val_accuracy']:.3f}",
        f"{summary['seconds']:.1f}",
        summary["weights"],
    ]
