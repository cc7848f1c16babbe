"""How long does `features` take where nothing is missing? And on many files?

    python benchmarks/startup.py --folder SCRATCH --dataset FOLDER --data DIR --runs 5

The features of `--dataset` must be in the cache of `--data`. Then so many tiny files are written to the scratch folder,
and a row for each through the real writer, one number a row, and `features` is run on them: once so that it hashes
them, and so often that it remembers. Prints one JSON object: seconds of the whole command and MB of memory, medians
with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bare import spread

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.backbone.frozen import ENGINE  # noqa: E402
from pipeline.cache.shard import Rows  # noqa: E402
from pipeline.cache.space import Cache  # noqa: E402
from pipeline.core.spec import FeatureSpec  # noqa: E402
from pipeline.images import decoding  # noqa: E402

CLASSES, SHARD_ROWS = 10, 256
SPEC = FeatureSpec(
    "inception_v3", "sha256:" + "0" * 64, "mixed10", 299, decoding.DECODE_POLICY, decoding.RESIZE_POLICY, "squash",
    "x/127.5-1", "bfloat16", ENGINE, "float16",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="for the many files; 1 KB each")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    result: dict[str, Any] = {"cached": repeated(given.data, given.dataset, given.runs)}
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        root = Path(temporary)
        write(root, given.files)
        result["files"] = given.files
        result["hashed"] = repeated(root / "data", str(root / "images"), 1)
        result["remembered"] = repeated(root / "data", str(root / "images"), given.runs)
    print(json.dumps(result, indent=1))


def repeated(data: Path, dataset: str, runs: int) -> dict[str, Any]:
    done = [features(data, dataset) for _ in range(runs)]
    seconds, memory, rows = zip(*done, strict=True)
    print(json.dumps(done), file=sys.stderr, flush=True)
    return {"rows": rows[0], "seconds": spread(seconds), "mb": spread(memory)}


def features(data: Path, dataset: str) -> tuple[float, float, int]:
    """Return seconds, the peak of memory in MB, and the rows that were there."""
    command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), "features", "--json"]
    start = time.perf_counter()
    program = subprocess.Popen(
        [*command, "--dataset", dataset], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert program.stdout is not None
    said = json.loads(program.stdout.read())
    _, status, usage = os.wait4(program.pid, 0)
    assert (status, said["computed"]) == (0, 0)
    return time.perf_counter() - start, usage.ru_maxrss / 1000, said["rows"]


def write(root: Path, count: int) -> None:
    """Write images of one pixel and a row for each."""
    pixel = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    for i in range(CLASSES):
        (root / "images" / f"class{i}").mkdir(parents=True)
    with closing(Cache(root / "data" / "cache")) as cache:
        space = cache.create(SPEC, {"weights": "synthetic"})
        for start in range(0, count, SHARD_ROWS):
            keys = []
            for i in range(start, min(start + SHARD_ROWS, count)):
                content = pixel + str(i).encode()
                (root / "images" / f"class{i % CLASSES}" / f"{i}.png").write_bytes(content)
                keys.append(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
            n = len(keys)
            features = np.full((n, 1, 1, 1), start % 1000, np.float16)
            info = space.write(
                Rows(features, features[:, 0, 0].astype(np.float32), np.stack(keys), np.zeros(n, np.int64))
            )
            space.register(info)
    time.sleep(3)  # a digest is remembered of a file that is a little older than the clock's grain


if __name__ == "__main__":
    main()
