"""What every head is, what it is fitted on, and what comes of fitting it."""

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
_TRIES = 10  # to find folds
_MOST_COUNTED = (
    1 << 25
)  # groups times classes up to which scikit-learn finds the folds: it counts each in each, 8 bytes


class Predicts(Protocol):
    """Whatever tells classes apart by rows."""

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32."""
        ...


class Head(Predicts, Protocol):
    """A fitted head."""

    def save(self, directory: Path) -> None:
        """Write the head into a run directory; `head.json` comes last, so that it vouches for the rest."""
        ...

    @property
    def kind(self) -> str:
        """The head's name: "flatten", "gap" or "logreg"."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers were learned by gradient or solver."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A head and how it came about: one history entry an epoch (or a solver's fit), over the key `x`."""

    head: Head
    history: list[Entry]
    x: str
    seconds_per_epoch: float | None
    facts: dict[str, float | bool] = field(default_factory=dict)  # what else was found, for the run's summary
    seconds_before: float = 0.0  # spent on it by an earlier process that was stopped


@dataclass(frozen=True)
class Data:
    """What a head is fitted on: rows and (n,) int labels of the training and validation splits.

    `groups` (n,) int says which training rows belong together (copies, views, members of a group), if any do.
    """

    train: Rows
    train_labels: np.ndarray
    val: Rows
    val_labels: np.ndarray
    classes: int
    groups: np.ndarray | None = None


def class_weights(labels: np.ndarray, classes: int, kind: str) -> np.ndarray:
    """Return what each class counts, (k,) float32: 1, or "balanced" by its frequency, as in scikit-learn."""
    from sklearn.utils.class_weight import compute_class_weight

    weights = np.ones(classes, np.float32)
    if kind == "balanced":
        present = np.unique(labels)
        weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights


def stratified_folds(labels: np.ndarray, groups: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (train, held out) indices of each fold: classes spread evenly, a group's rows together, whatever the seed.

    Raises
    ------
    DatasetError
        If that cannot be done such that something is held out and two classes are left to learn.
    """
    if np.unique(groups).size >= count <= np.unique(labels, return_counts=True)[1].max():
        for state in range(_TRIES):  # some leave a fold empty where groups are large
            found = deal_folds(labels, groups, count, state)
            if all(len(held) and np.unique(labels[some]).size > 1 for some, held in found):
                return found
    raise DatasetError(f"{len(labels)} images to train on are too few, or too much alike, for {count} folds")


def deal_folds(labels: np.ndarray, groups: np.ndarray, count: int, state: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (train, held out) indices of each fold: classes spread as evenly as it goes, a group's rows together.

    Some may be empty, or of one class.
    """
    from sklearn.model_selection import PredefinedSplit, StratifiedGroupKFold

    if np.unique(groups).size * np.unique(labels).size > _MOST_COUNTED:
        return list(PredefinedSplit(_dealt(labels, groups, count, state)).split())
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class of fewer images lacks in some folds
        return list(folds.split(labels, labels, groups))


def _dealt(labels: np.ndarray, groups: np.ndarray, count: int, state: int) -> np.ndarray:
    """Return the fold of each row, groups being dealt out like cards, class by class."""
    _, first, of = np.unique(groups, return_index=True, return_inverse=True)
    chance = np.random.default_rng(state).random(len(first))
    fold = np.empty(len(first), np.int64)
    fold[np.lexsort((chance, labels[first]))] = np.arange(len(first)) % count
    return fold[of]


def measure(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the cross-entropy in nats and the accuracy."""
    truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return cross_entropy(truth), float((probabilities.argmax(axis=1) == labels).mean())


def cross_entropy(truth: np.ndarray) -> float:
    """Return the mean loss in nats by the probabilities (n,) that were given to the true classes."""
    return abs(float(-np.log(np.maximum(truth, np.finfo(np.float32).eps)).mean()))


def not_numbers(where: str) -> str:
    """Return what to say of rows that hold NaN or infinity."""
    return (
        f"features of {where} are not numbers (NaN or infinite): they overflow in this precision or storage; "
        "compute them by `features --precision float32 --storage float32`"
    )


def require_numbers(rows: Rows, where: str) -> None:
    """Raise DatasetError if a row holds what is not a number."""
    for _, some in blocks(rows):
        if not np.isfinite(some).all():
            raise DatasetError(not_numbers(where))
