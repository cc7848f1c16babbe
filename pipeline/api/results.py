"""What the methods of `Icebox` return: frozen dataclasses whose `to_dict` is the command line's JSON."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline.core.units import size_text

if TYPE_CHECKING:
    from pipeline.extraction.extract import Extraction
    from pipeline.extraction.planning import Quarantined
    from pipeline.training.sweep.sweep import Sweep

_SIZES = ("memory", "bytes", "bytes_read", "bytes_freed", "free")  # endings of names of sizes in bytes


@dataclass(frozen=True)
class Result:
    """Something a method returns; in a notebook it shows the lines that the command line prints."""

    shown: ClassVar[Sequence[str]] = ()  # names of the lines for people

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as the command prints them with --json."""
        return {each.name: plain(getattr(self, each.name)) for each in fields(self) if each.metadata.get("json", True)}

    def lines(self) -> dict[str, str]:
        """Return name → value of what people want to know at a glance."""
        found = self.to_dict()
        return {
            name.replace("_", " "): readable(name, found[name]) for name in self.shown if found.get(name) is not None
        }

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.lines().items()
        )
        return f"<table>{rows}</table>"


def plain(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses as objects, paths as text, tuples as lists."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(each) for name, each in asdict(value).items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def readable(name: str, value: Any) -> str:
    """Return a value as people read it: sizes with units, intervals with both ends, thousands parted."""
    if name.endswith("interval"):
        return " … ".join(f"{end:.3f}" for end in value)
    if name.endswith(_SIZES):
        return size_text(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def causes(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """Return reason → how many images were quarantined for it, the most frequent first."""
    return dict(Counter(bad.reason for bad in quarantined).most_common())


@dataclass(frozen=True)
class FeaturesResult(Result):
    """What `features` did: `rows` = `computed` + `reused` + `duplicates` = `views` x (`images` - `quarantined`)."""

    images: int
    rows: int  # images that have features, times their views
    computed: int
    reused: int
    duplicates: int  # of another image of the dataset
    quarantined: int
    quarantined_images: list[Quarantined]
    causes: dict[str, int]  # reason → how many images
    images_per_second: float | None  # from the first batch to the last shard published; None if none was computed
    model_share: float | None  # of the time, in which the model computed
    recomputed: int  # rows that were lost with a worker, and computed again
    workers: list[dict[str, Any]]
    space: str | None
    bytes_per_row: float | None  # on disk
    weights: str | None
    precision: str | None
    largest_16_bit_value: int | None
    views: int
    seconds: float

    shown = (
        "rows", "computed", "reused", "duplicates", "quarantined", "seconds", "images_per_second", "space",
        "bytes_per_row", "weights", "precision",
    )  # fmt: skip

    @classmethod
    def of(cls, done: Extraction, views: int, seconds: float) -> Self:
        """Return what an extraction has to tell; the cache must still be open."""
        space = done.space
        return cls(
            images=done.images,
            rows=done.rows,
            computed=done.computed,
            reused=done.reused,
            duplicates=done.duplicates,
            quarantined=len(done.quarantined),
            quarantined_images=done.quarantined,
            causes=causes(done.quarantined),
            images_per_second=round(done.computed / done.stats.seconds, 2) if done.computed else None,
            model_share=done.stats.model_share,
            recomputed=done.stats.lost,
            workers=done.stats.workers,
            space=space.name if space else None,
            bytes_per_row=space.totals().bytes_per_row if space else None,
            weights=space.provenance.get("weights") if space else None,
            precision=space.spec.precision if space else None,
            largest_16_bit_value=done.stats.peak or None,
            views=views,
            seconds=seconds,
        )


@dataclass(frozen=True)
class SweepResult(Result):
    """What `sweep` tried: the leaderboard, and the run that the best setting became."""

    sweep: str
    runs: list[dict[str, Any]]  # the leaderboard, best first: settings, val_accuracy, seconds, …
    best: dict[str, Any]  # the summary of the run
    reused: int  # settings that were tried before the sweep was stopped
    seconds: float
    features_computed: int  # rows
    path: Path
    quarantined: list[Quarantined] = field(metadata={"json": False})
    images: int = field(metadata={"json": False})

    @classmethod
    def of(cls, done: Sweep, images: int, seconds: float) -> Self:
        """Return what a sweep has to tell of so many images."""
        return cls(
            done.name, done.rows, done.best, done.reused, seconds, done.computed, done.path, done.quarantined, images
        )
