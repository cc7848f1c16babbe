"""Every measurement that `benchmarks/README.md` reports of speed, size and safety, one after the other.

    python benchmarks/all.py --dataset FOLDER --weights FILE [--photos FOLDER] [--thingsvision ENV/bin/python] [--quick]

Each program writes its JSON to `benchmarks/results/NAME.json`, beside it what machine, versions, command and date it is
of. Features are kept in a folder of their own, which is removed at the end unless it is given by `--data`; `precision`
computes those that others need. Takes some two hours on two cores, with
`--quick` a few minutes, for numbers that say little. Nothing else should work on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent))

from pipeline.core import machine  # noqa: E402

PACKAGES = ("tensorflow", "keras", "h5py", "hdf5plugin", "scikit-learn", "opencv-python", "openvino", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a folder of images, one folder a class")
    parser.add_argument("--weights", type=Path, required=True, help="a weights file of InceptionV3 without top")
    parser.add_argument("--photos", type=Path, help="a folder of photographs, for `photos`: each in five qualities")
    parser.add_argument("--thingsvision", type=Path, help="the Python of an environment that has it")
    parser.add_argument("--data", type=Path, help="where features are kept, by default for as long as this runs")
    parser.add_argument("--quick", action="store_true", help="few images, one run")
    parser.add_argument("--only", help="names, separated by commas")
    given = parser.parse_args()
    for path in (given.dataset, given.weights):
        if not path.exists():
            sys.exit(f"error: {path} is not there; DATASET= must be a folder of images, WEIGHTS= a file")
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, (program, options) in commands(given, str(given.data or temporary)).items():
            if given.only is None or name in given.only.split(","):
                measured(name, program, options)


def commands(given: argparse.Namespace, data: str) -> dict[str, tuple[str, list[str]]]:
    """Return each program with its options, in their order: some need the features that one before them computed."""
    dataset, weights = str(given.dataset.resolve()), str(given.weights.resolve())
    of_both = ["--dataset", dataset, "--data", data]
    runs = ["--runs", "1" if given.quick else "5"]
    few = given.quick
    peers = ["--thingsvision", str(given.thingsvision)] if given.thingsvision else []
    brief = ["--images", "128", "--float32", "96", "--of-keras", "96", "--of-thingsvision", "96"]
    extraction = ["--weights", weights, *runs, *peers]
    of_one = {
        "precision": [*of_both, "--weights", weights, "--seeds", "2" if few else "5"],
        "imports": runs,
        "startup": [*of_both, *runs, "--files", "2000" if few else "100000"],
        "flatten": [*of_both, *runs, "--epochs", "2" if few else "6"],
        "encodings": ["--data", data, "--rows", "64" if few else "512", *runs],
        "bare": ["--weights", weights, *runs],
        "extraction": [dataset, *extraction, *(brief if few else [])],
        "memory": ["--weights", weights, "--images", *(["64", "256"] if few else ["1000", "20000"])],
        "flat": ["--rows", *(["1000", "4000"] if few else ["1000", "10000", "100000", "1000000"])],
        "logreg_path": [*of_both, "--turns", "1" if few else "3"],
    }
    every = {name: (name, options) for name, options in of_one.items()}
    if given.photos:
        photos = [str(given.photos.resolve()), *extraction, "--requalities", "--images", "400", "--float32", "0"]
        every["damaged_jpegs"] = (
            "damaged_jpegs",
            ["--photos", str(given.photos.resolve()), *runs, "--count", "100" if few else "1000"],
        )
        every["photos"] = ("extraction", photos + (brief if few else ["--of-thingsvision", "200"]))
    return every


def measured(name: str, program: str, options: list[str]) -> None:
    """Run one program and keep what it says."""
    command = ["python", f"benchmarks/{program}.py", *options]
    print(f"{datetime.now(UTC):%H:%M:%S} {shlex.join(command)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE / f"{program}.py"), *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {program}.py ended with exit code {done.returncode}")
    here = machine.inspect_machine()
    about: dict[str, Any] = {
        "machine": f"{here.cpu}, {here.cores} cores, {here.memory / 2**30:.0f} GiB, {here.gpus} GPUs",
        "python": sys.version.split()[0],
        "versions": machine.versions(PACKAGES),
        "command": shlex.join(Path(part).name if part.startswith("/") else part for part in command),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "seconds": round(time.perf_counter() - start),
    }
    text = json.dumps({**about, "result": json.loads(done.stdout)}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
