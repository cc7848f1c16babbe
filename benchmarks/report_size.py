"""How large is a report, how long does it take, and how much memory, for some images and for many?

    python benchmarks/report_size.py --dataset FOLDER --weights FILE --rows 1000 10000

As many images are made of those in FOLDER (class folders) as each of `--rows` says, by cutting and mirroring them at
random. Features and a head are made of them, which is not measured; then the report. Prints one JSON object: of each
number of rows the page's bytes, the images on it, how the map was made, the command's seconds and its peak of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="what is made goes here, the images too")
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000])
    given = parser.parse_args()
    result = {}
    for rows in given.rows:
        folder = given.data / f"cut-{rows}"
        cut(given.dataset, folder, rows)
        icebox(given, "features", "--dataset", str(folder), "--weights", given.weights)
        run, _ = icebox(given, "train-head", "--dataset", str(folder), "--head", "logreg")
        start = time.perf_counter()
        told, memory = icebox(given, "report", run["run"])
        result[str(rows)] = {
            "megabytes": round(told["bytes"] / 1e6, 2),
            "images": told["images"],
            "map": told["map"],
            "seconds": round(time.perf_counter() - start, 1),
            "peak_gib": round(memory / 2**30, 3),
        }
        print(rows, json.dumps(result[str(rows)]), file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


def cut(source: Path, folder: Path, rows: int) -> None:
    """Fill `folder` with `rows` images: parts of those in `source`, between half of their sides and all of them."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for i in range(rows):
        path = files[i % len(files)]
        target = folder / path.parent.name / f"{i:06}.jpg"
        if target.exists():
            continue
        pixels: Any = cv2.imread(str(path))
        height, width = pixels.shape[:2]
        h, w = (int(side * rng.uniform(0.5, 1)) for side in (height, width))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        part = pixels[top : top + h, left : left + w]
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), part[:, ::-1] if rng.random() < 0.5 else part)


def icebox(given: argparse.Namespace, command: str, *options: str) -> tuple[dict[str, Any], int]:
    """Return what a command told, and its peak of memory in bytes."""
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(given.data), command, *options, "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return json.loads(told), usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
