"""How fast is the network alone, on a batch in memory? And what is the most that this processor could do?

    python benchmarks/bare.py --weights FILE --runs 5

For bfloat16 and float32, in turn and so often: the product of two matrices of 4096 x 4096 (the ceiling, of which an
image takes 11.4 GFLOP), our frozen network as `features` runs it, and OpenVINO on the same network. Each in a process
of its own. Prints one JSON object: images/s, medians with the lowest and the highest, and the ratios of each run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GFLOP = 11.4  # of an image
SIDE = 4096
BATCH, SECONDS = 16, 12.0
TOGETHER = 10  # batches of each stream before all are waited for: so many that the waiting does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "PRECISION"), help="what a process of its own does")
    given = parser.parse_args()
    if given.one:
        what, precision = given.one
        print(json.dumps({"images_per_second": WAYS[what](precision, given.weights)}))
        return
    result: dict[str, Any] = {}
    for precision in ("bfloat16", "float32"):
        rates: dict[str, list[float]] = {what: [] for what in WAYS}
        for _ in range(given.runs):
            for what in WAYS:
                rates[what].append(rate(what, precision, given.weights))
        ratios = {
            f"ours / {other}": [a / b for a, b in zip(rates["ours"], rates[other], strict=True)]
            for other in ("ceiling", "openvino")
        }
        result[precision] = {name: spread(values) for name, values in {**rates, **ratios}.items()}
    print(json.dumps(result, indent=1))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": round(float(np.median(values)), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def rate(what: str, precision: str, weights: Path) -> float:
    """Return images/s of one of `WAYS`, measured in a process of its own."""
    command = [sys.executable, __file__, "--weights", str(weights), "--one", what, precision]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found = json.loads(done.stdout)["images_per_second"]
    print(f"{what} {precision}: {found:.2f}", file=sys.stderr, flush=True)
    return found


def timed(once: Callable[[], int]) -> float:
    """Return images/s: `once` computes some, again and again."""
    once()
    images, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        images += once()
    return images / seconds


def ours(precision: str, weights: Path) -> float:
    """Return the rate of our network, as many batches at a time as `features` computes."""
    from pipeline.backbone.frozen import FrozenBackbone, streams
    from pipeline.backbone.source import of_row
    from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
    from pipeline.core import machine
    from pipeline.extraction.feature_choice import FeatureChoice, ResolvedChoice

    cores = machine.usable_cores()
    chosen = ResolvedChoice(FeatureChoice(precision=precision), of_row(BACKBONES[DEFAULT_BACKBONE]), None, None)
    spec = chosen.new_spec(weights_of(weights))
    model = FrozenBackbone(spec, weights, BATCH, cores)
    images = pixels()
    with ThreadPoolExecutor(streams(cores)) as pool:

        def once() -> int:
            done = list(pool.map(model, [images] * (TOGETHER * streams(cores))))
            return len(done) * BATCH

        return timed(once)


def weights_of(path: Path) -> Any:
    """Return a weights file as `features --weights` takes it."""
    from pipeline.backbone.weights import Weights

    return Weights("file", "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(), path)


def openvino(precision: str, weights: Path) -> float:
    """Return the rate of OpenVINO on the network as Keras has it, at its own choice of streams."""
    import openvino as ov
    import tensorflow as tf

    from pipeline.backbone.build import build, load_weights
    from pipeline.backbone.scaling import TANH, scale

    model = build("inception_v3")
    load_weights(model, "sha256:", weights)
    run = tf.function(lambda images: model(scale(tf.cast(images, tf.float32), TANH), training=False))
    graph = run.get_concrete_function(tf.TensorSpec((BATCH, 299, 299, 3), tf.uint8))
    options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16"}.get(precision, "f32")}
    compiled = ov.compile_model(ov.convert_model(graph), "CPU", options)
    queue, images = ov.AsyncInferQueue(compiled), pixels()

    def once() -> int:
        count = TOGETHER * len(queue)
        for _ in range(count):
            queue.start_async(images)
        queue.wait_all()
        return count * BATCH

    return timed(once)


def ceiling(precision: str, weights: Path) -> float:
    """Return images/s if all were products of large matrices, at the best of many."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.normal((SIDE, SIDE)), precision)
    run = tf.function(lambda: tf.matmul(matrix, matrix))
    run()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best / (GFLOP * 1e9)


def pixels() -> np.ndarray:
    """Return one batch of noise."""
    return np.random.default_rng(0).integers(0, 256, (BATCH, 299, 299, 3), np.uint8)


WAYS: dict[str, Callable[[str, Path], float]] = {"ceiling": ceiling, "ours": ours, "openvino": openvino}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if __name__ == "__main__":
    main()
