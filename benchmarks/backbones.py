"""Does every network of the table compute what Keras' own model computes? And are untrained features of ordinary size?

    python benchmarks/backbones.py --images FOLDER --results FILE --most 60

For each network with fewer than `--most` million parameters, untrained, at its own size, on two images of the folder:
rows as `features` computes them, in float32 and in bfloat16, stored as float32, beside `predict_on_batch` of the model
that `keras.applications` builds for its ImageNet weights, given the same weights, on what the application's own
`preprocess_input` makes of the same pixels. Each network has a process of its own, and its result is added to
`--results` at once: run again, only what is missing is computed. Prints one JSON object, for each network:

- `float32`: the largest difference from Keras, norm of the difference over norm, of an image's tensor and pooled row;
- `bfloat16`: the same from our own float32 (`ours`), of Keras' mixed_bfloat16 from Keras' float32 (`keras`), and the
  ratio of both;
- `features`: deviation, median and largest of the absolute values, whether float16 can hold them, and of the two
  pooled rows their correlation, their distance over the norm of the first, and the ratio of their norms.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pipeline.backbone.table import BACKBONES, Backbone  # noqa: E402
from pipeline.images import decoding  # noqa: E402

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
Rows = dict[str, np.ndarray]  # "tensor" (2, h, w, c) and "pooled" (2, c), float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs; two of them are taken")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file, begun or continued")
    parser.add_argument("--most", type=float, default=60, help="million parameters; 0: all networks")
    parser.add_argument("--only", help="names of networks, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained weights")
    parser.add_argument("--one", help="what a process of its own does")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(BACKBONES[given.one], two_of(given.images), given.seed)))
        return
    results = json.loads(given.results.read_text()) if given.results.exists() else {}
    for name in names(given):
        if name not in results:
            results[name] = in_a_process(name, given)
            given.results.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))


def names(given: argparse.Namespace) -> list[str]:
    """Return the networks to measure, the small ones first."""
    rows = sorted(BACKBONES.values(), key=lambda row: row.parameters)
    wanted = given.only.split(",") if given.only else BACKBONES
    return [row.name for row in rows if row.name in wanted and (not given.most or row.parameters < given.most * 1e6)]


def in_a_process(name: str, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--images", str(given.images), "--results", str(given.results)]
    done = subprocess.run([*command, "--seed", str(given.seed), "--one", name], capture_output=True, text=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def two_of(folder: Path) -> list[bytes]:
    """Return the files of the first image of the first and of the last class."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [next(p for p in files if p.parent == files[i].parent).read_bytes() for i in (0, -1)]


def measured(row: Backbone, files: list[bytes], seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    pixels = np.stack([decoding.decode(each, size=row.input_size) for each in files])  # (2, size, size, 3)
    ours = {precision: our_rows(row, pixels, seed, precision) for precision in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "untrained.weights.h5"
        save_weights(row, seed, weights)
        keras = {precision: keras_rows(row, pixels, weights, precision) for precision in POLICIES}
    return {
        "size": row.input_size,
        "million_parameters": round(row.parameters / 1e6, 1),
        "float32": {what: largest(apart(ours["float32"], keras["float32"], what)) for what in ("tensor", "pooled")},
        "bfloat16": {what: in_bfloat16(ours, keras, what) for what in ("tensor", "pooled")},
        "features": magnitudes(ours["float32"]),
        "seconds": round(time.perf_counter() - start),
    }


def our_rows(row: Backbone, pixels: np.ndarray, seed: int, precision: str) -> Rows:
    """Return what `features --weights untrained:SEED --storage float32` would store."""
    from pipeline.backbone.frozen import FrozenBackbone
    from pipeline.backbone.source import of_row
    from pipeline.backbone.weights import Weights
    from pipeline.extraction.feature_choice import FeatureChoice, ResolvedChoice

    weights = Weights("untrained", untrained(row, seed), None)
    chosen = ResolvedChoice(FeatureChoice(precision=precision, storage="float32"), of_row(row), None, None)
    tensor, pooled = FrozenBackbone(chosen.new_spec(weights), None, len(pixels))(pixels)
    return {"tensor": tensor, "pooled": pooled}


def untrained(row: Backbone, seed: int) -> str:
    from pipeline.backbone.untrained import recipe_of

    return f"untrained:{recipe_of(row.name)}:{seed}"


def save_weights(row: Backbone, seed: int, path: Path) -> None:
    from pipeline.backbone.build import build, load_weights

    model = build(row.name)
    load_weights(model, untrained(row, seed), None)
    model.save_weights(path)


def keras_rows(row: Backbone, pixels: np.ndarray, weights: Path, precision: str) -> Rows:
    """Return what Keras computes, its download of ImageNet's weights exchanged for the file `weights`."""
    import keras
    from keras.src.utils import file_utils

    applications: Any = keras.applications
    builder = getattr(applications, row.application)
    file_utils.get_file = lambda *_names, **_options: str(weights)
    keras.config.set_dtype_policy(POLICIES[precision])
    shape = (row.input_size, row.input_size, 3)
    model = builder(include_top=False, weights="imagenet", input_shape=shape)
    keras.config.set_dtype_policy("float32")
    scale = importlib.import_module(builder.__module__).preprocess_input
    tensor = model.predict_on_batch(scale(pixels.astype(np.float32))).astype(np.float32)
    return {"tensor": tensor, "pooled": tensor.mean(axis=(1, 2))}


def apart(rows: Rows, others: Rows, what: str) -> np.ndarray:
    """Return for each image the norm of the difference over the norm of `others`, (2,)."""
    flat, other = (each[what].reshape(len(each[what]), -1).astype(np.float64) for each in (rows, others))
    return np.linalg.norm(flat - other, axis=1) / np.linalg.norm(other, axis=1)


def largest(values: np.ndarray) -> float:
    return float(f"{values.max():.3g}")


def in_bfloat16(ours: dict[str, Rows], keras: dict[str, Rows], what: str) -> dict[str, float]:
    mine, theirs = (apart(each["bfloat16"], each["float32"], what) for each in (ours, keras))
    return {"ours": largest(mine), "keras": largest(theirs), "ratio": largest(mine / theirs)}


def magnitudes(rows: Rows) -> dict[str, Any]:
    tensor, (first, second) = np.abs(rows["tensor"]), rows["pooled"].astype(np.float64)
    norms = sorted(np.linalg.norm(each) for each in (first, second))
    return {
        "deviation": float(f"{rows['tensor'].std():.3g}"),
        "median": float(f"{np.median(tensor):.3g}"),
        "largest": float(f"{tensor.max():.3g}"),
        "in_float16": bool(tensor.max() <= np.finfo(np.float16).max),
        "correlation": round(float(np.corrcoef(first, second)[0, 1]), 3),
        "distance": float(f"{np.linalg.norm(first - second) / np.linalg.norm(first):.3g}"),
        "norms": float(f"{norms[1] / norms[0]:.3g}"),
    }


if __name__ == "__main__":
    main()
