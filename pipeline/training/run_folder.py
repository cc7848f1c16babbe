"""Write the files that every run has: description, images, metrics, history, predictions and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.runs import store
from pipeline.runs.checksums import CHECKSUMS
from pipeline.runs.metrics import compute_metrics
from pipeline.runs.plots import draw_curves
from pipeline.runs.predictions import Predictions, write_predictions
from pipeline.runs.run_dataset import resolved
from pipeline.training.labelled_features import LabelledImages
from pipeline.training.loop import Entry

Metrics = dict[str, dict[str, Any]]


def compute_split_metrics(predictions: Sequence[Predictions], classes: Sequence[str]) -> Metrics:
    """Return split → metrics of its predictions."""
    return {part.split: compute_metrics(part.labels, part.probabilities, classes) for part in predictions}


def summarize_metrics(metrics: Metrics, images: LabelledImages) -> dict[str, Any]:
    """Return the part of a run's summary on accuracies and images, which all kinds of runs share."""
    val, test = metrics["val"], metrics["test"]
    tested = images.members("test")
    left_out = len(tested) - test["images"]
    return {
        "accuracy": test["accuracy"],
        "accuracy_interval": test["accuracy_interval"],
        "val_accuracy": val["accuracy"],
        "val_accuracy_interval": val["accuracy_interval"],
        "val_rows": val["images"],
        "test_rows": test["images"],
        "test_rows_left_out": left_out,
        "test_rows_trained_on": int(images.trained_on(tested).sum()) - left_out,
        "classes": len(images.dataset.classes),
        "copies_across_splits": images.split.crossing,
        "groups_across_splits": images.split.crossing_groups,
        "copies_under_other_labels": images.split.conflicting,
        "quarantined": len(images.quarantined),
    }


def write_results(
    directory: Path,
    about: Mapping[str, Any],
    images: LabelledImages,
    metrics: Metrics,
    history: Sequence[Entry],
    x: str,
    predictions: Sequence[Predictions],
) -> None:
    """Write all files except the model into a run's folder.

    `about` gives the entries of run.json that depend on the kind of run; entries common to all runs are added.
    """
    dataset = images.dataset
    path, image_root = resolved(about["asked"]["images"]) or (None, None)
    common = {
        "format": store.FORMAT,
        "version": store.VERSION,
        "checksums": CHECKSUMS,
        "created": store.now(),
        "dataset": {
            "name": dataset.name,
            "path": path,
            **({"image_root": image_root} if image_root else {}),
            "images": len(dataset),
            "split": images.split.origin,
            "content": images.content,
        },
        "classes": list(dataset.classes),
    }
    files.write_json(directory / "run.json", {**common, **about}, store.MOST_ABOUT)
    images.run_images(joined=bool(about["asked"].get("folds"))).write(directory)
    files.write_json(directory / "metrics.json", metrics)
    files.write_json(directory / "history.json", history)
    store.write_history(directory / "history.csv", history)
    files.write_json(directory / "quarantined.json", [asdict(bad) for bad in images.quarantined])
    write_predictions(directory / "predictions.csv", predictions, dataset.classes)
    draw_curves(directory / "curves.png", history, x, f"{about['summary']['head']} on {dataset.name}")
