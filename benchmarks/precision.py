"""Is bfloat16 safe? The features of both precisions compared, and the accuracy of every head on each, over seeds.

    python benchmarks/precision.py --dataset FOLDER --weights FILE --seeds 5
    python benchmarks/precision.py --dataset FOLDER --backbone my.keras --scaling 127,128

Computes what is missing in the cache of `--data`, then trains each head on either by as many seeds; `logreg` knows no
chance and is trained once. Prints one JSON object: the relative error of a row's tensor and of its pooled row (norm of
the difference over norm in float32: mean, 99th percentile, largest), test accuracies, and the p-value of Welch's test
that both precisions have the same mean accuracy; of `logreg`, of McNemar's exact test on the answers of both.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
from common.network_options import add_network_options, network_options

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PRECISIONS = ("bfloat16", "float32")
HEADS = {
    "gap": ["--epochs", "50", "--patience", "8"],
    "flatten": ["--epochs", "12", "--patience", "4"],
    "logreg": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--dataset", required=True)
    add_network_options(parser)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    spaces = {}
    for precision in PRECISIONS:
        done = icebox(given, "features", *network_options(given), "--precision", precision)
        spaces[precision] = done["space"]
        print(json.dumps(done), file=sys.stderr, flush=True)
    result: dict[str, Any] = {"errors": errors(given, spaces), "accuracy": {}}
    for head in HEADS:
        result["accuracy"][head] = compared(given, head, spaces)
        print(head, json.dumps(result["accuracy"][head]), file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


def icebox(given: argparse.Namespace, command: str, *options: str) -> dict[str, Any]:
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(given.data), command, "--json"]
    line += ["--dataset", given.dataset, *options]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def errors(given: argparse.Namespace, spaces: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return how far the rows of the test split are apart, relative to their norms in float32."""
    from pipeline import open_features

    found = {}
    for what in ("features", "pooled"):
        rows = {}
        for precision, space in spaces.items():
            with open_features(given.dataset, what=cast(Any, what), data_dir=given.data, space=space) as features:
                some, _ = features.arrays("test")
                rows[precision] = some.reshape(len(some), -1).astype(np.float32)
        apart = np.linalg.norm(rows["bfloat16"] - rows["float32"], axis=1) / np.linalg.norm(rows["float32"], axis=1)
        found[what] = {
            "mean": round(float(apart.mean()), 5),
            "99%": round(float(np.quantile(apart, 0.99)), 5),
            "largest": round(float(apart.max()), 5),
        }
    return found


def compared(given: argparse.Namespace, head: str, spaces: dict[str, str]) -> dict[str, Any]:
    from scipy.stats import binomtest, ttest_ind

    options = ["--head", head, *HEADS[head]]
    seeds = [[]] if head == "logreg" else [["--seed", str(seed)] for seed in range(given.seeds)]
    runs = {
        precision: [icebox(given, "train-head", *options, "--space", space, *seed) for seed in seeds]
        for precision, space in spaces.items()
    }
    accuracies = {precision: [run["accuracy"] for run in some] for precision, some in runs.items()}
    result: dict[str, Any] = {
        precision: {"mean": round(float(np.mean(values)), 4), "all": values} for precision, values in accuracies.items()
    }
    if head == "logreg":
        right = [answers(given.data / "runs" / some[0]["run"]) for some in runs.values()]
        only = [int((a & ~b).sum()) for a, b in (right, right[::-1])]
        result["right_with_one_alone"] = only
        result["p_value"] = round(float(cast(Any, binomtest(only[0], max(1, sum(only)))).pvalue), 3)
        return result
    for precision, values in accuracies.items():
        result[precision]["deviation"] = round(float(np.std(values, ddof=1)), 4)
    result["p_value"] = round(float(cast(Any, ttest_ind(*accuracies.values(), equal_var=False)).pvalue), 3)
    return result


def answers(run: Path) -> np.ndarray:
    """Return for each image of the test split whether the answer was right: (n,) bool."""
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("split", "test") == "test"]
    return np.array([row["label"] == row["predicted"] for row in rows])


if __name__ == "__main__":
    main()
