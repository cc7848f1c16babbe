"""Kill `train-head` again and again, resuming each time: is the history that of a run that was left alone?

    python benchmarks/resume.py --dataset photos --head flatten --kills 20

The features must be in the cache of `--data`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--head", default="gap")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--memory", help="as `train-head --memory` takes it, to stream")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = ["--dataset", given.dataset, "--head", given.head, "--epochs", str(given.epochs)]
    settings += ["--memory", given.memory] if given.memory else []
    cli = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(given.data)]
    start = time.monotonic()
    alone = run([*cli, "train-head", *settings, "--json"])
    whole = time.monotonic() - start
    print(json.dumps(killed(cli, settings, given, alone, whole), indent=1))


def run(command: list[str]) -> dict[str, Any]:
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def killed(
    cli: list[str], settings: list[str], given: argparse.Namespace, alone: dict[str, Any], whole: float
) -> dict[str, Any]:
    rng, name = random.Random(given.seed), None
    kills = resumed = finished = equal = 0
    before = set(unfinished(cli))
    # From before anything is trained to when half of what is to be trained would be done.
    latest = max(8.0, whole / 2)
    expected = history(given.data, alone)
    while True:
        command = [*cli, "train-head", *(["--resume", name] if name else settings), "--json"]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            said, _ = program.communicate(timeout=rng.uniform(1.0, latest) if kills < given.kills else None)
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGKILL)
            program.communicate()
            kills += 1
            resumed += name is not None
            name = next(iter(set(unfinished(cli)) - before), None)
            print(f"\r{kills} kills", end="", file=sys.stderr, flush=True)
            continue
        if program.returncode:
            sys.exit(f"{command} ended with {program.returncode}: {said}")
        done = json.loads(said)
        finished += 1
        equal += history(given.data, done) == expected
        if kills == given.kills:
            break
        name = None  # it came to its end before its next kill: the next one begins anew
    return {
        "head": alone["head"],
        "epochs": len(expected),
        "kills": kills,
        "of_resumed_runs": resumed,
        "runs_finished": finished,
        "histories_equal": equal,
        "accuracy": [alone["accuracy"], done["accuracy"]],
        "val_accuracy": [alone["val_accuracy"], done["val_accuracy"]],
    }


def unfinished(cli: list[str]) -> list[str]:
    return run([*cli, "runs", "ls", "--json"])["unfinished"]


def history(data: Path, summary: dict[str, Any]) -> Any:
    return json.loads((data / "runs" / summary["run"] / "history.json").read_text())


if __name__ == "__main__":
    main()
