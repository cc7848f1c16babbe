"""What the methods of `Icebox.cache` return."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.api.results import Result
from pipeline.api.tables import Table, TableResult

if TYPE_CHECKING:
    from pipeline.cache.listing import SpaceListing
    from pipeline.cache.verify import Problem
    from pipeline.extraction.decode_check import DecodeCheck
    from pipeline.extraction.explain import ImageExplained, SpaceExplained
    from pipeline.extraction.planning import Quarantined
    from pipeline.extraction.recompute_check import RecomputeResult


@dataclass(frozen=True)
class CacheListResult(TableResult):
    """The feature spaces on disk, and how much they hold together."""

    spaces: list[SpaceListing]
    shards: int
    rows: int
    bytes: int
    quarantined: int  # contents, of all datasets

    def table(self) -> Table:
        """Return the headers of the table and its rows, a space each; networks are named if they differ."""
        from pipeline.core import console

        headers = ["space", "rows", "shards", "MB", "compressed", "begun", "last added", "weights", "precision"]
        rows = [_space_row(space) for space in self.spaces]
        console.insert_column(rows, headers, 1, "backbone", [space.backbone for space in self.spaces])
        return headers, rows


def _space_row(space: SpaceListing) -> list[object]:
    from pipeline.core import console

    return [
        space.space,
        space.rows,
        space.shards,
        space.bytes / 1e6,
        f"{space.compression_ratio:.1f}x" if space.compression_ratio else "",
        console.age(space.created),
        console.age(space.last_added),
        space.made_by.get("weights"),
        space.spec["precision"],
    ]


@dataclass(frozen=True)
class QuarantinedContent:
    """The content of an image file that cannot be decoded."""

    key: str  # its SHA-256, in hex
    reason: str
    since: str | None  # ISO 8601, UTC
    decoder: str  # that refused it
    max_pixels: int | None  # in force then; None where rows it once had are no longer used
    paths: list[str]  # where it was seen on this machine


@dataclass(frozen=True)
class CacheQuarantineResult(TableResult):
    """The contents that could not be decoded, the latest first."""

    quarantined: int
    contents: list[QuarantinedContent]

    def table(self) -> Table:
        """Return the headers of the table and its rows, a content each."""
        from pipeline.core import console

        headers = ("since", "reason", "file")
        rows = [(console.age(bad.since), bad.reason, ", ".join(bad.paths) or bad.key[:16]) for bad in self.contents]
        return headers, rows


@dataclass(frozen=True)
class CacheExplainResult(TableResult):
    """What `features` would do with a dataset, and why."""

    space: str | None  # the feature space that would be used; None: a new one would be made
    backbone: str
    counts: dict[str, int]  # state → images of the dataset
    spaces: list[SpaceExplained]
    images: list[ImageExplained]  # those that were named, else all

    shown = ("space", "backbone")

    def table(self) -> Table:
        """Return the headers of the table and its rows, a state each."""
        states = sorted(self.counts, key=lambda state: -self.counts[state])
        return ("images are", "count"), [(state, self.counts[state]) for state in states]


@dataclass(frozen=True)
class CacheVerifyResult(Result):
    """How much of the cache was checked, and what is wrong with it."""

    spaces: int
    shards: int
    rows: int
    bytes: int
    bytes_read: int  # of shards that were read to the last byte
    problems: list[Problem]  # also those that were repaired
    recomputed: list[RecomputeResult]  # a space each, with `recompute`
    images: DecodeCheck | None  # with `images`
    seconds: float
    error: str | None  # what is wrong and what to do, in one line; None if nothing is

    shown = ("spaces", "shards", "rows", "bytes", "bytes_read")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `error` is there only if something is wrong."""
        found = super().to_dict()
        if self.error is None:
            del found["error"]
        return found

    def _repr_html_(self) -> str:
        return f"{super()._repr_html_()}<p>{html.escape(self.error or 'nothing is wrong')}</p>"


@dataclass(frozen=True)
class CacheGcResult(Result):
    """What was removed and rewritten; with `dry_run`, what would be, and `bytes_freed` is an estimate."""

    rows_removed: int
    shards_removed: int
    shards_repacked: int
    shards_written: int
    leftovers: int  # files and folders of killed commands
    bytes_freed: int
    removed: list[Path]
    dry_run: bool
    seconds: float

    shown = ("rows_removed", "shards_removed", "shards_repacked", "shards_written", "leftovers", "bytes_freed")


@dataclass(frozen=True)
class CacheExportResult(Result):
    """The file that was written; it has a row for each image that can be decoded."""

    path: Path
    rows: int
    missing: int  # of these, rows that are not in the cache: NaN in a virtual file
    shards: int  # that hold the rows
    bytes: int
    space: str
    what: str  # "features" or "pooled"
    virtual: bool
    quarantined: int
    quarantined_images: list[Quarantined]
    seconds: float

    shown = ("path", "rows", "missing", "bytes", "space", "seconds")

    @property
    def images(self) -> int:
        """How many images the dataset has."""
        return self.rows + self.quarantined
