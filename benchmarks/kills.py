"""Kill `features` some hundred times at random moments; are the rows those of a run that was left alone?

    python benchmarks/kills.py --dataset photos --weights imagenet --limit 3000 --kills 200

One dataset, one cache: each run goes on where the one before was killed. Afterwards it is run to its end, and every row
is compared, byte by byte, with those of an undisturbed run. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the filter

ROOT = Path(__file__).parent.parent
# The program itself, writing down how far it came: a line when it starts, and one for each batch it computed.
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
log = open(sys.argv.pop(1), "a", buffering=1)
log.write("start\\n")
from pipeline.backbone import frozen
load, run = frozen.FrozenBackbone.__init__, frozen.FrozenBackbone.__call__
def loading(self, *arguments):
    log.write("load\\n")
    load(self, *arguments)
def running(self, images):
    result = run(self, images)
    log.write(f"batch {len(images)} {time.monotonic()}\\n")
    return result
frozen.FrozenBackbone.__init__, frozen.FrozenBackbone.__call__ = loading, running
import cli
sys.exit(cli.main())
"""


class Runs:
    """Runs of `features` on one data folder."""

    def __init__(self, data: Path, options: list[str]) -> None:
        self.data = data
        self.log = data.with_suffix(".log")
        self.notices = data.with_suffix(".err")
        arguments = ["--data-dir", str(data), "features", *options]
        self.command = [sys.executable, "-c", PROGRAM, str(ROOT), str(self.log), *arguments]

    def start(self) -> subprocess.Popen[bytes]:
        with self.notices.open("ab") as notices:
            return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=notices)

    def finish(self) -> None:
        if code := self.start().wait():
            sys.exit(f"features ended with {code}: {self.notices.read_text()[-2000:]}")

    def kill_after(self, seconds: float) -> tuple[str, float | None]:
        """Return in which phase it was killed, and how long it took to its first batch if it came that far."""
        before = self.log.stat().st_size if self.log.exists() else 0
        start = time.monotonic()
        program = self.start()
        try:
            program.wait(seconds)
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGKILL)
        code = program.wait()
        with self.log.open() as log:
            log.seek(before)
            lines = log.read().splitlines()
        if code != -signal.SIGKILL:
            return f"ended by itself with {code}", None
        batches = [line.split() for line in lines if line.startswith("batch")]
        phase = "computing" if batches else "loading the model" if "load" in lines else "starting and planning"
        return phase, float(batches[0][2]) - start if batches else None

    def computed(self) -> int:
        lines = self.log.read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("batch"))

    def rows(self) -> dict[bytes, tuple[bytes, bytes]]:
        """Return key → bytes of features and pooled, of every shard."""
        found: dict[bytes, tuple[bytes, bytes]] = {}
        for path in self.data.glob("cache/*/shards/*.h5"):
            with h5py.File(path) as file:
                columns: list[Any] = [file[name] for name in ("key", "features", "pooled")]
                for key, features, pooled in zip(*(column[:] for column in columns), strict=True):
                    if key.tobytes() in found:
                        sys.exit(f"{path}: a row that is in another shard too")
                    found[key.tobytes()] = (digest(features), digest(pooled))
        return found


def digest(values: Any) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--weights", default="untrained")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0, help="after the first batch, until the latest kill")
    parser.add_argument("--shard-rows", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = ("dataset", "weights", "limit", "shard_rows", "batch_size")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(Path(folder), options, given), indent=1))


def compare(folder: Path, options: list[str], given: argparse.Namespace) -> dict[str, Any]:
    rng, phases, torn, checked = random.Random(given.seed), Counter[str](), 0, set[Path]()
    alone, killed = Runs(folder / "alone", options), Runs(folder / "killed", options)
    alone.finish()
    began, longest = 0.0, 15.0
    while phases.total() < given.kills:
        # Loading TensorFlow is most of a life this short; every other kill comes after it.
        phase, to_first_batch = killed.kill_after(rng.uniform(began if phases.total() % 2 else 0, longest))
        if phase.startswith("ended"):  # nothing is left to compute: from now on it is killed while planning
            began, longest = 0.0, 2.0
            continue
        phases[phase] += 1
        if to_first_batch is not None:  # whatever else the machine is doing, some shards are published after that
            began, longest = to_first_batch, to_first_batch + given.seconds
        for path in set(killed.data.glob("cache/*/shards/[!.]*.h5")) - checked:
            torn += hashlib.sha256(path.read_bytes()).hexdigest() != path.stem
            checked.add(path)
        print(f"\r{phases.total()} kills, {len(checked)} shards", end="", file=sys.stderr, flush=True)
    before_last = len(killed.rows())
    killed.finish()
    rows, wanted = killed.rows(), alone.rows()
    return {
        "kills": phases.total(),
        "killed_while": dict(phases),
        "rows": len(rows),
        "rows_when_the_kills_ended": before_last,
        "identical": rows == wanted,
        "torn_files": torn,
        "shards_passed_over": killed.notices.read_text().count("count as missing"),
        "rows_computed": killed.computed(),
        "rows_computed_twice": killed.computed() - len(rows),
        "leftovers": len(list(killed.data.rglob(".partial-*"))),
    }


if __name__ == "__main__":
    main()
