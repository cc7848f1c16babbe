"""`cache …`: look at the feature cache, check it, clean it, take it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from pipeline.api.inspection_options import CacheExportOptions, GcOptions
from pipeline.commands.cache_explain import cache_explain
from pipeline.commands.cache_verify import cache_verify
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    DatasetOption,
    JsonOption,
    MaxBadOption,
    QuietOption,
    exit_for_bad,
    icebox,
    show,
)
from pipeline.core.units import counted

cache_app = typer.Typer(help="Look at the feature cache, check it, clean it, export it.", rich_markup_mode=None)


@cache_app.command("ls")
def cache_ls(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the feature spaces on disk: rows, bytes, how far they are compressed, how old they are."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        done = box.cache.ls()
    if as_json:
        show(done, as_json)
        return
    if not done.spaces:
        console.say("the cache is empty; `features` fills it")
        return
    headers, rows = done.table()
    console.table(rows, headers)


cache_app.command("explain")(cache_explain)
cache_app.command("verify")(cache_verify)


@cache_app.command("quarantine")
def cache_quarantine(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the contents that could not be decoded: why, since when, and where they were seen."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        done = box.cache.quarantine()
    if as_json:
        show(done, as_json)
        return
    if not done.contents:
        console.say("nothing is quarantined")
        return
    headers, rows = done.table()
    console.table(rows, headers)
    console.say("`features --retry-failed` tries them again, `cache verify --images DATASET` those that have rows")


@cache_app.command("gc")
@takes(GcOptions)
def cache_gc(
    context: typer.Context,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before rows are removed.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[GcOptions],
) -> None:
    """Make room: remove leftovers of killed commands and merge small shards.

    With --dataset or --space, every row that belongs to none of those named is removed as well.
    """
    with icebox(context, quiet=quiet) as box:
        names_rows = options.get("dataset") or options.get("space")  # else only second copies of rows go
        if names_rows and not (options.get("dry_run") or yes):
            _ask(box.cache.gc(**{**options, "dry_run": True}).rows_removed)
        done = box.cache.gc(**options)
    estimated = "this would be done, the bytes being an estimate; nothing was, as --dry-run was given"
    show(done, as_json, note=estimated if done.dry_run else None)


def _ask(rows: int) -> None:
    """Ask before features are removed. Raises UsageError where there is nobody to answer."""
    import sys

    from pipeline.core.errors import UsageError

    if not rows:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            f"{counted(rows, 'row')} of features would be removed, and there is no terminal to ask at; nothing was "
            "removed. --dry-run tells which shards they are in, --yes removes them"
        )
    typer.confirm(f"{counted(rows, 'row')} of features will be removed; go on?", abort=True, err=True)


@cache_app.command("export")
@takes(CacheExportOptions)
def cache_export(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="The HDF5 file to write.", dir_okay=False)],
    dataset: DatasetOption = "digits",
    *,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[CacheExportOptions],
) -> None:
    """Write the features of a dataset, with labels, paths, splits and class names, to one HDF5 file."""
    with icebox(context, quiet=quiet) as box:
        done = box.cache.export(out, dataset, **options)
    note = (
        "it refers to the shards as they are now: after `cache gc`, export it again. To read all of it "
        f"{done.shards:,} files must be open at once (`ulimit -n`), or rows read as NaN"
    )
    show(done, as_json, note=note if done.virtual else None)
    exit_for_bad(done.quarantined_images, done.images, max_bad)
