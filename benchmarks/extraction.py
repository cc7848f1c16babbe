"""The whole `features` command beside the bare model, Keras by hand, and thingsvision.

    python benchmarks/extraction.py FOLDER --weights FILE --runs 5 --images 2500 --thingsvision ENV/bin/python

All of them in turn, so often; ours in bfloat16 and in float32. Start-up is taken off: from ours by the difference to a
run on few images, from the others by their own clocks, which start after the model is loaded (and Keras' first batch).
`--requalities` first writes each image of the folder as a JPEG of five qualities, so that no two are the same bytes.
Prints one JSON object: images/s, medians with the lowest and the highest, and the ratios of each run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
from bare import rate, spread

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
FEW = 64  # images of the run that is taken off
QUALITIES = (95, 90, 85, 80, 75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--of-keras", type=int, help="images that Keras by hand gets; by default as many")
    parser.add_argument("--of-thingsvision", type=int, default=500, help="images that thingsvision gets")
    parser.add_argument("--float32", type=int, default=500, help="images that we get in float32; 0: not at all")
    parser.add_argument("--requalities", action="store_true")
    parser.add_argument("--thingsvision", type=Path, help="the Python of an environment that has it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = requalities(given.folder, Path(temporary) / "images") if given.requalities else given.folder
        rates: dict[str, list[float]] = {}
        for _ in range(given.runs):
            for name, value in one_run(given, folder).items():
                rates.setdefault(name, []).append(value)
    ratios = {
        f"{mine} / {other}": spread([a / b for a, b in zip(rates[mine], rates[other], strict=True)])
        for mine in ("bfloat16", "float32")
        for other in (f"bare {mine}", "keras", "thingsvision")
        if mine in rates and other in rates
    }
    print(json.dumps({"images_per_second": {k: spread(v) for k, v in rates.items()}, "ratios": ratios}, indent=1))


def one_run(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    found = {
        "bfloat16": ours(folder, given.weights, "bfloat16", given.images),
        "bare bfloat16": rate("ours", "bfloat16", given.weights),
    }
    if given.float32:
        found["float32"] = ours(folder, given.weights, "float32", given.float32)
        found["bare float32"] = rate("ours", "float32", given.weights)
    limit, script = str(given.of_keras or given.images), str(PEERS / "keras_features.py")
    found["keras"] = peer([sys.executable, script, str(folder), "--weights", str(given.weights), "--limit", limit])
    if given.thingsvision:
        limit, script = str(given.of_thingsvision), str(PEERS / "thingsvision_features.py")
        found["thingsvision"] = peer([str(given.thingsvision), script, str(folder), "--limit", limit])
    print(json.dumps({name: round(value, 2) for name, value in found.items()}), file=sys.stderr, flush=True)
    return found


def ours(folder: Path, weights: Path, precision: str, images: int) -> float:
    """Return images/s of `features`, into a new cache, start-up taken off."""
    few, all_of_them = (features(folder, weights, precision, count) for count in (FEW, images))
    return (all_of_them[0] - few[0]) / (all_of_them[1] - few[1])


def features(folder: Path, weights: Path, precision: str, limit: int) -> tuple[int, float]:
    """Return rows and the seconds of the whole command, as it counts them."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", data, "features", "--json"]
        command += ["--dataset", str(folder), "--weights", str(weights), "--precision", precision]
        done = said([*command, "--limit", str(limit)])
        return done["computed"], done["seconds"]


def peer(command: list[str]) -> float:
    done = said(command)
    return done["images"] / done["seconds"]


def said(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def requalities(folder: Path, out: Path) -> Path:
    """Write each image of `folder` as a JPEG of five qualities."""
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        if (image := cv2.imread(str(path))) is None:
            continue
        for quality in QUALITIES:
            target = out / path.parent.name / f"{path.stem}_{quality}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return out


if __name__ == "__main__":
    main()
