"""Describe for the user what is unusual in a dataset: ignored files, empty folders, classes that look alike."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.dataset.base import Dataset, identical_images
from pipeline.dataset.ignored import ignored_text

_NAMED = 10


def notices(dataset: Dataset) -> Iterator[str]:
    """Yield one line of text for each unusual point of `dataset`; none if all files are images."""
    if dataset.ignored:
        yield f"passed over: {ignored_text(dataset.ignored)}"
    if empty := dataset.without_images:
        others = f" and {len(empty) - _NAMED:,} more" if len(empty) > _NAMED else ""
        folders = "folder holds" if len(empty) == 1 else "folders hold"
        yield f"{len(empty):,} {folders} no images: {', '.join(empty[:_NAMED])}{others}"
    if groups := identical_images(dataset.classes):
        listed = ", ".join(" and ".join(map(repr, group)) for group in groups[:_NAMED])
        others = f" and {len(groups) - _NAMED:,} more" if len(groups) > _NAMED else ""
        yield f"classes that look alike are kept apart: {listed}{others}; rename them if they are one class"
