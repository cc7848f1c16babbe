"""The options of the methods and commands that look at the machine, the networks and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pipeline.api.options import (
    BackboneOptions,
    CachedOptions,
    ConnectionsOptions,
    InputSizeOptions,
    LayerOptions,
    LocationOptions,
    Option,
    PrecisionOptions,
    SpaceNameOptions,
    Text,
    ViewsOptions,
)


class DoctorOptions(CachedOptions, ViewsOptions, ConnectionsOptions, total=False):
    """The options of `doctor`, with a dataset."""


class BackbonesOptions(PrecisionOptions, total=False):
    """The options of `backbones`."""

    measure: Annotated[
        bool,
        Option(
            "Measure images/s on this machine first, with untrained weights.",
            False,
            spelling="--measure",
        ),
    ]


class WeightsOptions(BackboneOptions, total=False):
    """The options of `weights`."""

    weights: Annotated[Text | None, Option("Make these weights ready: imagenet, untrained[:SEED], or a file.")]


class SummaryOptions(BackboneOptions, InputSizeOptions, LayerOptions, total=False):
    """The options of `summary`."""

    head: Annotated[Literal["flatten", "gap"], Option("The head on top.", "gap")]
    classes: Annotated[int, Option("How many classes the head tells apart.", 10, 2)]


class ExplainOptions(CachedOptions, ViewsOptions, total=False):
    """The options of `cache explain`."""


class VerifyOptions(SpaceNameOptions, LocationOptions, total=False):
    """The options of `cache verify`."""

    read_data: Annotated[bool, Option("Read every byte of every shard.", False, spelling="--read-data")]
    sample: Annotated[float | None, Option("Read every byte of this share of the shards, drawn anew.", None, 0, 1)]
    repair: Annotated[
        bool,
        Option("Move bad shards aside; `features` then computes only their rows.", False, spelling="--repair"),
    ]
    recompute: Annotated[int, Option("Recompute N random rows of each space and compare.", 0, 0, None, "N")]
    dataset: Annotated[
        Text | None,
        Option("Where --recompute finds the images.  [default: files seen before, digits]", suggest="datasets"),
    ]
    images: Annotated[
        Text | None,
        Option(
            "Decode the images of this dataset that have rows again; quarantine the damaged ones.",
            metavar="DATASET",
            suggest="datasets",
        ),
    ]


class GcOptions(LocationOptions, total=False):
    """The options of `cache gc`."""

    dataset: Annotated[
        Text | Sequence[Text] | None,
        Option("Keep the rows of this dataset, in any space; may be repeated.", suggest="datasets"),
    ]
    space: Annotated[
        str | Sequence[str] | None, Option("Keep all rows of this space; may be repeated.", suggest="spaces")
    ]
    damaged: Annotated[bool, Option("Also remove shards that `verify` moved aside.", False, spelling="--damaged")]
    unfinished: Annotated[
        bool,
        Option("Also remove stopped runs and sweeps that `--resume` could finish.", False, spelling="--unfinished"),
    ]
    dry_run: Annotated[bool, Option("Only report what would be done.", False, spelling="--dry-run")]


class CacheExportOptions(CachedOptions, total=False):
    """The options of `cache export`."""

    what: Annotated[Literal["features", "pooled"], Option("Full tensors, or their spatial means.", "features")]
    virtual: Annotated[bool, Option("Refer to the shards, with NaN for what is missing.", False, spelling="--virtual")]
    force: Annotated[bool, Option("Replace a file of that name.", False, spelling="--force")]
