"""What `doctor`, `backbones`, `weights` and `summary` return."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from pipeline.api.results import Result, readable
from pipeline.api.tables import Table, TableResult
from pipeline.core.units import counted, duration, size_text

if TYPE_CHECKING:
    from pipeline.extraction.backbone_list import BackboneInfo
    from pipeline.extraction.planning import Quarantined
    from pipeline.report.doctor.checks import DatasetCheck
    from pipeline.report.doctor.cost import Cost


@dataclass(frozen=True)
class FullyShownResult(Result):
    """A result of which people see every value that is known."""

    def lines(self) -> dict[str, str]:
        """Return name → value of all that is known."""
        known = {name: value for name, value in self.to_dict().items() if value is not None}
        return {name.replace("_", " "): readable(name, value) for name, value in known.items()}


@dataclass(frozen=True)
class MachineResult(FullyShownResult):
    """What this machine has, and what Icebox would use of it. Sizes are in bytes."""

    python: str  # its version
    system: str
    packages: dict[str, str | None]  # package → version, None if it is not installed
    cpu: str
    cores: int  # that this process may use
    machine_cores: int
    bfloat16: bool  # whether the processor multiplies bfloat16 in hardware
    gpus: int
    memory: int  # that this process may use
    machine_memory: int
    available_memory: int
    tensorflow_gpus: int  # that TensorFlow sees
    precision_auto: str  # what `precision="auto"` means in a new feature space
    data_dir: str
    data_dir_free: int
    imagenet_weights: str  # the file of the default network, or "not downloaded"
    cache_spaces: int
    cache_rows: int
    cache_bytes: int

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """Return what `report.doctor.machine.examine` found."""
        named = {each.name for each in fields(cls)}
        packages = {name: version for name, version in found.items() if name not in named}
        return cls(packages=packages, **{name: value for name, value in found.items() if name in named})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; each package is a key of its own."""
        found = dict[str, Any]()
        for name, value in super().to_dict().items():
            found |= value if name == "packages" else {name: value}
        return found


@dataclass(frozen=True)
class DatasetCheckResult(Result):
    """What is in a dataset, what is wrong with it, what of it is cached, and what the rest would take.

    Images are listed as objects of `path`, `label` and `split`, a list for each group. Counts of copies have `images`,
    `groups`, and `crossing`: the groups on several sides of the split.
    """

    dataset: str
    images: int
    classes: dict[str, dict[str, int]]  # class → images that can be decoded in train, val and test
    split: str
    formats: dict[str, int]  # format → images
    sizes: dict[str, list[int] | None]  # smallest, median and largest: width and height in pixels
    turned_by_exif: int
    deeper_than_8_bits: int
    largest_16_bit_value: int | None
    with_alpha: int
    quarantined: int
    quarantined_images: list[Quarantined]
    ignored: dict[str, int]  # kind of file → how many
    folders_without_images: list[str]
    classes_alike: list[list[str]]
    copies: dict[str, int]  # exact ones
    copies_listed: list[list[dict[str, str]]]
    conflicting: list[list[dict[str, str]]]  # copies under several labels
    near_copies: dict[str, int]
    near_copies_listed: list[list[dict[str, str]]]
    space: str | None
    rows: dict[str, int]  # cached, duplicates, missing
    estimate: Cost | None  # of computing the missing rows; None if none are missing, or none can be computed
    free_bytes: int
    available_memory: int
    advice: list[str]  # what to do, the most pressing first

    @classmethod
    def of(cls, found: DatasetCheck) -> Self:
        """Return what a check of a dataset found."""
        from pipeline.report.doctor.checks import summarize
        from pipeline.report.doctor.recommendations import recommend

        typed = {"quarantined_images": found.quarantined, "estimate": found.cost}
        return cls(**{**summarize(found), **typed}, advice=recommend(found))

    @property
    def allowed_bad(self) -> float:
        """The share of images, in hundredths and rounded up, that `--max-bad` would have to allow."""
        return math.ceil(100 * self.quarantined / self.images) / 100

    def lines(self) -> dict[str, str]:
        """Return name → value of what people want to know at a glance."""
        sizes = {name: f"{size[0]:,} x {size[1]:,}" for name, size in self.sizes.items() if size}
        found = {
            "images": f"{self.images:,}",
            "split": self.split,
            "formats": ", ".join(f"{count:,} {kind}" for kind, count in self.formats.items()),
            "width x height": f"{sizes['median']} (median), {sizes['smallest']} to {sizes['largest']}" if sizes else "",
            "turned by EXIF": f"{self.turned_by_exif:,}" if self.turned_by_exif else "",
            "exact copies": _copies(self.copies),
            "near copies": _copies(self.near_copies),
            "cached": self._cached(),
        }
        if self.estimate is not None:
            found |= _estimated(self.rows["missing"], self.estimate)
        return {name: value for name, value in found.items() if value}

    def _repr_html_(self) -> str:
        advice = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.advice)
        return f"{super()._repr_html_()}<ul>{advice}</ul>"

    def _cached(self) -> str:
        cached, duplicates = self.rows["cached"], self.rows["duplicates"]
        return (
            f"{cached:,} of {cached + self.rows['missing']:,} rows"
            + (f" in {self.space}" if self.space else "")
            + (f"; {duplicates:,} more are copies" if duplicates else "")
        )


def _copies(found: Mapping[str, int]) -> str:
    if not found["groups"]:
        return "none"
    return f"{found['images']:,} images in {counted(found['groups'], 'group')}, {found['crossing']:,} across splits"


def _estimated(missing: int, cost: Cost) -> dict[str, str]:
    return {
        "to compute": f"{counted(missing, 'row')}: {duration(cost.seconds)}, {size_text(cost.bytes)} on disk",
        "measured": (
            f"{cost.images_per_second:,.1f} images/s, {cost.bytes_per_row:,} bytes a row, {size_text(cost.memory)} of "
            f"memory, with the weights {cost.weights}"
        ),
    }


@dataclass(frozen=True)
class BackbonesResult(TableResult):
    """The networks, the cheapest first, and what is known of them on this machine."""

    precision: str  # at which `images_per_second` was measured
    backbones: list[BackboneInfo]

    def table(self) -> Table:
        """Return the headers of the table and its rows, a network each."""
        headers = ("backbone", "pixels", "parameters", "mult. (G)", "bytes a row", "images/s", "weights")
        return headers, [_backbone_row(each) for each in self.backbones]


def _backbone_row(each: BackboneInfo) -> tuple[str, ...]:
    stored, memory = each.bytes_per_row, each.uncompressed
    return (
        each.name,
        f"{each.input_size or 'any':>6}",
        f"{each.parameters / 1e6:8.1f} M" if each.parameters else "",
        f"{each.multiplications / 1e9:9.2f}" if each.multiplications else "",
        f"{size_text(stored) if stored else f'~ {size_text(memory)}' if memory else '':>11}",
        f"{each.images_per_second:8,.1f}" if each.images_per_second else "",
        each.weights,
    )


@dataclass(frozen=True)
class WeightsResult(FullyShownResult):
    """Weights that are ready for use."""

    weights: str  # what people call them
    identity: str  # what decides features: the hash of the file, or the untrained recipe and seed
    path: str | None  # None of untrained ones, which are drawn from a seed
    backbone: str | None = None  # of your own network whose file has the weights, where none were named

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `backbone` stands first, if it is there at all."""
        found = super().to_dict()
        backbone = found.pop("backbone")
        return found if backbone is None else {"backbone": backbone, **found}


@dataclass(frozen=True)
class WeightSourcesResult(FullyShownResult):
    """Where the weights of a network can be had."""

    backbone: str
    imagenet: str  # the address of the published file
    imagenet_md5: str | None
    imagenet_sha256: str | None
    imagenet_file: str  # on this machine, or how to get it
    untrained: str
    file: str
    auto: str


@dataclass(frozen=True)
class LayerSummary:
    """A layer of a network; `bytes` and `share_after` are known where the network can be cut."""

    index: int
    name: str
    type: str
    shape: list[int]  # of its output, without the batch
    parameters: int
    cut: bool  # whether its output alone carries the network on, so that it can be cached
    bytes: int | None  # of its output for an image, in float16 and before compression
    share_after: float | None  # of all multiplications, those that come after it


@dataclass(frozen=True)
class SummaryResult(TableResult):
    """The layers of a network up to one of them, and the parameters that train with a head on top."""

    layers: list[LayerSummary]
    backbone: str
    layer: str
    feature_shape: list[int]
    backbone_parameters: int
    multiplications: int  # for an image, of backbone and head
    head: str
    classes: int
    head_parameters: int
    trainable_all: int
    trainable_backbone_frozen: int

    shown = (
        "backbone", "layer", "feature_shape", "backbone_parameters", "multiplications", "head", "classes",
        "head_parameters", "trainable_all", "trainable_backbone_frozen",
    )  # fmt: skip

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """Return what `training.summary.summarize` found."""
        return cls(**{**found, "layers": [LayerSummary(**each) for each in found["layers"]]})

    def table(self, *, every_layer: bool = False) -> Table:
        """Return the headers of the table and its rows: the layers where the network can be cut, or all."""
        headers = ("index", "layer", "type", "output", "parameters", "KiB an image", "work after it")
        return headers, [_layer_row(each) for each in self.layers if every_layer or each.cut]


def _layer_row(layer: LayerSummary) -> tuple[object, ...]:
    stored = "" if layer.bytes is None else f"{layer.bytes / 1024:,.0f}"
    after = "" if layer.share_after is None else f"{layer.share_after:.1%}"
    return layer.index, layer.name, layer.type, "x".join(map(str, layer.shape)), layer.parameters, stored, after
