"""The graph of a Keras model: its calls in order, the layers to cut it at, and the cost of each layer.

Keras keeps a node for each call of an operation. An operation is a layer, a nested model, or a bare operation such as
the addition in `x + 3`. A layer may be called several times.

`walk` runs a graph, and `cut_layers` lists the layers where it can be cut. `cut` returns the part up to a layer,
`layers_after` the part after it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core.errors import SpecError, did_you_mean

_PROPOSED = 5  # layers, in an error message
_ROW = "vector_as_row"


def functional(operation: Any) -> Any | None:
    """Return the graph of a model, also of a nested one; None if `operation` is not a model."""
    inner = getattr(operation, "_functional", None) or operation  # a Sequential model keeps its graph in _functional
    return inner if hasattr(inner, "_nodes_by_depth") else None


def nodes(model: KerasModel) -> list[Any]:
    """Return the nodes of `model` in topological order; nodes of equal depth are in the order of the layers."""
    graph: Any = functional(model)
    rank = {id(operation): i for i, operation in enumerate(graph.operations)}
    ranked = [
        (-depth, rank[id(node.operation)], node.operation._inbound_nodes.index(node), node)
        for depth, of_depth in graph._nodes_by_depth.items()
        for node in of_depth
    ]
    return [node for *_, node in sorted(ranked, key=lambda each: each[:3])]


def walk(model: KerasModel, values: dict[int, Any], call: Callable[[Any, Any, Any], Any]) -> dict[int, Any]:
    """Compute every tensor of `model` that can be computed from `values`, and return the values of all known tensors.

    `values` maps the `id` of a symbolic tensor of the model to its value, and is extended in place. `call` takes a
    node, its positional arguments and its keyword arguments, and returns the output.
    """
    flatten = import_keras().tree.flatten
    for node in nodes(model):
        known = any(id(tensor) in values for tensor in node.outputs)
        if node.is_input or known or not all(id(tensor) in values for tensor in node.input_tensors):
            continue
        args, kwargs = node.arguments.fill_in(values)
        results = flatten(call(node, args, kwargs))
        values.update((id(tensor), result) for tensor, result in zip(node.outputs, results, strict=True))
    return values


def layer_names(model: KerasModel) -> list[str]:
    """Return the names of the layers in their order.

    The operation that gives the output is always included, also if it is not a layer; then it comes last.
    """
    graph: Any = functional(model)
    names = [layer.name for layer in graph.layers]
    last = graph.outputs[0]._keras_history.operation.name
    return names if last in names else [*names, last]


def cut_layers(model: KerasModel) -> list[str]:
    """Return the names of the layers where `model` can be cut, in order, without the input.

    Every path from input to output passes through the output of such a layer, which has the shape (h, w, c) or (c,).
    A layer that is called several times is not included. The last operation may also be a bare one or a nested model.
    """
    calls, layer = nodes(model), import_keras().layers.Layer
    count = Counter(id(node.operation) for node in calls)
    return [
        node.operation.name
        for node in _carrying(calls)
        if count[id(node.operation)] == 1 and (node.outputs[0] is model.outputs[0] or isinstance(node.operation, layer))
    ]


def cut_tensor(model: KerasModel, layer: str) -> Any:
    """Return the symbolic output tensor of `layer`, which is one of the `cut_layers` of `model`.

    In a full model, `layer` may also be the bare operation that the backbone ends with: the head follows it.
    """
    return [node.outputs[0] for node in _carrying(nodes(model)) if node.operation.name == layer][-1]


def _carrying(calls: list[Any]) -> list[Any]:
    """Return the nodes whose single output is the only tensor that all later nodes need, without the input.

    `calls` are the nodes of a network in topological order. A node is returned if no later node uses the output of an
    earlier node, and if its own output has the shape (h, w, c) or (c,).
    """
    origin = {id(tensor): i for i, node in enumerate(calls) for tensor in node.outputs}
    last_use = [0] * len(calls)
    for i, node in enumerate(calls):
        for tensor in node.input_tensors:
            last_use[origin[id(tensor)]] = max(last_use[origin[id(tensor)]], i)
    found, needed_until = [], 0  # index of the last node that uses an output of a node before this one
    for i, node in enumerate(calls):
        if not node.is_input and needed_until <= i and _is_features(node.outputs):
            found.append(node)
        needed_until = max(needed_until, last_use[i])
    return found


def _is_features(outputs: list[Any]) -> bool:
    return len(outputs) == 1 and len(outputs[0].shape) in (2, 4) and None not in outputs[0].shape[1:]


def cut(model: KerasModel, layer: str) -> KerasModel:
    """Return the network up to `layer`, which must be one of its `cut_layers`; its output is (n, h, w, c).

    The output of a layer that gives a vector (c,) is reshaped to (1, 1, c).

    Raises
    ------
    SpecError
        If there is no such layer, or the model cannot be cut there. The message names the nearest possible layers.
    """
    keras, cuts = import_keras(), cut_layers(model)
    if layer not in cuts:
        raise SpecError(_refusal(model, layer, cuts))
    output = cut_tensor(model, layer)
    if len(output.shape) == 2:
        output = keras.layers.Reshape((1, 1, output.shape[-1]), name=_ROW, dtype=output.dtype)(output)
    return keras.Model(model.inputs, output, name=_scope(f"{model.name}_to_{layer}"))


def _refusal(model: KerasModel, layer: str, cuts: list[str]) -> str:
    names = layer_names(model)
    if layer not in names:
        last = ", ".join(cuts[-_PROPOSED:])
        near = did_you_mean(layer, names)
        return (
            f"{model.name} has no layer {layer!r:.100} (`summary --backbone B --all` lists them; the last to cut at: "
            f"{last}){near}"
        )
    at = names.index(layer)
    before, after = [name for name in cuts if names.index(name) < at], [n for n in cuts if names.index(n) > at]
    nearest = " or ".join([*before[-1:], *after[:1]])
    calls = [node for node in nodes(model) if node.operation.name == layer]
    reason = "other branches run beside it"
    if len(calls) > 1:
        reason = f"it is called {len(calls)} times"
    elif not _is_features(calls[0].outputs):
        reason = (
            f"it gives {', '.join(str(tensor.shape[1:]) for tensor in calls[0].outputs)}, not one (h, w, c) or (c,)"
        )
    works = f"the nearest layers that work: {nearest}" if nearest else "no other layer's does"
    return f"the output of {layer!r} does not carry {model.name} on by itself: {reason}; {works}"


def layers_after(model: KerasModel, layer: str, name: str | None = None) -> KerasModel:
    """Return the part of `model` after `layer`, where it can be cut: a model from rows (n, h, w, c) to the output."""
    keras, tensor = import_keras(), cut_tensor(model, layer)
    name = name and _scope(name)
    if len(tensor.shape) == 4:
        return keras.Model(tensor, model.output, name=name)
    rows = keras.Input((1, 1, tensor.shape[-1]), dtype=tensor.dtype)
    vectors = keras.layers.Reshape(tensor.shape[1:], dtype=tensor.dtype)(rows)
    return keras.Model(rows, keras.Model(tensor, model.output)(vectors), name=name)


def multiplications(layer: Any) -> int:
    """Return the number of multiplications with weights in the first call of a layer, for one image.

    Dense layers and convolutions (plain, grouped, depthwise, separable, transposed) are counted. All other layers,
    attention included, count as 0. For a nested model the result is the sum over its layers.
    """
    return _work(layer._inbound_nodes[0])


def _work(node: Any) -> int:
    return sum(_of_call(*call) for call in _calls(node.operation, node.input_tensors, node.outputs))


def output_shapes(model: KerasModel) -> list[tuple[str, tuple[int | None, ...]]]:
    """Return (operation name, shape without the batch axis) of each output of each call in `model`.

    Nested models are replaced by the calls of their layers.
    """
    calls = [call for node in nodes(model) for call in _calls(node.operation, node.input_tensors, node.outputs)]
    return [(operation.name, tuple(tensor.shape[1:])) for operation, _, given in calls for tensor in given]


def _of_call(operation: Any, inputs: list[Any], outputs: list[Any]) -> int:
    kernels = [getattr(operation, name, None) for name in ("kernel", "depthwise_kernel", "pointwise_kernel")]
    # A kernel is applied once for each spatial position of the output; in a transposed convolution, of the input.
    places = inputs if type(operation).__name__.endswith("Transpose") else outputs
    each = sum(math.prod(kernel.shape) for kernel in kernels if kernel is not None)
    return each and each * math.prod(size or 1 for size in places[0].shape[1:-1])


def _calls(operation: Any, inputs: list[Any], outputs: list[Any]) -> list[tuple[Any, list[Any], list[Any]]]:
    """Return a call as (operation, inputs, outputs); for a nested model, the calls of its layers for these inputs."""
    graph = functional(operation)
    if graph is None:
        return [(operation, inputs, outputs)]
    flatten, found = import_keras().tree.flatten, []

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        made = node.operation.compute_output_spec(*args, **kwargs)
        found.extend(_calls(node.operation, flatten(args), flatten(made)))
        return made

    walk(graph, {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}, call)
    return found


def share_of_work(model: KerasModel, after: str = "") -> list[tuple[Any, int]]:
    """Return (operation, number of multiplications) of each call in `model` after the layer `after`.

    Without `after`, all calls are returned.
    """
    calls = nodes(model)
    if after:
        tensor = cut_tensor(model, after)
        calls = calls[next(i for i, node in enumerate(calls) if tensor is node.outputs[0]) + 1 :]
    return [(node.operation, _work(node)) for node in calls]


def activations(model: KerasModel) -> int:
    """Return the total number of output values of all layers of `model` for one image, which training keeps."""
    return sum(math.prod(size or 1 for size in shape) for _, shape in output_shapes(model))


def allow_any_names(model: KerasModel) -> None:
    """Let TensorFlow trace layers with any name.

    TensorFlow refuses scope names with spaces or non-ASCII letters, so such layers get no name scope.
    """
    for layer in model._flatten_layers():
        if layer.name != _scope(layer.name):
            layer._open_name_scope = contextlib.nullcontext


def _scope(name: str) -> str:
    """Return `name` with the characters replaced that TensorFlow does not allow in a scope name."""
    return re.sub(r"[^A-Za-z0-9_.>-]", "_", re.sub(r"^[^A-Za-z0-9.]", "_", name))
