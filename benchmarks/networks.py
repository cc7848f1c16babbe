"""How fast is `features` with several networks, beside the network alone and beside Keras by hand? And what takes it?

    python benchmarks/networks.py FOLDER --networks inception_v3,mobilenet_v2,my.keras --scaling 127,128 --runs 5

Named networks are untrained, which are as fast as others; --scaling is that of the `.keras` file. In turn, so often,
each in a process of its own: the network alone on a batch in memory, as `features` runs it, for `--seconds`; the
`features` command on as many images of the folder as that computes in this time; `model.predict` by hand on as many
(`peers/keras_features.py`, float32). Start-up is not counted: `features` counts from its first image, Keras from the
end of its first batch. Prints one JSON object, for each network: images/s, medians with the lowest and the highest; the
ratios of each run; the share of the time of `features` in which the network worked; the milliseconds an image that
decoding, compressing and writing take of one core, what the network alone takes of all cores together, and its share
of their sum.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bare import BATCH, TOGETHER, spread
from extraction import PEERS, peer, said

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
LEAST = 96  # images: Keras by hand does not count its first batch of 32
RATES = ("features", "bare", "keras")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", required=True, help="names and .keras files, separated by commas")
    parser.add_argument("--scaling", help="of the .keras file")
    parser.add_argument("--precision", default="bfloat16", help="ours; that of Keras by hand is float32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of the network alone")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "NETWORK"), help="what a process of its own does")
    given = parser.parse_args()
    if given.one:
        what, network = given.one
        print(json.dumps(WAYS[what](given, network)))
        return
    found: dict[str, list[dict[str, float]]] = {network: [] for network in given.networks.split(",")}
    for _ in range(given.runs):
        for network, turns in found.items():
            turns.append(one_turn(given, network))
            print(Path(network).name, json.dumps(turns[-1]), file=sys.stderr, flush=True)
    result = {Path(network).name: summary(turns, one("parts", given, network)) for network, turns in found.items()}
    print(json.dumps(result, indent=1))


def summary(turns: list[dict[str, float]], parts: dict[str, float]) -> dict[str, Any]:
    from pipeline.core import machine

    rates = {name: [turn[name] for turn in turns] for name in RATES}
    ratios = {
        f"features / {other}": spread([a / b for a, b in zip(rates["features"], rates[other], strict=True)])
        for other in ("bare", "keras")
    }
    parts["network"] = round(1000 * machine.usable_cores() / float(np.median(rates["bare"])), 3)
    return {
        "images": int(turns[0]["images"]),
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "ratios": ratios,
        "model_share": spread([turn["model_share"] for turn in turns]),
        "milliseconds_of_a_core": parts,
        "share_of_the_network": round(parts["network"] / sum(parts.values()), 3),
    }


def one_turn(given: argparse.Namespace, network: str) -> dict[str, float]:
    bare = one("bare", given, network)["images_per_second"]
    limit = max(LEAST, round(bare * given.seconds))
    done = features(given, network, limit)
    by_hand = [sys.executable, str(PEERS / "keras_features.py"), str(given.folder), "--limit", str(limit)]
    keras = peer([*by_hand, *for_keras(given, network)])
    rates = {"features": done["images_per_second"], "bare": round(bare, 2), "keras": round(keras, 2)}
    return {**rates, "images": done["computed"], "model_share": done["model_share"]}


def one(what: str, given: argparse.Namespace, network: str) -> dict[str, float]:
    """Return what one of `WAYS` says in a process of its own."""
    command = [sys.executable, __file__, str(given.folder), "--networks", network, "--precision", given.precision]
    scaling = ["--scaling", given.scaling] if given.scaling else []
    return said([*command, *scaling, "--seconds", str(given.seconds), "--one", what, network])


def features(given: argparse.Namespace, network: str, limit: int) -> dict[str, Any]:
    """Return what `features` says of a new cache."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, str(ROOT / "cli.py"), "--data-dir", data, "features", "--json"]
        command += ["--dataset", str(given.folder), "--limit", str(limit), "--precision", given.precision]
        own = ["--scaling", given.scaling] if is_file(network) else ["--weights", "untrained"]
        return said([*command, "--backbone", network, *own])


def is_file(network: str) -> bool:
    return network.endswith(".keras")


def for_keras(given: argparse.Namespace, network: str) -> list[str]:
    from pipeline.backbone.table import BACKBONES

    if is_file(network):
        return ["--model", network, "--scaling", given.scaling]
    row = BACKBONES[network]
    return ["--application", row.application, "--size", str(row.input_size)]


def loaded(given: argparse.Namespace, network: str) -> Any:
    """Return the frozen network as `features` has it."""
    from pipeline.backbone.frozen import FrozenBackbone
    from pipeline.cache.workspace import open_workspace
    from pipeline.core import machine
    from pipeline.extraction.feature_choice import FeatureChoice, resolve_choice

    own = is_file(network)
    weights, scaling = ("auto", given.scaling) if own else ("untrained", None)
    choice = FeatureChoice(weights=weights, precision=given.precision, backbone=network, scaling=scaling)
    with tempfile.TemporaryDirectory() as data, open_workspace(Path(data)) as workspace:
        resolved = resolve_choice(workspace, choice)
        assert resolved.weights is not None
        found = resolved.weights.require()
    return FrozenBackbone(
        resolved.new_spec(found), found.path, BATCH, machine.usable_cores(), network=resolved.source.file
    )


def bare(given: argparse.Namespace, network: str) -> dict[str, float]:
    """Return the rate of the network alone, as many batches at a time as `features` computes."""
    from pipeline.backbone.frozen import streams
    from pipeline.core import machine

    model, count = loaded(given, network), streams(machine.usable_cores())
    size = model.spec.input_size
    images = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), np.uint8)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(model, [images] * count))
        done, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < given.seconds:
            done += len(list(pool.map(model, [images] * (TOGETHER * count)))) * BATCH
    return {"images_per_second": done / seconds}


def parts(given: argparse.Namespace, network: str) -> dict[str, float]:
    """Return the milliseconds an image that one core takes for what is not the network."""
    from pipeline.cache.shard import Rows, shard_image
    from pipeline.images import decoding

    model = loaded(given, network)
    size, files = model.spec.input_size, sorted(path for path in given.folder.rglob("*") if path.is_file())
    data = [path.read_bytes() for path in files[:: max(1, len(files) // BATCH)][:BATCH]]
    pixels = np.stack([decoding.decode(each, size=size) for each in data])
    tensor, pooled = model(pixels)
    rows = Rows(tensor, pooled, np.zeros((len(data), 32), np.uint8), np.zeros(len(data), np.int64))
    packed = shard_image(rows, model.spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        ways: dict[str, Callable[[], Any]] = {
            "decode": lambda: [decoding.decode(each, size=size) for each in data],
            "compress": lambda: shard_image(rows, model.spec),
            "write": lambda: write(path, bytes(packed)),
        }
        return {name: round(1000 * shortest(way) / len(data), 3) for name, way in ways.items()}


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def shortest(way: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of several calls."""
    found = []
    for _ in range(7):
        start = time.perf_counter()
        way()
        found.append(time.perf_counter() - start)
    return min(found)


WAYS: dict[str, Callable[[argparse.Namespace, str], dict[str, float]]] = {"bare": bare, "parts": parts}

if __name__ == "__main__":
    main()
