"""Every export format of a run: how far from the full model, how large, how quick in its own runtime beside Keras.

    python benchmarks/formats.py --data-dir DATA RUN --images FOLDER

Exports RUN in each format, then lets every runtime answer the same images in turn, `--rounds` times, 32 at once (of
LiteRT, which is made for one, also 1), with all cores. Prints one JSON object: median images/s with the least and the
most, and the ratio to Keras' `predict_on_batch` of the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.dataset import open_images  # noqa: E402
from pipeline.deployment.export_formats import FORMATS  # noqa: E402
from pipeline.images import decoding  # noqa: E402
from pipeline.images.loader import Loader  # noqa: E402

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    options = parser.parse_args()
    about = {name: exported(options.data_dir, options.run, name) for name in options.formats}
    pixels = pixels_of(options.images, 2 * BATCH)
    answers = {name: FORMATS[name].load(Path(each["path"])) for name, each in about.items()}
    calls: dict[str, Callable[[], Any]] = {name: in_batches(answer, pixels, BATCH) for name, answer in answers.items()}
    if "litert" in answers:
        calls["litert, 1 at once"] = in_batches(answers["litert"], pixels, 1)
    for call in calls.values():
        call()
    rates = {name: list[float]() for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            rates[name].append(len(pixels) / (time.perf_counter() - start))
    table = {name: row(found, rates["keras"]) for name, found in rates.items()}
    for name, each in about.items():
        table[name] |= {key: each[key] for key in ("max_difference", "difference_to_run", "bytes", "seconds")}
    print(json.dumps({"run": options.run, "images": len(pixels), "rounds": options.rounds, "formats": table}, indent=1))


def exported(data: str, run: str, name: str) -> dict[str, Any]:
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", data, "export", run, "--format", name, "--json"]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def pixels_of(folder: str, count: int) -> np.ndarray:
    found = open_images([folder])
    with Loader(found, 299, "squash", decoding.DEFAULT_MAX_PIXELS) as load:
        loaded = [load(i).pixels for i in range(count)]
    return np.stack([pixels for pixels in loaded if pixels is not None])


def in_batches(answer: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, size: int) -> Callable[[], Any]:
    return lambda: [answer(pixels[at : at + size]) for at in range(0, len(pixels), size)]


def row(rates: list[float], keras: list[float]) -> dict[str, Any]:
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates, keras, strict=True))
    return {"images_per_second": [round(x, 1) for x in (statistics.median(rates), min(rates), max(rates))],
            "beside_keras": round(ratio, 2)}  # fmt: skip


if __name__ == "__main__":
    main()
