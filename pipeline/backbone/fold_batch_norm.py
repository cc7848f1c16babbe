"""Run a frozen network with its batch norms folded into the convolutions: same function, fewer passes over memory.

In inference a batch norm is y = scale · x + shift, with constants for each channel. The convolution before it can
include both: its kernel is multiplied by scale, and shift is added to its bias (Jacob et al., arXiv:1712.05877,
section 3.2). `run_folded` runs a model in this way, `fold` computes the folded kernel and bias.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from pipeline.backbone.graph import cut_tensor, functional, nodes, walk
from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core.errors import SpecError


def run_folded(model: KerasModel, inputs: Any, after: str | None = None) -> Any:
    """Return the output of a frozen Keras model for `inputs` (n, h, w, c). Call it inside a `tf.function`.

    `inputs` are images, or rows of the layer `after`, where the model can be cut. A convolution and the batch norm
    after it are computed as one convolution. Grouped convolutions with one input channel for each group are computed as
    depthwise ones. Other layers are called unchanged in inference mode, nested models layer by layer.
    `model` computes in the precision it was built for. Its weights are read during this call; later changes to the
    weights have no effect.

    Raises
    ------
    SpecError
        If a layer cannot be computed.
    """
    import tensorflow as tf

    begin = model.inputs[0] if after is None else cut_tensor(model, after)
    with tf.name_scope("frozen"):  # TensorFlow refuses some layer names as the outermost scope, but not inside another
        if len(begin.shape) == 2:
            inputs = tf.reshape(inputs, (-1, begin.shape[-1]))
        return _run(model, begin, inputs)[0]


def _run(model: KerasModel, begin: Any, value: Any) -> list[Any]:
    """Return the outputs of `model` when its symbolic tensor `begin` has the value `value`."""
    import tensorflow as tf

    folded = _foldable(model, begin)
    taken = set(folded.values())
    values = {id(begin): tf.cast(value, begin.dtype)}

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        fed = values[id(node.input_tensors[0])]  # the first input, positional or keyword argument
        if node in taken:
            return fed  # this convolution is computed together with its batch norm
        if node in folded:
            return _convolve(folded[node].operation, node.operation, fed)
        if is_depthwise(node.operation):
            return _convolve(node.operation, None, fed)
        graph, tensors = functional(node.operation), node.input_tensors
        if graph is not None and len(tensors) == 1 and len(tensors[0].shape) == len(graph.inputs[0].shape):
            return _run(graph, graph.inputs[0], fed)
        return _call(model, node.operation, args, kwargs)

    walk(model, values, call)
    return [values[id(tensor)] for tensor in model.outputs]


def _call(model: KerasModel, operation: Any, args: Any, kwargs: Any) -> Any:
    if "training" in getattr(operation, "_call_context_args", ()):
        kwargs = {**kwargs, "training": False}
    try:
        return operation(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        kind = type(operation).__name__
        raise SpecError(
            f"{model.name} cannot be computed: its {kind} {operation.name!r:.100} fails: {reason}"
        ) from error


def _convolve(layer: Any, norm: Any | None, inputs: Any) -> Any:
    """Return the output of a convolution `layer`, followed by the batch norm `norm` if given, for `inputs`."""
    import tensorflow as tf

    ops, layers = import_keras().ops, import_keras().layers
    # The tensors are made outside the graph, so the graph keeps no copy of them. Constants inside the graph would be
    # converted to the processor's layout only once: at best 1% faster, but 0.8 GB more memory (2.4 GB in float32).
    with tf.init_scope():
        *kernels, bias = (tf.constant(each, layer.compute_dtype) for each in fold(layer, norm))
    kinds = {layers.Conv2D: ops.conv, layers.DepthwiseConv2D: ops.depthwise_conv}
    convolution = kinds.get(type(layer), ops.separable_conv)
    if is_depthwise(layer):
        convolution, kernels = ops.depthwise_conv, [tf.reshape(kernels[0], (*layer.kernel_size, layer.groups, -1))]
    how = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate}
    product = convolution(tf.cast(inputs, layer.compute_dtype), *kernels, data_format=layer.data_format, **how)
    result = tf.nn.bias_add(product, bias)
    return layer.activation(result) if norm is None else tf.cast(result, norm.compute_dtype)


def is_depthwise(layer: Any) -> bool:
    """Return whether `layer` is a grouped Conv2D that is equal to a depthwise convolution, as in ConvNeXt.

    On a CPU, Keras runs grouped convolutions through XLA. For a 7 by 7 kernel on (56, 56, 96), this takes 80 times as
    long as a depthwise convolution.
    """
    return (
        type(layer) is import_keras().layers.Conv2D
        and layer.groups > 1
        and layer.kernel.shape[2] == 1
        and layer.strides[0] == layer.strides[1]
        and layer.data_format == "channels_last"
    )


def fold(convolution: Any, norm: Any | None) -> tuple[np.ndarray, ...]:
    """Return the kernels and the bias (c_out,) of a convolution with the batch norm `norm` folded in, as float64.

    The kernels have the shapes of those of `convolution`; without a `norm` their values are unchanged too.
    """
    *before, kernel = _kernels(convolution)
    own = None if convolution.bias is None else _numbers(convolution.bias)
    if norm is None:
        return *before, kernel, np.zeros(kernel.shape[-1]) if own is None else own
    scale = 1.0 / np.sqrt(_numbers(norm.moving_variance) + norm.epsilon)
    if norm.gamma is not None:
        scale *= _numbers(norm.gamma)
    bias = -_numbers(norm.moving_mean) * scale
    if norm.beta is not None:
        bias += _numbers(norm.beta)
    if own is not None:
        bias += own * scale
    if isinstance(convolution, import_keras().layers.DepthwiseConv2D):
        scale = scale.reshape(kernel.shape[2:])  # a depthwise kernel is (h, w, c, m) and has c · m output channels
    return *before, kernel * scale, bias


def _kernels(convolution: Any) -> list[np.ndarray]:
    if isinstance(convolution, import_keras().layers.SeparableConv2D):
        return [_numbers(convolution.depthwise_kernel), _numbers(convolution.pointwise_kernel)]
    return [_numbers(convolution.kernel)]


def _numbers(variable: Any) -> np.ndarray:
    return variable.value.numpy().astype(np.float64)


def _foldable(model: KerasModel, begin: Any) -> dict[Any, Any]:
    """Return node of a batch norm → node of the convolution to fold it into.

    The batch norm must be the only node that uses the output of the convolution. This output must not be the tensor
    `begin`, whose value is given, nor an output of the model.
    """
    calls = nodes(model)
    users = defaultdict(list)
    for node in calls:
        for tensor in node.input_tensors:
            users[id(tensor)].append(node)
    kept = {id(begin), *map(id, model.outputs)}
    found = {}
    for node in calls:
        output = id(node.outputs[0])
        if output not in kept and len(users[output]) == 1 and _fit(node.operation, users[output][0].operation):
            found[users[output][0]] = node
    return found


def _fit(layer: Any, norm: Any) -> bool:
    """Return whether `layer` is a convolution and `norm` a batch norm over channels that can be folded into it."""
    keras = import_keras()
    layers = keras.layers
    return (
        type(layer) in (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
        and layer.activation is keras.activations.linear
        and layer.data_format == "channels_last"
        and type(norm) is layers.BatchNormalization
        and norm.axis in (-1, 3)
    )
