"""`features` in one process, by `--workers 2`, by two workers of a scheduler, and with workers being killed.

    python benchmarks/cluster.py --dataset FOLDER --weights FILE --kill-every 20

Each way has a data directory of its own; every row is compared, bit for bit, with those of the first. While workers are
killed, one of the two goes every `--kill-every` seconds, and its nanny starts another. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the filter
from distributed import Client

ROOT = Path(__file__).parent.parent
DASK = str(Path(sys.executable).parent / "dask")
ADDRESS = "tcp://127.0.0.1:8790"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kill-every", type=float, default=20.0)
    parser.add_argument("--ways", nargs="+", default=["here", "workers", "scheduler", "kills"])
    options = parser.parse_args()
    request = ["--dataset", options.dataset, "--weights", options.weights]
    with tempfile.TemporaryDirectory() as folder:
        root, found = Path(folder), dict[str, Any]()
        if "here" in options.ways:
            found["here"] = features(root / "here", *request)
        if "workers" in options.ways:
            found["workers"] = features(root / "workers", *request, "--workers", "2")
        with cluster(root / "scratch"):
            if "scheduler" in options.ways:
                found["scheduler"] = features(root / "scheduler", *request, "--scheduler", ADDRESS)
            if "kills" in options.ways:
                with killing(options.kill_every) as killed:
                    found["kills"] = features(root / "kills", *request, "--scheduler", ADDRESS)
                found["kills"]["killed"] = len(killed)
        first = rows(root / options.ways[0])
        for way, about in found.items():
            about["same_rows"] = rows(root / way) == first
    print(json.dumps(found, indent=1))


def parser_of(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--weights", required=True)
    return parser


def features(data: Path, *arguments: str, within: Sequence[str] = ()) -> dict[str, Any]:
    """Run the command, as an argument of that other one; return what it told."""
    line = [*within, sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), "features", *arguments, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    names = ("rows", "seconds", "images_per_second", "model_share", "recomputed", "workers", "quarantined")
    return {name: json.loads(done.stdout)[name] for name in names}


def rows(data: Path) -> dict[str, str]:
    """Return image → hash of its row; of a row that stands twice both must be alike."""
    found: dict[str, str] = {}
    for path in data.glob("cache/*/shards/*.h5"):
        with h5py.File(path) as file:
            columns: list[Any] = [file[name] for name in ("key", "features", "pooled")]
            for key, row, mean in zip(*(column[:] for column in columns), strict=True):
                value = hashlib.sha256(row.tobytes() + mean.tobytes()).hexdigest()
                if found.setdefault(key.tobytes().hex(), value) != value:
                    raise SystemExit(f"two rows of {key.tobytes().hex()} differ")
    return found


@contextmanager
def cluster(scratch: Path) -> Iterator[None]:
    worker = worker_line(ADDRESS, "127.0.0.1", scratch)
    with running([scheduler_line(ADDRESS), worker, worker]):
        with Client(ADDRESS, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2)
        yield


def scheduler_line(address: str) -> list[str]:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return [DASK, "scheduler", "--host", host, "--port", port, "--no-dashboard"]


def worker_line(address: str, host: str, scratch: Path) -> list[str]:
    own = ["--host", host, "--local-directory", str(scratch)]
    return [DASK, "worker", address, "--nthreads", "1", "--memory-limit", "0", *own]


@contextmanager
def running(lines: Sequence[Sequence[str]]) -> Iterator[None]:
    """Keep these commands running, and end them with all that they started."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    started = [subprocess.Popen(line, **quiet) for line in lines]
    try:
        yield
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def killing(every: float) -> Iterator[list[int]]:
    """Kill one of the worker processes now and then."""
    killed, over = list[int](), threading.Event()

    def kill() -> None:
        with Client(ADDRESS, set_as_default=False) as client:
            while not over.wait(every):
                pids: Any = client.run(os.getpid)
                killed.append(random.choice(list(pids.values())))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    over.set()
    thread.join(timeout=60)
    time.sleep(1)


if __name__ == "__main__":
    main()
