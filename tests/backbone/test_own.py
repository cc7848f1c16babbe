"""Anybody's own network: what a `.keras` file is taken for, rebuilt as Keras has it, and everything that is refused."""

from __future__ import annotations

import json
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT, SPEC, environment
from keras import layers, ops
from keras.src.applications.efficientnet import EfficientNet

from pipeline.backbone import build, keras_archive, keras_objects, own
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.core.errors import IceboxError, SpecError, UsageError, WeightsError
from pipeline.core.spec import FeatureSpec

SIZE = 16
CONFIG, WEIGHTS = "config.json", "model.weights.h5"
Config = dict[str, Any]


def image(size: int | None = SIZE) -> Any:
    return keras.Input((size, size, 3))


def convolved(inputs: Any, filters: int = 4) -> Any:
    return layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same", activation="relu")(inputs))


def randomised(model: Any) -> Any:
    """Give every weight a value of its own, or two that were swapped would look the same."""
    random = np.random.default_rng(0)
    model.set_weights([random.uniform(0.1, 1, weight.shape) for weight in model.get_weights()])
    return model


def functional() -> Any:
    inputs = image()
    return randomised(keras.Model(inputs, convolved(convolved(inputs))))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(functional(), tmp_path_factory.mktemp("own") / "good.keras")


def saved(model: Any, path: Path) -> Path:
    model.save(path)
    return path


def loaded(path: Path) -> Any:
    """Return what Keras' own reader makes of a file."""
    return keras.models.load_model(path, compile=False)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, content: dict[str, bytes], packed: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def with_config(good: Path, path: Path, change: Callable[[Config], Any]) -> Path:
    content = members(good)
    config = json.loads(content[CONFIG])
    changed = change(config)
    content[CONFIG] = json.dumps(config if changed is None else changed).encode()
    return written(path, content)


def layer(config: Config, number: int = 1) -> Config:
    return config["config"]["layers"][number]


# Right ones: as Keras itself has them


def compare(path: Path, size: int = SIZE) -> Any:
    """Assert that the network computes what Keras' own reader makes of the file; return it."""
    network = own.read_network(path)
    model = build.build(network.name, input_size=size, network=path)
    build.load_weights(model, network.weights, path)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    expected: Any = loaded(path)(pixels, training=False)
    expected = expected[0] if isinstance(expected, list) else expected
    np.testing.assert_array_equal(model(pixels, training=False), expected)
    assert network.default_layer in [operation.name for operation in model.operations]
    assert own.identity_of(network.config) == network.name
    return model


def sequential() -> Any:
    first = [
        image(),
        layers.RandomFlip(),
        layers.Rescaling(1 / 255),
        layers.Normalization(mean=[1, 2, 3], variance=[1, 2, 3]),
    ]
    return keras.Sequential([*first, layers.Conv2D(4, 3), layers.Dropout(0.5), layers.GlobalAveragePooling2D()])


def built_later() -> Any:
    model = keras.Sequential([layers.Conv2D(4, 3), layers.TimeDistributed(layers.Dense(3))])
    model.build((None, SIZE, SIZE, 3))
    return model


def nested() -> Any:
    inner = keras.Model(inputs := keras.Input((SIZE, SIZE, 4)), convolved(inputs))
    return keras.Sequential([image(), layers.Conv2D(4, 1), inner, keras.Sequential([layers.Conv2D(2, 1)])])


def bare_operations() -> Any:
    inputs = image()
    features: Any = ops.relu6(convolved(inputs) * 0.5 + 1)
    return keras.Model([inputs], [ops.mean(ops.cast(features[:, 2:10, ..., 1:3], "float32"), axis=(1, 2))])


def shared() -> Any:
    convolution = layers.Conv2D(3, 3, padding="same", activation=ops.silu)
    return keras.Model(inputs := image(), convolution(convolution(inputs)))


def compiled() -> Any:
    model: Any = keras.Sequential([image(), layers.Conv2D(2, 3)])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.zeros((2, SIZE, SIZE, 3)), np.zeros((2, SIZE - 2, SIZE - 2, 2)), verbose=0)
    return model


@pytest.mark.parametrize("make", [functional, sequential, built_later, nested, bare_operations, shared, compiled])
def test_a_network_computes_what_keras_makes_of_the_file(tmp_path: Path, make: Callable[[], Any]) -> None:
    compare(saved(randomised(make()), tmp_path / "my.keras"))


# EfficientNetB0 is of the same blocks as the shallow one.
@pytest.mark.parametrize(
    ("builder", "options"),
    [
        ("MobileNetV2", {"alpha": 0.35, "pooling": "avg"}),
        ("EfficientNet", {"width_coefficient": 0.5, "depth_coefficient": 0.1, "default_size": 64}),
        pytest.param("EfficientNetB0", {}, marks=pytest.mark.long),
        pytest.param("MobileNetV3Small", {"minimalistic": False}, marks=pytest.mark.long),
    ],
)
def test_what_keras_applications_build_is_taken_as_a_file_too(tmp_path: Path, builder: str, options: Config) -> None:
    make: Any = EfficientNet if builder == "EfficientNet" else getattr(keras.applications, builder)
    compare(saved(make(include_top=False, weights=None, input_shape=(64, 64, 3), **options), tmp_path / "my.keras"), 64)


def test_layers_that_keras_applications_add_for_themselves_are_taken(tmp_path: Path) -> None:
    from keras.src.applications.convnext import LayerScale, StochasticDepth
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

    inputs = image()
    scaled = CustomScaleLayer(0.5)([inputs, StochasticDepth(0.1)(LayerScale(0.5, 3)(inputs))])
    compare(saved(keras.Model(inputs, scaled), tmp_path / "my.keras"))


def test_a_network_saved_in_mixed_precision_computes_in_the_precision_asked_for(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        path = saved(functional(), tmp_path / "mixed.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    plain = saved(functional(), tmp_path / "plain.keras")
    assert own.read_network(path).name == own.read_network(plain).name
    assert own.read_network(path).weights == own.read_network(plain).weights
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
    for precision, beside in (("float32", plain), ("bfloat16", path)):
        model = own.build(path, precision)
        own.load_weights(model, path)
        expected = loaded(beside)(pixels, training=False)
        assert model.output.dtype == expected.dtype == precision
        np.testing.assert_array_equal(ops.cast(model(pixels, training=False), "float32"), ops.cast(expected, "float32"))
    assert keras.config.dtype_policy().name == "float32"


def test_another_size_is_built_where_the_network_takes_it(tmp_path: Path) -> None:
    inner = keras.Model(inputs := keras.Input((SIZE, SIZE, 3)), layers.Conv2D(4, 3, strides=2)(inputs))
    path = saved(keras.Sequential([image(), layers.Rescaling(2.0), inner, layers.Conv2D(2, 1)]), tmp_path / "my.keras")
    model = own.build(path, input_size=24)
    own.load_weights(model, path)
    assert (model.input_shape, model.output_shape) == ((None, 24, 24, 3), (None, 11, 11, 2))
    fixed = saved(keras.Sequential([image(), layers.Flatten(), layers.Dense(2)]), tmp_path / "fixed.keras")
    with pytest.raises(
        WeightsError, match=r"of another network: they are 1,538 numbers, its architecture claims 3,458"
    ):
        own.build(fixed, input_size=24)


def test_a_network_of_any_size_needs_one_said(tmp_path: Path) -> None:
    inputs = image(None)
    path = saved(keras.Model(inputs, convolved(inputs)), tmp_path / "free.keras")
    assert own.read_network(path).input_size is None
    with pytest.raises(UsageError, match=r"free\.keras takes images of any size: say which by --input-size N"):
        own.build(path)
    compare(path, 10)


# Who a network is


def test_saving_the_same_network_again_leaves_it_the_same(tmp_path: Path, good: Path) -> None:
    first = own.read_network(good)
    model = loaded(good)
    model.compile("sgd", "mse")
    model.trainable = False
    again = own.read_network(saved(model, tmp_path / "another name.keras"))
    counted_on = own.read_network(saved(functional(), tmp_path / "counted.keras"))  # conv2d_17 and so on
    for other in (again, counted_on):
        assert (other.name, other.weights, other.default_layer) == (first.name, first.weights, "batch_normalization_1")


def test_a_network_that_icebox_rebuilt_is_the_same_when_it_is_saved(tmp_path: Path) -> None:
    for number, make in enumerate((functional, sequential, built_later, nested, bare_operations, shared)):
        network = own.read_network(saved(make(), tmp_path / f"{number}.keras"))
        again = own.read_network(saved(own.build_from(network.config), tmp_path / f"{number} again.keras"))
        assert again.name == network.name, make.__name__


def set_in_layer(**values: object) -> Callable[[Config], None]:
    return lambda config: layer(config)["config"].update(values)


def test_what_changes_the_computation_is_another_network(tmp_path: Path, good: Path) -> None:
    changes = [
        lambda config: None,
        set_in_layer(activation="gelu"),
        set_in_layer(strides=[2, 2]),
        set_in_layer(padding="valid"),
        set_in_layer(use_bias=False),
        set_in_layer(name="stem"),  # by which a layer is asked for
        lambda config: layer(config, 2)["config"].update(epsilon=0.1),
        lambda config: config["config"].update(output_layers=[layer(config, 3)["name"], 0, 0]),
        lambda config: layer(config, 0)["config"].update(batch_shape=[None, 24, 24, 3]),
    ]
    changes[5] = lambda config: json.loads(json.dumps(config).replace('"' + layer(config)["name"] + '"', '"stem"'))
    names = [own.read_network(with_config(good, tmp_path / "a.keras", change)).name for change in changes]
    assert len(set(names)) == len(names)
    kept = set_in_layer(kernel_regularizer=None, kernel_initializer="ones", trainable=False)
    assert own.read_network(with_config(good, tmp_path / "a.keras", kept)).name == names[0]


def test_each_number_and_its_place_decide_who_the_weights_are(tmp_path: Path, good: Path) -> None:
    model = loaded(good)
    found = {own.read_network(good).weights}
    kernel, bias, scale, *others = model.get_weights()
    for changed in ([kernel, bias, scale + 1e-6], [kernel, scale, bias], [kernel[:, ::-1], bias, scale]):
        model.set_weights([*changed, *others])
        found.add(own.read_network(saved(model, tmp_path / "a.keras")).weights)
    assert len(found) == 4


def test_a_stored_architecture_is_rebuilt_without_the_file_and_checked_again(good: Path) -> None:
    network = own.read_network(good)
    stored = json.loads(json.dumps(network.config))
    model = own.build_from(stored, "bfloat16", 24)
    assert (model.output_shape, model.output.dtype) == ((None, 24, 24, 4), "bfloat16")
    layer(stored)["class_name"] = "Lambda"
    with pytest.raises(SpecError, match="has 'Lambda', which is code"):
        own.build_from(stored)
    with pytest.raises(SpecError, match="has 'Lambda', which is code"):
        own.identity_of(stored)


def test_the_file_must_be_of_the_network_and_the_weights_meant(tmp_path: Path, good: Path) -> None:
    network = own.read_network(good)
    other = saved(keras.Sequential([image(), layers.Conv2D(2, 3)]), tmp_path / "other.keras")
    with pytest.raises(SpecError, match=r"other\.keras is the network own:\w+, expected own:\w+; give that file"):
        build.build(network.name, network=other)
    with pytest.raises(SpecError, match=r"own:\w+ is known by its hash alone; give its file"):
        build.build(network.name)
    model = build.build(network.name, network=good)
    with pytest.raises(WeightsError, match=r"holds the weights sha256:\w+, expected sha256:0+; give the file"):
        build.load_weights(model, f"sha256:{'0' * 64}", good)
    with pytest.raises(WeightsError, match=r"of another network: 2 variables of 56 numbers, expected 12 of 292"):
        own.load_weights(model, other)


def test_a_file_is_read_without_tensorflow(good: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pipeline.backbone import own; own.read_network(Path(sys.argv[1]));"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(good)], cwd=ROOT, env=environment(), check=True, timeout=300)


def test_the_lists_name_what_keras_has() -> None:
    import importlib
    import inspect

    from keras.src.ops.operation import Operation

    for name in keras_objects.LAYERS:
        assert getattr(layers, name).__name__ == name
    for module, names in {**keras_objects.OPERATIONS, **keras_objects.APPLICATION_LAYERS}.items():
        for name in names:
            found = getattr(importlib.import_module(module), name)
            assert issubclass(found, Operation)
            parameters = inspect.signature(found.__init__).parameters
            assert {"name", "kwargs"} & set(parameters), name
    for name in keras_objects.ACTIVATIONS:
        assert callable(getattr(keras.activations, name))
    for module in ("initializers", "regularizers", "constraints"):
        for name in getattr(keras_objects, module.upper()):
            assert isinstance(getattr(getattr(keras, module), name), type)


# The table of refused files: architectures


def replaced(number: int, **values: object) -> Callable[[Config], None]:
    return lambda config: layer(config, number).update(values)


LAMBDA = {"module": "keras.layers", "class_name": "Lambda", "config": {"function": {}}, "registered_name": None}
BARE_LAMBDA = {"class_name": "__lambda__", "config": {"value": ["4wA=", None, None]}}
CUSTOM = {"module": "antigravity", "class_name": "Evil", "config": {}, "registered_name": "my>Evil"}


def holding(key: str, value: object) -> Callable[[Config], None]:
    return set_in_layer(**{key: value})


def in_inner_model(config: Config) -> None:
    inner = {
        "layers": [{**LAMBDA, "name": "x", "inbound_nodes": []}],
        "name": "m",
        "input_layers": [],
        "output_layers": [],
    }
    layer(config).update(module="keras.src.models.functional", class_name="Functional", config=inner)


def in_wrapper(config: Config) -> None:
    layer(config).update(class_name="TimeDistributed", config={"name": layer(config)["name"], "layer": LAMBDA})


def deep(config: Config) -> None:
    value: Any = 1
    for _ in range(150):
        value = [value]
    layer(config)["config"]["kernel_size"] = value


def many_calls(config: Config) -> None:
    layer(config)["inbound_nodes"] *= 20_000


def twice(side: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config["config"][side] = [config["config"][side], [layer(config, 2)["name"], 0, 0]]

    return change


def shape(*sides: int | None, batch: int | None = None) -> Callable[[Config], None]:
    return lambda config: layer(config, 0)["config"].update(batch_shape=[batch, *sides])


ARCHITECTURES = {
    "custom class": (
        replaced(1, **{**CUSTOM, "registered_name": None}),
        "has 'Evil' of 'antigravity', which is not one of",
    ),
    "registered custom class": (
        replaced(1, **CUSTOM),
        "has 'my>Evil' of 'antigravity', which is not one of Keras' own",
    ),
    "custom class in Keras' clothes": (
        replaced(1, registered_name="my>Conv2D"),
        "has 'my>Conv2D', which is not one of Keras' own that are read; use layers of Keras alone",
    ),
    "class of a module of Keras": (replaced(1, module="keras.src.utils.file_utils"), "has 'Conv2D', which is not one"),
    "subclassed model": (
        lambda config: config.update(module="my", class_name="Mine", registered_name="my>Mine", config={}),
        "has 'my>Mine' of 'my', which is not one of Keras' own",
    ),
    "Lambda": (
        replaced(1, **LAMBDA),
        "has 'Lambda', which is code; use layers of Keras alone, and save the model anew",
    ),
    "Lambda in an inner model": (in_inner_model, "has 'Lambda', which is code"),
    "Lambda in a wrapper": (in_wrapper, "has 'Lambda', which is code"),
    "Lambda as activation": (holding("activation", LAMBDA), "has 'Lambda', which is code"),
    "lambda as activation": (holding("activation", BARE_LAMBDA), "has '__lambda__', which is code"),
    "custom activation": (holding("activation", "evil"), "has the activation 'evil' at 'conv2d"),
    "function as activation": (
        holding(
            "activation", {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
        ),
        "has 'function' of 'os', which is not one of Keras' own",
    ),
    "lambda as initializer": (holding("kernel_initializer", BARE_LAMBDA), "has '__lambda__', which is code"),
    "custom initializer": (holding("kernel_initializer", CUSTOM), "has 'my>Evil' of 'antigravity'"),
    "custom regularizer": (holding("kernel_regularizer", CUSTOM), "has 'my>Evil' of 'antigravity'"),
    "lambda as argument of a call": (
        lambda config: layer(config)["inbound_nodes"][0]["kwargs"].update(x=BARE_LAMBDA),
        "has '__lambda__', which is code",
    ),
    "TFSMLayer": (replaced(1, class_name="TFSMLayer"), "has 'TFSMLayer', which loads a SavedModel"),
    "TorchModuleWrapper": (replaced(1, class_name="TorchModuleWrapper"), "which is code of PyTorch"),
    "StringLookup": (replaced(1, class_name="StringLookup"), "has 'StringLookup', which reads files"),
    "TextVectorization": (replaced(1, class_name="TextVectorization"), "has 'TextVectorization', which reads files"),
    "operation that calls a function": (
        replaced(1, module="keras.src.ops.core", class_name="Map"),
        "has 'Map', which is not one of Keras' own that are read",
    ),
    "array of objects": (
        holding("kernel_size", {"class_name": "__numpy__", "config": {"value": [3], "dtype": "object"}}),
        "has an array of 'object' at 'conv2d",
    ),
    "quantized": (holding("quantization_config", {"mode": "int8"}), "has the quantized or LoRA layer 'conv2d"),
    "int8 policy": (holding("dtype", "int8_from_float32"), "has the dtype policy 'int8_from_float32' at 'conv2d"),
    "several inputs": (twice("input_layers"), "has 2 inputs ('input_layer"),
    "several outputs": (twice("output_layers"), "has 2 outputs ('batch_normalization"),
    "no layer's name": (lambda config: config["config"].update(output_layers="x"), "names 'x' as an input or output"),
    "no such layer": (
        lambda config: config["config"].update(output_layers=["x", 0, 0]),
        "refers to a layer 'x' that it",
    ),
    "layer in two models": (
        replaced(1, shared_object_id=7),
        "in two models at once; give each of them layers of its own",
    ),
    "format of Keras 2": (replaced(1, inbound_nodes=[[["input_layer", 0, 0, {}]]]), "is in the format of Keras 2"),
    "grey input": (shape(SIZE, SIZE, 1), "takes (16, 16, 1), expected RGB images (height, width, 3)"),
    "channels first": (shape(3, SIZE, SIZE), "takes (3, 16, 16), expected RGB images (height, width, 3)"),
    "texts as sides": (
        lambda config: layer(config, 0)["config"].update(batch_shape=["\n", 1, "\x1b\n", 3]),
        r"batches of '\n' images",
    ),
    "vector input": (shape(3), "takes (3), expected RGB images (height, width, 3)"),
    "non-square input": (shape(SIZE, 24, 3), "takes images of (16, 24, 3), expected square ones; save it for (None,"),
    "absurd input": (shape(10**9, 10**9, 3), "expected sides of 1 to 4096 pixels"),
    "fixed batch": (shape(SIZE, SIZE, 3, batch=8), "takes batches of 8 images only"),
    "uint8 input": (
        lambda config: layer(config, 0)["config"].update(dtype="uint8"),
        "takes uint8, expected float pixels",
    ),
    "too deep": (deep, "its architecture is nested deeper than any network's"),
    "too many calls": (many_calls, "it calls more than 20,000 layers"),
    "no model": (lambda config: [1, 2], "has '[1, 2]', which is not one of Keras' own"),
    "no layers": (
        lambda config: config["config"].pop("layers") and None,
        "is a subclass of keras.Model, which is code",
    ),
    "not as Keras writes it": (replaced(1, inbound_nodes=[{}]), "is not as Keras 3 writes it (KeyError: 'args')"),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_architecture_of_other_than_plain_layers_is_refused(tmp_path: Path, good: Path, case: str) -> None:
    change, message = ARCHITECTURES[case]
    assert_refused(with_config(good, tmp_path / "bad.keras", change), message)


def assert_refused(path: Path, message: str, kind: type[IceboxError] = SpecError) -> None:
    with pytest.raises(kind) as refused:
        own.read_network(path)
    text = str(refused.value)
    assert message in text, text
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 500
    assert "antigravity" not in sys.modules


# Those that Keras must have built


def model_of(body: Callable[[Any], Any]) -> Any:
    inputs = image()
    return keras.Model(inputs, body(inputs))


BUILT = {
    "rank 3": (
        lambda: keras.Sequential([image(), layers.Reshape((256, 3))]),
        "has an output of (256, 3), expected a feature",
    ),
    "one row": (lambda: keras.Sequential([image(), layers.Reshape((1, 256, 3, 1))]), "has an output of (1, 256, 3, 1)"),
    "unknown size": (
        lambda: model_of(lambda x: ops.reshape(x, (1, -1, SIZE, 3))),
        "expected one of known size: (h, w, c) or (c,)",
    ),
    "several rows an image": (lambda: model_of(lambda x: ops.reshape(x, (-1, 3))), "gives 512 rows for 2 images"),
    "nothing but its input": (lambda: model_of(lambda x: x), "its output is its input"),
    "sizes that do not fit": (lambda: keras.Sequential([image(), layers.Reshape((768,))]), "Keras cannot build"),
}


@pytest.mark.parametrize("case", BUILT)
def test_an_output_that_is_no_row_of_an_image_is_refused_when_it_is_built(tmp_path: Path, case: str) -> None:
    make, message = BUILT[case]
    path = saved(make(), tmp_path / "bad.keras")
    with pytest.raises(SpecError) as refused:
        own.build(path, input_size=24 if "fit" in case else SIZE)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


MIXING: dict[str, Callable[[Any], Any]] = {
    "all": lambda x: x - ops.mean(x, axis=0, keepdims=True),
    "those before it": lambda x: ops.cumsum(x, axis=0),
    "those behind it": lambda x: ops.flip(ops.cumsum(ops.flip(x, axis=0), axis=0), axis=0),
    "one elsewhere": lambda x: ops.roll(x, 2, axis=0),
}


@pytest.mark.parametrize("mixed", MIXING)
def test_a_network_that_mixes_images_is_refused(tmp_path: Path, mixed: str) -> None:
    mixing = model_of(lambda x: layers.Conv2D(4, 3)(MIXING[mixed](x)))
    for model, refused in ((mixing, True), (functional(), False)):
        path = saved(model, tmp_path / "any.keras")
        network = own.read_network(path)
        spec = FeatureSpec.from_dict({
            **SPEC.to_dict(), "backbone": network.name, "weights": network.weights, "input_size": SIZE,
            "layer": network.default_layer,
        })  # fmt: skip
        with pytest.raises(SpecError, match="mixes images with one another") if refused else nullcontext():
            FrozenBackbone(spec, path, 2, network=path)


CLAIMS = {
    "terabytes of weights": (1, {"filters": 10**10}, WeightsError, "of another network: they are 292 numbers"),
    "more than can be counted": (1, {"filters": 10**400}, IceboxError, "architecture"),
    "terabytes on the way": (
        1,
        {"strides": [1, 1], "padding": "valid", "dilation_rate": [1, 1], "kernel_size": [10**9, 1]},
        IceboxError,
        "",
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_absurd_claims_are_refused_before_memory_is_taken(tmp_path: Path, good: Path, case: str) -> None:
    number, values, kind, message = CLAIMS[case]
    path = with_config(good, tmp_path / "bad.keras", lambda config: layer(config, number)["config"].update(values))
    with pytest.raises(kind) as refused:
        own.build(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert own.build(good).built  # what was refused is not in the way of the next


def test_an_output_on_the_way_that_no_memory_takes_is_refused(tmp_path: Path) -> None:
    inputs = image()
    path = saved(
        keras.Model(inputs, layers.AveragePooling2D(2)(layers.UpSampling2D(2)(inputs))), tmp_path / "good.keras"
    )
    bad = with_config(path, tmp_path / "bad.keras", set_in_layer(size=[100_000, 100_000]))
    with pytest.raises(
        SpecError, match=r"has an output of \(1600000, 1600000, 3\) at 'up_sampling2d', too large for one"
    ):
        own.build(bad)


def test_an_output_in_a_nested_model_that_no_memory_takes_is_refused(tmp_path: Path) -> None:
    any_size = keras.Input((None, None, 3))
    inner = keras.Model(any_size, layers.GlobalAveragePooling2D()(layers.UpSampling2D(2)(any_size)))
    path = saved(model_of(inner), tmp_path / "good.keras")

    def enlarge(config: dict[str, Any]) -> None:
        layer(layer(config, 1), 1)["config"]["size"] = [100_000, 100_000]

    with pytest.raises(SpecError, match=r"has an output of \(1600000, 1600000, 3\) at '.*', too large for one"):
        own.build(with_config(path, tmp_path / "bad.keras", enlarge))


def test_why_a_layer_cannot_be_built_is_said(tmp_path: Path, good: Path) -> None:
    bad = with_config(good, tmp_path / "bad.keras", lambda config: layer(config, 1)["config"].update(padding="weird"))
    with pytest.raises(SpecError, match="padding"):
        own.build(bad)


def test_a_stored_architecture_may_not_claim_more_than_any_network_has(good: Path) -> None:
    stored = own.read_network(good).config
    layer(stored)["config"]["filters"] = 10**9
    with pytest.raises(SpecError, match=r"the architecture claims [0-9,]+ weights, more than 536,870,912"):
        own.build_from(stored)


# Archives


def test_a_file_torn_anywhere_is_refused(tmp_path: Path, good: Path) -> None:
    data, torn = good.read_bytes(), tmp_path / "torn.keras"
    for share in range(5, 100, 5):
        torn.write_bytes(data[: len(data) * share // 100])
        assert_refused(torn, "is torn, or something follows after the archive; copy it again, or save the model anew")


def flagged(path: Path, at: int, mark: bytes, value: int) -> Path:
    """Set a 16-bit field of the first entry of an archive that begins with `mark`."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(mark) + at, value)
    path.write_bytes(data)
    return path


def linked(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if name == CONFIG else 0
            archive.writestr(info, data)
    return path


def doubled(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for name, data in [*content.items(), (CONFIG, b"{}")]:
            archive.writestr(name, data)
    return path


def bomb(path: Path, content: dict[str, bytes]) -> Path:
    return written(path, {**content, CONFIG: b" " * 2**22}, zipfile.ZIP_DEFLATED)


def encrypted(path: Path, content: dict[str, bytes]) -> Path:
    return flagged(written(path, content), 8, b"PK\x01\x02", 0x1)


def but(name: str, data: bytes) -> Callable[[Path, dict[str, bytes]], Path]:
    return lambda path, content: written(path, {**content, name: data})


def without(name: str) -> Callable[[Path, dict[str, bytes]], Path]:
    return lambda path, content: written(path, {n: data for n, data in content.items() if n != name})


def adding(name: str) -> Callable[[Path, dict[str, bytes]], Path]:
    return lambda path, content: written(path, {**content, name: b"x"})


def appended(path: Path, content: dict[str, bytes]) -> Path:
    written(path, content)
    path.write_bytes(path.read_bytes() + b"junk")
    return path


def crossed(path: Path, content: dict[str, bytes]) -> Path:
    data = bytearray(written(path, content).read_bytes())
    data[data.index(b'"Functional"') + 1] ^= 1
    path.write_bytes(data)
    return path


ARCHIVES = {
    "name above": (adding("../evil"), "holds '../evil' with a name that leaves the archive"),
    "absolute name": (adding("/etc/evil"), "holds '/etc/evil' with a name that leaves the archive"),
    "drive": (adding("C:evil"), "holds 'C:evil' with a name that leaves the archive"),
    "other member": (adding("evil.py"), "holds 'evil.py' besides the architecture and its weights"),
    "assets": (
        adding("assets/vocabulary.txt"),
        "holds 'assets/vocabulary.txt' (files that a layer such as StringLookup",
    ),
    "duplicate": (doubled, "holds 'config.json' twice"),
    "link": (linked, "holds 'config.json' as a link or another special file"),
    "encrypted": (encrypted, "encrypted, which Keras does not write; save the model anew with Keras 3"),
    "bomb": (bomb, "holds 'config.json' of 4,194,304 bytes unpacked"),
    "no config": (without(CONFIG), "lacks config.json (found: "),
    "no weights": (without(WEIGHTS), "lacks model.weights.h5 (found: "),
    "junk behind": (appended, "is torn, or something follows after the archive"),
    "a bit flipped": (crossed, "is a damaged .keras file (Bad CRC-32 for file 'config.json')"),
    "config is text": (but(CONFIG, b"hello"), "its config.json is not JSON (Expecting value"),
    "config is deep": (but(CONFIG, b"[" * 10**5), "its architecture is nested deeper than any network's"),
    "config is huge": (but(CONFIG, b" " * (2**23 + 1)), "holds 'config.json' of 8,388,609 bytes unpacked"),
    "config has NaN": (but(CONFIG, b'{"a": NaN}'), "its config.json is not JSON (NaN is not JSON)"),
    "Keras 2": (but("metadata.json", b'{"keras_version": "2.15.0"}'), "was saved by Keras '2.15.0', expected Keras 3"),
    "no version": (but("metadata.json", b"[]"), "its metadata.json does not name a version of Keras"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_keras_did_not_write_so_is_refused(tmp_path: Path, good: Path, case: str) -> None:
    write, message = ARCHIVES[case]
    assert_refused(write(tmp_path / "bad.keras", members(good)), message)


def hdf5(path: Path) -> None:
    h5py.File(path, "w").close()


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read (No such file or directory); expected a .keras file"),
    "empty": (lambda path: path.touch(), "is empty; save the model anew with Keras 3: model.save('name.keras')"),
    "text": (lambda path: path.write_text("hello"), "is not a .keras file; save the model anew"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({})),
        "is a Python pickle, which may hold code; it is not opened",
    ),
    "HDF5": (hdf5, "is an HDF5 file: weights alone, or a model in the format before .keras"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a .keras file"),
    "SavedModel": (lambda path: (path.mkdir(), (path / "saved_model.pb").touch()), "is a SavedModel folder"),
    "other archive": (lambda path: written(path, {"a.txt": b"a"}), "holds 'a.txt' besides the architecture"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, case: str) -> None:
    make, message = OTHERS[case]
    make(tmp_path / "bad.keras")
    assert_refused(tmp_path / "bad.keras", message)


# Weights


def with_weights(good: Path, path: Path, change: Callable[[h5py.File], Any]) -> Path:
    content = members(good)
    plain = path.parent / "changed.h5"
    plain.write_bytes(content[WEIGHTS])
    with h5py.File(plain, "r+") as file:
        change(file)
    content[WEIGHTS] = plain.read_bytes()
    return written(path, content)


def external(file: h5py.File) -> None:
    file["layers/evil"] = h5py.ExternalLink("/etc/passwd", "/")


def stored_outside(file: h5py.File) -> None:
    file.create_dataset("layers/evil", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def claiming(file: h5py.File) -> None:
    file.create_dataset("layers/evil", (2**27,), "f4", chunks=(2**20,))


def texts(file: h5py.File) -> None:
    file["layers/evil"] = ["text"]


READ = {
    "link to another file": (external, "links 'layers/evil' to elsewhere, which weights do not"),
    "numbers in another file": (stored_outside, "keeps '/layers/evil' in other files, which weights do not"),
    "claims": (claiming, "claims 536,"),
    "texts": (texts, "has object at '/layers/evil', which weights do not"),
}


@pytest.mark.parametrize("case", READ)
def test_weights_that_are_not_plain_numbers_in_the_file_are_refused(tmp_path: Path, good: Path, case: str) -> None:
    change, message = READ[case]
    assert_refused(with_weights(good, tmp_path / "bad.keras", change), message, WeightsError)


def test_weights_that_are_no_hdf5_are_refused(tmp_path: Path, good: Path) -> None:
    path = but(WEIGHTS, pickle.dumps({}))(tmp_path / "bad.keras", members(good))
    assert_refused(path, "model.weights.h5 in ", WeightsError)
    assert_refused(path, "is a Python pickle, which may hold code", WeightsError)


def drop_layer(file: h5py.File) -> None:
    del file["layers/conv2d_1"]


def add_layer(file: h5py.File) -> None:
    file["layers/conv2d_2/vars/0"] = np.zeros(3, np.float32)


def swap_shape(file: h5py.File) -> None:
    values = np.asarray(file["layers/conv2d/vars/0"])
    del file["layers/conv2d/vars/0"]
    file["layers/conv2d/vars/0"] = values.transpose(3, 0, 1, 2)


def rename_layer(file: h5py.File) -> None:
    file.move("layers/conv2d_1", "layers/conv2d_7")


LOADED = {
    "lacking": (drop_layer, "of another network: 10 variables of 144 numbers, expected 12 of 292"),
    "foreign": (add_layer, "of another network: 13 variables of 295 numbers, expected 12 of 292"),
    "other shape": (swap_shape, "do not fit its architecture: "),
    "other name": (rename_layer, "do not fit its architecture: "),
}


@pytest.mark.parametrize("case", LOADED)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, good: Path, case: str) -> None:
    change, message = LOADED[case]
    path = with_weights(good, tmp_path / "bad.keras", change)
    model = own.build_from(own.architecture(path))
    with pytest.raises(WeightsError) as refused:
        own.load_weights(model, path)
    assert message in str(refused.value), str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_file_is_is_told_by_its_content(tmp_path: Path, good: Path) -> None:
    assert keras_archive.is_archive(good)
    (tmp_path / "a.keras").write_text("hello")
    assert not keras_archive.is_archive(tmp_path / "a.keras")
