"""`cache …`: look at the feature cache, check it, clean it, take it elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.cache_checks import cache_explain, cache_verify
from pipeline.commands.completion import dataset_names, space_names
from pipeline.commands.depth import DepthOption
from pipeline.commands.network import BackboneOption, InputSizeOption, ScalingOption
from pipeline.commands.shared import (
    MAX_PIXELS,
    ArchiveOption,
    DatasetOption,
    FitOption,
    ImageRootOption,
    JsonOption,
    LayerOption,
    LimitOption,
    MaxBadOption,
    MaxPixelsOption,
    PrecisionOption,
    QuietOption,
    SpaceOption,
    StorageOption,
    WeightsOption,
    exit_for_bad,
    feature_choice,
    features_command,
    finish,
    open_dataset,
    opened,
)
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.cache.gc import Retention
    from pipeline.cache.workspace import Workspace

cache_app = typer.Typer(help="Look at the feature cache, check it, clean it, export it.", rich_markup_mode=None)


@cache_app.command("ls")
def cache_ls(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the feature spaces on disk: rows, bytes, how far they are compressed, how old they are."""
    from pipeline.cache.listing import describe
    from pipeline.commands import terminal

    with opened(context) as workspace:
        spaces = [describe(space) for space in workspace.cache.spaces()]
        quarantined = len(workspace.cache.index.all_quarantined()) if workspace.cache.index_path.exists() else 0
    totals = {key: sum(space[key] for space in spaces) for key in ("shards", "rows", "bytes")}
    result = {"spaces": spaces, **totals, "quarantined": quarantined}
    if as_json:
        terminal.emit_json(result)
        return
    if not spaces:
        terminal.say("the cache is empty; `features` fills it")
        return
    headers = ["space", "rows", "shards", "MB", "compressed", "begun", "last added", "weights", "precision"]
    rows = [_space_row(space) for space in spaces]
    terminal.insert_column(rows, headers, 1, "backbone", [space["backbone"] for space in spaces])
    terminal.table(rows, headers)


def _space_row(space: dict[str, Any]) -> list[object]:
    from pipeline.commands import terminal

    ratio = space["compression_ratio"]
    return [
        space["space"],
        space["rows"],
        space["shards"],
        space["bytes"] / 1e6,
        f"{ratio:.1f}x" if ratio else "",
        terminal.age(space["created"]),
        terminal.age(space["last_added"]),
        space["made_by"].get("weights"),
        space["spec"]["precision"],
    ]


cache_app.command("explain")(cache_explain)
cache_app.command("verify")(cache_verify)


@cache_app.command("quarantine")
def cache_quarantine(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the contents that could not be decoded: why, since when, and where they were seen."""
    from pipeline.commands import terminal

    with opened(context) as workspace:
        cache = workspace.cache
        found = [
            {
                "key": bad.key.hex(),
                "reason": bad.reason,
                "since": bad.since,
                "decoder": bad.decoder,
                "max_pixels": bad.max_pixels or None,  # none of those whose rows are condemned
                "paths": [str(path) for path in cache.index.files_with_digest(bad.key)],
            }
            for bad in (cache.index.all_quarantined() if cache.index_path.exists() else ())
        ]
    if as_json:
        terminal.emit_json({"quarantined": len(found), "contents": found})
        return
    if not found:
        terminal.say("nothing is quarantined")
        return
    rows = [(terminal.age(bad["since"]), bad["reason"], ", ".join(bad["paths"]) or bad["key"][:16]) for bad in found]
    terminal.table(rows, ("since", "reason", "file"))
    terminal.say("`features --retry-failed` tries them again, `cache verify --images DATASET` those that have rows")


@cache_app.command("gc")
def cache_gc(
    context: typer.Context,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep the rows of this dataset and of others named so, in any space.", autocompletion=dataset_names
        ),
    ] = None,
    space: Annotated[
        list[str] | None, typer.Option(help="Keep this space whole, and others named so.", autocompletion=space_names)
    ] = None,
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Remove shards that `verify` moved aside, too.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Remove stopped runs and sweeps that `--resume` could finish, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before rows are removed.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make room: leftovers of killed runs go, small shards are merged.

    With --dataset or --space, every row that belongs to none of those named is removed as well.
    """
    from pipeline.cache.gc import collect
    from pipeline.core.errors import UsageError
    from pipeline.runs.store import remove_leftovers

    if not dataset and (archive or image_root):
        raise UsageError("--archive and --image-root go with --dataset only")
    start = time.perf_counter()
    with opened(context) as workspace:
        keep = _keep(workspace, dataset or [], space or [], archive, image_root)
        if (dataset or space) and not (dry_run or yes):  # else only second copies of rows go, and nothing is lost
            _ask(collect(workspace.cache, keep, damaged=damaged, dry_run=True).rows_removed)
        done = collect(workspace.cache, keep, damaged=damaged, dry_run=dry_run)
        stopped = [
            remove_leftovers(root, resumable=unfinished, dry_run=dry_run) for root in (workspace.runs, workspace.sweeps)
        ]
    folders = [folder for some, _ in stopped for folder in some]
    numbers = ("rows_removed", "shards_removed", "shards_repacked", "shards_written")
    result = {
        **{name: getattr(done, name) for name in numbers},
        "leftovers": done.leftovers + len(folders),
        "bytes_freed": done.bytes_freed + sum(size for _, size in stopped),
        "removed": [str(path) for path in (*done.removed, *folders)],
        "dry_run": dry_run,
        "seconds": round(time.perf_counter() - start, 3),
    }
    note = "this would be done, the bytes being an estimate; nothing was, as --dry-run was given" if dry_run else None
    finish(result, as_json, (*numbers, "leftovers", "bytes_freed"), note=note)


def _keep(
    workspace: Workspace, datasets: Sequence[str], spaces: Sequence[str], archive: Path | None, root: Path | None
) -> Retention:
    from pipeline.cache.digests import identify
    from pipeline.cache.gc import Retention
    from pipeline.core.errors import DatasetError
    from pipeline.runs.request import DatasetChoice

    for name in spaces:
        workspace.cache.open(name, sync=False)  # a name mistyped must not cost a space
    keys: set[bytes] = set()
    for name in datasets:
        images = DatasetChoice(name, archive and str(archive), root and str(root)).open(workspace)
        with workspace.progress(f"identifying images of {images.name}", len(images)) as advance:
            found = identify(images, workspace.cache.index, advance)
        if found.unread:
            first, reason = next(iter(found.unread.items()))
            raise DatasetError(
                f"{counted(len(found.unread), 'image')} of {name} cannot be read now, so it is not known which rows "
                f"are theirs (the first: {images.names[first]} {reason}); nothing was removed"
            )
        keys.update(key for key in found.keys if key is not None)
    return Retention(keys if datasets else None, spaces)


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
def cache_export(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="The HDF5 file to write.", dir_okay=False)],
    what: Annotated[Literal["features", "pooled"], typer.Option(help="Full tensors, or their spatial means.")] = (
        "features"
    ),
    virtual: Annotated[
        bool, typer.Option("--virtual", help="Refer to the shards, with NaN for what is missing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file of that name.")] = False,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    backbone: BackboneOption = None,
    input_size: InputSizeOption = None,
    scaling: ScalingOption = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    storage: StorageOption = "auto",
    space: SpaceOption = None,
    fit: FitOption = None,
    depth: DepthOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the features of a dataset, with labels, paths, splits and class names, to one HDF5 file."""
    from dataclasses import asdict

    from pipeline.core.errors import UsageError
    from pipeline.training.export_rows import export_dataset

    if out.exists() and not out.is_file():
        raise UsageError(f"{out} is no regular file, and is not replaced by one")
    if out.exists() and not force:
        raise UsageError(f"{out} is there already; --force replaces it")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent} to write {out.name} to")
    start = time.perf_counter()
    with opened(context) as workspace:
        if workspace.cache.root.resolve() in out.resolve().parents:
            raise UsageError(f"{out} lies in the cache itself; name a file elsewhere")
        images = open_dataset(workspace, context)
        command = features_command(context)
        done = export_dataset(
            images, workspace, feature_choice(context), max_pixels, command, out.absolute(), what, virtual=virtual
        )
    result = {
        "path": str(out),
        "rows": done.rows,
        "missing": done.missing,
        "shards": done.shards,
        "bytes": done.bytes,
        "space": done.space,
        "what": what,
        "virtual": virtual,
        "quarantined": len(done.quarantined),
        "quarantined_images": [asdict(bad) for bad in done.quarantined],
        "seconds": round(time.perf_counter() - start, 3),
    }
    note = (
        "it refers to the shards as they are now: after `cache gc`, export it again. To read all of it "
        f"{done.shards:,} files must be open at once (`ulimit -n`), or rows read as NaN"
        if virtual
        else None
    )
    finish(result, as_json, ("path", "rows", "missing", "bytes", "space", "seconds"), note=note)
    exit_for_bad(done.quarantined, len(images), max_bad)
