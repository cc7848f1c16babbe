"""A dataset and its cached rows, brought together: which images have rows, in which space, on which side."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np

from pipeline.cache.digests import identify
from pipeline.cache.space import FeatureSpace
from pipeline.dataset import Dataset, Split, assign, groups
from pipeline.errors import DatasetError, MissingRowsError
from pipeline.extract import (
    FeatureChoice,
    Planning,
    Quarantined,
    find_space,
    name_quarantined,
)
from pipeline.spec import PLAIN_VIEW, Views
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Material:
    """The images that have rows, split: for each split the indices of its images in the dataset."""

    dataset: Dataset
    keys: list[bytes]  # of the usable images, in the order of `usable`
    usable: np.ndarray  # (m,) indices into the dataset
    split: Split
    space: FeatureSpace
    quarantined: list[Quarantined]
    groups: np.ndarray  # (m,) int64, alike for images that must stay together
    views: Views  # in which the images are cached; only the training split is read in more than the plain one

    def members(self, side: str) -> np.ndarray:
        """Return positions in `keys` of the images on one side."""
        return np.flatnonzero(self.split.sides[self.usable] == side)

    def labels(self, members: np.ndarray) -> np.ndarray:
        """Return the labels of the images at these positions in `keys`."""
        return self.dataset.labels[self.usable[members]]

    def digest(self) -> str:
        """Return a hash of which rows there are, of which space and views, under which labels, in which groups, and on
        which sides.
        """
        found = hashlib.sha256(self.space.spec.fingerprint().encode() + b"".join(self.keys))
        found.update(self.dataset.labels[self.usable].astype("<i8").tobytes())
        found.update(self.split.sides[self.usable].astype("<U5").tobytes())
        found.update(self.groups.astype("<i8").tobytes())
        found.update(np.array(self.views.numbers, "<i8").tobytes())
        return found.hexdigest()


def gather(
    dataset: Dataset,
    workspace: Workspace,
    choice: FeatureChoice,
    max_pixels: int,
    features_command: str,
    *,
    views: Views = PLAIN_VIEW,
    partly: bool = False,
) -> Material:
    """Find the rows of all images of `dataset` that can be decoded, in all `views`; with `partly`, some may have none.

    Raises
    ------
    MissingRowsError
        If an image that can be decoded has no row; the text names `features_command`.
    DatasetError
        If none can be decoded.
    """
    index = workspace.cache.index
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, index, advance)
    space, _ = find_space(workspace, choice, identities, views)
    planning = Planning(dataset, identities, index, max_pixels, views)
    plan = planning.meet_undecodable(space) if space is not None else planning.plan(space)
    if not plan.rows:
        raise DatasetError(f"no images to train on: none of {len(dataset):,} can be decoded; `features` lists why")
    lacking = {identities.keys[i] for i in plan.todo}
    if space is None or (lacking and not partly):
        raise _missing(planning, lacking, space, features_command)
    usable = np.array([i for i in range(len(dataset)) if i not in plan.quarantined], np.int64)
    split = assign(dataset, identities.keys)
    _report_leaks(split)
    bad = name_quarantined(dataset, plan)
    keys = [key for i in usable if (key := identities.keys[i]) is not None]
    together = groups(dataset, identities.keys)[usable]
    return Material(dataset, keys, usable, split, space, bad, together, views)


def _missing(
    planning: Planning, lacking: set[bytes | None], space: FeatureSpace | None, features_command: str
) -> MissingRowsError:
    count, images = sum(key in lacking for key in planning.identities.keys), len(planning.dataset)
    in_views = f", in {planning.views.count} views" if planning.views.count > 1 else ""
    where = f" in {space.name}" if space else " in any feature space that agrees with what was asked for"
    return MissingRowsError(
        f"{count:,} of {images:,} images have no features{where}{in_views}; make them by: {features_command}"
        " (`cache explain` tells why)"
    )


def _report_leaks(split: Split) -> None:
    if split.crossing:
        logger.warning("%d images have an identical copy on another side of the split", split.crossing)
    if split.crossing_groups:
        logger.warning("%d groups lie on more than one side of the split", split.crossing_groups)
    if split.conflicting:
        logger.warning("%d images have an identical copy under another label", split.conflicting)
