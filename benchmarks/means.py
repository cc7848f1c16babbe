"""The means of transfer learning on one dataset: accuracy, and the minutes each took.

    python benchmarks/means.py --dataset DIR --weights FILE
    python benchmarks/means.py --dataset DIR --backbone my.keras --scaling 127,128

A head on cached features; freeze with augmentation; fine-tuning from images and from cached rows of several views, both
begun with that head. Prints a JSON object for each; minutes count all that the way needs, features too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.network_options import add_network_options, network_options

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    add_network_options(parser)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of fine-tuning")
    given = parser.parse_args()
    images = ["--dataset", given.dataset, *network_options(given)]
    epochs = ["--epochs", str(given.epochs)]
    with tempfile.TemporaryDirectory() as data:

        def run(command: str, *options: str) -> dict[str, Any]:
            line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", data, command, "--json", *options]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{line} failed:\n{done.stderr}")
            return json.loads(done.stdout)

        features = run("features", *images)["seconds"]
        head = run("train-head", *images, "--head", "logreg")
        note("head only (logreg)", head, features)
        note("freeze, augmented", run("freeze", *images, *epochs, "--augment", "default"))
        tune = [*images, *epochs, "--init", head["run"], "--learning-rate", str(given.learning_rate)]
        note("fine-tune from images", run("finetune", *tune), features + head["seconds"])
        cached = run("finetune", *tune, "--from-cache", "--views", str(given.views))
        note(f"fine-tune from cache, {given.views} views", cached, features + head["seconds"])


def note(name: str, run: dict[str, Any], before: float = 0.0) -> None:
    row = {
        "way": name,
        "accuracy": round(run["accuracy"], 3),
        "interval": [round(each, 3) for each in run["accuracy_interval"]],
        "val_accuracy": round(run["val_accuracy"], 3),
        "minutes": round((before + run["seconds"]) / 60, 2),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
