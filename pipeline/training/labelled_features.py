"""Join a dataset with its cached rows: which images have rows, in which space, in which split.

`join_features` returns `LabelledFeatures` for heads, `join_images` returns `LabelledImages` for models that read
pixels.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from pipeline.backbone import source as networks
from pipeline.cache.digests import Identities, identify
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError, MissingFeaturesError
from pipeline.core.spec import PLAIN_VIEW, Views
from pipeline.core.units import counted
from pipeline.dataset import Dataset, Split, assign, groups
from pipeline.dataset.split import SPLITS
from pipeline.extraction.feature_choice import FeatureChoice, find_space, resolve_choice
from pipeline.extraction.planning import Plan, Planning, Quarantined, name_quarantined, warn_dark
from pipeline.images.decoding import FULL_DEPTH
from pipeline.runs.run_images import SEEN, RunImages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """The images of a dataset that can be decoded, with their labels, splits and groups."""

    dataset: Dataset
    keys: list[bytes]  # keys of the usable images, in the order of `usable`
    usable: np.ndarray  # (m,) indices into the dataset
    split: Split
    quarantined: list[Quarantined]
    groups: np.ndarray  # (m,) int64; images with the same number must stay in the same fold
    initial: RunImages | None = field(default=None, kw_only=True)  # images that the initial run was trained on

    def members(self, side: str) -> np.ndarray:
        """Return the positions in `keys` of the images of one split, "train", "val" or "test"."""
        return np.flatnonzero(self.split.sides[self.usable] == side)

    def labels(self, members: np.ndarray) -> np.ndarray:
        """Return the labels of the images at these positions in `keys`."""
        return self.dataset.labels[self.usable[members]]

    def sides(self, members: np.ndarray) -> np.ndarray:
        """Return the split of the images at these positions in `keys`, (n,) str."""
        return self.split.sides[self.usable[members]]

    def names(self, members: np.ndarray) -> list[str]:
        """Return the names of the images at these positions in `keys`."""
        return [self.dataset.names[int(i)] for i in self.usable[members]]

    def run_images(self, *, joined: bool = False) -> RunImages:
        """Return the images that a run on this dataset is trained on, selected on and tested on.

        With `joined` it is trained on the images of the validation split too, as in cross-validation.
        """
        keys = {side: [self.keys[i] for i in self.members(side).tolist()] for side in SPLITS}
        if joined:
            keys |= {"train": [*keys["train"], *keys["val"]], "val": []}
        return RunImages.of(keys, self.initial)

    def trained_on(self, members: np.ndarray) -> np.ndarray:
        """Return for the images at these positions whether a run is trained or selected on them, (n,) bool.

        Test images count if they are copies of images in other splits, or if the initial model was trained on them.
        """
        if not self.split.crossing and self.initial is None:
            return self.sides(members) != "test"
        return self.run_images().contains([self.keys[i] for i in members.tolist()], *SEEN)

    @property
    def content(self) -> str:
        """The SHA-256 (hex) of the images' keys, labels, splits and groups."""
        return self._hashed(b"")

    def digest(self) -> str:
        """Return a hash of all that decides the training data."""
        return self.content

    def _hashed(self, first: bytes, last: bytes = b"") -> str:
        found = hashlib.sha256(first + b"".join(self.keys))
        found.update(self.dataset.labels[self.usable].astype("<i8").tobytes())
        found.update(self.split.sides[self.usable].astype("<U5").tobytes())
        found.update(self.groups.astype("<i8").tobytes() + last)
        return found.hexdigest()


@dataclass(frozen=True)
class LabelledFeatures(LabelledImages):
    """Images that have rows in `space`, in all `views`. Validation and test images are read in the plain view only."""

    space: FeatureSpace
    views: Views

    def digest(self) -> str:
        """Return a hash of the images, the space and the views."""
        return self._hashed(self.space.spec.fingerprint().encode(), np.array(self.views.numbers, "<i8").tobytes())


def join_features(
    dataset: Dataset,
    workspace: Workspace,
    choice: FeatureChoice,
    max_pixels: int,
    *,
    views: Views = PLAIN_VIEW,
    partly: bool = False,
) -> LabelledFeatures:
    """Return the images of `dataset` that can be decoded, joined with their rows in all `views`. Compute none.

    Raises
    ------
    MissingFeaturesError
        If an image that can be decoded has no row, unless `partly` allows that, or no feature space fits `choice`.
    DatasetError
        If no image can be decoded.
    """
    index = workspace.cache.index
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, index, advance, read_unseen=partly)
    resolved = resolve_choice(workspace, choice)
    space = find_space(workspace, resolved, identities, views)
    planning = Planning(dataset, identities, index, max_pixels, views)
    plan = planning.meet_undecodable(space) if space is not None else planning.plan(space)
    if not plan.rows:
        raise DatasetError(f"no images to train on: none of {len(dataset):,} can be decoded; `features` lists why")
    lacking = {key for i in plan.todo.distinct.tolist() if (key := identities.keys[i]) is not None}
    if space is None or (plan.todo and not partly):
        others = [] if space else _other_backbones(workspace, resolved.source.name, lacking)
        raise _missing(planning, lacking, space, others)
    found = LabelledFeatures(*_sorted(dataset, identities, plan), space, views)
    _report_leaks(found.split)
    return found


def join_images(
    dataset: Dataset, workspace: Workspace, max_pixels: int, fit: str, depth: int = FULL_DEPTH
) -> LabelledImages:
    """Return the images of `dataset` that can be decoded, for models that read pixels instead of rows.

    Every image is decoded once here, so that a broken image is found before a long training starts.

    Raises
    ------
    DatasetError
        If no image can be decoded.
    """
    cache = workspace.cache
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, cache.index, advance, read_unseen=False)
    planning = Planning(dataset, identities, cache.index, max_pixels)
    warn_dark(planning.try_to_decode(planning.plan(None).todo.distinct.tolist(), fit, workspace.progress), depth)
    plan = planning.plan(None)
    if not plan.todo:
        raise DatasetError(f"no images to train on: none of {len(dataset):,} can be decoded; `features` lists why")
    found = LabelledImages(*_sorted(dataset, identities, plan))
    _report_leaks(found.split)
    return found


def list_images(dataset: Dataset, workspace: Workspace, quarantined: Set[str]) -> LabelledImages:
    """Return the images of `dataset` except those whose names are `quarantined`. Decode none and fetch none."""
    with workspace.progress("identifying images", len(dataset)) as advance:
        keys = identify(dataset, workspace.cache.index, advance, read_unseen=False).keys
    known = [(i, key) for i, key in enumerate(keys) if key is not None and dataset.names[i] not in quarantined]
    usable = np.array([i for i, _ in known], np.int64)
    split = assign(dataset, keys)
    return LabelledImages(dataset, [key for _, key in known], usable, split, [], groups(dataset, keys)[usable])


def _sorted(
    dataset: Dataset, identities: Identities, plan: Plan
) -> tuple[Dataset, list[bytes], np.ndarray, Split, list[Quarantined], np.ndarray]:
    usable = np.delete(np.arange(len(dataset)), list(plan.quarantined))
    split = assign(dataset, identities.keys)
    keys = [key for i in usable.tolist() if (key := identities.keys[i]) is not None]
    return dataset, keys, usable, split, name_quarantined(dataset, plan), groups(dataset, identities.keys)[usable]


def _other_backbones(workspace: Workspace, backbone: str, keys: Set[bytes]) -> list[str]:
    """Return the names of the other backbones of which a feature space has a row of each of `keys`.

    The list is empty if `backbone` has such a space too: then another option than the backbone is wrong.
    """
    spaces = workspace.cache.spaces() if keys else []
    complete = [space for space in spaces if space.locate(list(keys), [0] * len(keys)).found.all()]
    if any(space.spec.backbone == backbone for space in complete):
        return []
    return sorted({networks.label(space.spec, space.provenance.get("network")) for space in complete})


def _missing(
    planning: Planning,
    lacking: Set[bytes],
    space: FeatureSpace | None,
    other_backbones: Sequence[str],
) -> MissingFeaturesError:
    unseen = planning.identities.unseen
    count, images = sum(key in lacking for key in planning.identities.keys) + len(unseen), len(planning.dataset)
    in_views = f", in {planning.views.count} views" if planning.views.count > 1 else ""
    where = f" in {space.name}" if space else " in any feature space that agrees with what was asked for"
    causes = Counter(planning.identities.unread.values()).most_common(3)
    unread = "".join(f"; {many:,} {cause}" for cause, many in causes)
    names = ", ".join(other_backbones)
    others = f"; there are features of {names}, which --backbone names" if names else ""
    return MissingFeaturesError(
        f"{count:,} of {counted(images, 'image')} {'has' if count == 1 else 'have'} no features"
        f"{where}{in_views}{unread}{others}"
    )


def _report_leaks(split: Split) -> None:
    if split.crossing:
        some = counted(split.crossing, "image has", "images have")
        logger.warning("%s an identical copy on another side of the split", some)
    if split.crossing_groups:
        some = counted(split.crossing_groups, "group lies", "groups lie")
        logger.warning("%s on more than one side of the split", some)
    if split.conflicting:
        some = counted(split.conflicting, "image has", "images have")
        logger.warning("%s an identical copy under another label", some)
