"""Rank the trials of a sweep on the validation split, test which differences are noise, and report extraction costs."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.spec import HeadSpec
from pipeline.core.units import counted, size_text
from pipeline.runs.metrics import wilson_interval
from pipeline.runs.plots import CostPoint, draw_ranking

SIGNIFICANCE = 0.05
_MOST_DRAWN = 40
_MEASURED = ("val_accuracy", "low", "high", "val_loss", "p_value", "within_noise")  # on the validation split
_COLUMNS = (
    "rank", "trial", "backbone", "head", *_MEASURED, "seconds", "parameters", "bytes", "error", "space",
    "images_per_second", "bytes_per_row",
)  # fmt: skip


@dataclass(frozen=True)
class ExtractionCost:
    """The backbone and space of a trial's rows, and the cost of extracting them; None if a cost is unknown."""

    backbone: str  # its name for people
    space: str
    images_per_second: float | None  # of extraction on this machine
    bytes_per_row: int | None  # on disk


@dataclass(frozen=True)
class Trial:
    """One setting, tried on the rows of one space, and its result on the validation split."""

    name: str  # different for each trial of a sweep
    spec: HeadSpec
    cost: ExtractionCost
    right: np.ndarray  # (n,) bool: which validation images were classified correctly; empty if the trial failed
    val_loss: float
    seconds: float
    parameters: int
    bytes: int  # of the saved head
    error: str | None = None  # why the trial failed

    @property
    def accuracy(self) -> float:
        """The accuracy on the validation split; 0 if the trial failed."""
        return float(self.right.mean()) if len(self.right) else 0.0

    @property
    def order(self) -> tuple[Any, ...]:
        """The sort key of the ranking, smallest for the best trial: accuracy, then loss, then parameters."""
        return (self.error is not None, -self.accuracy, self.val_loss, self.parameters, self.name)


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test that two classifiers have the same accuracy on the same images.

    The test uses only the images that exactly one of them classifies correctly. If the accuracies are equal, each
    classifier is expected to be right on half of these.

    Parameters
    ----------
    one, other : (n,) bool
        Which images each classifier got right.
    """
    from scipy.stats import binomtest

    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def leaderboard(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return one row per trial, the best first, as plain JSON values.

    `p_value` compares the trial with the best one by `mcnemar`. `within_noise` is true if it is 0.05 or more: then
    the best trial may be better on these images by chance alone.
    """
    ranked = sorted(trials, key=lambda trial: trial.order)
    return [_row(rank, trial, ranked[0]) for rank, trial in enumerate(ranked, 1)]


def noise_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on how many other trials may be as good as the best; `rows` are those of `leaderboard`."""
    others = [row["within_noise"] for row in rows if row["error"] is None][1:]
    if not others:
        return "no other setting to compare the best with"
    near, count = sum(others), counted(len(others), "other setting")
    if not near:
        return f"the best is better than {'the' if len(others) == 1 else 'all'} {count}, beyond chance ({_TEST} < 0.05)"
    return f"of {count}, {near:,} may be as good as the best on the validation split ({_TEST} ≥ 0.05)"


_TEST = "p of McNemar's test"


def _row(rank: int, trial: Trial, best: Trial) -> dict[str, Any]:
    about = trial.spec.to_dict()
    row = {"rank": rank, "trial": trial.name, **asdict(trial.cost), "head": about.pop("head"), "settings": about}
    if trial.error is not None:
        return {**row, **dict.fromkeys(_MEASURED), "seconds": trial.seconds, "error": trial.error}
    low, high = wilson_interval(int(trial.right.sum()), len(trial.right))
    p_value = mcnemar(best.right, trial.right)
    return {
        **row,
        "val_accuracy": trial.accuracy,
        "low": low,
        "high": high,
        "val_loss": trial.val_loss if math.isfinite(trial.val_loss) else None,
        "p_value": p_value,
        "within_noise": p_value >= SIGNIFICANCE,
        "seconds": trial.seconds,
        "parameters": trial.parameters,
        "bytes": trial.bytes,
        "error": None,
    }


def best_of_each(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the best row of each space, the best first. A space where every setting failed has none."""
    first = {row["space"]: row for row in reversed(rows) if row["error"] is None}
    return sorted(first.values(), key=lambda row: row["rank"])


def has_several_backbones(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the rows of a leaderboard are of several feature spaces; older rows name no space."""
    return len({row.get("space") for row in rows}) > 1


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each row whether it is on the Pareto front of accuracy and extraction rate.

    No other row is at least as accurate and as fast, and better in one of the two. A row without a rate is not on it.
    """
    points = [(row["val_accuracy"], row["images_per_second"]) for row in rows]
    known = [point for point in points if None not in point]

    def is_dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in known)

    return [None not in point and not is_dominated(point) for point in points]


def cost_points(rows: Sequence[Mapping[str, Any]]) -> list[CostPoint]:
    """Return the best row of each backbone as a point of a plot; backbones without a known rate are left out."""
    best = best_of_each(rows)
    return [
        CostPoint(_named(row), row["images_per_second"], (row["low"], row["val_accuracy"], row["high"]), on_front)
        for row, on_front in zip(best, pareto_front(best), strict=True)
        if row["images_per_second"] is not None
    ]


def _named(row: Mapping[str, Any]) -> str:
    size = row["bytes_per_row"]
    return row["backbone"] if size is None else f"{row['backbone']}\n{size_text(size)} a row"


def fastest_sentence(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a sentence on the fastest backbone within noise of the best; None if no such backbone is faster."""
    best, *others = best_of_each(rows)
    rate = best["images_per_second"] or math.inf
    faster = [row for row in others if row["within_noise"] and (row["images_per_second"] or 0) > rate]
    if not faster:
        return None
    fastest = max(faster, key=lambda row: row["images_per_second"])
    return (
        f"{fastest['backbone']} is within noise of the best and extracted at {fastest['images_per_second']:,.4g} "
        f"images/s, {best['backbone']} at {rate:,.4g}"
    )


def unmeasured_sentence(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a sentence that lists the backbones without images/s on this machine; None if all have a rate."""
    names = [row["backbone"] for row in best_of_each(rows) if row["images_per_second"] is None]
    if not names:
        return None
    return f"not in the plot, as no images/s are known here: {', '.join(names)} (`backbones --measure` measures them)"


def varied(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return trial → text of the settings that differ among the trials of its head, such as "hidden=64"."""
    found = {}
    for row in rows:
        siblings = [other["settings"] for other in rows if other["head"] == row["head"]]
        differing = [name for name, value in row["settings"].items() if any(each[name] != value for each in siblings)]
        found[row["trial"]] = " ".join(f"{name}={_text(row['settings'][name])}" for name in differing)
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_leaderboard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV with one line per trial; settings that its head does not have are empty."""
    names = sorted({name for row in rows for name in row["settings"]})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *names])
        for row in rows:
            settings = [row["settings"].get(name, "") for name in names]
            writer.writerow([*(row.get(name) for name in _COLUMNS), *settings])


def draw_leaderboard(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the accuracies of the best 40 trials with their confidence intervals."""
    names, several = varied(rows), has_several_backbones(rows)
    best = [row for row in rows if row["error"] is None][:_MOST_DRAWN]
    draw_ranking(
        path,
        [f"{row['backbone'] if several else ''} {row['head']} {names[row['trial']]}".strip() for row in best],
        [(row["low"], row["val_accuracy"], row["high"]) for row in best],
        [row["within_noise"] for row in best],
        title,
    )
