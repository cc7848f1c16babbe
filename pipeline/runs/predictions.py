"""Write and read a run's `predictions.csv`: the predictions of a model, one row for each image."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.utf8 import to_utf8
from pipeline.runs.metrics import MOST_DENSE

_TOP = 10  # likeliest classes stored for each image if there are more than MOST_DENSE classes

Answers = dict[tuple[str, str], list[tuple[int, int, float]]]


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for the images of one split."""

    split: str
    names: Sequence[str]
    labels: np.ndarray  # (n,) int
    probabilities: np.ndarray  # (n, k) float32


def write_predictions(path: Path, parts: Sequence[Predictions], classes: Sequence[str]) -> None:
    """Write a CSV file with a row for each image: image, split, label, predicted, probability, and p:<class> columns.

    For more than 200 classes, only the ten likeliest are stored: `predicted` and `probability`, then label_2 and
    probability_2 to label_10 and probability_10.
    """
    named = [to_utf8(name) for name in classes]
    dense = len(classes) <= MOST_DENSE
    ranks = [f"{of}_{rank}" for rank in range(2, _TOP + 1) for of in ("label", "probability")]
    further = [f"p:{name}" for name in named] if dense else ranks
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split", "label", "predicted", "probability", *further])
        for part in parts:
            for name, label, row in zip(part.names, part.labels, part.probabilities, strict=True):
                cells = _dense(row, named) if dense else _likeliest(row, named)
                writer.writerow([to_utf8(name), part.split, named[label], *cells])


def _dense(row: np.ndarray, named: Sequence[str]) -> list[str]:
    shares = [f"{p:.6g}" for p in row]
    best = int(row.argmax())
    return [named[best], shares[best], *shares]


def _likeliest(row: np.ndarray, named: Sequence[str]) -> list[str]:
    some = np.union1d(np.argpartition(-row, _TOP)[:_TOP], row.argmax())  # ascending, so that ties are in class order
    best = some[np.argsort(-row[some], kind="stable")][:_TOP]  # the first of ties is predicted, like `argmax`
    return [cell for i in map(int, best) for cell in (named[i], f"{row[i]:.6g}")]


def read_predictions(path: Path, classes: Sequence[str]) -> Answers:
    """Return (split, image name as written in the file) → a list of (label, predicted class, its probability).

    The list has more than one entry if images share a name.

    Raises
    ------
    OSError, ValueError, KeyError, csv.Error
        If the file cannot be read, or is not in the format of `write_predictions`.
    """
    known = {name.encode("utf-8", "backslashreplace").decode(): i for i, name in enumerate(classes)}  # in older files
    known |= {to_utf8(name): i for i, name in enumerate(classes)}
    said: Answers = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            answer = known[row["label"]], known[row["predicted"]], _finite(row["probability"])
            said.setdefault((row["split"], row["image"]), []).append(answer)
    return said


def _finite(text: Any) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text!r:.60} where a probability should be")
    return value
