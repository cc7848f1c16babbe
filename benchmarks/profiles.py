"""Where does the time go? Profiles of `features` and of `train-head --head flatten`, to be looked at.

    python benchmarks/profiles.py --dataset FOLDER --weights FILE --images 1000

Runs both commands under py-spy (flame graphs of all threads, `benchmarks/profiles/*.svg`), then the network and the
head's training step alone under TensorFlow's profiler (`benchmarks/profiles/*.txt`: milliseconds of a step by kind of
operation, those of all threads added up).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "profiles"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_000)
    given = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        some = ["--dataset", str(given.dataset.resolve()), "--limit", str(given.images), "--json"]
        spied(data, "features", *some, "--weights", str(given.weights.resolve()))
        spied(data, "train-head", *some, "--head", "flatten", "--epochs", "20", "--patience", "0")
    traced("features", network(given.weights))
    traced("train-head", head())


def spied(data: str, command: str, *options: str) -> None:
    """Run a command of ours under py-spy."""
    spy = [str(Path(sys.executable).parent / "py-spy"), "record", "--rate", "50", "--threads", "--nonblocking"]
    spy += ["--format", "flamegraph", "--output", str(OUT / f"{command}.svg"), "--"]
    line = [sys.executable, "cli.py", "--data-dir", data, command, *options]
    subprocess.run([*spy, *line], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    picture = OUT / f"{command}.svg"
    text = picture.read_text()
    folders = [np.__path__[0].removesuffix("numpy"), f"{sysconfig.get_path('stdlib')}/", f"{ROOT}/", f"{data}"]
    folders += [f"{Path(option).parent}/" for option in options if option.startswith("/")]
    for folder in folders:  # where things lie on this machine is nobody's business
        text = text.replace(folder, "")
    picture.write_text(text)


def network(weights: Path) -> Callable[[], object]:
    """Return what computes one batch of features."""
    from bare import BATCH, pixels, weights_of

    from pipeline.backbone.frozen import FrozenBackbone
    from pipeline.backbone.source import of_row
    from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
    from pipeline.core import machine
    from pipeline.extraction.feature_choice import FeatureChoice, ResolvedChoice

    chosen = ResolvedChoice(FeatureChoice(), of_row(BACKBONES[DEFAULT_BACKBONE]), None, None)
    spec = chosen.new_spec(weights_of(weights))
    model, images = FrozenBackbone(spec, weights, BATCH, machine.usable_cores()), pixels()
    return lambda: model(images)


def head() -> Callable[[], object]:
    """Return what trains a `flatten` head on one batch."""
    import keras

    from pipeline.core.spec import HeadSpec
    from pipeline.training.heads import dense
    from pipeline.training.loop import optimizer

    spec = HeadSpec.make("flatten")
    model = dense.build(spec, (8, 8, 2048), 10, quick=True)
    model.compile(optimizer(spec.settings, 1), keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    random = np.random.default_rng(0)
    rows = np.maximum(random.normal(size=(64, 8, 8, 2048)) - 1.036, 0).astype(np.float16)
    labels = np.eye(10, dtype=np.float32)[random.integers(0, 10, 64)]
    return lambda: model.train_on_batch(rows, labels)


def traced(name: str, step: Callable[[], object]) -> None:
    """Write how long a step spends in each kind of operation."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for _ in range(2):  # the first ones compile
        step()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(STEPS):
            step()
        tf.profiler.experimental.stop()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space: Any = xplane_pb2.XSpace()  # type: ignore[attr-defined]
        space.ParseFromString(path.read_bytes())
    seconds, counts = Counter[str](), Counter[str]()
    for plane in space.planes:
        names = {key: value.name for key, value in plane.event_metadata.items()}
        for event in (event for line in plane.lines for event in line.events):
            node, _, kind = names[event.metadata_id].rpartition(":")
            # Operations are named "node:Kind"; what stands around them is named otherwise.
            if node and not node.endswith(":") and kind.isidentifier() and kind not in ("Run", "Process"):
                seconds[kind] += event.duration_ps / 1e9 / STEPS
                counts[kind] += 1
    total = sum(seconds.values())
    lines = [f"{'ms a step':>10} {'share':>6} {'times':>6}  operation"]
    for kind, spent in seconds.most_common(20):
        lines.append(f"{spent:10.1f} {spent / total:6.1%} {counts[kind] / STEPS:6.0f}  {kind}")
    (OUT / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
