"""A dataset looked at before a night is spent on it: what is in it, what is wrong with it, what it will take."""

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
    """Groups of images that are the same, or nearly: each a list of indices into the dataset.

    Those that lie on several sides of the split come first, and `crossing` is how many these are.
    """

    groups: list[list[int]]
    crossing: int

    @property
    def images(self) -> int:
        """How many images are in the groups."""
        return sum(map(len, self.groups))


@dataclass(frozen=True, eq=False)
class DatasetCheck:
    """What was found. `looks` is (n,) of `survey.LOOK`; `quarantined` lists what cannot be read or decoded."""

    dataset: Dataset
    split: Split
    looks: np.ndarray
    quarantined: list[Quarantined]
    equal: Copies
    near: Copies
    conflicting: list[list[int]]  # groups of equal images under several labels
    space: str | None
    plan: Plan
    cost: Cost | None  # None where nothing is missing
    free_bytes: int
    available_memory: int
    depth: int  # that 16-bit channels are taken for
    input_size: int  # pixels a side that the network is given
    row_shape: tuple[int, ...]  # of one image's features, (h, w, c)

    @property
    def allowed_bad(self) -> float:
        """What `--max-bad` would have to allow for, in hundredths, rounded up; 0 if no image is bad."""
        return float(np.ceil(100 * len(self.quarantined) / len(self.dataset)) / 100)

    @property
    def counts(self) -> np.ndarray:
        """Images of each class on each side that can be decoded, (classes, 3): train, val, test."""
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
    """Look at every image of `dataset`, and at what of it is cached; measure what the rest would take.

    Raises
    ------
    IceboxError
        If the weights, the layer or the space that were asked for cannot be had.
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
    """Return groups of distinct images that look nearly the same."""
    seen = np.sort(first[looks["kind"][first] != ""])
    with workspace.progress("comparing images", 8, "passes") as advance:
        pairs = near_duplicates.near_pairs(looks["fingerprint"][seen], looks["thumb"][seen], advance)
    return _copies([seen[group].tolist() for group in near_duplicates.clusters(pairs, len(seen))], split)


def _copies(groups: list[list[int]], split: Split) -> Copies:
    crosses = [len(set(split.sides[group].tolist())) > 1 for group in groups]
    order = sorted(range(len(groups)), key=lambda at: not crosses[at])
    return Copies([groups[at] for at in order], sum(crosses))


def summarize(found: DatasetCheck) -> dict[str, Any]:
    """Return what was found as plain values, for JSON."""
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
