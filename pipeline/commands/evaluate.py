"""`evaluate`: what a trained run is worth on some images."""

from __future__ import annotations

from typing import Any, Unpack

import typer

from pipeline.api.deployment_options import EvaluateOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    JsonOption,
    MaxBadOption,
    QuietOption,
    RunArgument,
    exit_for_bad,
    icebox,
    show,
)
from pipeline.core.units import counted

_MOST_CLASSES = 20  # listed for people: those with the lowest F1


@takes(EvaluateOptions)
def evaluate(
    context: typer.Context,
    run: RunArgument,
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[EvaluateOptions],
) -> None:
    """Measure a trained run, with plots.

    A head is measured on cached rows, a full model on images. Images it was trained on are left out.
    """
    with icebox(context, quiet=quiet) as box:
        done = box.evaluate(run, **options)
    show(done, as_json)
    if not as_json:
        _list_classes(done.per_class, f"plots and predictions in {done.path}")
    exit_for_bad(done.quarantined_images, done.dataset_images, max_bad)


def _list_classes(per_class: list[dict[str, Any]], note: str) -> None:
    from pipeline.core import console

    listed = [each for each in per_class if each["support"]]
    hidden = len(listed) - _MOST_CLASSES
    if hidden > 0:
        listed = sorted(listed, key=lambda each: each["f1"])[:_MOST_CLASSES]
    names = ("class", "precision", "recall", "f1", "support")
    console.say("")
    console.table([tuple(_cell(each[name]) for name in names) for each in listed], names)
    if hidden > 0:
        console.say(f"and {counted(hidden, 'more class', 'more classes')}, with a higher f1")
    console.say(note)


def _cell(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value
