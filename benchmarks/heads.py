"""Do heads depend on how their rows are shuffled? Each trained by several seeds, all in memory and streamed.

    python benchmarks/heads.py --dataset photos --seeds 5

The features must be in the cache of `--data`. In memory the rows are shuffled as a whole; streamed, with `--memory` for
a window, in blocks. Prints one JSON object: test accuracies, their mean and deviation, and the p-value of Welch's test
that the two ways of shuffling have the same mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

ROOT = Path(__file__).parent.parent
EVERYTHING = "1TB"  # more than any machine here has rows for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--flatten", default="--epochs 12 --patience 4 --memory 150MB", help="options; memory: streamed"
    )
    parser.add_argument("--gap", default="--epochs 50 --patience 8 --memory 3MB")
    given = parser.parse_args()
    command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(given.data), "train-head", "--json"]
    command += ["--dataset", given.dataset]
    result: dict[str, Any] = {}
    for head in ("flatten", "gap"):
        options = getattr(given, head).split()
        ways = {
            way: [
                accuracy([*command, "--head", head, *options, *more, "--seed", str(seed)])
                for seed in range(given.seeds)
            ]
            for way, more in (("full_shuffle", ["--memory", EVERYTHING]), ("block_shuffle", []))
        }
        p_value = float(ttest_ind(*ways.values(), equal_var=False).pvalue)  # type: ignore[attr-defined]
        result[head] = {**{way: summary(values) for way, values in ways.items()}, "p_value": round(p_value, 3)}
    result["logreg"] = summary([accuracy([*command, "--head", "logreg"])])  # which knows no chance
    print(json.dumps(result, indent=1))


def accuracy(command: list[str]) -> float:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found = json.loads(done.stdout)["accuracy"]
    print(f"{' '.join(command[6:])}: {found:.4f}", file=sys.stderr, flush=True)
    return found


def summary(values: list[float]) -> dict[str, Any]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 4), "sd": round(deviation, 4), "all": values}


if __name__ == "__main__":
    main()
