"""Describe a feature space in numbers, for `cache ls`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.cache.shard import row_layout
from pipeline.cache.space import FeatureSpace
from pipeline.cache.verify import ASIDE
from pipeline.core import files
from pipeline.core.errors import CacheError


@dataclass(frozen=True)
class SpaceListing:
    """Description of a feature space and its content. Sizes are in bytes, times ISO 8601 in UTC."""

    space: str
    backbone: str  # a name of `backbone.table`, or the file name of an own network
    shards: int
    rows: int
    bytes: int
    compression_ratio: float | None  # bytes of the rows in memory over bytes on disk; None if there is no row
    created: str | None
    last_added: str | None  # None if there is no shard
    aside_bytes: int  # size of the shards that `verify` moved aside
    spec: Mapping[str, Any]
    made_by: Mapping[str, Any]  # program, versions, weights


def describe(space: FeatureSpace) -> SpaceListing:
    """Return the description of `space` and its content."""
    totals, shards = space.totals(), space.shard_files()
    aside = files.list_files(space.path / ASIDE)
    newest = max((stat.st_mtime for stat in shards.values()), default=None)
    return SpaceListing(
        space=space.name,
        backbone=_label(space),
        shards=totals.shards,
        rows=totals.rows,
        bytes=totals.bytes,
        compression_ratio=_ratio(space, totals.rows, totals.bytes),
        created=_text(space.provenance.get("created")),
        last_added=None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        aside_bytes=sum(stat.st_size for stat in aside.values()),
        spec=space.spec.to_dict(),
        made_by=dict(space.provenance),
    )


def _ratio(space: FeatureSpace, rows: int, size: int) -> float | None:
    good = [record.name for record in space.index.shards(space.name).values() if record.state == "good"]
    if not good:
        return None
    path = space.shard_path(good[0])
    try:
        layouts = [row_layout(path, dataset) for dataset in ("features", "pooled")]
    except CacheError:  # a damaged shard must not stop the listing; `cache verify` reports it
        return None
    return round(rows * sum(math.prod(shape) * dtype.itemsize for shape, dtype in layouts) / size, 2)


def _label(space: FeatureSpace) -> str:
    """Return the name to show for the network: its name in `backbone.table`, or the file name of an own network."""
    recorded = space.provenance.get("network")
    named = _text(recorded.get("file")) if isinstance(recorded, dict) else None
    return named or space.spec.backbone


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
