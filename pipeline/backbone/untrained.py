"""Untrained weights that serve: seeded, the same on every machine, and features of ordinary magnitude.

Two recipes. A recipe's name stands in the spec of a feature space: what it draws never changes.

`glorot_centred_1`, of InceptionV3: Glorot-uniform kernels (Glorot and Bengio 2010), each output channel's kernel then
shifted to mean zero: behind a ReLU all inputs are positive, and a kernel that answers to their common mean makes every
image look the same a few layers on. Batch norm stays the identity. Such a network fades its input to about 1e-6; it is
positively homogeneous, so a factor on the first kernel alone brings the features back to ordinary magnitudes and
changes nothing else.

`unit_variance_1`, of every other network: each output channel's kernel is drawn uniformly, shifted to mean zero and
brought to one length, as weight standardisation does (Brock, De and Smith 2021, arXiv:2101.08692); the length is such
that the output's deviation comes to 1 by the moments followed through the graph (`moments`), or to another number where
a gate, a smooth nonlinearity or the sum of a residual block takes it (`_deviation`). The kernel of a depthwise
convolution keeps a sum, the same for all channels: it lets through both what is smooth and what has detail, and the
common mean is left to the next kernel that sees all channels. Normalisations are the identity, biases 0.
Kernels are drawn as whole numbers, their sums are exact, and each further step is one correctly rounded operation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.backbone import moments
from pipeline.backbone.keras_start import import_keras
from pipeline.backbone.moments import Moments
from pipeline.core.errors import SpecError

_GLOROT_CENTRED, _UNIT_VARIANCE = "glorot_centred_1", "unit_variance_1"

# A power of two, so that no digit changes; as large as float16 allows: the first layer's outputs stay below 65504.
_GAIN = 2.0**14
_LEAST_VARIANCE = 2.0**-20  # behind an operation that makes everything equal
# The deviation of what goes into a gate (squeeze and excitation). A gate driven to 0 and 1 by its input multiplies the
# differences in size between images, block after block.
_GATE = 1 / 16
# The deviation of what goes into a nonlinearity that is a ReLU for large numbers only. Of smaller ones it lets through
# less in proportion, so that layer by layer the features of one image grow a thousandfold over those of another.
_SMOOTH, _SMOOTH_NAMES = 8.0, ("silu", "hard_silu", "gelu", "mish", "softplus")
# The deviation of what a residual block adds to its input. Behind a ReLU and a centred kernel a difference is larger
# than before, also one of rounding; blocks that add little keep that small (De and Smith 2020, arXiv:2002.10444).
_RESIDUAL = 1 / 4
# What a ReLU made positive stays so behind a depthwise kernel where it is smooth. In the next nonlinearity it behaves
# like a normal distribution with so many times the mean (tried with EfficientNet and MobileNet on photographs).
_POSITIVE = 2.0


def recipe_of(backbone: str) -> str:
    """Return the name of the recipe by which untrained weights of `backbone` are drawn."""
    return _GLOROT_CENTRED if backbone == "inception_v3" else _UNIT_VARIANCE


def initialise(model: Any, recipe: str, seed: int) -> None:
    """Give the Keras `model` its untrained weights, drawn by `recipe` in the order of the graph from `seed`.

    Raises
    ------
    SpecError
        If this version has no such recipe.
    """
    random = np.random.default_rng(seed)
    if recipe == _GLOROT_CENTRED:
        _initialise_glorot_centred(model, random)
    elif recipe == _UNIT_VARIANCE:
        _initialise_unit_variance(model, random, [moments.pixels(model.name)])
    else:
        raise SpecError(
            f"the feature space was made by another version of Icebox: its untrained weights are of the recipe "
            f"{recipe!r:.60}, this version has {_GLOROT_CENTRED} and {_UNIT_VARIANCE}; compute it anew"
        )


def _initialise_glorot_centred(model: Any, random: np.random.Generator) -> None:
    gain = _GAIN
    for layer in model.layers:
        if type(layer).__name__ == "Conv2D":
            layer.kernel.assign(gain * _glorot_centred(random, tuple(layer.kernel.shape)))
            gain = 1.0


def _glorot_centred(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    height, width, inputs, outputs = shape
    limit = np.sqrt(6.0 / (height * width * (inputs + outputs)))
    kernel = random.uniform(-limit, limit, shape)  # (height, width, inputs, outputs)
    return (kernel - kernel.mean(axis=(0, 1, 2))).astype(np.float32)


def _initialise_unit_variance(model: Any, random: np.random.Generator, inputs: list[Moments]) -> Moments:
    """Give weights to every operation of the graph; return the moments of its output."""
    graph = getattr(model, "_functional", None) or model  # of a Sequential model
    known = {id(tensor): each for tensor, each in zip(graph.inputs, inputs, strict=True)}
    users = _users(graph)
    for node in _nodes(graph):
        parts = [known[id(x)] if id(x) in known else Moments(float(x), 0.0) for x in _arguments(node, known)]
        channels = [int(x.shape[-1]) for x in _arguments(node, known) if id(x) in known]
        found = _initialise_operation(node.operation, random, parts, channels, _deviation(node, users))
        known |= {id(tensor): found for tensor in node.outputs}
    return known[id(graph.outputs[0])]


def _nodes(graph: Any) -> Iterator[Any]:
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if not node.is_input:
                yield node


def _users(graph: Any) -> dict[int, list[Any]]:
    """Return the nodes that take each tensor of the graph, by its id."""
    users = defaultdict(list)
    for node in _nodes(graph):
        for tensor in node.input_tensors:
            users[id(tensor)].append(node)
    return users


def _deviation(node: Any, users: dict[int, list[Any]]) -> float:
    """Return the deviation that the output of a layer with a kernel is to have."""
    if _is_gate(node.operation):
        return _GATE
    tensor = node.outputs[0]
    while len(taken := users[id(tensor)]) == 1 and type(taken[0].operation).__name__ in _PASSED:
        tensor = taken[0].outputs[0]
    following = taken[0].operation if len(taken) == 1 else None
    if not {_activation(node.operation), _activation(following)}.isdisjoint(_SMOOTH_NAMES):
        return _SMOOTH
    if type(following).__name__ != "Add":
        return 1.0
    others = [other for other in taken[0].input_tensors if other is not tensor]
    return _RESIDUAL if any(len(users[id(other)]) > 1 for other in others) else 1.0


_PASSED = ("BatchNormalization", "Dropout")


def _activation(operation: Any) -> str:
    return getattr(getattr(operation, "activation", None), "__name__", "linear")


def _arguments(node: Any, known: dict[int, Moments]) -> list[Any]:
    """Return the tensors and the plain numbers that an operation takes, in their order."""
    flat = import_keras().tree.flatten(node.arguments.args)
    return [x for x in flat if id(x) in known or (isinstance(x, int | float) and not isinstance(x, bool))]


# What a weight is that no signal is summed with: no shift, and the factor 1.
_CONSTANTS = {"bias": 0.0, "beta": 0.0, "alpha": 0.0, "moving_mean": 0.0, "gamma": 1.0, "moving_variance": 1.0}


def _initialise_operation(
    operation: Any, random: np.random.Generator, parts: list[Moments], channels: list[int], deviation: float
) -> Moments:
    """Give weights to one operation of the graph; return the moments of its output.

    That of a layer with a kernel is to have this `deviation`, before its own activation.
    """
    if hasattr(operation, "_nodes_by_depth") or hasattr(operation, "_functional"):  # a model within the model
        return _initialise_unit_variance(operation, random, parts)
    found = None
    for weight in getattr(operation, "weights", []):
        name, shape = weight.path.rsplit("/", 1)[-1], tuple(weight.shape)
        if name in _CONSTANTS:
            weight.assign(np.full(shape, _CONSTANTS[name], np.float32))
        elif len(shape) > 1:
            axes = _input_axes(operation, name, shape)
            gain = _gain(parts[0].variance) * deviation
            keeps_mean = 1 < math.prod(shape[:-2]) == math.prod(shape[axis] for axis in axes)
            if name == "depthwise_kernel":  # of a separable convolution: the pointwise kernel has the gain
                gain = 1.0
            weight.assign(_kernel(random, shape, axes, gain, keeps_mean))
            found = Moments(_POSITIVE * gain * parts[0].mean if keeps_mean else 0.0, deviation * deviation)
    if found is None:
        return moments.after(operation, parts, channels)
    return moments.activated(found, _activation(operation))


def _is_gate(layer: Any) -> bool:
    """Return whether a layer makes a factor for each channel: it ends in a sigmoid, or sees one place alone."""
    return _activation(layer) in ("sigmoid", "hard_sigmoid") or (
        type(layer).__name__ == "Conv2D" and tuple(layer.input.shape[1:-1]) == (1, 1)
    )


def _input_axes(layer: Any, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of a kernel over which one output channel sums."""
    kind, last = type(layer).__name__, len(shape) - 1
    if name == "depthwise_kernel" or kind.startswith("DepthwiseConv"):
        return tuple(range(last - 1))
    if kind.endswith("Transpose"):
        return (*range(last - 1), last)
    return tuple(range(last))


def _kernel(
    random: np.random.Generator, shape: tuple[int, ...], axes: tuple[int, ...], gain: float, keeps_mean: bool
) -> np.ndarray:
    """Return a kernel whose part over `axes` has mean zero and length `gain`; with `keeps_mean`, its sum is `gain`."""
    drawn = random.integers(-(2**15), 2**15, shape, np.int16).astype(np.float64)
    count = math.prod(shape[axis] for axis in axes)
    total = drawn.sum(axis=axes, keepdims=True)  # exact: whole numbers below 2**53
    squares = (drawn * drawn).sum(axis=axes, keepdims=True)
    if count == 1:
        kernel = np.where(drawn < 0, -1.0, 1.0)
    else:
        kernel = (drawn - total / count) / np.sqrt(squares - total * total / count)
    if keeps_mean:
        kernel = kernel + 1 / count
    return (gain * kernel).astype(np.float32)


def _gain(variance: float) -> float:
    """Return the factor that brings `variance` to 1.

    To eight binary digits: the last ones of `exp` and `erf`, in the moments, differ between machines.
    """
    fraction, exponent = math.frexp(1 / math.sqrt(max(variance, _LEAST_VARIANCE)))
    return math.ldexp(round(fraction * 256), exponent - 8)
