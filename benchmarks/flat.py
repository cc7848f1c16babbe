"""Does a row cost the same among a thousand and among a million? Rows through the real writer and reader.

    python benchmarks/flat.py --rows 1000 10000 100000 1000000 --folder SCRATCH

The rows are made up, as sparse as those of trained weights, (1, 1, 2048) each. For each number of them, in a process
each: shards are written and entered in the index; then all rows are found by their keys, read in order, and read once
more in shuffled batches of 64 by no more than `--memory` bytes. Prints one JSON object: seconds for a thousand rows,
and the peak of resident memory in MB, in brackets what of it were the keys and what Python had loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from plan import drawn, resident  # noqa: E402
from startup import SHARD_ROWS, SPEC  # noqa: E402

from pipeline.cache.shard import Rows  # noqa: E402
from pipeline.cache.space import Cache  # noqa: E402
from pipeline.training.batches import Shuffled  # noqa: E402
from pipeline.training.rows import StoredRows, blocks  # noqa: E402

CHANNELS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="for the cache: 6 KB a row")
    parser.add_argument("--memory", type=int, default=200_000_000)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "CACHE"), help="what a process of its own does")
    given = parser.parse_args()
    if given.one:
        what, cache = given.one
        print(json.dumps(write(Path(cache), given.rows[0]) if what == "write" else read(Path(cache), given)))
        return
    result = {}
    for count in given.rows:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            command = [sys.executable, __file__, "--rows", str(count), "--memory", str(given.memory), "--one"]
            found: dict[str, Any] = {}
            for what in ("write", "read"):
                done = subprocess.run([*command, what, folder], check=True, stdout=subprocess.PIPE)
                found |= json.loads(done.stdout)
        result[count] = found
        print(json.dumps(result), file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


def write(root: Path, count: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    base = np.maximum(random.normal(size=(SHARD_ROWS, 1, 1, CHANNELS)) - 1.036, 0).astype(np.float16)
    keys, before, start = drawn(0, count), resident("VmRSS"), time.perf_counter()
    with closing(Cache(root)) as cache:
        space = cache.create(SPEC, {"weights": "synthetic"})
        for at in range(0, count, SHARD_ROWS):
            some = keys[at : at + SHARD_ROWS]
            rows = np.roll(base[: len(some)], at // SHARD_ROWS % CHANNELS, axis=-1)
            rows[:, 0, 0, 0] = np.arange(at, at + len(some)) % CHANNELS  # what is checked when they are read
            pooled = rows[:, 0, 0].astype(np.float32)
            space.register(space.write(Rows(rows, pooled, some, np.zeros(len(some), np.int64))))
    return told("write", time.perf_counter() - start, count, before)


def read(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    count = given.rows[0]
    keys = [key.tobytes() for key in drawn(0, count)]
    before, start = resident("VmRSS"), time.perf_counter()
    with closing(Cache(root)) as cache:
        (space,) = cache.spaces()
        located = space.locate(keys, [0] * count)
        space.require(located)
        reader = space.reader("features")
        shape, dtype = reader.layout(located)
        rows = StoredRows(reader, located, shape, CHANNELS * dtype.itemsize, 0)
        found = told("find", time.perf_counter() - start, count, before)
        start = time.perf_counter()
        for at, block in blocks(rows.within(given.memory)):
            assert np.array_equal(block[:, 0, 0, 0], at % CHANNELS)
        found |= told("in order", time.perf_counter() - start, count, before)
        start, seen = time.perf_counter(), 0
        for block, labels in Shuffled(rows.within(given.memory), np.arange(count) % CHANNELS, 64, 0).epoch(1):
            assert np.array_equal(block[:, 0, 0, 0], labels)
            seen += len(block)
        assert seen == count
        return found | told("shuffled", time.perf_counter() - start, count, before)


def told(what: str, seconds: float, count: int, before: int) -> dict[str, str]:
    return {what: f"{seconds / count * 1000:.3f} s, {resident('VmHWM')} MB ({before})"}


if __name__ == "__main__":
    main()
