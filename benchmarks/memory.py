"""Does the memory of `features` grow with the number of images? The whole command, computing, on few and on many.

    python benchmarks/memory.py --weights FILE --images 1000 20000 --folder SCRATCH

Writes so many pictures of 64 x 64 pixels, no two alike. Prints one JSON object: for each number images/s, and the peak
of resident memory in GiB, of the program alone and with the processes that decode for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 20_000])
    parser.add_argument("--folder", type=Path, help="for images and cache: 60 KB each")
    given = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        root = Path(temporary)
        for count in given.images:
            write(root / f"images{count}", count)
            result[count] = features(root / f"data{count}", root / f"images{count}", given.weights, count)
            print(json.dumps(result), file=sys.stderr, flush=True)
    peaks = [each["peak_gib"] for each in result.values()]
    print(json.dumps({"images": result, "most / least": round(max(peaks) / min(peaks), 3)}, indent=1))


def write(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (6, 7, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))


def features(data: Path, images: Path, weights: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), "features", "--json"]
    command += ["--dataset", str(images), "--weights", str(weights)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    watch = Watch(program.pid)
    watch.start()
    assert program.stdout is not None
    said = json.loads(program.stdout.read())
    _, status, usage = os.wait4(program.pid, 0)
    watch.join()
    assert (status, said["computed"]) == (0, count)
    alone = round(usage.ru_maxrss / 2**20, 3)
    return {"images_per_second": said["images_per_second"], "peak_gib": alone, "with_decoders": round(watch.peak, 3)}


class Watch(threading.Thread):
    """Looks, four times a second, at how much memory a program and its children take."""

    def __init__(self, process: int) -> None:
        super().__init__()
        self._process = psutil.Process(process)
        self.peak = 0.0

    def run(self) -> None:
        with suppress(psutil.NoSuchProcess):
            while self._process.status() != psutil.STATUS_ZOMBIE:
                every = [self._process, *self._process.children(recursive=True)]
                self.peak = max(self.peak, sum(map(_resident, every)) / 2**30)
                time.sleep(0.25)


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0


if __name__ == "__main__":
    main()
