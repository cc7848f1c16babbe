"""Planning for millions of images: how long it takes to know which rows are missing, and how much memory.

    python benchmarks/plan.py --rows 10000000 --folder /dev/shm

Makes an index of so many rows through `Index.add_shard`, beside it a sparse file for every shard, then plans in a
process of its own each for as many images: all cached, 1% missing, none cached. Prints one JSON object: the seconds to
open the cache, to choose the space (a look at every shard's file is part of it) and to plan; the processor's seconds of
all that, which count where others work on the same machine; and the peak of resident memory in MB beside what the
process had once it held the images' keys. On a slow disk the first plan waits for the index to be read.
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

from pipeline.cache.digests import Identities  # noqa: E402
from pipeline.cache.keys import Keys  # noqa: E402
from pipeline.cache.shard import ShardInfo  # noqa: E402
from pipeline.cache.space import Cache  # noqa: E402
from pipeline.core.spec import FeatureRequest, FeatureSpec  # noqa: E402
from pipeline.dataset.base import of_files  # noqa: E402
from pipeline.extraction.planning import Planning  # noqa: E402
from pipeline.images import decoding  # noqa: E402

SHARD_ROWS, SHAPE = 256, (8, 8, 2048)
SHARD_BYTES = 2**20  # as recorded, and as the sparse file says
MISSING = {"all cached": 0.0, "1% missing": 0.01, "none cached": 1.0}
SPEC = FeatureSpec(
    "inception_v3", "sha256:" + "0" * 64, "mixed10", 299, decoding.DECODE_POLICY, decoding.RESIZE_POLICY, "squash",
    "x/127.5-1", "bfloat16", "keras", "float16",
)  # fmt: skip
REQUEST = FeatureRequest(
    SPEC.backbone, SPEC.layer, SPEC.fit, SPEC.decode, SPEC.resize, SPEC.input_size, SPEC.scaling, SPEC.engine
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the index is made; 125 bytes a row")
    parser.add_argument("--plan", nargs=2, metavar=("CACHE", "MISSING"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        print(json.dumps(planned(Path(given.plan[0]), given.rows, float(given.plan[1]))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        started = time.perf_counter()
        make(root, given.rows)
        result: dict[str, Any] = {
            "rows": given.rows,
            "index_bytes_per_row": round((root / "cache.db").stat().st_size / given.rows, 1),
            "rows_added_per_second": round(given.rows / (time.perf_counter() - started)),
        }
        for name, share in MISSING.items():
            command = [sys.executable, __file__, "--rows", str(given.rows), "--plan", folder, str(share)]
            result[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(result, indent=1))


def drawn(seed: int, rows: int) -> np.ndarray:
    """Return keys (rows, 32) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (rows, 32), np.uint8)


def make(root: Path, rows: int) -> None:
    """Fill an index as so many computed rows would."""
    keys = drawn(0, rows)
    with closing(Cache(root)) as cache:
        space = cache.create(SPEC, {"weights": "synthetic"})
        for start in range(0, rows, SHARD_ROWS):
            name, some = f"{start:064x}", keys[start : start + SHARD_ROWS]
            with space.shard_path(name).open("xb") as file:
                file.truncate(SHARD_BYTES)
            space.register(ShardInfo(name, SHARD_BYTES, some, np.zeros(len(some), np.int64), SHAPE))
            if start % (1000 * SHARD_ROWS) == 0:
                print(f"{start:,} rows in the index", file=sys.stderr)


def planned(root: Path, rows: int, missing: float) -> dict[str, Any]:
    """Plan for as many images; return the seconds of each step, the memory, and what came out."""
    digests = drawn(0, rows)
    others = round(rows * missing)
    digests[rows - others :] = drawn(1, others)
    keys = Keys(digests, np.ones(rows, bool))
    before, times, worked = resident("VmRSS"), [time.perf_counter()], time.process_time()
    with closing(Cache(root)) as cache:
        times.append(time.perf_counter())
        space = cache.choose(REQUEST, keys)
        times.append(time.perf_counter())
        plan = Planning(of_files("synthetic", []), Identities(keys, {}), cache.index, decoding.DEFAULT_MAX_PIXELS)
        found = plan.plan(space)
        times.append(time.perf_counter())
    assert (found.missing, found.rows) == (others, rows)
    spent = [*np.diff(times).tolist(), time.process_time() - worked]
    seconds = {name: round(each, 2) for name, each in zip(("open", "choose", "plan", "processor"), spent, strict=True)}
    return {**seconds, "mb_before": before, "mb_peak": resident("VmHWM"), "missing": found.missing}


def resident(what: str) -> int:
    """Return MB: `ru_maxrss` would count what the process that started this one had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
