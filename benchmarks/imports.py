"""How long do Keras and skops take to be imported, as they are and as Icebox does it?

    python benchmarks/imports.py --runs 5

Each import is a process of its own, the ways in turn. Prints one JSON object: seconds of the whole process, medians
with the lowest and the highest, the ratio of the medians, and MB of memory.
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

from bare import spread

ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
WAYS = {
    "keras": ("import keras", "from pipeline.backbone.keras_start import import_keras; import_keras()"),
    "skops": ("import skops.io", "from pipeline.training.heads import logreg; logreg._skops()"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    print(json.dumps({name: compared(*ways, parser.parse_args().runs) for name, ways in WAYS.items()}, indent=1))


def compared(plain: str, ours: str, runs: int) -> dict[str, Any]:
    """Return seconds and MB of both ways."""
    done = [(imported(plain), imported(ours)) for _ in range(runs)]
    print(json.dumps(done), file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for name, each in zip(("plain", "icebox"), zip(*done, strict=True), strict=True):
        seconds, memory = zip(*each, strict=True)
        found[name] = {"seconds": spread(seconds), "mb": spread(memory)}
    found["ratio"] = round(found["plain"]["seconds"]["median"] / found["icebox"]["seconds"]["median"], 2)
    return found


def imported(code: str) -> tuple[float, float]:
    """Return seconds of a process that runs this, and the peak of its memory in MB."""
    start = time.perf_counter()
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=QUIET, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(program.pid, 0)
    assert status == 0, code
    return time.perf_counter() - start, usage.ru_maxrss / 1000


if __name__ == "__main__":
    main()
