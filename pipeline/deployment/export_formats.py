"""Define the export formats (`FORMATS`): how each is written, and how it is loaded in its own runtime."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone.fold_batch_norm import is_depthwise
from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core import machine
from pipeline.core.native_stderr import hold_back
from pipeline.training.full_model import BatchPredictor

CLASSES = "classes.json"  # file of the class names, inside an exported model and beside it


@dataclass(frozen=True)
class Format:
    """An export format. `write(model, path, classes)` also stores the class names in the file.

    `file` is the name of the model's file or folder. `load(path)` returns a function from pixels to probabilities.
    """

    name: str
    file: str
    write: Callable[[KerasModel, Path, Sequence[str]], None]
    load: Callable[[Path], BatchPredictor]
    packages: tuple[str, ...]
    named: bool = True  # whether outputs have names

    def require(self) -> None:
        """Raise UsageError unless the format's packages are installed."""
        machine.require_packages(f"--format {self.name}", self.packages, self.name)


def _write_keras(model: KerasModel, path: Path, classes: Sequence[str]) -> None:
    model.save(path)
    _add_to_zip(path, classes)


def _load_keras(path: Path) -> BatchPredictor:
    model = import_keras().models.load_model(path, compile=False)
    return lambda pixels: np.asarray(model.predict_on_batch(pixels), np.float32)


def _add_to_zip(path: Path, classes: Sequence[str]) -> None:
    with zipfile.ZipFile(path, "a") as archive:  # for another kind of file, a zip archive is appended
        archive.writestr(CLASSES, json.dumps(classes))


def _write_savedmodel(model: KerasModel, path: Path, classes: Sequence[str]) -> None:
    """Write the same SavedModel as Keras' own export, but store each weight only once."""
    import tensorflow as tf

    shape = (None, *model.input_shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="pixels")])
    def serve(pixels: Any) -> Any:
        return model(pixels, training=False)

    module: Any = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    module.serve = serve
    tf.saved_model.save(module, str(path), signatures={"serving_default": serve})
    extra = path / "assets.extra"  # TensorFlow's folder for extra files of a model
    extra.mkdir(exist_ok=True)
    (extra / CLASSES).write_text(json.dumps(classes))


def _load_savedmodel(path: Path) -> BatchPredictor:
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    return lambda pixels: serve(pixels=tf.constant(pixels))["probabilities"].numpy()


def _write_onnx(model: KerasModel, path: Path, classes: Sequence[str]) -> None:
    import onnx
    from tf2onnx.handler import tf_op

    tf_op("Erfc").register_compat_handler(_convert_erfc, 9)  # ONNX has Erf since opset 9
    model = _without_xla(model)
    for layer in model._flatten_layers():
        if isinstance(layer, import_keras().layers.Normalization):  # arrays become constants of the graph
            layer.mean, layer.variance = np.asarray(layer.mean), np.asarray(layer.variance)
    model(np.zeros((1, *model.input_shape[1:]), np.uint8))  # Keras exports only a model that was called before
    with _quietly():
        model.export(path, format="onnx", verbose=False)
    made = onnx.load(path)
    onnx.helper.set_model_props(made, {"classes": json.dumps(classes)})
    onnx.save(made, path)


def _convert_erfc(graph: Any, node: Any, **_: Any) -> None:
    """Convert TensorFlow's Erfc to ONNX as 1 - Erf: the exact GELU uses Erfc, and tf2onnx 1.17 does not support it."""
    one = graph.make_const(f"{node.name}/one", np.ones((), np.float32)).output[0]
    node.type = "Erf"
    graph.insert_new_node_on_output("Sub", node.output[0], f"{node.name}/sub", [one, node.output[0]])


def _without_xla(model: KerasModel) -> KerasModel:
    """Return the model with each grouped convolution replaced by a depthwise one, or by one convolution per group.

    On a CPU, Keras computes grouped convolutions by XLA calls, which tf2onnx 1.17 does not convert.
    """
    keras = import_keras()
    ops = keras.ops

    class Ungrouped(keras.layers.Layer):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def call(self, inputs: Any) -> Any:
            layer = self.layer
            how = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate}
            if is_depthwise(layer):
                kernel = ops.reshape(layer.kernel, (*layer.kernel_size, layer.groups, -1))
                output = ops.depthwise_conv(inputs, kernel, **how)
            else:
                parts = zip(*(ops.split(each, layer.groups, axis=-1) for each in (inputs, layer.kernel)), strict=True)
                output = ops.concatenate([ops.conv(*part, **how) for part in parts], axis=-1)
            return layer.activation(output if layer.bias is None else output + layer.bias)

    def is_grouped(layer: Any) -> bool:
        return type(layer) is keras.layers.Conv2D and layer.groups > 1

    if not any(is_grouped(layer) for layer in model._flatten_layers()):
        return model
    return keras.models.clone_model(
        model, clone_function=lambda layer: Ungrouped(layer) if is_grouped(layer) else layer, recursive=True
    )


def _load_onnx(path: Path) -> BatchPredictor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = machine.usable_cores()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(["probabilities"], {"pixels": pixels})[0])


def _write_litert(model: KerasModel, path: Path, classes: Sequence[str]) -> None:
    with _quietly():
        model.export(path, format="litert", verbose=False)
    _add_to_zip(path, classes)  # like TensorFlow Lite's metadata: the interpreter ignores an appended archive


def _load_litert(path: Path) -> BatchPredictor:
    from ai_edge_litert.interpreter import Interpreter

    with hold_back("LiteRT"):
        interpreter = Interpreter(str(path), num_threads=machine.usable_cores())
        interpreter.allocate_tensors()
        signature = interpreter.get_signature_runner("serving_default")
    return lambda pixels: signature(pixels=pixels)["probabilities"]


def _write_openvino(model: KerasModel, path: Path, classes: Sequence[str]) -> None:
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _write_savedmodel(model, Path(folder), classes)
        # `openvino.convert_model` is avoided, because it sends usage reports over the network.
        made = openvino.Core().read_model(folder)
        made.set_rt_info(json.dumps(classes), ["classes"])
        openvino.save_model(made, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> BatchPredictor:
    import openvino

    # By default OpenVINO computes in bfloat16 on CPUs that support it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": machine.usable_cores()}
    model = openvino.compile_model(path, "CPU", settings)
    return lambda pixels: np.asarray(model(pixels)[0])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide the output and the warnings of converters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


FORMATS = {
    form.name: form
    for form in (
        Format("keras", "model.keras", _write_keras, _load_keras, ("keras", "tensorflow"), named=False),
        Format("savedmodel", "saved_model", _write_savedmodel, _load_savedmodel, ("tensorflow",)),
        Format("onnx", "model.onnx", _write_onnx, _load_onnx, ("onnx", "onnxruntime", "tf2onnx")),
        Format("litert", "model.tflite", _write_litert, _load_litert, ("ai-edge-litert",)),
        Format("openvino", "model.xml", _write_openvino, _load_openvino, ("openvino",)),
    )
}
