"""`doctor`: what this machine has, and what a dataset is, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.completion import dataset_names
from pipeline.commands.depth import DepthOption
from pipeline.commands.network import BackboneOption, InputSizeOption, ScalingOption
from pipeline.commands.shared import (
    CONNECTIONS,
    MAX_PIXELS,
    ArchiveOption,
    AugmentOption,
    ConnectionsOption,
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
    features_command,
    finish,
    open_dataset,
    opened,
    typed,
    views_choice,
)
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.report.doctor.checks import DatasetCheck

_MOST_CLASSES = 20  # lines of the table
_LISTED = 10  # groups of copies and members of each, and bad images


def doctor(
    context: typer.Context,
    dataset: Annotated[
        str | None,
        typer.Argument(
            metavar="DATASET",
            help="What --dataset of other commands takes; left out, only the machine.",
            autocompletion=dataset_names,
        ),
    ] = None,
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
    views: ViewsOption = 1,
    augment: AugmentOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    connections: ConnectionsOption = CONNECTIONS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tell what this machine has, or what is wrong with a DATASET.

    With DATASET: what is in it, what should be mended, what is cached, and what the rest will take here.
    """
    from pipeline.commands import terminal
    from pipeline.core.errors import UsageError

    if dataset is None:
        if others := [name for name in typed(context) if name not in ("as_json", "quiet")]:
            spelt = {parameter.name: parameter.opts[0] for parameter in context.command.params}
            raise UsageError(f"{', '.join(spelt[name] for name in others)}: say of which DATASET")
        from pipeline.report.doctor.machine import examine

        with opened(context) as workspace:
            result = examine(workspace)
        finish(result, as_json, tuple(result))
        return
    from pipeline.dataset import remote
    from pipeline.report.doctor.checks import check_dataset, summarize
    from pipeline.report.doctor.recommendations import recommend

    remote.limit_connections(connections)
    with opened(context) as workspace:
        images = open_dataset(workspace, context)
        found = check_dataset(images, workspace, feature_choice(context), max_pixels, views_choice(context))
    words = recommend(found)
    if as_json:
        terminal.emit_json({**summarize(found), "advice": words})
        return
    _show(found, summarize(found))
    for sentence in words:
        terminal.say(f"- {sentence}", "yellow")
    if found.plan.missing:
        command = features_command(context) + (f" --max-bad {found.allowed_bad:g}" if found.quarantined else "")
        terminal.say(f"{'' if words else 'nothing stands out; '}to compute them: {command}")


def _show(found: DatasetCheck, about: dict[str, Any]) -> None:
    from pipeline.commands import terminal
    from pipeline.core.units import counted, duration, size_text

    rows = [(name, *counts.values()) for name, counts in about["classes"].items()]
    terminal.table(rows[:_MOST_CLASSES], ("class", *next(iter(about["classes"].values()))))
    if len(rows) > _MOST_CLASSES:
        terminal.say(f"and {len(rows) - _MOST_CLASSES:,} more; --json lists them all")
    sizes = {name: f"{size[0]:,} x {size[1]:,}" for name, size in about["sizes"].items() if size}
    lines = {
        "images": f"{about['images']:,}",
        "split": about["split"],
        "formats": ", ".join(f"{count:,} {kind}" for kind, count in about["formats"].items()),
        "width x height": f"{sizes['median']} (median), {sizes['smallest']} to {sizes['largest']}" if sizes else "",
        "turned by EXIF": f"{about['turned_by_exif']:,}" if about["turned_by_exif"] else "",
        "exact copies": _copies(about["copies"]),
        "near copies": _copies(about["near_copies"]),
        "cached": f"{about['rows']['cached']:,} of {found.plan.rows - found.plan.duplicates:,} rows"
        + (f" in {found.space}" if found.space else "")
        + (f"; {found.plan.duplicates:,} more are copies" if found.plan.duplicates else ""),
    }
    if (cost := found.cost) is not None:
        missing = counted(found.plan.missing, "row")
        lines["to compute"] = f"{missing}: {duration(cost.seconds)}, {size_text(cost.bytes)} on disk"
        lines["measured"] = (
            f"{cost.images_per_second:,.1f} images/s, {cost.bytes_per_row:,} bytes a row, {size_text(cost.memory)} of "
            f"memory, with the weights {cost.weights}"
        )
    terminal.pairs({name: value for name, value in lines.items() if value})
    for bad in found.quarantined[:_LISTED]:
        terminal.warn(f"bad: {bad.path}: {bad.reason}")
    _say_others(len(found.quarantined), "bad images")
    for title, groups in (("two labels", about["conflicting"]), ("nearly alike", about["near_copies_listed"])):
        for group in groups[:_LISTED]:
            named = ", ".join(f"{each['path']} ({each['split']}, {each['label']})" for each in group[:_LISTED])
            terminal.say(f"{title}: {named}{f', and {len(group) - _LISTED:,} more' if len(group) > _LISTED else ''}")
    _say_others(len(found.conflicting), "groups with two labels")
    _say_others(len(found.near.groups), "groups that are nearly alike")


def _say_others(count: int, things: str) -> None:
    from pipeline.commands import terminal

    if count > _LISTED:
        terminal.say(f"and {count - _LISTED:,} more {things}; --json lists them all")


def _copies(found: dict[str, int]) -> str:
    if not found["groups"]:
        return "none"
    return f"{found['images']:,} images in {counted(found['groups'], 'group')}, {found['crossing']:,} across splits"
