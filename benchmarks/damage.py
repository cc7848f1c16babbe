"""Damage a cache in a thousand places, one at a time: what does `cache verify` find, and what do reads return?

    python benchmarks/damage.py --dataset photos --weights imagenet --limit 256

Single bytes are flipped, files cut short, and files exchanged. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.cache.space import Cache, FeatureSpace  # noqa: E402
from pipeline.cache.verify import verify  # noqa: E402
from pipeline.core.errors import CacheError  # noqa: E402


class Damage:
    """A cache that is damaged and put right again, and the counts of what was noticed."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.space: FeatureSpace = cache.spaces()[0]
        self.files = sorted(self.space.shards.glob("*.h5"))
        self.contents = {path: path.read_bytes() for path in self.files}
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        # Read by the index alone: `open` would pass a damaged shard over before it is read from.
        self.keys = [
            bytes(key)
            for record in self.space.index.shards(self.space.name).values()
            for key in self.space.index.rows(record.id)[0]
        ]
        self.rows = self.read()

    def read(self) -> list[np.ndarray]:
        return [self.space.read(self.keys, name) for name in ("features", "pooled")]

    def found(self, paths: set[Path], *, sample: float) -> bool:
        problems = verify(self.cache, sample=sample).problems
        return {problem.path for problem in problems} == paths

    def note_read(self) -> None:
        """Read every row: either an error, or the rows as they were."""
        try:
            rows = self.read()
        except CacheError:
            self.counts["reads_that_raised"] += 1
            return
        same = all(np.array_equal(a, b) for a, b in zip(rows, self.rows, strict=True))
        self.counts["reads_unharmed" if same else "reads_with_wrong_rows"] += 1

    def flip(self) -> None:
        path = self.random.choice(self.files)
        content = bytearray(self.contents[path])
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        self.counts["flips"] += 1
        self.counts["flips_found_by_read_data"] += self.found({path}, sample=1.0)
        self.note_read()
        path.write_bytes(self.contents[path])

    def cut(self) -> None:
        path = self.random.choice(self.files)
        path.write_bytes(self.contents[path][: self.random.randrange(len(self.contents[path]))])
        self._count("cut", {path})

    def exchange(self) -> None:
        first, second = self.random.sample(self.files, 2)
        first.write_bytes(self.contents[second])
        second.write_bytes(self.contents[first])
        self._count("exchanged", {first, second})

    def remove(self) -> None:
        path = self.random.choice(self.files)
        path.unlink()
        self._count("removed", {path})

    def _count(self, kind: str, paths: set[Path]) -> None:
        self.counts[f"{kind}_files"] += len(paths)
        for name, sample in (("quick_look", 0.0), ("read_data", 1.0)):
            self.counts[f"{kind}_files_found_by_{name}"] += len(paths) * self.found(paths, sample=sample)
        for path in paths:
            path.write_bytes(self.contents[path])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--weights", default="untrained")
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--shard-rows", type=int, default=8)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", data, "features", "--dataset", given.dataset]
        command += ["--weights", given.weights, "--limit", str(given.limit), "--shard-rows", str(given.shard_rows)]
        subprocess.run(command, check=True)
        with closing(Cache(Path(data) / "cache")) as cache:
            print(json.dumps(damaged(cache, given.flips, given.seed), indent=1))


def damaged(cache: Cache, flips: int, seed: int) -> dict[str, Any]:
    work = Damage(cache, seed)
    for number in range(flips):
        work.flip()
        print(f"\r{number + 1} flips", end="", file=sys.stderr, flush=True)
    for _ in range(32):
        work.cut()
        work.remove()
    for _ in range(16):
        work.exchange()
    assert work.found(set(), sample=1.0), "the cache was not put right again"
    work.counts["reads_unharmed_afterwards"] += all(map(np.array_equal, work.rows, work.read()))
    return {"shards": len(work.files), "rows": len(work.keys), **work.counts}


if __name__ == "__main__":
    main()
