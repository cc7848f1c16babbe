"""`runs`: the trained heads and models there are."""

from __future__ import annotations

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
    from pipeline import runs, terminal
    from pipeline.asked import resume_commands

    with opened(context) as workspace:
        again = workspace.command
        found, stopped = runs.list_runs(workspace.runs), runs.unfinished(workspace.runs)
        commands = resume_commands(workspace.runs, stopped)
        sweeps = runs.unfinished(workspace.sweeps)
    if as_json:
        listed = [{"dataset": about["dataset"]["name"], **about["summary"]} for about in found]
        terminal.emit_json({"runs": listed, "unfinished": stopped, "unfinished_sweeps": sweeps})
        return
    if not found:
        terminal.say("there are no runs; `train-head` makes them")
    else:
        rows = [_run_row(about["summary"]) for about in found]
        terminal.table(rows, ("run", "head", "accuracy", "95% interval", "val", "seconds", "weights"))
    for name, command in (*commands.items(), *((name, "sweep") for name in sweeps)):
        terminal.warn(f"stopped, go on by: {again(command)} --resume {name}")


def _run_row(summary: dict[str, Any]) -> tuple[object, ...]:
    from pipeline import terminal

    return (
        summary["run"],
        summary["head"] if summary.get("stage", "head") == "head" else f"{summary['head']}, {summary['stage']}",
        f"{summary['accuracy']:.3f}",
        terminal.interval(summary["accuracy_interval"]),
        f"{summary['val_accuracy']:.3f}",
        f"{summary['seconds']:.1f}",
        summary["weights"],
    )
