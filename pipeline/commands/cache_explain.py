"""`cache explain`: which images would be computed, and why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from pipeline.api.inspection_options import ExplainOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import (
    DatasetOption,
    JsonOption,
    QuietOption,
    icebox,
    show,
    without_unused_views,
)

if TYPE_CHECKING:
    from pipeline.extraction.explain import SpaceExplained

_LISTED = 20  # lines of what may be thousands; --json has them all


@takes(ExplainOptions)
def cache_explain(
    context: typer.Context,
    image: Annotated[
        list[str] | None, typer.Argument(help="Only these images, by their path in the dataset or on disk.")
    ] = None,
    dataset: DatasetOption = "digits",
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[ExplainOptions],
) -> None:
    """Show why images would be computed: new bytes, another space, quarantined, a bad shard. Changes nothing."""
    from pipeline.core import console

    with icebox(context, quiet=quiet) as box:
        found = box.cache.explain(dataset, image or (), **without_unused_views(context, options))
    if as_json:
        show(found, as_json)
        return
    console.say(f"features would {'use ' + found.space if found.space else 'begin a new space'}")
    for each in found.spaces:
        console.say(f"{each.space}: {each.rows:,} of these images; {_differences(each, found.backbone)}")
    headers, rows = found.table()
    console.table(rows, headers)
    listed = found.images if image else [each for each in found.images if each.state != "cached"]
    console.table([(each.path, each.state, each.why) for each in listed[:_LISTED]], ("image", "state", "why"))
    if len(listed) > _LISTED:
        console.say(f"and {len(listed) - _LISTED:,} more; --json lists them all")


def _differences(space: SpaceExplained, backbone: str) -> str:
    """Return in which fields a space differs from the one that is wanted; networks are called by their names."""
    differs = {name: (pair["found"], pair["asked"]) for name, pair in space.differs.items()}
    if "backbone" in differs and space.backbone != backbone:
        differs["backbone"] = (space.backbone, backbone)
    pairs = [f"{name} is {_short(found)}, asked for {_short(wanted)}" for name, (found, wanted) in differs.items()]
    return "; ".join(pairs) or "as asked for"


def _short(value: object) -> str:
    """Return a field's value for people: of a SHA-256 the first eight digits, as names of spaces have them."""
    return re.sub(r"([0-9a-f]{8})[0-9a-f]{56}", r"\1…", str(value))
