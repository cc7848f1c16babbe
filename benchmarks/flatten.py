"""The `flatten` head as `train-head` trains it, beside the same Keras model and Keras' own optimizer and `fit`.

    python benchmarks/flatten.py --data DIR --dataset FOLDER --runs 5 --epochs 6

The features must be in the cache of `--data`. Both get the same arrays in memory, the same first weights and batches
of 64; each in a process of its own, in turn, so often, each time from another seed. Prints one JSON object: images/s of
the median epoch without the first, which compiles; the ratio of each run; the loss of each epoch and the accuracy on
the test split, and the p-value of Welch's test that both have the same mean accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from bare import spread

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "SEED"), help="what a process of its own does")
    given = parser.parse_args()
    if given.one:
        what, seed = given.one
        print(json.dumps(trained(what, int(seed), given)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "keras": []}
    for seed in range(given.runs):
        for what, found in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", what, str(seed)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            found.append(json.loads(done.stdout))
            print(what, json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps(compared(runs), indent=1))


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from scipy.stats import ttest_ind

    result: dict[str, Any] = {
        what: {
            "images_per_second": spread([run["images_per_second"] for run in found]),
            "accuracy": spread([run["accuracy"] for run in found]),
            "loss": np.mean([run["loss"] for run in found], axis=0).round(4).tolist(),
            "loss_deviation": deviation([run["loss"] for run in found]),
        }
        for what, found in runs.items()
    }
    both = list(zip(runs["ours"], runs["keras"], strict=True))
    result["ratio"] = spread([mine["images_per_second"] / other["images_per_second"] for mine, other in both])
    if len(both) < 2:  # nothing is known of chance
        return result
    mine, other = ([run["accuracy"] for run in found] for found in runs.values())
    result["p_value"] = round(float(cast(Any, ttest_ind(mine, other, equal_var=False)).pvalue), 3)
    return result


def deviation(losses: list[list[float]]) -> list[float] | None:
    return np.std(losses, axis=0, ddof=1).round(4).tolist() if len(losses) > 1 else None


def trained(what: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train a head in one of the two ways; return its rate, losses and accuracy."""
    from pipeline.backbone.keras_start import import_keras
    from pipeline.core.spec import HeadSpec
    from pipeline.training.heads import dense

    keras = import_keras()
    splits = arrays(given)
    spec = HeadSpec.make("flatten", epochs=given.epochs, batch_size=BATCH, seed=seed, patience=0)
    keras.utils.set_random_seed(seed)
    shape, classes = splits["train"][0].shape[1:], int(splits["train"][1].max()) + 1
    model = dense.build(spec, shape, classes, quick=what == "ours")
    dense.normalise(model, [splits["train"][0]])
    losses, seconds = (ours if what == "ours" else by_keras)(model, spec, *splits["train"])
    said = model.predict(splits["test"][0], verbose=0).argmax(1)
    return {
        "images_per_second": round(len(splits["train"][0]) / seconds, 1),
        "loss": losses,
        "accuracy": round(float((said == splits["test"][1]).mean()), 4),
    }


def arrays(given: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return rows and labels of each split, in memory."""
    from pipeline import open_features

    with open_features(given.dataset, data_dir=given.data) as features:
        return {name: features.arrays(name) for name in ("train", "test")}


def ours(model: Any, spec: Any, rows: np.ndarray, labels: np.ndarray) -> tuple[list[float], float]:
    """Return the loss of each epoch, and the seconds of one."""
    from pipeline.training.batches import Shuffled
    from pipeline.training.loop import TrainingContext, train

    better = itertools.count(0.0, -1.0)  # for the last epoch is to be kept, as `fit` below does
    batches = Shuffled(rows, labels, BATCH, spec.settings["seed"])
    ones = np.ones(int(labels.max()) + 1, np.float32)
    done = train(model, batches, lambda: (next(better), 0.0), spec.settings, ones, TrainingContext())
    return [entry["loss"] for entry in done.history], done.seconds_per_epoch


def by_keras(model: Any, spec: Any, rows: np.ndarray, labels: np.ndarray) -> tuple[list[float], float]:
    """Return the same."""
    import keras

    class Clock(keras.callbacks.Callback):
        ends: list[float]

        def on_train_begin(self, logs: object = None) -> None:
            self.ends = []

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: object = None) -> None:
            self.ends.append(time.perf_counter() - self.start)

    clock = Clock()
    model.compile(keras.optimizers.Adam(spec.settings["learning_rate"]), "sparse_categorical_crossentropy")
    done = model.fit(rows, labels, batch_size=BATCH, epochs=spec.settings["epochs"], callbacks=[clock], verbose=0)
    return [float(loss) for loss in done.history["loss"]], float(np.median(clock.ends[1:]))


if __name__ == "__main__":
    main()
