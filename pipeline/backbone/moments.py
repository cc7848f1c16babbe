"""Compute the mean and variance of the signal after each operation of an untrained network, without running it.

The method is AutoInit (Bingham and Miikkulainen 2021, arXiv:2109.08958): each layer maps the mean and the variance
of its inputs to those of its output. TensorFlow is not used, so the result is the same on every machine. `pixels` gives
the moments of the input, `after` those of an operation's output, `activated` those after an activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any, NamedTuple

from pipeline.backbone.scaling import BGR_MEANS
from pipeline.backbone.table import BACKBONES


class Moments(NamedTuple):
    """Mean and variance of a tensor over images, positions and channels."""

    mean: float
    variance: float

    @property
    def square(self) -> float:
        """Return the mean of the squares."""
        return self.variance + self.mean * self.mean


# Pixels scaled before the network, to -1 … 1 or as an own network expects. A kernel of mean zero responds only to the
# contrast of neighbouring pixels. In photographs scaled to -1 … 1 its standard deviation is about 0.1.
PIXELS = Moments(0.0, 1.0)
_BGR_PIXELS = Moments(0.0, 64.0**2)  # -128 … 128
SCALED_PIXELS = Moments(0.0, 1 / 16)  # scaled inside the network, to about -1 … 1
NORMALISED = Moments(0.0, 1.0)  # after a normalisation layer


def pixels(backbone: str) -> Moments:
    """Return the moments of the pixels that the network `backbone` takes as input."""
    row = BACKBONES.get(backbone)
    return _BGR_PIXELS if row is not None and row.scaling == BGR_MEANS else PIXELS


# Mean and variance of a nonlinearity's output are computed over 64 equally probable points of a normal distribution.
_POINTS = 64
_QUANTILES = [NormalDist().inv_cdf((i + 0.5) / _POINTS) for i in range(_POINTS)]
_DEVIATION = math.sqrt(sum(x * x for x in _QUANTILES) / _POINTS)
_NORMAL = [x / _DEVIATION for x in _QUANTILES]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-min(max(x, -700.0), 700.0)))


def _hard_sigmoid(x: float) -> float:
    return min(max(x / 6 + 0.5, 0.0), 1.0)


def _gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def _elu(x: float) -> float:
    return x if x > 0 else math.expm1(x)


# Name in keras.activations → function; a nonlinearity that is not listed is treated as a ReLU.
_ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: max(x, 0.2 * x),
    "elu": _elu,
    "selu": lambda x: 1.0507 * (x if x > 0 else 1.67326 * math.expm1(x)),
    "gelu": _gelu,
    "silu": lambda x: x * _sigmoid(x),
    "hard_silu": lambda x: x * _hard_sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(min(x, 700.0)))),
    "softplus": lambda x: math.log1p(math.exp(min(x, 700.0))),
    "softsign": lambda x: x / (1 + abs(x)),
    "sigmoid": _sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "tanh": math.tanh,
}


def activated(moments: Moments, name: str) -> Moments:
    """Return the moments after the activation `name` of `keras.activations`; an unlisted name counts as "relu"."""
    return _through(moments, _ACTIVATIONS.get(name, _ACTIVATIONS["relu"]))


def _through(moments: Moments, function: Callable[[float], float]) -> Moments:
    deviation = math.sqrt(moments.variance)
    values = [function(moments.mean + deviation * point) for point in _NORMAL]
    mean = sum(values) / _POINTS
    return Moments(mean, sum((value - mean) ** 2 for value in values) / _POINTS)


def _relu_layer(layer: Any, moments: Moments) -> Moments:
    most = math.inf if layer.max_value is None else float(layer.max_value)
    slope = float(layer.negative_slope)
    return _through(moments, lambda x: min(x, most) if x > 0 else slope * x)


def _sum(parts: Iterable[Moments]) -> Moments:
    means, variances = zip(*parts, strict=True)
    return Moments(sum(means), sum(variances))


def _product(parts: Iterable[Moments]) -> Moments:
    mean, square = 1.0, 1.0
    for part in parts:
        mean, square = mean * part.mean, square * part.square
    return Moments(mean, square - mean * mean)


def _scaled(moments: Moments, factor: float) -> Moments:
    return Moments(factor * moments.mean, factor * factor * moments.variance)


def _joined(parts: list[Moments], channels: list[int]) -> Moments:
    shares = [count / sum(channels) for count in channels]
    mean = sum(share * part.mean for share, part in zip(shares, parts, strict=True))
    square = sum(share * part.square for share, part in zip(shares, parts, strict=True))
    return Moments(mean, square - mean * mean)


# Class name of a Keras layer or operation → function from the moments of its inputs to those of its output.
_MERGED: dict[str, Callable[[list[Moments]], Moments]] = {
    "Add": _sum,
    "Subtract": lambda parts: _sum([parts[0], _scaled(parts[1], -1)]),
    "Multiply": _product,
    "Average": lambda parts: _scaled(_sum(parts), 1 / len(parts)),
    "LayerNormalization": lambda _: NORMALISED,
    "GroupNormalization": lambda _: NORMALISED,
    "RMSNormalization": lambda _: NORMALISED,
}
_ACTIVATION_LAYERS = {"PReLU": "relu", "LeakyReLU": "leaky_relu", "ELU": "elu"}


_PIXEL_OPERATIONS = ("Rescaling", "Normalization", "Add", "Subtract", "Multiply", "Divide", "TrueDivide")


def after(operation: Any, parts: list[Moments], channels: list[int]) -> Moments:
    """Return the moments of the output of an `operation` without a kernel.

    `parts` holds the moments of its inputs, including inputs that are plain numbers. `channels` holds the number of
    channels of each input tensor. An operation without a rule, such as pooling, keeps the moments of its first input.
    """
    kind, first = type(operation).__name__, parts[0]
    if (first is PIXELS or first is SCALED_PIXELS) and kind in _PIXEL_OPERATIONS:
        return SCALED_PIXELS
    if kind in _MERGED:
        return _MERGED[kind](parts)
    if kind == "Concatenate":
        return _joined(parts, channels)
    if kind == "CustomScaleLayer":  # the residual sum of InceptionResNetV2
        return _sum([first, _scaled(parts[1], operation.scale)])
    if kind == "Rescaling" and isinstance(operation.scale, int | float):
        return _sum([_scaled(first, operation.scale), Moments(float(operation.offset), 0.0)])
    if kind == "ReLU":
        return _relu_layer(operation, first)
    if kind == "Activation":
        return activated(first, operation.activation.__name__)
    return activated(first, _ACTIVATION_LAYERS[kind]) if kind in _ACTIVATION_LAYERS else first
