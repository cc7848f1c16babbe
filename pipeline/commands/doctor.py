"""`doctor`: what this machine has, and what a dataset is, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Unpack, cast

import typer

from pipeline.api.inspection_options import DoctorOptions
from pipeline.commands.completion import dataset_names
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    JsonOption,
    QuietOption,
    features_command,
    icebox,
    show,
    typed,
    without_unused_views,
)

if TYPE_CHECKING:
    from pipeline.api.inspection_results import DatasetCheckResult

_MOST_CLASSES = 20  # lines of the table
_LISTED = 10  # groups of copies and members of each, and bad images


@takes(DoctorOptions)
def doctor(
    context: typer.Context,
    dataset: Annotated[
        str | None,
        typer.Argument(
            metavar="DATASET",
            help="What --dataset of other commands takes.  [default: check the machine only]",
            autocompletion=dataset_names,
            show_default=False,
        ),
    ] = None,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[DoctorOptions],
) -> None:
    """Check this machine, or check a DATASET before computing anything.

    With DATASET: what is in it, what is wrong with it, what is cached, and what computing the rest takes here.
    """
    from pipeline.api.inspection_results import MachineResult
    from pipeline.core import console

    given = without_unused_views(context, options)
    if dataset is None:  # then a file of options may say what only a dataset takes, and nobody may type it
        given = cast(DoctorOptions, {name: given[name] for name in typed(context) if name in given})
    with icebox(context, quiet=quiet) as box:
        found = box.doctor(dataset, **given)
    if as_json or isinstance(found, MachineResult):
        show(found, as_json)
        return
    _show(found)
    if found.rows["missing"]:
        command = features_command(context) + (f" --max-bad {found.allowed_bad:g}" if found.quarantined else "")
        console.say(f"{'' if found.advice else 'nothing stands out; '}to compute them: {command}")


def _show(found: DatasetCheckResult) -> None:
    from pipeline.core import console

    rows = [(name, *counts.values()) for name, counts in found.classes.items()]
    console.table(rows[:_MOST_CLASSES], ("class", *next(iter(found.classes.values()))))
    if len(rows) > _MOST_CLASSES:
        console.say(f"and {len(rows) - _MOST_CLASSES:,} more; --json lists them all")
    show(found, as_json=False)
    for bad in found.quarantined_images[:_LISTED]:
        console.warn(f"bad: {bad.path}: {bad.reason}")
    _say_others(found.quarantined, "bad images")
    for title, groups in (("two labels", found.conflicting), ("nearly alike", found.near_copies_listed)):
        for group in groups[:_LISTED]:
            named = ", ".join(f"{each['path']} ({each['split']}, {each['label']})" for each in group[:_LISTED])
            console.say(f"{title}: {named}{f', and {len(group) - _LISTED:,} more' if len(group) > _LISTED else ''}")
    _say_others(len(found.conflicting), "groups with two labels")
    _say_others(len(found.near_copies_listed), "groups that are nearly alike")
    for sentence in found.advice:
        console.say(f"- {sentence}", "yellow")


def _say_others(count: int, things: str) -> None:
    from pipeline.core import console

    if count > _LISTED:
        console.say(f"and {count - _LISTED:,} more {things}; --json lists them all")
