"""Check a dataset before computing its features: its content, its problems, and the cost of computing.

`check_dataset` decodes every image once and returns a `DatasetCheck`; `summarize` turns that into JSON values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.cache.digests import identify
from pipeline.cache.workspace import Workspace
from pipeline.core import files, machine
from pipeline.core.spec import PLAIN_VIEW, Views
from pipeline.dataset import Dataset, Split, assign, identical_images
from pipeline.dataset.split import SPLITS
from pipeline.extraction.feature_choice import FeatureChoice, find_space, resolve_choice
from pipeline.extraction.planning import Plan, Planning, Quarantined, name_quarantined
from pipeline.images import near_duplicates
from pipeline.images.decoding import FULL_DEPTH, depth_of
from pipeline.report.doctor import cost
from pipeline.report.doctor.cost import Cost
from pipeline.report.doctor.profile import profile_images


@dataclass(frozen=True)
class Copies:
    """Groups of identical images, or of near-duplicates; each group is a list of indices into the dataset.

    Groups with images in more than one split come first; `crossing` is the number of these groups.
    """

    groups: list[list[int]]
    crossing: int

    @property
    def images(self) -> int:
        """The number of images in all groups."""
        return sum(map(len, self.groups))


@dataclass(frozen=True, eq=False)
class DatasetCheck:
    """The results of the check of a dataset of n images.

    `looks` is (n,) with the dtype `profile.LOOK`. `quarantined` lists the images that cannot be read or decoded.
    `equal` and `near` are groups of identical and of nearly identical images. `free_bytes` and `available_memory` are
    in bytes.
    """

    dataset: Dataset
    split: Split
    looks: np.ndarray
    quarantined: list[Quarantined]
    equal: Copies
    near: Copies
    conflicting: list[list[int]]  # groups of identical images with different labels
    space: str | None
    plan: Plan
    cost: Cost | None  # None if no row is missing, or no image could be decoded to measure it
    free_bytes: int
    available_memory: int
    depth: int  # number of bits that 16-bit channels are assumed to hold
    input_size: int  # width and height of the network's input in pixels
    row_shape: tuple[int, ...]  # shape of one image's features, (h, w, c); () if not known

    @property
    def allowed_bad(self) -> float:
        """The value of `--max-bad` that the dataset needs: the share of bad images, rounded up to hundredths."""
        return float(np.ceil(100 * len(self.quarantined) / len(self.dataset)) / 100)

    @property
    def counts(self) -> np.ndarray:
        """The number of decodable images of each class in each split, (classes, 3): train, val, test."""
        usable = np.ones(len(self.dataset), bool)
        usable[list(self.plan.quarantined)] = False
        counts = np.zeros((len(self.dataset.classes), len(SPLITS)), np.int64)
        for column, side in enumerate(SPLITS):
            labels = self.dataset.labels[usable & (self.split.sides == side)]
            counts[:, column] = np.bincount(labels, minlength=len(counts))
        return counts


def check_dataset(
    dataset: Dataset, workspace: Workspace, choice: FeatureChoice, max_pixels: int, views: Views = PLAIN_VIEW
) -> DatasetCheck:
    """Check every image of `dataset`, find which rows are cached, and measure the cost of computing the others.

    Raises
    ------
    IceboxError
        If the requested weights, layer or feature space are not available.
    """
    index = workspace.cache.index
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, index, advance, read_unseen=False)
    resolved = resolve_choice(workspace, choice)
    space = find_space(workspace, resolved, identities, views)
    planning = Planning(dataset, identities, index, max_pixels, views)
    depth = depth_of(space.spec.decode) if space else choice.depth or FULL_DEPTH
    looks = profile_images(planning, workspace.progress, depth)
    plan = planning.plan(space)
    split = assign(dataset, identities.keys)
    grouped = identities.keys.grouped()
    sizes = np.diff(np.append(np.flatnonzero(grouped.leads), len(grouped.images)))
    equal = grouped.members(np.flatnonzero(sizes > 1))
    took = cost.measure(planning, plan, space, resolved, workspace) if plan.missing else None
    row_shape = took.row_shape if took else tuple(space.provenance.get("row_shape") or ()) if space else ()
    return DatasetCheck(
        dataset,
        split,
        looks,
        name_quarantined(dataset, plan),
        _copies(equal, split),
        _near(looks, split, grouped.first, workspace),
        [group for group in equal if len(set(dataset.labels[group].tolist())) > 1],
        space.name if space else None,
        plan,
        took,
        files.free_bytes(workspace.root),
        machine.available_memory(),
        depth,
        resolved.source.input_size,
        row_shape,
    )


def _near(looks: np.ndarray, split: Split, first: np.ndarray, workspace: Workspace) -> Copies:
    """Return groups of near-duplicates among images of different content; of identical images the first is compared."""
    seen = np.sort(first[looks["kind"][first] != ""])
    with workspace.progress("comparing images", 8, "passes") as advance:
        pairs = near_duplicates.near_pairs(looks["fingerprint"][seen], looks["thumb"][seen], advance)
    return _copies([seen[group].tolist() for group in near_duplicates.clusters(pairs, len(seen))], split)


def _copies(groups: list[list[int]], split: Split) -> Copies:
    crosses = [len(set(split.sides[group].tolist())) > 1 for group in groups]
    order = sorted(range(len(groups)), key=lambda at: not crosses[at])
    return Copies([groups[at] for at in order], sum(crosses))


def summarize(found: DatasetCheck) -> dict[str, Any]:
    """Return the results of a check as JSON values."""
    dataset, looks, plan = found.dataset, found.looks, found.plan
    seen = looks[looks["kind"] != ""]
    return {
        "dataset": dataset.name,
        "images": len(dataset),
        "classes": {
            name: dict(zip(SPLITS, counts, strict=True))
            for name, counts in zip(dataset.classes, found.counts.tolist(), strict=True)
        },
        "split": found.split.origin,
        "formats": dict(Counter(seen["kind"].tolist()).most_common()),
        "sizes": _sizes(seen),
        "turned_by_exif": int(seen["turned"].sum()),
        "deeper_than_8_bits": int(seen["deep"].sum()),
        "largest_16_bit_value": int(seen["peak"].max(initial=0)) or None,
        "with_alpha": int(seen["alpha"].sum()),
        "quarantined": len(found.quarantined),
        "quarantined_images": [asdict(bad) for bad in found.quarantined],
        "ignored": dict(dataset.ignored),
        "folders_without_images": list(dataset.without_images),
        "classes_alike": identical_images(dataset.classes),
        "copies": _counted(found.equal),
        "copies_listed": _named(found, found.equal.groups),
        "conflicting": _named(found, found.conflicting),
        "near_copies": _counted(found.near),
        "near_copies_listed": _named(found, found.near.groups),
        "space": found.space,
        "rows": {"cached": plan.reused, "duplicates": plan.duplicates, "missing": plan.missing},
        "estimate": asdict(found.cost) if found.cost else None,
        "free_bytes": found.free_bytes,
        "available_memory": found.available_memory,
    }


def _sizes(seen: np.ndarray) -> dict[str, list[int] | None]:
    """Return the smallest, median and largest width and height."""
    sides = np.stack([seen["width"], seen["height"]], axis=1)
    shares = {"smallest": 0.0, "median": 0.5, "largest": 1.0}
    return {
        name: [int(value) for value in np.quantile(sides, share, axis=0)] if len(sides) else None
        for name, share in shares.items()
    }


def _counted(copies: Copies) -> dict[str, int]:
    return {"images": copies.images, "groups": len(copies.groups), "crossing": copies.crossing}


def _named(found: DatasetCheck, groups: list[list[int]]) -> list[list[dict[str, str]]]:
    dataset, sides = found.dataset, found.split.sides

    def about(i: int) -> dict[str, str]:
        return {"path": dataset.names[i], "label": dataset.classes[dataset.labels[i]], "split": str(sides[i])}

    return [[about(i) for i in group] for group in groups]
