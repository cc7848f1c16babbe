"""Trials ranked by the validation split, and which of their differences are within noise."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate import wilson_interval
from pipeline.pictures import draw_ranking
from pipeline.progress import counted
from pipeline.spec import HeadSpec

SIGNIFICANCE = 0.05
_MOST_DRAWN = 40
_COLUMNS = (
    "rank", "trial", "head", "val_accuracy", "low", "high", "val_loss", "p_value", "within_noise", "seconds",
    "parameters", "bytes", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One setting that was tried, and what the validation split says of it."""

    spec: HeadSpec
    right: np.ndarray  # (n,) bool: which validation images it got right; empty if it failed
    val_loss: float
    seconds: float
    parameters: int
    bytes: int  # of the saved head
    error: str | None = None  # why it failed

    @property
    def accuracy(self) -> float:
        """On the validation split."""
        return float(self.right.mean()) if len(self.right) else 0.0

    @property
    def order(self) -> tuple[Any, ...]:
        """What trials are ranked by, the best being the smallest: accuracy, then loss, then parameters."""
        return (self.error is not None, -self.accuracy, self.val_loss, self.parameters, self.spec.identity)


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test that two classifiers are equally often right on the same images.

    Only the images that one got right and the other did not tell them apart; by chance they are half and half.

    Parameters
    ----------
    one, other : (n,) bool
    """
    from scipy.stats import binomtest

    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def leaderboard(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return a row a trial, the best first, as plain JSON values.

    `p_value` compares it with the best one by `mcnemar`, and `within_noise` says that it is 0.05 or more: on these
    images the best one may be the better one by chance alone.
    """
    ranked = sorted(trials, key=lambda trial: trial.order)
    return [_row(rank, trial, ranked[0]) for rank, trial in enumerate(ranked, 1)]


def noise_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in words how many other trials may be as good as the best, by what `leaderboard` returned."""
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
    row = {"rank": rank, "trial": trial.spec.identity, "head": about.pop("head"), "settings": about}
    if trial.error is not None:
        return {**row, **dict.fromkeys(_COLUMNS[3:9]), "seconds": trial.seconds, "error": trial.error}
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


def varied(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return trial → its settings as people tell it from others of its head: those that were varied."""
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
    """Write a CSV with a line a trial; a setting that its head does not have is empty."""
    names = sorted({name for row in rows for name in row["settings"]})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *names])
        for row in rows:
            settings = [row["settings"].get(name, "") for name in names]
            writer.writerow([*(row.get(name) for name in _COLUMNS), *settings])


def draw_leaderboard(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the accuracies of the best trials with their intervals."""
    names = varied(rows)
    best = [row for row in rows if row["error"] is None][:_MOST_DRAWN]
    draw_ranking(
        path,
        [f"{row['head']} {names[row['trial']]}".strip() for row in best],
        [(row["low"], row["val_accuracy"], row["high"]) for row in best],
        [row["within_noise"] for row in best],
        title,
    )
