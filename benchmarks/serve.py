"""`serve` under load beside the bare model: requests/s at a concurrency, and how long one takes.

    python benchmarks/serve.py --data-dir DATA RUN --images FOLDER --requests 200 --concurrency 8

Starts the server, sends each image of FOLDER in turn from as many threads, each with a connection of its own; then runs
the same network in this process on the same images, already decoded, 32 and 8 at once, and 1. Five rounds of each, one
after the other. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.cache.space import Cache  # noqa: E402
from pipeline.cache.workspace import Workspace  # noqa: E402
from pipeline.dataset import open_images  # noqa: E402
from pipeline.deployment.ensemble import group_runs  # noqa: E402
from pipeline.images.loader import Loader  # noqa: E402
from pipeline.training.full_model import compile_model  # noqa: E402
from pipeline.training.open_run import open_run  # noqa: E402

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    options = parser.parse_args()
    files = [path for path in sorted(Path(options.images).rglob("*")) if path.is_file()][: options.requests]
    contents = [path.read_bytes() for path in files]
    contents = (contents * (options.requests // len(contents) + 1))[: options.requests]
    model, pixels = bare(options.data_dir, options.run, files)
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", options.data_dir, "serve", options.run]
    server = subprocess.Popen([*line, "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        ask(url, contents[:32], options.concurrency)
        for size in (32, 8, 1):
            model(pixels[:size])
        rounds = [one_round(url, contents, options.concurrency, model, pixels) for _ in range(ROUNDS)]
    finally:
        server.terminate()
        server.wait(30)
    found = {name: [round(each, 3) for each in summary([r[name] for r in rounds])] for name in rounds[0]}
    print(json.dumps({"requests": len(contents), "concurrency": options.concurrency, **found}, indent=1))


def summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def bare(data: str, run: str, files: list[Path]) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    with closing(Cache(Path(data) / "cache")) as cache:
        workspace = Workspace(Path(data), cache)
        (group,) = group_runs([open_run(workspace.runs, run)], workspace)
        network = group.network()
    images = open_images([str(path) for path in files])
    with Loader(images, 299, group.spec.fit, 180_000_000) as load:
        found = [load(i).pixels for i in range(len(images))]
    return compile_model(network), np.stack([pixels for pixels in found if pixels is not None])


def one_round(
    url: str, contents: list[bytes], concurrency: int, model: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray
) -> dict[str, float]:
    start = time.perf_counter()
    seconds = ask(url, contents, concurrency)
    served = len(contents) / (time.perf_counter() - start)
    alone = {}
    for size in (32, 8, 1):
        some = pixels[: max(size, 64 if size > 1 else 16)]
        start = time.perf_counter()
        for at in range(0, len(some), size):
            model(some[at : at + size])
        alone[size] = len(some) / (time.perf_counter() - start)
    seconds.sort()
    return {
        "served_per_second": served,
        "bare_32_at_once": alone[32],
        "bare_8_at_once": alone[8],
        "bare_1_at_once": alone[1],
        "served_of_bare_8": served / alone[8],
        "median_ms": 1000 * seconds[len(seconds) // 2],
        "p95_ms": 1000 * seconds[int(0.95 * len(seconds))],
    }


def ask(url: str, contents: list[bytes], concurrency: int) -> list[float]:
    """Send everything; return how long each answer took. Raises unless all are answered."""
    mine: Any = threading.local()

    def one(data: bytes) -> float:
        if not hasattr(mine, "client"):
            mine.client = httpx.Client(timeout=60, trust_env=False)
        start = time.perf_counter()
        mine.client.post(f"{url}/predict", files={"image": ("image", data)}).raise_for_status()
        return time.perf_counter() - start

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, contents))


if __name__ == "__main__":
    main()
