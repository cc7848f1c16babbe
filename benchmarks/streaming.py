"""A `flatten` head on a cache larger than the memory it may have, beside the same head fed from arrays in memory.

    python benchmarks/streaming.py --rows 30000 --limit 3000 --gib 2

Writes rows as sparse as those of trained weights through the real writer, for as many tiny images; trains the head on
all of them streamed, and, before and after, on `--limit` of them in memory. Prints one JSON object: images/s, the peak
of resident memory, the ratio, and whether the first stayed below `--gib`. Where control groups can be made, one holds
it there.
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
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import cv2
import h5py
import ml_dtypes
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.cache.shard import Rows  # noqa: E402
from pipeline.cache.space import Cache  # noqa: E402
from pipeline.core.spec import FeatureSpec  # noqa: E402
from pipeline.images import decoding  # noqa: E402

SHARD_ROWS, CLASSES, SHAPE = 256, 10, (8, 8, 2048)
ZEROS = 0.85  # of the numbers, as InceptionV3's trained weights leave
GROUPS = Path("/sys/fs/cgroup/memory")
SPEC = FeatureSpec(
    "inception_v3", "sha256:" + "0" * 64, "mixed10", 299, decoding.DECODE_POLICY, decoding.RESIZE_POLICY, "squash",
    "x/127.5-1", "bfloat16", "keras", "float16",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--limit", type=int, default=3_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--like", type=Path, help="a shard whose rows the written ones are made from, channels moved")
    parser.add_argument("--memory", default="200MB", help="as `train-head --memory` takes it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write(root, given.rows, given.like)
        command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(root / "data"), "train-head", "--json"]
        command += ["--dataset", str(root / "images"), "--head", "flatten"]
        # A short run before and one after it: what else the machine does changes by the minute.
        in_memory = [*command, "--limit", str(given.limit), "--memory", "100GB", "--epochs", "12"]
        before = trained(in_memory, None)
        with ControlGroup(given.gib) as (inside, by_group):
            streamed = trained([*command, "--memory", given.memory, "--epochs", str(given.epochs)], inside)
        held = [before, trained(in_memory, None)]
    result = {
        "rows": given.rows,
        "gb_on_disk": round(size / 1e9, 2),
        "gb_as_arrays": round(given.rows * np.prod(SHAPE) * 2 / 1e9, 2),
        "streamed": streamed,
        "limit_gib": given.gib,
        "below_limit": streamed["peak_gib"] < given.gib,
        "limited_by_control_group": by_group,
        "in_memory": held,
        "ratio": round(streamed["images_per_second"] / np.mean([each["images_per_second"] for each in held]), 3),
    }
    print(json.dumps(result, indent=1))


def write(root: Path, count: int, like: Path | None) -> int:
    """Write images of one pixel and a row for each; return the bytes of the shards."""
    random = np.random.default_rng(0)
    pixel = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    base = np.maximum(random.normal(size=(SHARD_ROWS, *SHAPE)).astype(np.float32) - np.float32(1.036), 0)
    assert abs((base == 0).mean() - ZEROS) < 0.01
    if like is not None:
        with h5py.File(like) as file:
            stored: Any = file["features"]
            base = np.resize(stored[:SHARD_ROWS], base.shape).astype(np.float32)
    with closing(Cache(root / "data" / "cache")) as cache:
        space = cache.create(SPEC, {"weights": "synthetic"})
        for start in range(0, count, SHARD_ROWS):
            keys = []
            for i in range(start, min(start + SHARD_ROWS, count)):
                content = pixel + str(i).encode()
                path = root / "images" / f"class{i % CLASSES}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                keys.append(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
            rows = np.roll(base[: len(keys)], random.integers(1, SHAPE[-1]), axis=-1)  # another row for each image
            for at in range(len(keys)):
                rows[at, ..., (start + at) % CLASSES] += 1  # something to learn
            rows = rows.astype(ml_dtypes.bfloat16).astype(np.float32)  # as what a bfloat16 network computes
            info = space.write(
                Rows(rows.astype(np.float16), rows.mean((1, 2)), np.stack(keys), np.zeros(len(keys), np.int64))
            )
            space.register(info)
            print(f"\r{start + len(keys):,} rows written", end="", file=sys.stderr, flush=True)
        return space.totals().bytes


class ControlGroup:
    """A control group that holds what joins it to so much memory, where one can be made."""

    def __init__(self, gib: float) -> None:
        self._folder = GROUPS / f"icebox-{os.getpid()}"
        self._bytes = round(gib * 2**30)
        self._made = False

    def __enter__(self) -> tuple[Callable[[], None] | None, bool]:
        with suppress(OSError):
            self._folder.mkdir()
            (self._folder / "memory.limit_in_bytes").write_text(str(self._bytes))
            self._made = True
        return (self._join if self._made else None), self._made

    def _join(self) -> None:
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def __exit__(self, *error: object) -> None:
        if self._made:
            self._folder.rmdir()


def trained(command: list[str], inside: Callable[[], None] | None) -> dict[str, Any]:
    """Train; return images/s of the median epoch without the first, and the highest resident memory."""
    start = time.perf_counter()
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=inside)
    assert program.stdout is not None
    said = program.stdout.read()
    _, status, usage = os.wait4(program.pid, 0)
    if status:
        sys.exit(f"\n{command} ended with {os.waitstatus_to_exitcode(status)}")
    run = json.loads(said)
    return {
        "train_rows": run["train_rows"],
        "images_per_second": round(run["train_rows"] / run["seconds_per_epoch"], 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 3),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
