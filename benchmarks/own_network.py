"""Are the rows of a network of one's own those of a plain Keras call, and what can heads do with them?

    python benchmarks/own_network.py my.keras --scaling 127,128 --dataset FOLDER

FOLDER has train/ and test/. Rows in float32 (stored as float32) and in bfloat16 (as they are by default), beside
`keras.models.load_model(FILE).predict` of the same pixels in float32. Prints one JSON object: for each precision the
difference of a row's tensor and of its pooled row (norm of the difference over norm: mean, largest; of the test split)
and the test accuracy of each head; the test accuracy of scikit-learn's logistic regression on Keras' own pooled rows,
standardised, for three values of C; images, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

STORAGE = {"float32": "float32", "bfloat16": "float16"}
HEADS = {"logreg": [], "gap": ["--patience", "8"], "flatten": ["--epochs", "12", "--patience", "4"]}
CS = (1e-4, 1e-3, 1e-2)
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="a .keras file")
    parser.add_argument("--scaling", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="where features are kept, by default for as long as this runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(compared(given, given.data or Path(temporary)), indent=1))


def compared(given: argparse.Namespace, data: Path) -> dict[str, Any]:
    start = time.perf_counter()
    result: dict[str, Any] = {}
    spaces = {precision: compute(given, data, precision) for precision in STORAGE}
    keras = {split: keras_rows(given, split) for split in ("train", "test")}
    for precision, space in spaces.items():
        result[precision] = {what: apart(given, data, space, what, keras["test"]) for what in ("features", "pooled")}
        heads = {head: trained(given, data, space, head, options) for head, options in HEADS.items()}
        result[precision]["test_accuracy"] = heads
        print(precision, json.dumps(result[precision]), file=sys.stderr, flush=True)
    result["scikit-learn on Keras' rows"] = {str(c): plain(given, keras, c) for c in CS}
    return {**result, "images": sum(map(len, keras.values())), "seconds": round(time.perf_counter() - start)}


def icebox(data: Path, command: str, *options: str) -> dict[str, Any]:
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), command, "--json", *options]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def compute(given: argparse.Namespace, data: Path, precision: str) -> str:
    """Return the name of the feature space that holds the rows."""
    options = ["--backbone", str(given.network), "--scaling", given.scaling, "--dataset", str(given.dataset)]
    return icebox(data, "features", *options, "--precision", precision, "--storage", STORAGE[precision])["space"]


def trained(given: argparse.Namespace, data: Path, space: str, head: str, options: list[str]) -> dict[str, Any]:
    run = icebox(data, "train-head", "--dataset", str(given.dataset), "--space", space, "--head", head, *options)
    low, high = run["accuracy_interval"]
    return {"accuracy": round(run["accuracy"], 4), "interval": [round(low, 4), round(high, 4)]}


def paths(given: argparse.Namespace, split: str) -> list[Path]:
    return sorted(path for path in (given.dataset / split).rglob("*") if path.is_file())


def keras_rows(given: argparse.Namespace, split: str) -> np.ndarray:
    """Return what Keras makes of the images of a split, in the order of their paths: (n, h, w, c) float32."""
    import keras

    from pipeline.backbone.scaling import canonical
    from pipeline.images import decoding

    models: Any = keras.models
    model = models.load_model(given.network, compile=False)
    size, scaling = model.input_shape[1], canonical(given.scaling)
    files, found = paths(given, split), []
    for at in range(0, len(files), BATCH):
        pixels = [decoding.decode(path.read_bytes(), size=size) for path in files[at : at + BATCH]]
        found.append(model.predict_on_batch(by_hand(np.stack(pixels).astype(np.float32), scaling)))
    return np.concatenate(found)


def by_hand(pixels: np.ndarray, scaling: str) -> np.ndarray:
    if "," not in scaling:
        raise SystemExit("error: --scaling must be MEAN,STD here: it is done once more, by hand")
    mean, deviation = map(float, scaling.split(","))
    return (pixels - mean) / deviation


def apart(given: argparse.Namespace, data: Path, space: str, what: str, keras: np.ndarray) -> dict[str, float]:
    """Return how far the rows of the test split are from those of Keras, relative to their norms."""
    from pipeline import open_features

    with open_features(str(given.dataset), what=cast(Any, what), data_dir=data, space=space) as features:
        rows, _ = features.arrays("test")
    theirs = keras.mean(axis=(1, 2)) if what == "pooled" else keras
    flat, other = rows.reshape(len(rows), -1).astype(np.float64), theirs.reshape(len(theirs), -1).astype(np.float64)
    found = np.linalg.norm(flat - other, axis=1) / np.linalg.norm(other, axis=1)
    return {"mean": float(f"{found.mean():.3g}"), "largest": float(f"{found.max():.3g}")}


def plain(given: argparse.Namespace, keras: dict[str, np.ndarray], c: float) -> float:
    """Return the test accuracy of plain scikit-learn on Keras' pooled rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = {split: tensor.mean(axis=(1, 2)) for split, tensor in keras.items()}
    labels = {split: [path.parent.name for path in paths(given, split)] for split in keras}
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    model.fit(rows["train"], labels["train"])
    return round(float(model.score(rows["test"], labels["test"])), 4)


if __name__ == "__main__":
    main()
