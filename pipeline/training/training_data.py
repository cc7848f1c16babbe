"""Open and check training data: the cached rows of a dataset, or its images.

`open_training_data` opens rows for heads, `open_tensor_data` rows for a full model after a cut, and
`open_image_data` images for a full model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from pipeline.cache.digests import identify
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError
from pipeline.core.spec import HeadSpec
from pipeline.core.units import counted
from pipeline.dataset import Dataset, assign, few_groups
from pipeline.dataset.split import SPLITS
from pipeline.extraction.feature_choice import warn_untrained
from pipeline.images.decoding import FULL_DEPTH
from pipeline.runs.predictions import Predictions
from pipeline.training import heads
from pipeline.training.image_batches import ImageRows, open_decoder
from pipeline.training.labelled_features import LabelledFeatures, LabelledImages
from pipeline.training.rows import Rows, RowSelection, StoredRows, load_or_stream_all, select, stored_rows

logger = logging.getLogger(__name__)


S = TypeVar("S", bound=LabelledImages)


@dataclass(frozen=True)
class TrainingData(Generic[S]):
    """Training data of a model: for each split its positions in `labelled.keys`, its labels and its rows.

    For cross-validation the validation images are part of "train", and there is no "val". `members` and `labels`
    have one entry per image. The rows of "train" are images times `views`, those of the plain view first.
    """

    labelled: S
    members: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    rows: Mapping[str, Rows]
    views: int = 1

    def data(self) -> heads.Data:
        """Return the data that a single head is fitted on."""
        labels, groups = (np.tile(each, self.views) for each in (self.labels["train"], self.groups))
        return heads.Data(self.rows["train"], labels, self.rows["val"], self.labels["val"], self.classes, groups)

    def fold(self, some: np.ndarray, held: np.ndarray) -> heads.Data:
        """Return the data of one fold: train on images `some` in all views, validate on `held` in the plain view.

        Both are indices (n,) into the training images.
        """
        rows, labels, views = self.rows["train"], self.labels["train"], self.views
        at = np.concatenate([some + view * len(labels) for view in range(views)])
        train, train_labels, groups = select(rows, at), np.tile(labels[some], views), np.tile(self.groups[some], views)
        return heads.Data(train, train_labels, select(rows, held), labels[held], self.classes, groups)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.labelled.dataset.classes)

    @property
    def groups(self) -> np.ndarray:
        """The group of each training image, (n,) int64; images of one group must stay on one side of a fold."""
        return self.labelled.groups[self.members["train"]]

    def predictions(self, side: str, members: np.ndarray, probabilities: np.ndarray) -> Predictions:
        """Return the probabilities (n, k) of `members` together with their names and labels."""
        return Predictions(side, self.labelled.names(members), self.labelled.labels(members), probabilities)


@contextmanager
def open_training_data(
    labelled: LabelledFeatures,
    specs: Sequence[HeadSpec],
    memory: int | None,
    *,
    folds: int = 0,
    sides: Sequence[str] = SPLITS,
    held: bool = True,
) -> Iterator[TrainingData[LabelledFeatures]]:
    """Check the splits and open the rows that heads of these specs read; `gc` waits until the context ends.

    All heads must read the same kind of rows, "features" or "pooled". Rows are opened for `sides` only. If `held`,
    `load_or_stream_all` decides where they are kept; else they are returned as `StoredRows`.

    Raises
    ------
    DatasetError
        If a split has no image, or there is only one class to learn.
    DoNotFitError
        If a head takes more memory than is free.
    """
    members, labels = split_members(labelled, folds=folds)
    (reads,) = {heads.READS[spec.head] for spec in specs}
    names = [name for name in members if name in sides]
    with labelled.space.reading():
        stored = _stored(labelled, members, names, reads)
        about = stored[0].shape[1:], len(labelled.dataset.classes)
        needed = memory_needed(specs, *about)
        if held:  # otherwise Dask workers train, in their own memory
            heads.require_memory(max(specs, key=lambda spec: heads.memory_needed(spec, *about)), *about)
        rows = load_or_stream_all(stored, memory=memory, needed=needed) if held else stored
        yield TrainingData(labelled, members, labels, dict(zip(names, rows, strict=True)), labelled.views.count)


@contextmanager
def open_tensor_data(
    labelled: LabelledFeatures, memory: int | None, needed: int
) -> Iterator[TrainingData[LabelledFeatures]]:
    """Check the splits and open the full tensors of a model that takes `needed` bytes beside them.

    `gc` waits until the context ends. Raises what `split_members` does.
    """
    members, labels = split_members(labelled)
    with labelled.space.reading():
        stored = _stored(labelled, members, SPLITS, "features")
        rows = load_or_stream_all(stored, memory=memory, needed=needed)
        yield TrainingData(labelled, members, labels, dict(zip(SPLITS, rows, strict=True)), labelled.views.count)


@contextmanager
def open_image_data(
    images: LabelledImages, size: int, fit: str, max_pixels: int, depth: int = FULL_DEPTH
) -> Iterator[TrainingData[LabelledImages]]:
    """Check the splits and open the images, decoded to (n, size, size, 3) uint8 RGB; raise as `split_members` does."""
    members, labels = split_members(images)
    with open_decoder(images.dataset, images.keys, images.usable, size, fit, max_pixels, depth) as source:
        yield TrainingData(images, members, labels, {side: ImageRows(source, at) for side, at in members.items()})


def _stored(
    labelled: LabelledFeatures, members: Mapping[str, np.ndarray], sides: Sequence[str], reads: str
) -> list[StoredRows]:
    numbers = {"train": labelled.views.numbers}
    wanted = [RowSelection(members[side], numbers.get(side, (0,))) for side in sides]
    return stored_rows(labelled.space, labelled.keys, reads, wanted)


def split_members(images: LabelledImages, *, folds: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return for each split its positions in `images.keys`, and its labels. With `folds`, "train" includes "val".

    Test images that the model is trained on are left out, unless there are no others.

    Raises
    ------
    DatasetError
        If a split has no image, or there is only one class to learn.
    """
    joined = {"train": ("train", "val"), "test": ("test",)} if folds else {side: (side,) for side in SPLITS}
    members = {name: np.sort(np.concatenate([images.members(side) for side in some])) for name, some in joined.items()}
    labels = {name: images.labels(at) for name, at in members.items()}
    _check_splits(images.dataset, labels)
    members["test"] = _unseen(images, members["test"])
    labels["test"] = images.labels(members["test"])
    if isinstance(images, LabelledFeatures):
        warn_untrained(images.space.spec)
    return members, labels


def memory_needed(specs: Sequence[HeadSpec], row_shape: tuple[int, ...], classes: int) -> int:
    """Return about how many bytes training the largest of these heads takes beside the rows."""
    return max(heads.memory_needed(spec, row_shape, classes) for spec in specs)


def _unseen(images: LabelledImages, tested: np.ndarray) -> np.ndarray:
    """Return the test images that the model is neither trained nor selected on; all of them if there is none."""
    seen = images.trained_on(tested)
    if not seen.any():
        return tested
    fate = "measured on all the same, as there are no others" if seen.all() else "left out of its accuracy"
    logger.warning("%d of these %d test images were trained on; they are %s", seen.sum(), len(tested), fate)
    return tested if seen.all() else tested[~seen]


def check_sides(dataset: Dataset, workspace: Workspace) -> None:
    """Raise DatasetError if a split has no image, or there is only one class to learn. Decode no image."""
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, workspace.cache.index, advance)
    sides = assign(dataset, identities.keys).sides
    _check_splits(dataset, {side: dataset.labels[sides == side] for side in SPLITS})


def _check_splits(dataset: Dataset, labels: Mapping[str, np.ndarray]) -> None:
    counts = {side: len(some) for side, some in labels.items()}
    if empty := [side for side, count in counts.items() if count == 0]:
        found = ", ".join(f"{side} {count}" for side, count in counts.items())
        way_out = few_groups(dataset) or "add images, or bring your own split"
        raise DatasetError(f"no images to {' or '.join(_USES[side] for side in empty)} ({found}); {way_out}")
    _warn_of_single_images(dataset, labels)
    learnable = np.unique(labels["train"])
    if len(learnable) < 2:
        raise DatasetError(
            f"the training images show one class only ({dataset.classes[learnable[0]]}); a classifier needs two"
        )
    if absent := sorted(set(range(len(dataset.classes))) - set(learnable.tolist())):
        names = ", ".join(dataset.classes[i] for i in absent[:5])
        some = counted(len(absent), "class has", "classes have")
        logger.warning("%s no training image and cannot be learned: %s", some, names)


def _warn_of_single_images(dataset: Dataset, labels: Mapping[str, np.ndarray]) -> None:
    counts = np.bincount(np.concatenate(list(labels.values())), minlength=len(dataset.classes))
    if single := np.flatnonzero(counts == 1).tolist():
        names = ", ".join(dataset.classes[i] for i in single[:5])
        some = counted(len(single), "class has", "classes have")
        logger.warning("%s one image only, to learn from or to measure by: %s", some, names)


_USES = {"train": "train on", "val": "validate on", "test": "test on"}
