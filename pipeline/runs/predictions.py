"""What a model said of images, image by image, as a run keeps it: `predictions.csv`, written and read."""

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

_TOP = 10  # classes whose probabilities are kept of each image where there are more than MOST_DENSE

Answers = dict[tuple[str, str], list[tuple[int, int, float]]]


@dataclass(frozen=True)
class Predictions:
    """What a model said of the images of one split."""

    split: str
    names: Sequence[str]
    labels: np.ndarray  # (n,) int
    probabilities: np.ndarray  # (n, k) float32


def write_predictions(path: Path, parts: Sequence[Predictions], classes: Sequence[str]) -> None:
    """Write a CSV with one row an image: name, split, label, predicted, probability, and p:<class> for each.

    Of more than 200 classes the ten likeliest are told instead: label_2 and probability_2 to label_10 and
    probability_10 beside the first, the answer.
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
    some = np.union1d(np.argpartition(-row, _TOP)[:_TOP], row.argmax())  # in ascending order, so that of equal ones …
    best = some[np.argsort(-row[some], kind="stable")][:_TOP]  # … the first is the answer, as everywhere
    return [cell for i in map(int, best) for cell in (named[i], f"{row[i]:.6g}")]


def read_predictions(path: Path, classes: Sequence[str]) -> Answers:
    """Return for each split and name of an image, as it is spelt, its label, the answer, and its probability.

    There are several where several images have one name.

    Raises
    ------
    OSError, ValueError, KeyError, csv.Error
        If the file is not what `write_predictions` leaves.
    """
    known = {name.encode("utf-8", "backslashreplace").decode(): i for i, name in enumerate(classes)}  # of earlier files
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
