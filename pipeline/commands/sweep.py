"""`sweep`: which head to take, and with which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import typer

from pipeline.api.training_options import SweepOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    DatasetOption,
    JsonOption,
    MaxBadOption,
    QuietOption,
    exit_for_bad,
    icebox,
    only_what_was_typed,
    typed,
    without_unused_views,
)
from pipeline.core.units import size_text

if TYPE_CHECKING:
    from pipeline.api.results import SweepResult

_MOST_LISTED = 30


@takes(SweepOptions)
def sweep(
    context: typer.Context,
    dataset: DatasetOption = "digits",
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[SweepOptions],
) -> None:
    """Try heads and settings on the cache, of one backbone or several; keep the best as a run.

    No feature is computed, unless with --compute.
    """
    from pipeline.core import console
    from pipeline.core.errors import UsageError

    with icebox(context, quiet=quiet) as box:
        if options.get("resume") is not None:
            done = box.sweep(**only_what_was_typed(context, options))
        else:
            if options.get("random") is None and "seed" in typed(context):
                raise UsageError("--seed is of the draw, so it goes with --random only; of the heads: --set seed=0,1,2")
            done = box.sweep(dataset, **without_unused_views(context, options))
    if as_json:
        console.emit_json(done.to_dict())
    else:
        _show(done)
    exit_for_bad(done.quarantined, done.images, max_bad)


def _show(done: SweepResult) -> None:
    from pipeline.core import console
    from pipeline.training.sweep.leaderboard import (
        fastest_sentence,
        has_several_backbones,
        noise_sentence,
        unmeasured_sentence,
        varied,
    )

    names, several = varied(done.runs), has_several_backbones(done.runs)
    rows = [_row(row, names[row["trial"]], several) for row in done.runs]
    console.table(rows[:_MOST_LISTED], _HEADERS_OF_SEVERAL if several else _HEADERS)
    if len(rows) > _MOST_LISTED:
        console.say(f"and {len(rows) - _MOST_LISTED:,} more in {done.path / 'leaderboard.csv'}")
    console.say(noise_sentence(done.runs))
    for sentence in (fastest_sentence(done.runs), unmeasured_sentence(done.runs)) if several else ():
        if sentence:
            console.say(sentence)
    low, high = done.best["accuracy_interval"]
    console.say(f"the best on the test split: accuracy {done.best['accuracy']:.4f} ({low:.4f} to {high:.4f})")
    console.say(f"kept as the run {done.best['run']}; the sweep, {done.seconds:,.0f} s, in {done.path}")


_HEADERS = ("rank", "head", "settings", "val", "95% interval", "p", "seconds", "parameters", "size")
_HEADERS_OF_SEVERAL = ("rank", "backbone", *_HEADERS[1:], "images/s", "a row")


def _row(row: dict[str, Any], settings: str, several: bool) -> tuple[Any, ...]:
    rank, *cells = _cells(row, settings)
    if not several:
        return (rank, *cells)
    rate, size = row["images_per_second"], row["bytes_per_row"]
    return (
        rank,
        row["backbone"],
        *cells,
        "" if rate is None else f"{rate:,.4g}",
        "" if size is None else size_text(size),
    )


def _cells(row: dict[str, Any], settings: str) -> tuple[Any, ...]:
    if row["error"] is not None:
        return (row["rank"], row["head"], settings, "failed", row["error"], "", f"{row['seconds']:.1f}", "", "")
    return (
        row["rank"],
        row["head"],
        settings,
        f"{row['val_accuracy']:.4f}",
        f"{row['low']:.3f} … {row['high']:.3f}",
        "best" if row["rank"] == 1 else f"{row['p_value']:.2g}",
        f"{row['seconds']:.1f}",
        row["parameters"],
        size_text(row["bytes"]),
    )
