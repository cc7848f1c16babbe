"""`train-head`: stage two, a head trained from the cache."""

from __future__ import annotations

from typing import Annotated, Literal, Unpack, cast

import typer

from pipeline.api.options import declared
from pipeline.api.training_options import HeadOptions, TrainHeadOptions
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
    without_unused_views,
)


@takes(TrainHeadOptions)
def train_head(
    context: typer.Context,
    head: Annotated[Literal["flatten", "gap", "logreg"], typer.Option(help="Which head to train.")] = "gap",
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[TrainHeadOptions],
) -> None:
    """Train a head from the cache. Computes no feature."""
    with icebox(context, quiet=quiet) as box:
        if options.get("resume") is not None:
            run = box.train_head(**only_what_was_typed(context, options))
        else:
            settings = _without_foreign_settings(context, head, without_unused_views(context, options))
            run = box.train_head(dataset, head, **settings)
    show_run(run, as_json)
    exit_for_bad(run.quarantined, run.images, max_bad)


def _without_foreign_settings(context: typer.Context, head: str, options: TrainHeadOptions) -> TrainHeadOptions:
    """Leave out, with a notice, what a file or --like says about another kind of head."""
    from pipeline.core import console
    from pipeline.core.spec import HEAD_DEFAULTS

    given, stated = dict(options), typed(context)
    foreign = [
        name
        for name in declared(HeadOptions)
        if given[name] is not None and name not in HEAD_DEFAULTS[head] and name not in stated
    ]
    if foreign:
        console.warn(f"notice: a {head} head has no {', '.join(foreign)}; what was not typed of them is left out")
    return cast(TrainHeadOptions, {name: value for name, value in given.items() if name not in foreign})
