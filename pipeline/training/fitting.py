"""Fit the heads of a train request: one head, or K heads by cross-validation, each with checkpoint and logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.files import write_json
from pipeline.core.progress import Progress
from pipeline.core.spec import HeadSpec
from pipeline.runs.request import TrainRequest
from pipeline.training import heads, tracking
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.heads.base import JSON_FILE, Predicts, require_numbers, stratified_folds
from pipeline.training.heads.ensemble import Ensemble, member_name
from pipeline.training.rows import Rows
from pipeline.training.training_data import TrainingData

_HISTORY = "history.json"


@dataclass(frozen=True)
class FitResult:
    """A fitted head, and its probabilities on the validation and test splits, each (n, k) float32.

    `val_members` are the positions of the validation images. In cross-validation these are all training images, and
    `val` holds for each the probabilities of the head that was not trained on it.
    """

    fitted: heads.Fitted
    val_members: np.ndarray
    val: np.ndarray
    test: np.ndarray


def fit_request(training_data: TrainingData, request: TrainRequest, directory: Path, progress: Progress) -> FitResult:
    """Fit the head or heads of `request`, resuming from checkpoints and finished folds in `directory`."""
    fit = _fit_folds if request.folds else _fit_one
    steps = heads.steps(request.head) * max(1, request.folds)
    unit = "fits" if request.head.head == "logreg" else "epochs"
    with progress(f"training {request.head.head}", steps, unit) as advance:
        return fit(training_data, request, directory, advance)


def fit_head(
    spec: HeadSpec, data: heads.Data, directory: Path, advance: Callable[[float], None], *, tensorboard: bool = False
) -> heads.Fitted:
    """Fit one head of `spec` on `data`, with checkpoint and logs in `directory`."""
    with tracking.tensorboard(directory, tensorboard) as note:
        return heads.fit(spec, data, heads.TrainingContext(advance, note, Checkpoint(directory)))


def _fit_one(
    training_data: TrainingData, request: TrainRequest, directory: Path, advance: Callable[[float], None]
) -> FitResult:
    fitted = fit_head(request.head, training_data.data(), directory, advance, tensorboard=request.tensorboard)
    said = (predict_probabilities(fitted.head, training_data.rows[side], side) for side in ("val", "test"))
    return FitResult(fitted, training_data.members["val"], *said)


def predict_probabilities(head: Predicts, rows: Rows, side: str) -> np.ndarray:
    """Return the probabilities of `head` for `rows`, (n, k) float32. Raises DatasetError if a row has NaN or infinity.

    `side` is the split's name in the error.
    """
    said = head.predict(rows)
    if not np.isfinite(said).all():
        require_numbers(rows, f"the {side} split")
    return said


def _fit_folds(
    training_data: TrainingData, request: TrainRequest, directory: Path, advance: Callable[[float], None]
) -> FitResult:
    labels = training_data.labels["train"]
    said = np.zeros((len(labels), training_data.classes), np.float32)
    members, history = list[heads.Head](), list[dict[str, float]]()
    for number, (some, held) in enumerate(stratified_folds(labels, training_data.groups, request.folds), 1):
        folder = directory / member_name(number)
        data = training_data.fold(some, held)
        if not (folder / JSON_FILE).exists():
            _fit_member(data, request, folder, advance)
        else:
            advance(heads.steps(request.head))
        members.append(heads.load(folder))
        said[held] = predict_probabilities(members[-1], data.val, "train")
        history.append({"fold": number, **_best(json.loads((folder / _HISTORY).read_text()))})
    ensemble = Ensemble(members)
    return FitResult(
        heads.Fitted(ensemble, history, "fold", None),
        training_data.members["train"],
        said,
        predict_probabilities(ensemble, training_data.rows["test"], "test"),
    )


def _fit_member(data: heads.Data, request: TrainRequest, folder: Path, advance: Callable[[float], None]) -> None:
    folder.mkdir(exist_ok=True)
    fitted = fit_head(request.head, data, folder, advance, tensorboard=request.tensorboard)
    write_json(folder / _HISTORY, fitted.history)
    fitted.head.save(folder)
    Checkpoint(folder).remove()


def _best(history: list[dict[str, float]]) -> dict[str, float]:
    best = min(history, key=lambda entry: entry["val_loss"])
    return {name: best[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
