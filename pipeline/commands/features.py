"""`features`: stage one, every image through the backbone once."""

from __future__ import annotations

from typing import Unpack

import typer

from pipeline.api.training_options import FeaturesOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    DatasetOption,
    JsonOption,
    LikeOption,
    MaxBadOption,
    QuietOption,
    exit_for_bad,
    icebox,
    show,
    without_unused_views,
)


@takes(FeaturesOptions)
def features(
    context: typer.Context,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[FeaturesOptions],
) -> None:
    """Compute the features that are missing, and keep them."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        done = box.features(dataset, **without_unused_views(context, options))
    show(done, as_json)
    if done.workers and not as_json:
        rows = [tuple(each.values()) for each in done.workers]
        console.table(rows, ("worker", "rows", "images/s", "time in model"))
    exit_for_bad(done.quarantined_images, done.images, max_bad)
