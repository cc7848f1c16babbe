"""Does the report find what is wrong? Labels changed and near copies planted in a dataset, and what came of it.

    python benchmarks/planted.py --dataset FOLDER --weights FILE --wrong 0.03 --copies 20
    python benchmarks/planted.py --dataset FOLDER --backbone my.keras --scaling 127,128

FOLDER has train/ and test/; `digits` makes one of scikit-learn's. A copy of it is made in which a share of all images
lies in another class, drawn by `--seed`, and some test images lie in train/ once more: saved anew as a poor JPEG,
smaller, brighter, cut by a pixel on each side, blurred. Features, a head and its report are made of it.

Prints one JSON object: of labels, how many are named, the share of the planted ones that are (recall), the share of the
named ones that were planted (precision), the same of the first ones named, and the out-of-sample accuracy that this
rests on; of copies, the pairs across the split that are named, recall by kind of change, and the pairs that were not
planted, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common.network_options import add_network_options, network_options

_MOST_NAMED = 20  # pairs that were not planted
ROOT = Path(__file__).parent.parent


def smaller(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return cv2.resize(pixels, (round(0.85 * width), round(0.85 * height)), interpolation=cv2.INTER_AREA)


CHANGES = {
    "poor JPEG": lambda pixels: pixels,
    "smaller": smaller,
    "brighter": lambda pixels: cv2.convertScaleAbs(pixels, alpha=0.9, beta=25),
    "cut": lambda pixels: pixels[1:-1, 1:-1],
    "blurred": lambda pixels: cv2.GaussianBlur(pixels, (3, 3), 0.7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="what is made goes here, the copy too")
    parser.add_argument("--dataset", required=True)
    add_network_options(parser)
    parser.add_argument("--wrong", type=float, default=0.03)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.data / f"planted-{Path(given.dataset).name}-{given.seed}"
    wrong, copies = plant(given, folder)
    images = ["--dataset", str(folder), *network_options(given)]
    icebox(given, "features", *images)
    run = icebox(given, "train-head", *images, "--head", "logreg")
    told = icebox(given, "report", run["run"])
    result = {"images": told["images"], "labels": of_labels(told, wrong), "copies": of_copies(told, copies)}
    print(json.dumps(result, indent=1))


def plant(given: argparse.Namespace, folder: Path) -> tuple[set[str], dict[str, tuple[str, str]]]:
    """Make the dataset; return which images are labelled wrongly, and what was made of which test image, and how."""
    rng = np.random.default_rng(given.seed)
    shutil.rmtree(folder, ignore_errors=True)
    if given.dataset == "digits":
        write_digits(folder)
    else:
        shutil.copytree(given.dataset, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    classes = sorted(path.name for path in (folder / "train").iterdir())
    wrong = set()
    for at in rng.permutation(len(files))[: round(given.wrong * len(files))]:
        path = files[at]
        other = rng.choice([name for name in classes if name != path.parent.name])
        wrong.add(str(path.rename(path.parent.parent / other / f"wrong_{path.parent.name}_{path.name}")))
    tested = sorted(path for path in (folder / "test").rglob("*") if path.is_file() and str(path) not in wrong)
    copies = {}
    for number, at in enumerate(rng.permutation(len(tested))[: given.copies]):
        path, kind = tested[at], list(CHANGES)[number % len(CHANGES)]
        copy = folder / "train" / path.parent.name / f"copy_{path.stem}.jpg"
        cv2.imwrite(str(copy), CHANGES[kind](cv2.imread(str(path))), [cv2.IMWRITE_JPEG_QUALITY, 60])
        copies[str(copy.relative_to(folder))] = str(path.relative_to(folder)), kind
    return {str(Path(path).relative_to(folder)) for path in wrong}, copies


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as files, every fifth of them to be tested on."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("train" if i % 5 else "test") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize((pixels * 15).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC))


def icebox(given: argparse.Namespace, command: str, *options: str) -> dict[str, Any]:
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(given.data), command, *options, "--json"]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def of_labels(told: dict[str, Any], wrong: set[str]) -> dict[str, Any]:
    named = [each["image"] for each in told["likely_wrong"]]
    right = [name in wrong for name in named]
    first = right[: len(wrong)]
    return {
        "planted": len(wrong),
        "named": len(named),
        "found": sum(right),
        "recall": round(sum(right) / len(wrong), 3),
        "precision": round(sum(right) / max(1, len(named)), 3),
        "precision_of_the_first": {str(n): round(sum(right[:n]) / n, 3) for n in (10, 25, 50) if n <= len(named)},
        "recall_of_as_many_as_planted": round(sum(first) / len(wrong), 3),
        "out_of_sample_accuracy": told["out_of_sample_accuracy"],
    }


def of_copies(told: dict[str, Any], copies: dict[str, tuple[str, str]]) -> dict[str, Any]:
    crossing = [sorted(pair["images"]) for pair in told["near"] if pair["crossing"]]
    planted = {tuple(sorted((copy, of))): kind for copy, (of, kind) in copies.items()}
    found = [pair for pair in crossing if tuple(pair) in planted]
    return {
        "planted": len(copies),
        "named": len(crossing),
        "found": len(found),
        "recall": round(len(found) / len(copies), 3),
        "precision": round(len(found) / max(1, len(crossing)), 3),
        "found_by_kind": dict(Counter(planted[tuple(pair)] for pair in found)),
        "not_planted": [pair for pair in crossing if tuple(pair) not in planted][:_MOST_NAMED],
        "within_one_split": sum(not pair["crossing"] for pair in told["near"]),
    }


if __name__ == "__main__":
    main()
