"""The graph of a network: its calls in order, where it can be cut, what comes after a layer, how much work a layer is.

Keras keeps a node for each call of an operation: of a layer, which may be called several times, of a nested model, or
of a bare operation such as the addition in `x + 3`.
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
    """Return the graph of a model, which may be nested in another one; None if `operation` is not a model."""
    inner = getattr(operation, "_functional", None) or operation  # a Sequential keeps its graph there
    return inner if hasattr(inner, "_nodes_by_depth") else None


def nodes(model: KerasModel) -> list[Any]:
    """Return the nodes of `model` in an order that they can be computed in; those of equal depth as its layers are."""
    graph: Any = functional(model)
    rank = {id(operation): i for i, operation in enumerate(graph.operations)}
    ranked = [
        (-depth, rank[id(node.operation)], node.operation._inbound_nodes.index(node), node)
        for depth, of_depth in graph._nodes_by_depth.items()
        for node in of_depth
    ]
    return [node for *_, node in sorted(ranked, key=lambda each: each[:3])]


def walk(model: KerasModel, values: dict[int, Any], call: Callable[[Any, Any, Any], Any]) -> dict[int, Any]:
    """Compute what of `model` can be computed from `values`, and return those of all tensors.

    `values` go by the `id` of the model's symbolic tensors. `call` takes a node, its arguments and its keywords.
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
    """Return the names of the layers in their order, the operation that gives the output last, be it a layer or not."""
    graph: Any = functional(model)
    names = [layer.name for layer in graph.layers]
    last = graph.outputs[0]._keras_history.operation.name
    return names if last in names else [*names, last]


def cut_layers(model: KerasModel) -> list[str]:
    """Return the names of the layers where `model` can be cut, but the input, in order.

    These are the layers through whose output, (h, w, c) or (c,), every path from input to output passes. A layer that
    is called several times is none of them. The last operation is one, also a bare one or a nested model.
    """
    calls, layer = nodes(model), import_keras().layers.Layer
    count = Counter(id(node.operation) for node in calls)
    return [
        node.operation.name
        for node in _carrying(calls)
        if count[id(node.operation)] == 1 and (node.outputs[0] is model.outputs[0] or isinstance(node.operation, layer))
    ]


def cut_tensor(model: KerasModel, layer: str) -> Any:
    """Return the symbolic tensor that `layer` gives, which is one of the `cut_layers` of `model` or of a longer one.

    A bare operation with which a network ends is one of them, and has a head behind it in a full model.
    """
    return [node.outputs[0] for node in _carrying(nodes(model)) if node.operation.name == layer][-1]


def _carrying(calls: list[Any]) -> list[Any]:
    """Return those of the nodes of a network whose output carries it on alone, but the input.

    Going through them in an order that they could be computed in: an output carries the network on alone if nothing
    computed so far, but that output, is still needed by what comes after.
    """
    origin = {id(tensor): i for i, node in enumerate(calls) for tensor in node.outputs}
    last_use = [0] * len(calls)
    for i, node in enumerate(calls):
        for tensor in node.input_tensors:
            last_use[origin[id(tensor)]] = max(last_use[origin[id(tensor)]], i)
    found, needed_until = [], 0  # the furthest node that needs what was computed before this one
    for i, node in enumerate(calls):
        if not node.is_input and needed_until <= i and _is_features(node.outputs):
            found.append(node)
        needed_until = max(needed_until, last_use[i])
    return found


def _is_features(outputs: list[Any]) -> bool:
    return len(outputs) == 1 and len(outputs[0].shape) in (2, 4) and None not in outputs[0].shape[1:]


def cut(model: KerasModel, layer: str) -> KerasModel:
    """Return the network up to `layer`, whose output alone must carry the network on; it gives (n, h, w, c).

    A layer that gives a vector (c,) is one of (1, 1, c).

    Raises
    ------
    SpecError
        If there is no such layer, or a path from input to output goes around it; the text names those nearest.
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
    """Return what of `model` comes after `layer`, where it can be cut: its rows (n, h, w, c) → the output."""
    keras, tensor = import_keras(), cut_tensor(model, layer)
    name = name and _scope(name)
    if len(tensor.shape) == 4:
        return keras.Model(tensor, model.output, name=name)
    rows = keras.Input((1, 1, tensor.shape[-1]), dtype=tensor.dtype)
    vectors = keras.layers.Reshape(tensor.shape[1:], dtype=tensor.dtype)(rows)
    return keras.Model(rows, keras.Model(tensor, model.output)(vectors), name=name)


def multiplications(layer: Any) -> int:
    """Return how many multiplications with weights a layer does for one image where it is called first.

    Of a nested model, those of its layers. Convolutions, plain, grouped, depthwise, separable and transposed, and
    dense layers are counted; all others, attention among them, count as none.
    """
    return _work(layer._inbound_nodes[0])


def _work(node: Any) -> int:
    return sum(_of_call(*call) for call in _calls(node.operation, node.input_tensors, node.outputs))


def output_shapes(model: KerasModel) -> list[tuple[str, tuple[int | None, ...]]]:
    """Return what each call in `model` gives for one image, as the operation's name and a shape without the batch."""
    calls = [call for node in nodes(model) for call in _calls(node.operation, node.input_tensors, node.outputs)]
    return [(operation.name, tuple(tensor.shape[1:])) for operation, _, given in calls for tensor in given]


def _of_call(operation: Any, inputs: list[Any], outputs: list[Any]) -> int:
    kernels = [getattr(operation, name, None) for name in ("kernel", "depthwise_kernel", "pointwise_kernel")]
    # Where the kernel is laid: once on a vector, else on each place of what comes out, or of what goes in.
    places = inputs if type(operation).__name__.endswith("Transpose") else outputs
    each = sum(math.prod(kernel.shape) for kernel in kernels if kernel is not None)
    return each and each * math.prod(size or 1 for size in places[0].shape[1:-1])


def _calls(operation: Any, inputs: list[Any], outputs: list[Any]) -> list[tuple[Any, list[Any], list[Any]]]:
    """Return a call as operation, inputs and outputs; of a nested model, the calls of its layers on such inputs."""
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
    """Return each call in `model` that comes after the layer `after` as its operation and its multiplications."""
    calls = nodes(model)
    if after:
        tensor = cut_tensor(model, after)
        calls = calls[next(i for i, node in enumerate(calls) if tensor is node.outputs[0]) + 1 :]
    return [(node.operation, _work(node)) for node in calls]


def activations(model: KerasModel) -> int:
    """Return how many numbers the layers of `model` give for one image, all together: training keeps them."""
    return sum(math.prod(size or 1 for size in shape) for _, shape in output_shapes(model))


def allow_any_names(model: KerasModel) -> None:
    """Have TensorFlow trace layers whatever they are called: it takes no blanks and no other alphabets in a name."""
    for layer in model._flatten_layers():
        if layer.name != _scope(layer.name):
            layer._open_name_scope = contextlib.nullcontext


def _scope(name: str) -> str:
    """Return a name that TensorFlow takes for a scope."""
    return re.sub(r"[^A-Za-z0-9_.>-]", "_", re.sub(r"^[^A-Za-z0-9.]", "_", name))
