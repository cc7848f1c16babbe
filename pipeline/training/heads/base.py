"""Define what all heads share: the `Head` protocol, the data to fit on, the result of a fit, folds and losses."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.core.errors import DatasetError
from pipeline.training.loop import Entry
from pipeline.training.rows import Rows, blocks

JSON_FILE = "head.json"
_TRIES = 10  # random states to try for valid folds
# Largest groups times classes for scikit-learn's folds: it counts every class in every group, 8 bytes each.
_MOST_COUNTED = 1 << 25


class Predicts(Protocol):
    """Protocol of a classifier of rows."""

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32."""
        ...


class Head(Predicts, Protocol):
    """A fitted head."""

    def save(self, directory: Path) -> None:
        """Write the head into a run directory; `head.json` is written last, so it exists only if all files do."""
        ...

    @property
    def kind(self) -> str:
        """The head's name: "flatten", "gap" or "logreg"."""
        ...

    @property
    def parameters(self) -> int:
        """The number of learned parameters."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A fitted head and its history, with one entry per epoch or per fit of the solver.

    `x` is the entries' key for the horizontal axis of a plot, such as "epoch" or "C".
    """

    head: Head
    history: list[Entry]
    x: str
    seconds_per_epoch: float | None
    facts: dict[str, float | bool] = field(default_factory=dict)  # further values for the run's summary
    seconds_before: float = 0.0  # training time in an earlier process that was stopped


@dataclass(frozen=True)
class Data:
    """Data to fit a head on: rows and (n,) int labels of the training and validation splits.

    `groups` (n,) int gives the same number to training rows that belong together: copies, views, members of a group.
    None means that every row is its own group.
    """

    train: Rows
    train_labels: np.ndarray
    val: Rows
    val_labels: np.ndarray
    classes: int
    groups: np.ndarray | None = None


def class_weights(labels: np.ndarray, classes: int, kind: str) -> np.ndarray:
    """Return the weight of each class in the loss, (k,) float32.

    If `kind` is "balanced", classes are weighted by inverse frequency as in scikit-learn; else all weights are 1.
    """
    from sklearn.utils.class_weight import compute_class_weight

    weights = np.ones(classes, np.float32)
    if kind == "balanced":
        present = np.unique(labels)
        weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights


def stratified_folds(labels: np.ndarray, groups: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (train, held out) indices of each fold, with classes spread evenly and the rows of a group together.

    The folds do not depend on the seed of a head.

    Raises
    ------
    DatasetError
        If no folds are found where each has held-out rows and at least two classes to train on.
    """
    if np.unique(groups).size >= count <= np.unique(labels, return_counts=True)[1].max():
        for state in range(_TRIES):  # with large groups, some random states leave a fold empty
            found = deal_folds(labels, groups, count, state)
            if all(len(held) and np.unique(labels[some]).size > 1 for some, held in found):
                return found
    raise DatasetError(f"{len(labels)} images to train on are too few, or too much alike, for {count} folds")


def deal_folds(labels: np.ndarray, groups: np.ndarray, count: int, state: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (train, held out) indices of each fold, with classes spread evenly and the rows of a group together.

    Some folds may be empty, or have one class only.
    """
    from sklearn.model_selection import PredefinedSplit, StratifiedGroupKFold

    if np.unique(groups).size * np.unique(labels).size > _MOST_COUNTED:
        return list(PredefinedSplit(_dealt(labels, groups, count, state)).split())
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a class has fewer images than folds
        return list(folds.split(labels, labels, groups))


def _dealt(labels: np.ndarray, groups: np.ndarray, count: int, state: int) -> np.ndarray:
    """Return the fold of each row; groups, ordered by class, are assigned to the folds in turn."""
    _, first, of = np.unique(groups, return_index=True, return_inverse=True)
    chance = np.random.default_rng(state).random(len(first))
    fold = np.empty(len(first), np.int64)
    fold[np.lexsort((chance, labels[first]))] = np.arange(len(first)) % count
    return fold[of]


def measure(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the cross-entropy in nats and the accuracy of `probabilities` (n, k) for `labels` (n,)."""
    truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return cross_entropy(truth), float((probabilities.argmax(axis=1) == labels).mean())


def cross_entropy(truth: np.ndarray) -> float:
    """Return the mean cross-entropy in nats, from the predicted probabilities `truth` (n,) of the true classes."""
    return abs(float(-np.log(np.maximum(truth, np.finfo(np.float32).eps)).mean()))


def not_numbers(where: str) -> str:
    """Return the error message for rows that hold NaN or infinity."""
    return (
        f"features of {where} are not numbers (NaN or infinite): they overflow in this precision or storage; "
        "compute them by `features --precision float32 --storage float32`"
    )


def require_numbers(rows: Rows, where: str) -> None:
    """Raise DatasetError if a row holds NaN or infinity."""
    for _, some in blocks(rows):
        if not np.isfinite(some).all():
            raise DatasetError(not_numbers(where))
