"""`cache verify` and `cache explain`: is it whole, and why something would be computed."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.completion import dataset_names
from pipeline.commands.depth import DepthOption
from pipeline.commands.network import BackboneOption, InputSizeOption, ScalingOption
from pipeline.commands.shared import (
    MAX_PIXELS,
    ArchiveOption,
    AugmentOption,
    DatasetOption,
    FitOption,
    ImageRootOption,
    JsonOption,
    LayerOption,
    LimitOption,
    MaxPixelsOption,
    PrecisionOption,
    QuietOption,
    SpaceOption,
    StorageOption,
    ViewsOption,
    WeightsOption,
    feature_choice,
    finish,
    open_dataset,
    opened,
    views_choice,
)
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.cache.verify import Verification
    from pipeline.cache.workspace import Workspace
    from pipeline.extraction.decode_check import DecodeCheck
    from pipeline.extraction.recompute_check import RecomputeResult

_LISTED = 20  # lines of what may be thousands; --json has them all


def cache_verify(
    context: typer.Context,
    space: SpaceOption = None,
    read_data: Annotated[bool, typer.Option("--read-data", help="Read every byte of every shard.")] = False,
    sample: Annotated[
        float | None, typer.Option(help="Read every byte of this share of the shards, drawn anew.", min=0, max=1)
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move bad shards aside; `features` then computes just their rows.")
    ] = False,
    recompute: Annotated[int, typer.Option(help="Compute N random rows of each space afresh and compare.", min=0)] = 0,
    dataset: Annotated[
        str | None, typer.Option(help="Where --recompute finds the images.  [default: files seen before, digits]")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Decode the images of this dataset that have rows again; quarantine those that are damaged.",
            autocompletion=dataset_names,
        ),
    ] = None,
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check the cache: names, sizes, row counts, the index against the shards. Exits with 1 if anything is wrong."""
    from dataclasses import asdict

    from pipeline.cache.verify import verify
    from pipeline.core.errors import UsageError

    if read_data and sample is not None:
        raise UsageError("--read-data reads all, --sample a share: give one of the two")
    of_images = (dataset,) if images is not None else (dataset, archive, image_root)
    if not recompute and any(given is not None for given in of_images):
        raise UsageError(
            "--dataset, --archive and --image-root go with --recompute N only, or the latter with --images"
        )
    start = time.perf_counter()
    with opened(context) as workspace:
        done = verify(workspace.cache, space=space, sample=1.0 if read_data else sample or 0.0, repair=repair)
        drifts = _recomputed(workspace, context, space, recompute) if recompute and done.sound else []
        rechecked = _rechecked(workspace, context, images, space) if images is not None and done.sound else None
    result = {
        **{name: getattr(done, name) for name in ("spaces", "shards", "rows", "bytes", "bytes_read")},
        "problems": [{**asdict(problem), "path": str(problem.path)} for problem in done.problems],
        "recomputed": [asdict(drift) for drift in drifts],
        "images": asdict(rechecked) if rechecked else None,
        "seconds": round(time.perf_counter() - start, 3),
    }
    error = _verdict(done, drifts, repair) or _damaged(rechecked)
    _show_problems(done, drifts, as_json)
    if rechecked is not None and not as_json:
        _show_images(rechecked)
    finish(result | ({"error": error} if error else {}), as_json, ("spaces", "shards", "rows", "bytes", "bytes_read"))
    _conclude(error, as_json, "" if done.problems else "nothing is wrong")


def _recomputed(workspace: Workspace, context: typer.Context, space: str | None, count: int) -> list[RecomputeResult]:
    from pipeline.commands import terminal
    from pipeline.core.errors import MissingRowsError
    from pipeline.extraction.recompute_check import recompute

    dataset = open_dataset(workspace, context) if context.params["dataset"] is not None else None
    spaces = [workspace.cache.open(space)] if space else workspace.cache.spaces()
    drifts, skipped = [], []
    for each in spaces:
        try:
            drifts.append(recompute(each, count, workspace, dataset))
        except MissingRowsError as error:
            skipped.append(error)
    compared = [drift for drift in drifts if drift is not None]
    if skipped and not compared:
        raise skipped[0]
    for error in skipped:
        terminal.warn(f"notice: {error}")
    return compared


def _rechecked(workspace: Workspace, context: typer.Context, name: str, space: str | None) -> DecodeCheck:
    from pipeline.extraction.decode_check import check_decoding
    from pipeline.runs.request import DatasetChoice

    archive, root = (each and str(each) for each in (context.params["archive"], context.params["image_root"]))
    return check_decoding(DatasetChoice(name, archive, root).open(workspace), workspace, space)


def _damaged(rechecked: DecodeCheck | None) -> str | None:
    if rechecked is None or not rechecked.quarantined:
        return None
    first, count = rechecked.quarantined[0], len(rechecked.quarantined)
    return (
        f"{count:,} of {rechecked.images:,} images that have rows cannot be decoded whole, the first: {first.path}: "
        f"{first.reason}; they are quarantined now, and their rows not used"
    )


def _show_images(rechecked: DecodeCheck) -> None:
    from pipeline.commands import terminal

    for bad in rechecked.quarantined[:_LISTED]:
        terminal.warn(f"quarantined {bad.path}: {bad.reason}")
    if len(rechecked.quarantined) > _LISTED:
        terminal.warn(f"and {len(rechecked.quarantined) - _LISTED:,} more; --json lists them all")
    if rechecked.released:
        terminal.say(f"{rechecked.released:,} images can be decoded by now, and their rows are used again")
    terminal.say(f"{rechecked.images:,} images that have rows were decoded again")


def _verdict(done: Verification, drifts: Sequence[RecomputeResult], repair: bool) -> str | None:
    """Return what is wrong, on one line, or None."""
    left = [problem for problem in done.problems if not problem.repaired]
    if left:
        again = (
            "move it out of the cache by hand" if repair else "run `cache verify --read-data --repair`, then `features`"
        )
        count = "1 problem:" if len(left) == 1 else f"{len(left):,} problems, the first:"
        return f"{count} {left[0].path} {left[0].problem}; {again}"
    if drifted := [drift for drift in drifts if not drift.same]:
        return (
            f"the features of {drifted[0].space} are not what this machine computes now (relative difference "
            f"{drifted[0].max_relative:.2g}); add nothing to it here, or compute it anew"
        )
    return None


def _show_problems(done: Verification, drifts: Sequence[RecomputeResult], as_json: bool) -> None:
    from pipeline.commands import terminal

    if as_json:
        return
    for problem in done.problems[:_LISTED]:
        mended = " (mended)" if problem.repaired else ""
        rows = f", {counted(problem.rows, 'row')}" if problem.rows else ""
        terminal.warn(f"{problem.path}: {problem.problem}{rows}{mended}")
    if len(done.problems) > _LISTED:
        terminal.warn(f"and {len(done.problems) - _LISTED:,} more; --json lists them all")
    for drift in drifts:
        terminal.say(
            f"{drift.space}: {drift.identical:,} of {drift.rows:,} rows computed afresh are identical, greatest "
            f"difference {drift.max_difference:.3g}, of a row {drift.max_relative:.2%}"
        )


def _conclude(error: str | None, as_json: bool, otherwise: str) -> None:
    from pipeline.commands import terminal

    if error:
        terminal.warn(f"error: {error}")
        raise typer.Exit(1)
    if otherwise and not as_json:
        terminal.say(otherwise)


def cache_explain(
    context: typer.Context,
    image: Annotated[
        list[str] | None, typer.Argument(help="Only these images, by their path in the dataset or on disk.")
    ] = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    views: ViewsOption = 1,
    augment: AugmentOption = None,
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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tell why images would be computed: new bytes, another space, quarantined, a bad shard. Changes nothing."""
    from dataclasses import asdict

    from pipeline.commands import terminal
    from pipeline.extraction.explain import explain, select_images

    with opened(context) as workspace:
        images = open_dataset(workspace, context)
        found = explain(images, workspace, feature_choice(context), max_pixels, views_choice(context))
        shown = select_images(found.images, images, image) if image else found.images
    result = {
        "space": found.space,
        "backbone": found.backbone,
        "counts": found.counts,
        "spaces": [asdict(each) for each in found.spaces],
        "images": [asdict(each) for each in shown],
    }
    if as_json:
        terminal.emit_json(result)
        return
    terminal.say(f"features would {'use ' + found.space if found.space else 'begin a new space'}")
    for each in found.spaces:
        differs = {name: (pair["found"], pair["asked"]) for name, pair in each.differs.items()}
        if "backbone" in differs and each.backbone != found.backbone:
            differs["backbone"] = (each.backbone, found.backbone)
        pairs = [
            f"{name} is {_short(there)}, asked for {_short(request)}" for name, (there, request) in differs.items()
        ]
        terminal.say(f"{each.space}: {each.rows:,} of these images; {'; '.join(pairs) or 'as asked for'}")
    counted = sorted(found.counts, key=lambda state: -found.counts[state])
    terminal.table([(state, found.counts[state]) for state in counted], ("images are", "count"))
    listed = shown if image else [each for each in shown if each.state != "cached"]
    terminal.table([(each.path, each.state, each.why) for each in listed[:_LISTED]], ("image", "state", "why"))
    if len(listed) > _LISTED:
        terminal.say(f"and {len(listed) - _LISTED:,} more; --json lists them all")


def _short(value: object) -> str:
    """Return a field's value for people: of a SHA-256 the first eight digits, as names of spaces have them."""
    return re.sub(r"([0-9a-f]{8})[0-9a-f]{56}", r"\1…", str(value))
