"""Draw untrained weights from a seed: equal on every machine, with features of ordinary magnitude.

There are two recipes, and `recipe_of` names the one for a network. The recipe's name is part of a feature space's spec,
so the weights that a recipe draws never change.

`glorot_centred_1` is for InceptionV3. Kernels are Glorot-uniform (Glorot and Bengio 2010), then the kernel of each
output channel is shifted to mean zero. After a ReLU all inputs are positive. Kernels that respond to their common
mean would make the features of all images nearly equal after a few layers. Batch norms are the identity. In such a
network the signal shrinks to about 1e-6 of its size. The network is positively homogeneous, so one factor on the first
kernel brings the features back to ordinary magnitudes and changes nothing else.

`unit_variance_1` is for all other networks. The kernel of each output channel is drawn uniformly, shifted to mean zero
and scaled to a fixed norm. Weight standardisation does the same (Brock, De and Smith 2021, arXiv:2101.08692). The norm
is chosen so that the output's standard deviation is 1; `moments` follows the moments of the signal through the graph.
The target differs before a gate, a smooth nonlinearity or the sum of a residual block (`_deviation`). The kernel of a
depthwise convolution keeps a nonzero sum, equal for all channels, so that both smooth and detailed signals pass. The
common mean is then removed by the next kernel that sums over all channels. Normalisations are the identity, biases 0.
Kernels are drawn as integers, their sums are exact, and each further step is one correctly rounded operation.
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

# A power of two multiplies without rounding. This one is the largest for float16: the first layer's outputs stay below
# 65504.
_GAIN = 2.0**14
_LEAST_VARIANCE = 2.0**-20  # lower bound, for operations whose output is constant
# Standard deviation of the input of a gate (squeeze and excitation). A gate with outputs near 0 and 1 increases the
# differences in magnitude between images in each block.
_GATE = 1 / 16
# Standard deviation of the input of a smooth nonlinearity, which is close to a ReLU for large numbers only. It reduces
# small numbers more, so the features of one image would become a thousand times larger than those of another.
_SMOOTH, _SMOOTH_NAMES = 8.0, ("silu", "hard_silu", "gelu", "mish", "softplus")
# Standard deviation of the output that a residual block adds to its input. A ReLU and a centred kernel enlarge every
# difference, also rounding errors. Blocks that add little keep them small (De and Smith 2020, arXiv:2002.10444).
_RESIDUAL = 1 / 4
# The output of a ReLU stays positive after a depthwise kernel where the signal is smooth. In the next nonlinearity this
# signal behaves like a normal distribution with a mean larger by this factor (tested with EfficientNet and MobileNet on
# photographs).
_POSITIVE = 2.0


def recipe_of(backbone: str) -> str:
    """Return the name of the recipe that draws the untrained weights of `backbone`."""
    return _GLOROT_CENTRED if backbone == "inception_v3" else _UNIT_VARIANCE


def initialise(model: Any, recipe: str, seed: int) -> None:
    """Set the weights of the Keras `model` to untrained ones, drawn from `seed` by `recipe` in the order of the graph.

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
    """Set the weights of every operation of the graph; return the moments of the graph's output.

    `inputs` holds the moments of each input of `model`.
    """
    graph = getattr(model, "_functional", None) or model  # a Sequential model keeps its graph in _functional
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
    """Return id of a tensor of the graph → nodes that take this tensor as input."""
    users = defaultdict(list)
    for node in _nodes(graph):
        for tensor in node.input_tensors:
            users[id(tensor)].append(node)
    return users


def _deviation(node: Any, users: dict[int, list[Any]]) -> float:
    """Return the target standard deviation of the output of a layer with a kernel."""
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
    """Return the tensors and the plain numbers among an operation's positional arguments, in their order."""
    flat = import_keras().tree.flatten(node.arguments.args)
    return [x for x in flat if id(x) in known or (isinstance(x, int | float) and not isinstance(x, bool))]


# Values of the weights that are not kernels: shifts are 0, factors are 1.
_CONSTANTS = {"bias": 0.0, "beta": 0.0, "alpha": 0.0, "moving_mean": 0.0, "gamma": 1.0, "moving_variance": 1.0}


def _initialise_operation(
    operation: Any, random: np.random.Generator, parts: list[Moments], channels: list[int], deviation: float
) -> Moments:
    """Set the weights of one operation of the graph; return the moments of its output.

    `parts` holds the moments of its inputs, `channels` their numbers of channels. `deviation` is the target standard
    deviation of the output of a layer with a kernel, before the layer's own activation.
    """
    if hasattr(operation, "_nodes_by_depth") or hasattr(operation, "_functional"):  # a nested model
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
            if name == "depthwise_kernel":  # in a separable convolution, only the pointwise kernel has the gain
                gain = 1.0
            weight.assign(_kernel(random, shape, axes, gain, keeps_mean))
            found = Moments(_POSITIVE * gain * parts[0].mean if keeps_mean else 0.0, deviation * deviation)
    if found is None:
        return moments.after(operation, parts, channels)
    return moments.activated(found, _activation(operation))


def _is_gate(layer: Any) -> bool:
    """Return whether a layer gives a factor for each channel: it ends in a sigmoid, or is a Conv2D on 1 by 1 input."""
    return _activation(layer) in ("sigmoid", "hard_sigmoid") or (
        type(layer).__name__ == "Conv2D" and tuple(layer.input.shape[1:-1]) == (1, 1)
    )


def _input_axes(layer: Any, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of a kernel that are summed over for one output channel."""
    kind, last = type(layer).__name__, len(shape) - 1
    if name == "depthwise_kernel" or kind.startswith("DepthwiseConv"):
        return tuple(range(last - 1))
    if kind.endswith("Transpose"):
        return (*range(last - 1), last)
    return tuple(range(last))


def _kernel(
    random: np.random.Generator, shape: tuple[int, ...], axes: tuple[int, ...], gain: float, keeps_mean: bool
) -> np.ndarray:
    """Return a float32 kernel whose part over `axes` has mean zero and Euclidean norm `gain`.

    With `keeps_mean`, a constant is added, so that the sum over `axes` is `gain`.
    """
    drawn = random.integers(-(2**15), 2**15, shape, np.int16).astype(np.float64)
    count = math.prod(shape[axis] for axis in axes)
    total = drawn.sum(axis=axes, keepdims=True)  # exact: integers below 2**53
    squares = (drawn * drawn).sum(axis=axes, keepdims=True)
    if count == 1:
        kernel = np.where(drawn < 0, -1.0, 1.0)
    else:
        kernel = (drawn - total / count) / np.sqrt(squares - total * total / count)
    if keeps_mean:
        kernel = kernel + 1 / count
    return (gain * kernel).astype(np.float32)


def _gain(variance: float) -> float:
    """Return the factor that scales `variance` to 1, rounded to eight binary digits.

    The last digits of `exp` and `erf`, which the moments are computed with, differ between machines.
    """
    fraction, exponent = math.frexp(1 / math.sqrt(max(variance, _LEAST_VARIANCE)))
    return math.ldexp(round(fraction * 256), exponent - 8)
