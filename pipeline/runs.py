"""A run directory: what was asked, what came out, the model. It appears whole or not at all."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import storage
from pipeline.errors import RunError

FORMAT = "icebox-run"
VERSION = 1


@contextmanager
def new_run(root: Path, title: str) -> Iterator[tuple[str, Path]]:
    """Give the name of a new run and a folder to fill; on leaving without an error it becomes `root/<name>`.

    After an error nothing is left; after a kill a hidden ".partial-…" folder, which no reader looks at.

    Raises
    ------
    RunError
        If `root` cannot be written.
    """
    partial = storage.partial_name(root)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"no run can be written to {root}: {error}") from error
    name = _free_name(root, f"{datetime.now():%Y%m%d-%H%M%S}-{_slug(title)}")
    try:
        yield name, partial
        for path in partial.iterdir():
            storage.fsync(path)
        storage.publish(partial, root / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was published


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Predictions:
    """What a model said of the images of one split."""

    split: str
    names: Sequence[str]
    labels: np.ndarray  # (n,) int
    probabilities: np.ndarray  # (n, k) float32


def write_predictions(path: Path, parts: Sequence[Predictions], classes: Sequence[str]) -> None:
    """Write a CSV with one row an image: name, split, label, predicted, probability, and p:<class> for each."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split", "label", "predicted", "probability", *(f"p:{name}" for name in classes)])
        for part in parts:
            best = part.probabilities.argmax(axis=1)
            for name, label, guess, row in zip(part.names, part.labels, best, part.probabilities, strict=True):
                shares = [f"{p:.6g}" for p in row]
                writer.writerow([name, part.split, classes[label], classes[guess], shares[guess], *shares])


def draw_curves(path: Path, history: Sequence[Mapping[str, float]], x: str, title: str) -> None:
    """Draw loss and accuracy of training and validation over `x`, a key of each entry of `history`."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    kinds = [kind for kind in ("loss", "accuracy") if kind in history[0] or f"val_{kind}" in history[0]]
    figure = Figure(figsize=(5 * len(kinds), 3.6), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for key, label in ((kind, "training"), (f"val_{kind}", "validation")):
            if key in history[0]:
                values = [entry[key] for entry in history]
                axis.plot([entry[x] for entry in history], values, marker="." if len(values) < 30 else "", label=label)
        axis.set(xlabel=x.replace("_", " "), ylabel=kind)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"


def _free_name(root: Path, name: str) -> str:
    number, candidate = 1, name
    while (root / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate
