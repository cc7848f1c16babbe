"""An epoch of fine-tuning from the cache, beside the same in plain Keras and beside our own from images.

    python benchmarks/finetune.py --dataset DIR --weights FILE

DIR holds train/ and test/ with a folder a class. Prints one JSON object: for each layer that is frozen the seconds for
as many images as train/ holds, and the ratios of plain Keras, in float32 as it is by default, to each of ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--layers", nargs="+", default=["mixed8", "mixed9"])
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as data:
        for layer in given.layers:
            found[layer] = measured(given, layer, Path(data))
            print(json.dumps({layer: found[layer]}), file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))


def measured(given: argparse.Namespace, layer: str, data: Path) -> dict[str, Any]:
    peer = [sys.executable, str(ROOT / "benchmarks/peers/keras_finetune.py")]
    keras = run([*peer, str(given.dataset / "train"), layer, "--weights", str(given.weights)])
    images = keras["images"]
    ours = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), "finetune", "--json"]
    ours += ["--dataset", str(given.dataset), "--weights", str(given.weights), "--freeze-until", layer]
    ways = {
        "from_cache_float32": ["--from-cache", "--epochs", "4", "--precision", "float32"],
        "from_cache_bfloat16": ["--from-cache", "--epochs", "4", "--precision", "bfloat16"],
        "from_images_bfloat16": ["--epochs", "2", "--precision", "bfloat16"],
    }
    seconds = {"keras_float32": keras["seconds"]}
    for name, options in ways.items():
        done = run([*ours, *options])
        seconds[name] = round(done["seconds_per_epoch"] * images / done["train_rows"], 2)
    ratios = {name: round(keras["seconds"] / each, 2) for name, each in seconds.items() if name != "keras_float32"}
    return {"images": images, "seconds": seconds, "keras_takes_times": ratios}


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
