"""Load a run's stored results for its report page: metrics, curves, tables, predictions.

`load_run` reads only the run's folder; it needs neither images nor features.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import RunError
from pipeline.core.files import MOST_JSON_BYTES
from pipeline.core.units import counted
from pipeline.deployment.reproduce import reproduction_commands
from pipeline.report import page
from pipeline.runs.metrics import confusion_cells
from pipeline.runs.predictions import Answers, read_predictions
from pipeline.training.open_run import TrainedRun

_MOST_CLASSES = 1_000  # rows of the table of classes; a page with more is slow to open
_MEASURES = ("precision", "recall", "f1", "roc_auc", "support")
_STAGES = {"freeze": "the full model, backbone frozen", "finetune": "the full model, fine-tuned"}
_TOLD_ELSEWHERE = ("run", "head", "space", "weights", "precision")  # keys of a summary that other tables show

_AXES = {"fold": "the folds", "epoch": "the epochs", "C": "C"}

Row = tuple[str, str]
# The exceptions that reading damaged or foreign files can raise.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error)


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """The stored results of a run: `values` for the page's template, the confusion matrix and the predictions.

    `confusion` is a list of cells [true class, predicted class, number of images]. `said` maps (split, image name as
    written in the CSV) to a list of (label, predicted class, probability); it is longer where images share a name.
    """

    values: dict[str, Any]
    confusion: list[list[int]]
    said: Answers


def load_run(run: TrainedRun, program: Sequence[str]) -> LoadedRun:
    """Read the stored results of a run; `program` is the beginning of the command lines on the page.

    Raises
    ------
    RunError
        If a file cannot be read, or its content is not valid.
    """
    try:
        about, metrics, history, bad = (
            _json(run.path / f"{name}.json") for name in ("run", "metrics", "history", "quarantined")
        )
        test, share = metrics["test"], len(bad) / about["dataset"]["images"]
        values = {
            "title": f"{about['dataset']['name']}: {run.kind}",
            "subtitle": f"{run.name}, {about.get('created', '')}",
            "untrained": run.base.untrained,
            "cards": _cards(run, about, metrics),
            "curves": _curves(history),
            "reliability": page.reliability(test["calibration"]),
            "calibration_error": _number(test["expected_calibration_error"]),
            "measures": _MEASURES,
            "per_class": _per_class(test["per_class"]),
            "classes": len(run.classes),
            "quarantined": [(str(each["path"]), str(each["reason"])) for each in bad],
            "provenance": _provenance(run, about),
            "commands": reproduction_commands(run, program, share),
        }
        said = read_predictions(run.path / "predictions.csv", run.classes)
        for side, measured in metrics.items():
            if (found := sum(len(some) for (of, _), some in said.items() if of == side)) != measured["images"]:
                raise ValueError(f"predictions.csv has {found:,} images of {side}, not {measured['images']:,}")
        return LoadedRun(values, confusion_cells(test["confusion"], len(run.classes)).tolist(), said)
    except _UNREADABLE as error:
        raise RunError(f"the files of the run {run.name} cannot be read ({error!r:.200}); train anew") from error


def _number(value: Any) -> float:
    """Return `value` unchanged if it is a finite number, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} where a number should be")
    return value


def _per_class(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the measures of each class; above 1,000 classes, of the 1,000 with the lowest F1, in class order."""
    told = [_measures(each) for each in measured]
    tested = [i for i, each in enumerate(told) if each["support"]]
    worst = sorted(tested, key=lambda i: told[i]["f1"])[:_MOST_CLASSES]
    return told if len(told) <= _MOST_CLASSES else [told[i] for i in sorted(worst)]


def _measures(of_class: Mapping[str, Any]) -> dict[str, Any]:
    measured = {name: value if (value := of_class[name]) is None else _number(value) for name in _MEASURES}
    return {"class": str(of_class["class"]), **measured}


def _json(path: Path) -> Any:
    return json.loads(files.read_small(path, MOST_JSON_BYTES))


def _curves(history: Sequence[Mapping[str, float]]) -> list[Row]:
    """Return the plots of loss and accuracy during training, as far as recorded: caption and SVG of each."""
    x = "fold" if "fold" in history[0] else "epoch" if "epoch" in history[0] else "C"
    kinds = [kind for kind in ("loss", "accuracy") if kind in history[0] or f"val_{kind}" in history[0]]
    found = []
    for kind in kinds:
        some = [{key: entry[key] for key in (x, kind, f"val_{kind}") if key in entry} for entry in history]
        found.append((f"{kind.capitalize()} over {_AXES[x]}.", page.curves(some, x)))
    return found


def _cards(run: TrainedRun, about: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the cards at the top of the page: name, value, and a line of details."""
    test, val, summary, dataset = metrics["test"], metrics["val"], about["summary"], about["dataset"]
    low, high = map(_number, test["accuracy_interval"])
    sure = f"95% interval {low:.1%} to {high:.1%}, {counted(test['images'], 'test image')}"
    trained = _STAGES.get(summary.get("stage"), "a head on cached features")
    return [
        ("Accuracy", f"{test['accuracy']:.1%}", sure),
        ("On validation", f"{val['accuracy']:.1%}", counted(val["images"], "image")),
        ("Dataset", str(dataset["name"]), f"{counted(dataset['images'], 'image')}, {len(run.classes):,} classes"),
        ("Trained", run.kind, trained),
        ("Backbone", run.backbone, f"weights {run.weights}, {run.base.input_size} pixels, {run.base.precision}"),
        ("Time spent", _minutes(float(summary["seconds"])), f"{summary.get('parameters') or 0:,} parameters"),
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _provenance(run: TrainedRun, about: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the tables of settings and results, by title."""
    dataset, summary = about["dataset"], about["summary"]
    base = {"base weights": run.base.weights} if run.full else {}
    measured = {name: value for name, value in summary.items() if name not in _TOLD_ELSEWHERE}
    made_by = about.get("made_by") or {}
    first = {"run": run.name, "dataset": dataset["name"], "split": dataset.get("split", "")}
    return {
        "The run": _rows({**first, **(about.get("head") or {})}),
        "What came of it": _rows(measured),
        "Features": _rows({"space": run.spec.directory, **asdict(run.spec), **base, **made_by}),
    }


def _rows(values: Mapping[str, Any]) -> list[Row]:
    return [(name.replace("_", " "), _short(value)) for name, value in values.items() if value is not None]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
