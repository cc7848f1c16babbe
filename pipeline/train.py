"""Stage two: a head trained from the cache. Computes no feature."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import heads, runs
from pipeline.dataset import Dataset
from pipeline.errors import DatasetError, RunError
from pipeline.evaluate import evaluate
from pipeline.extract import FeatureChoice, Quarantined, warn_untrained
from pipeline.gather import SPLITS, Material, gather
from pipeline.rows import Rows, open_rows
from pipeline.spec import HeadSpec
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

_MOST_DIFFERENCE = 1e-5  # between the probabilities of a head in memory and the same one read back


@dataclass(frozen=True)
class HeadRun:
    """What `train_head` made."""

    name: str
    path: Path
    summary: dict[str, Any]
    quarantined: list[Quarantined]


def train_head(
    dataset: Dataset,
    workspace: Workspace,
    choice: FeatureChoice,
    spec: HeadSpec,
    max_pixels: int,
    features_command: str,
) -> HeadRun:
    """Train, measure and save one head from cached rows; publish it as a run.

    Raises
    ------
    MissingRowsError
        If an image that can be decoded has no row; the text names `features_command`.
    DatasetError
        If a split has no image, or there is only one class to learn.
    RunError
        If the saved head, read back, does not say what it said before.
    """
    start = time.perf_counter()
    material = gather(dataset, workspace, choice, max_pixels, features_command)
    members = [material.members(side) for side in SPLITS]
    labels = [dataset.labels[material.usable[at]] for at in members]
    _check_splits(dataset, labels)
    warn_untrained(material.space.spec)
    with material.space.reading():  # `gc` waits
        return _train(material, workspace, spec, members, labels, start)


def _train(
    material: Material,
    workspace: Workspace,
    spec: HeadSpec,
    members: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    start: float,
) -> HeadRun:
    dataset = material.dataset
    rows = open_rows(material.space, material.keys, heads.READS[spec.head], members)
    data = heads.Data(rows[0], labels[0], rows[1], labels[1], len(dataset.classes))
    unit = "fits" if spec.head == "logreg" else "epochs"
    with runs.new_run(workspace.runs, f"{dataset.name}-{spec.head}") as (name, directory):
        with workspace.progress(f"training {spec.head}", heads.steps(spec), unit) as advance:
            fitted = heads.fit(spec, data, advance)
        predictions = [
            _predict(fitted.head, material, side, at, some)
            for side, at, some in zip(SPLITS[1:], members[1:], rows[1:], strict=True)
        ]
        summary = _summary(name, spec, material, fitted, predictions, labels)
        summary["seconds"] = round(time.perf_counter() - start, 3)
        _write(directory, summary, spec, material, fitted, predictions)
        _check_saved(directory, rows[1], predictions[0].probabilities)
    return HeadRun(name, workspace.runs / name, summary, material.quarantined)


def _check_splits(dataset: Dataset, labels: Sequence[np.ndarray]) -> None:
    counts = {side: len(some) for side, some in zip(SPLITS, labels, strict=True)}
    if empty := [side for side, count in counts.items() if count == 0]:
        found = ", ".join(f"{side} {count}" for side, count in counts.items())
        raise DatasetError(
            f"no images to {' or '.join(_USES[side] for side in empty)} ({found}); add images, or bring your own split"
        )
    learnable = np.unique(labels[0])
    if len(learnable) < 2:
        raise DatasetError(
            f"the training images show one class only ({dataset.classes[learnable[0]]}); a classifier needs two"
        )
    if absent := sorted(set(range(len(dataset.classes))) - set(learnable.tolist())):
        names = ", ".join(dataset.classes[i] for i in absent[:5])
        logger.warning("%d classes have no training image and cannot be learned: %s", len(absent), names)


_USES = {"train": "train on", "val": "validate on", "test": "test on"}


def _predict(head: heads.Head, material: Material, side: str, at: np.ndarray, rows: Rows) -> runs.Predictions:
    images = material.usable[at]
    names = [material.dataset.names[int(i)] for i in images]
    return runs.Predictions(side, names, material.dataset.labels[images], head.predict(rows))


def _summary(
    name: str,
    spec: HeadSpec,
    material: Material,
    fitted: heads.Fitted,
    predictions: Sequence[runs.Predictions],
    labels: Sequence[np.ndarray],
) -> dict[str, Any]:
    classes = material.dataset.classes
    val, test = (evaluate(part.labels, part.probabilities, classes) for part in predictions)
    return {
        "run": name,
        "head": spec.head,
        "stage": "head",
        "accuracy": test["accuracy"],
        "accuracy_interval": test["accuracy_interval"],
        "val_accuracy": val["accuracy"],
        "train_rows": len(labels[0]),
        "val_rows": len(labels[1]),
        "test_rows": len(labels[2]),
        "classes": len(classes),
        "parameters": fitted.head.parameters,
        "epochs": len(fitted.history) if fitted.x == "epoch" else None,
        "seconds_per_epoch": fitted.seconds_per_epoch,
        "features_computed": 0,
        "copies_across_splits": material.split.crossing,
        "groups_across_splits": material.split.crossing_groups,
        "copies_under_other_labels": material.split.conflicting,
        "quarantined": len(material.quarantined),
        "space": material.space.name,
        "weights": material.space.provenance.get("weights"),
        "precision": material.space.spec.precision,
    }


def _write(
    directory: Path,
    summary: dict[str, Any],
    spec: HeadSpec,
    material: Material,
    fitted: heads.Fitted,
    predictions: Sequence[runs.Predictions],
) -> None:
    dataset = material.dataset
    about = {
        "format": runs.FORMAT,
        "version": runs.VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": {"name": dataset.name, "images": len(dataset), "split": material.split.origin},
        "classes": list(dataset.classes),
        "features": material.space.spec.to_dict(),
        "made_by": material.space.provenance,
        "head": spec.to_dict(),
        "summary": summary,
    }
    metrics = {part.split: evaluate(part.labels, part.probabilities, dataset.classes) for part in predictions}
    runs.write_json(directory / "run.json", about)
    runs.write_json(directory / "metrics.json", metrics)
    runs.write_json(directory / "history.json", fitted.history)
    runs.write_json(directory / "quarantined.json", [asdict(bad) for bad in material.quarantined])
    runs.write_predictions(directory / "predictions.csv", predictions, dataset.classes)
    runs.draw_curves(directory / "curves.png", fitted.history, fitted.x, f"{spec.head} on {dataset.name}")
    fitted.head.save(directory)


def _check_saved(directory: Path, rows: Rows, expected: np.ndarray) -> None:
    """Read the head back and compare, so that what is published is the model that was measured."""
    difference = float(np.abs(heads.load(directory).predict(rows) - expected).max())
    if not difference <= _MOST_DIFFERENCE:  # so that NaN counts as different
        raise RunError(
            f"the saved head, read back, differs from the trained one by {difference:.2g}; nothing published"
        )
