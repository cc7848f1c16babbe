"""How fast `cache verify --read-data` reads, beside `sha256sum` on the same files, in turns.

    python benchmarks/verify_speed.py data

Prints one JSON object: MB/s of each, the best of five turns, and their ratio. The files are in the system's memory
after the first turn, so this is what the processor allows; on a slow disk both wait for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    files = sorted(map(str, data.glob("cache/*/shards/[!.]*.h5")))
    size = sum(Path(file).stat().st_size for file in files)
    # The whole command with its start, and the share of it that is spent reading.
    cli = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), "cache", "verify", "--json"]
    times: dict[str, list[float]] = {"verify": [], "verify_without_start": [], "sha256sum": []}
    for _ in range(5):
        start, done = time.perf_counter(), subprocess.run([*cli, "--read-data"], check=True, capture_output=True)
        times["verify"].append(time.perf_counter() - start)
        times["verify_without_start"].append(json.loads(done.stdout)["seconds"])
        start = time.perf_counter()
        subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
        times["sha256sum"].append(time.perf_counter() - start)
    speeds = {f"{name}_mb_per_second": round(size / min(some) / 1e6, 1) for name, some in times.items()}
    ratio = min(times["sha256sum"]) / min(times["verify"])
    print(json.dumps({"files": len(files), "mb": round(size / 1e6, 1), **speeds, "ratio": round(ratio, 2)}, indent=1))


if __name__ == "__main__":
    main()
