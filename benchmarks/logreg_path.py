"""The `logreg` head over a path of C, beside a plain scikit-learn loop on the same rows, in turns.

    python benchmarks/logreg_path.py --dataset photos --rows 10000

The features must be in the cache of `--data`; `--views K` counts them in K views. The head stops where larger C are
ever worse; the loop is measured twice, over all values of the path and over those that the head tried. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import open_features  # noqa: E402
from pipeline.core.spec import C_PATH, HeadSpec  # noqa: E402
from pipeline.training.heads import Data, TrainingContext, fit  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    with open_features(given.dataset, what="pooled", data_dir=given.data, views=given.views) as features:
        train, labels = (each[: given.rows] for each in features.arrays("train"))
        val, val_labels = features.arrays("val")
        data = Data(train, labels, val, val_labels, len(features.classes))
    tried = len(icebox(data))
    ways = {
        "icebox": icebox,
        "scikit_learn_loop": lambda data: plain(data, C_PATH),
        "loop_over_as_many": lambda data: plain(data, C_PATH[:tried]),
    }
    found: dict[str, list[tuple[float, dict[float, float]]]] = {name: [] for name in ways}
    for _ in range(given.turns):
        for name, way in ways.items():
            start = time.perf_counter()
            accuracies = way(data)
            found[name].append((time.perf_counter() - start, accuracies))
            print(f"{name}: {found[name][-1][0]:.1f} s", file=sys.stderr, flush=True)
    seconds = {name: round(min(turn[0] for turn in turns), 2) for name, turns in found.items()}
    best: dict[str, Any] = {name: max(turns[0][1].items(), key=lambda pair: pair[1]) for name, turns in found.items()}
    about = {"rows": len(train), "val_rows": len(val), "C": list(C_PATH), "tried": tried, "seconds": seconds}
    ratios = {name: round(taken / seconds["icebox"], 2) for name, taken in seconds.items() if name != "icebox"}
    print(json.dumps({**about, "times_as_fast_as": ratios, "best_C_and_val_accuracy": best}, indent=1))


def icebox(data: Data) -> dict[float, float]:
    fitted = fit(HeadSpec.make("logreg"), data, TrainingContext())
    return {entry["C"]: entry["val_accuracy"] for entry in fitted.history}


def plain(data: Data, path: Sequence[float]) -> dict[float, float]:
    """What people write by hand: each C from the start."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    accuracies = {}
    rows, val = np.asarray(data.train), np.asarray(data.val)
    for c in path:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(rows, data.train_labels)
        accuracies[c] = float(model.score(val, data.val_labels))
    return accuracies


if __name__ == "__main__":
    main()
