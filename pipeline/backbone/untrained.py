"""Untrained weights that serve: seeded, the same on every machine, and their features keep their digits.

Glorot-uniform kernels (Glorot and Bengio, 2010), each output channel's kernel then shifted to mean zero: behind a
ReLU all inputs are positive, and a kernel that answers to their common mean makes every image look the same a few
layers on. Batch norm stays the identity. Such a network fades its input to about 1e-6; it is positively homogeneous,
so a factor on the first kernel alone brings the features back to ordinary magnitudes and changes nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

UNTRAINED_RECIPE = "glorot_centred_1"

# A power of two, so that no digit changes; as large as float16 allows: the first layer's outputs stay below 65504.
_GAIN = 2.0**14


def initialise(model: Any, seed: int) -> None:
    """Give every convolution of the Keras `model` its kernel, drawn in the order of the layers from `seed`."""
    random = np.random.default_rng(seed)
    gain = _GAIN
    for layer in model.layers:
        if type(layer).__name__ == "Conv2D":
            layer.kernel.assign(gain * _kernel(random, tuple(layer.kernel.shape)))
            gain = 1.0


def _kernel(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    height, width, inputs, outputs = shape
    limit = np.sqrt(6.0 / (height * width * (inputs + outputs)))
    kernel = random.uniform(-limit, limit, shape)  # (height, width, inputs, outputs)
    return (kernel - kernel.mean(axis=(0, 1, 2))).astype(np.float32)
