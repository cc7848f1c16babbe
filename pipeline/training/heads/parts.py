"""Provide a large dense layer for training on a CPU, with its weights split into parts.

A `flatten` head has 33 million weights. In each step, the weights, their gradient and both moments of Adam pass
through memory, and memory bandwidth limits the speed. With parts, the gradient of a part is still in the processor's
cache when the optimizer uses it, and one core updates a part while another core multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core import machine

_PART = 2**20  # weights in a part: 4 MiB


def dense_in_parts() -> Callable[..., Any]:
    """Return a layer class that computes as `keras.layers.Dense`; `whole()` returns its weights in that layer's layout.

    If the processor can multiply bfloat16, the gradient of the weights is computed in bfloat16, rounded to 8 bits.
    That error is far below the sampling noise of a batch of 64. Outputs, weights and optimizer state are float32.
    """
    keras = import_keras()
    import tensorflow as tf

    in_bfloat16 = machine.best_precision() == "bfloat16"
    product = _product(in_bfloat16)

    class DenseInParts(keras.layers.Layer):
        gradients_in_bfloat16 = in_bfloat16

        def __init__(self, units: int, *, activation: str, kernel_initializer: Any, name: str) -> None:
            super().__init__(name=name)
            self.units = units
            self.activation = keras.activations.get(activation)
            self.kernel_initializer = kernel_initializer

        def build(self, input_shape: tuple[int, ...]) -> None:
            whole = keras.ops.convert_to_numpy(self.kernel_initializer((input_shape[-1], self.units)))
            self.parts = [
                self.add_weight(shape=part.shape, initializer=_given(part), name=f"kernel_{i}")
                for i, part in enumerate(np.array_split(whole, -(-whole.size // _PART)))
            ]
            self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

        def call(self, inputs: Any) -> Any:
            some = tf.split(inputs, [part.shape[0] for part in self.parts], axis=1)
            weights = [tf.convert_to_tensor(part) for part in self.parts]
            products: list[Any] = [product(*each) for each in zip(some, weights, strict=True)]
            output = tf.add_n(products)
            return self.activation(tf.nn.bias_add(output, tf.convert_to_tensor(self.bias)))

        def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
            return *input_shape[:-1], self.units

        def whole(self) -> list[np.ndarray]:
            return [np.concatenate([part.numpy() for part in self.parts]), self.bias.numpy()]

    return DenseInParts


def _product(in_bfloat16: bool) -> Callable[[Any, Any], Any]:
    """Return a function that multiplies inputs (n, i) and weights (i, o).

    With `in_bfloat16`, the gradient of the weights is computed in bfloat16.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def product(inputs: Any, weights: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        def backward(upstream: Any) -> tuple[Any, Any]:
            both = [tf.cast(each, tf.bfloat16) if in_bfloat16 else each for each in (inputs, upstream)]
            gradient = tf.cast(tf.matmul(*both, transpose_a=True), weights.dtype)
            return tf.matmul(upstream, weights, transpose_b=True), gradient

        return tf.matmul(inputs, weights), backward

    return product


def _given(numbers: np.ndarray) -> Callable[..., np.ndarray]:
    """Return an initializer that returns `numbers`."""
    return lambda shape, dtype: numbers


def gradients_in_bfloat16(model: KerasModel) -> bool:
    """Return whether a layer of `model` computes its gradient in bfloat16."""
    return any(getattr(layer, "gradients_in_bfloat16", False) for layer in model.layers)
