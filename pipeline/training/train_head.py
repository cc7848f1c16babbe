"""Train a head on cached rows, measure it, and publish it as a run (stage two). Computes no features."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone import source as networks
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import RunError
from pipeline.dataset import Dataset
from pipeline.extraction.planning import Quarantined
from pipeline.runs import store
from pipeline.runs.request import TrainRequest
from pipeline.training import heads, run_folder, tracking
from pipeline.training.fitting import FitResult, fit_request
from pipeline.training.labelled_features import LabelledFeatures, join_features
from pipeline.training.rows import Rows
from pipeline.training.training_data import TrainingData, open_training_data

_MOST_DIFFERENCE = 1e-5  # largest allowed difference of probabilities between the head in memory and the saved one


@dataclass(frozen=True)
class HeadResult:
    """Name, folder and summary of the run that `train_head` published, and the images that could not be decoded."""

    name: str
    path: Path
    summary: dict[str, Any]
    quarantined: list[Quarantined]


def train_head(
    dataset: Dataset, workspace: Workspace, request: TrainRequest, *, resume: str | None = None
) -> HeadResult:
    """Train the head of `request` on cached rows, measure, save and publish it. `resume` names an unfinished run.

    Raises
    ------
    MissingRowsError
        If an image that can be decoded has no row.
    DatasetError
        If a split has no image, or there is only one class to learn.
    RunError
        If the saved head, read back, predicts other probabilities, or the data of the run to resume have changed.
    """
    start = time.perf_counter()
    if request.tensorboard:
        tracking.require_tensorboard()
    labelled = join_features(dataset, workspace, request.features, request.max_pixels, views=request.views)
    with (
        open_training_data(labelled, [request.head], request.memory, folds=request.folds) as training_data,
        _run(workspace, request, labelled, resume) as (name, directory),
    ):
        outcome = fit_request(training_data, request, directory, workspace.progress)
        seconds = time.perf_counter() - start + outcome.fitted.seconds_before
        summary = write_run(directory, name, training_data, request, outcome, seconds)
    return HeadResult(name, workspace.runs / name, summary, labelled.quarantined)


@contextmanager
def _run(
    workspace: Workspace, request: TrainRequest, labelled: LabelledFeatures, resume: str | None
) -> Iterator[tuple[str, Path]]:
    """Yield name and folder of a new run, or of the run to resume if its rows are the same."""
    command = workspace.command("train-head")
    if resume is None:
        with store.new_run(workspace.runs, f"{labelled.dataset.name}-{request.head.head}", command) as (
            name,
            directory,
        ):
            store.write_request(directory, request.to_dict(), labelled.digest(), labelled.space.name)
            yield name, directory
        return
    store.require_same(workspace.runs, resume, labelled.digest())
    with store.reopened(workspace.runs, resume, command) as found:
        yield found


def write_run(
    directory: Path,
    name: str,
    training_data: TrainingData[LabelledFeatures],
    request: TrainRequest,
    outcome: FitResult,
    seconds: float,
) -> dict[str, Any]:
    """Write all files of a run into its folder, check the saved head, and return the summary.

    Raises RunError if the saved head, read back, predicts other probabilities.
    """
    labelled, fitted = training_data.labelled, outcome.fitted
    predictions = [
        training_data.predictions("val", outcome.val_members, outcome.val),
        training_data.predictions("test", training_data.members["test"], outcome.test),
    ]
    metrics = run_folder.compute_split_metrics(predictions, labelled.dataset.classes)
    summary = {
        "run": name,
        "head": request.head.head,
        "stage": "head",
        **run_folder.summarize_metrics(metrics, labelled),
        "train_rows": len(training_data.members["train"]) * request.views.count,
        "views": request.views.count,
        "folds": request.folds,
        "parameters": fitted.head.parameters,
        "epochs": len(fitted.history) if fitted.x == "epoch" else None,
        "seconds_per_epoch": fitted.seconds_per_epoch,
        **fitted.facts,
        "features_computed": 0,
        "space": labelled.space.name,
        "backbone": networks.label(labelled.space.spec, labelled.space.provenance.get("network")),
        "weights": labelled.space.provenance.get("weights"),
        "precision": labelled.space.spec.precision,
        "seconds": round(seconds, 3),
    }
    about = {
        "features": labelled.space.spec.to_dict(),
        "made_by": labelled.space.provenance,
        "head": request.head.to_dict(),
        "asked": request.to_dict(),
        "summary": summary,
    }
    run_folder.write_results(directory, about, labelled, metrics, fitted.history, fitted.x, predictions)
    fitted.head.save(directory)
    _check_saved(directory, training_data.rows["test"], outcome.test)
    return summary


def _check_saved(directory: Path, rows: Rows, expected: np.ndarray) -> None:
    """Raise RunError if the saved head, read back, does not predict `expected`: it must be the model measured."""
    difference = float(np.abs(heads.load(directory).predict(rows) - expected).max())
    if not difference <= _MOST_DIFFERENCE:  # negated, so that NaN counts as different
        raise RunError(
            f"the saved head, read back, differs from the trained one by {difference:.2g}; nothing published"
        )
