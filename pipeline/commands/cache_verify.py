"""`cache verify`: whether the cache is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import typer

from pipeline.api.inspection_options import VerifyOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, QuietOption, icebox, show
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.api.cache_results import CacheVerifyResult
    from pipeline.extraction.decode_check import DecodeCheck

_LISTED = 20  # lines of what may be thousands; --json has them all


@takes(VerifyOptions)
def cache_verify(
    context: typer.Context,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[VerifyOptions],
) -> None:
    """Check the cache: names, sizes, row counts, the index against the shards. Exits with 1 if anything is wrong."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        done = box.cache.verify(**options)
    if not as_json:
        _show_problems(done)
        if done.images is not None:
            _show_images(done.images)
    show(done, as_json)
    if done.error is not None:
        console.warn(f"error: {done.error}")
        raise typer.Exit(1)
    if not done.problems and not as_json:
        console.say("nothing is wrong")


def _show_problems(done: CacheVerifyResult) -> None:
    from pipeline.core import console

    for problem in done.problems[:_LISTED]:
        mended = " (mended)" if problem.repaired else ""
        rows = f", {counted(problem.rows, 'row')}" if problem.rows else ""
        console.warn(f"{problem.path}: {problem.problem}{rows}{mended}")
    if len(done.problems) > _LISTED:
        console.warn(f"and {len(done.problems) - _LISTED:,} more; --json lists them all")
    for each in done.recomputed:
        console.say(
            f"{each.space}: {each.identical:,} of {each.rows:,} rows computed afresh are identical, greatest "
            f"difference {each.max_difference:.3g}, of a row {each.max_relative:.2%}"
        )


def _show_images(decoded: DecodeCheck) -> None:
    from pipeline.core import console

    for bad in decoded.quarantined[:_LISTED]:
        console.warn(f"quarantined {bad.path}: {bad.reason}")
    if len(decoded.quarantined) > _LISTED:
        console.warn(f"and {len(decoded.quarantined) - _LISTED:,} more; --json lists them all")
    if decoded.released:
        console.say(f"{decoded.released:,} images can be decoded by now, and their rows are used again")
    console.say(f"{decoded.images:,} images that have rows were decoded again")
