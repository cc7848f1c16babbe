"""`freeze` and `finetune`: the full model, trained from images or from cached rows of its frozen part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import typer

from pipeline.api.training_options import FinetuneOptions, FreezeOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    DatasetOption,
    JsonOption,
    LikeOption,
    MaxBadOption,
    QuietOption,
    exit_for_bad,
    icebox,
    only_what_was_typed,
    show_run,
    typed,
)

_OF_A_NEW_HEAD = ("head", "hidden", "dropout", "normalize")
_OF_CACHED_ROWS = ("memory", "storage")


@takes(FreezeOptions)
def freeze(
    context: typer.Context,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[FreezeOptions],
) -> None:
    """Train a gap head on the whole, frozen backbone, from images."""
    with icebox(context, quiet=quiet) as box:
        if options.get("resume") is not None:
            run = box.freeze(**only_what_was_typed(context, options))
        else:
            run = box.freeze(dataset, **options)
    show_run(run, as_json)
    exit_for_bad(run.quarantined, run.images, max_bad)


@takes(FinetuneOptions)
def finetune(
    context: typer.Context,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[FinetuneOptions],
) -> None:
    """Train the backbone's last layers and the head.

    From images, or with --from-cache from cached rows of the part that stays frozen.
    """
    with icebox(context, quiet=quiet) as box:
        if options.get("resume") is not None:
            run = box.finetune(**only_what_was_typed(context, options))
        else:
            run = box.finetune(dataset, **_without_unused(context, options))
    show_run(run, as_json)
    exit_for_bad(run.quarantined, run.images, max_bad)


def _without_unused(context: typer.Context, options: Mapping[str, Any]) -> Any:
    """Leave out what only a file of options says, and what this training has no use for."""
    stated = typed(context)
    unused = [*(_OF_A_NEW_HEAD if options["init"] is not None else ())]
    unused += () if options["from_cache"] else _OF_CACHED_ROWS
    return {name: value for name, value in options.items() if name not in unused or name in stated}
