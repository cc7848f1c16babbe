"""Check the architecture that Keras saved as JSON against lists of allowed objects, and normalise it.

`check` returns the normalised form, which networks are rebuilt from. Its hash is the network's identity, so two
architectures that compute different outputs never have the same identity. Everything that does not change the output is
left out:

- the model's name, `trainable`, compilation, initializers, regularizers and constraints;
- the shapes that Keras stores for building, and the module of a class inside Keras;
- dtype policies, because Icebox sets its own.

The numbers in the layer names that Keras generates are counted again from the start. A Sequential model is written as a
Functional model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.backbone.keras_names import TENSOR, new_names, renamed_ends, renamed_layers, tensor
from pipeline.backbone.keras_objects import (
    ACTIVATIONS,
    APPLICATION_LAYERS,
    LATER_DEFAULTS,
    MODELS,
    OPERATIONS,
    OWN_ONLY,
    module_of,
    require_known,
    require_known_or_none,
    require_policy,
)
from pipeline.core.errors import SpecError
from pipeline.core.spec import OWN, canonical_json

Config = dict[str, Any]

_NAME = "own_network"
_DEEPEST = 100  # levels of nested lists and dicts; a nested model takes eight
_MOST_CALLS = 20_000  # layer calls; those of a nested model count once for each of its calls; NASNetLarge has 1,041
_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|b?float(16|32|64)|bfloat16")
_FLOATS = ("float32", "float16", "bfloat16")
_ARRAY = "__numpy__"
_ONLY_TRAINING = ("_regularizer", "_constraint")


def parse(text: bytes) -> Config:
    """Return the checked and normalised form of the bytes of a config.json.

    Raises
    ------
    SpecError
        If `text` is not JSON, or `check` refuses it.
    """
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise SpecError("its architecture is nested deeper than any network's") from error
    except ValueError as error:
        raise SpecError(f"its config.json is not JSON ({str(error)[:100]})") from error
    return check(value)


def check(value: Any) -> Config:
    """Return the normalised form of an architecture read from JSON, from which a `keras.Model` can be rebuilt.

    A value that `check` returned is returned unchanged.

    Raises
    ------
    SpecError
        If the architecture contains anything but Keras' own objects that only compute. Also if it does not have one RGB
        image as input and one output. The message is one line to put after the file's name: the finding and the remedy.
    """
    _require_shallow(value)
    try:
        config = _model(value, top=True)
        if _calls(config) > _MOST_CALLS:
            raise SpecError(f"it calls more than {_MOST_CALLS:,} layers")
        _input_side(config)
        return json.loads(canonical_json(config))
    except SpecError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise SpecError(f"its architecture is not as Keras 3 writes it ({reason})") from error


def identity(config: Config) -> str:
    """Return "own:" and the sha256 of the canonical JSON of a checked architecture."""
    return f"{OWN}{hashlib.sha256(canonical_json(config).encode()).hexdigest()}"


def input_size(config: Config) -> int | None:
    """Return the side in pixels of the images that a checked architecture was saved for; None for any size."""
    return _input_side(config)


def output_layer(config: Config) -> str:
    """Return the name of the layer or operation that gives the output of a checked architecture."""
    return config["config"]["output_layers"][0]


def at_size(config: Config, size: int) -> Config:
    """Return a copy of a checked architecture for images of `size` by `size` pixels.

    Nested models that were built for the saved size are changed to `size` too; other nested models then take any size.
    """
    before = input_size(config)
    changed = json.loads(canonical_json(config))
    if before != size:
        for layer in _input_layers(changed):
            shape = layer["config"]["batch_shape"]
            if len(shape) == 4:
                shape[1:3] = [size, size] if shape[1:3] == [before, before] else [None, None]
        _input_layer(changed)["config"]["batch_shape"][1:3] = [size, size]
    return changed


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise SpecError("its architecture is nested deeper than any network's")


# Models, and the calls in them.


def _model(value: Any, *, top: bool = False) -> Config:
    kind = require_known(value, "model")
    inner = value["config"]
    if kind == "Sequential" and not top:
        layers = renamed_layers([_layer(each) for each in inner["layers"]], {})
        return _object("keras", "Sequential", {"layers": layers, "name": inner["name"]})
    if kind == "Sequential":
        inner = _as_functional(inner)
    elif "layers" not in inner:
        raise SpecError("is a subclass of keras.Model, which is code; only Functional and Sequential models are read")
    layers = [_called_layer(each) for each in inner["layers"]]
    ends = {"input_layers": inner["input_layers"], "output_layers": inner["output_layers"]}
    if top:
        ends = {side: _only_one(side.removesuffix("_layers"), refs) for side, refs in ends.items()}
    names = new_names([(each["class_name"], each["name"]) for each in layers])
    ends = {side: renamed_ends(refs, names) for side, refs in ends.items()}
    config = {"layers": renamed_layers(layers, names), "name": _NAME if top else inner["name"], **ends}
    return _object("keras.src.models.functional", "Functional", config)


def _as_functional(inner: Config) -> Config:
    """Return the config of the Functional model that is equal to a Sequential model with the config `inner`."""
    layers, shape = list(inner["layers"]), inner.get("build_input_shape")
    if not layers or layers[0]["class_name"] != "InputLayer":
        if not shape:
            raise SpecError("has never been built, so the size of its input is not known; call it once, save it anew")
        config = {"batch_shape": shape, "dtype": "float32", "name": "input_layer"}
        layers.insert(0, _object("keras.layers", "InputLayer", config))
    called, before = [], None
    for layer in layers:
        nodes = [{"args": [tensor([before, 0, 0])], "kwargs": {}}] if before else []
        before = layer["config"]["name"]
        called.append({**layer, "name": before, "inbound_nodes": nodes})
    last = int(layers[-1]["class_name"] in ("Functional", "Model"))  # Keras counts calls of these classes from 1 here
    first = layers[0]["config"]["name"]
    return {"layers": called, "input_layers": [first, 0, 0], "output_layers": [before, last, 0]}


def _called_layer(value: Any) -> Config:
    layer = _layer(value)
    if not isinstance(value["inbound_nodes"], list) or not all(type(node) is dict for node in value["inbound_nodes"]):
        raise SpecError("is in the format of Keras 2; load it in Keras and save it anew: model.save('name.keras')")
    name = value["name"]
    nodes = [{side: _plain(node[side], name) for side in ("args", "kwargs")} for node in value["inbound_nodes"]]
    for node in nodes:
        node["kwargs"].pop("training", None)  # Keras stores a default; the call of the whole model sets the value
        if node["kwargs"].get("mask") is None:
            node["kwargs"].pop("mask", None)  # None is equal to leaving the argument out
    return {**layer, "name": name, "inbound_nodes": nodes}


def _only_one(side: str, refs: Any) -> list[Any]:
    found = list(_refs(refs))
    if len(found) != 1:
        names = ", ".join(repr(ref[0]) for ref in found)[:100]
        raise SpecError(
            f"has {len(found)} {side}s ({names}), expected one; save a model of one: "
            f"keras.Model({'one_input, model.output' if side == 'input' else 'model.input, one_output'})"
        )
    return found[0]


def _refs(value: Any) -> Iterator[list[Any]]:
    """Yield each [layer, call, output] of a structure that names a model's inputs or outputs."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _refs(inner)
    else:
        raise SpecError(f"names {value!r:.60} as an input or output, expected a layer's")


def _calls(model: Config) -> int:
    """Return the number of layer calls in one call of a model."""
    total = 0
    for layer in model["config"]["layers"]:
        calls = max(1, len(layer.get("inbound_nodes", ())))
        total += calls * (_calls(layer) if layer["class_name"] in MODELS else 1)
    return total


# Layers, operations and their arguments.


def _object(module: str, kind: str, config: Config) -> Config:
    return {"module": module, "class_name": kind, "config": config, "registered_name": None}


def _layer(value: Any) -> Config:
    """Return a layer, an operation or a nested model, normalised: without settings that do not change its output.

    Raises SpecError if it is not allowed.
    """
    kind = require_known(value, "layer")
    if "shared_object_id" in value:  # Keras stores this key if the same layer occurs more than once
        name = value["config"].get("name")
        raise SpecError(f"has the layer {name!r:.60} in two models at once; give each of them layers of its own")
    if kind in MODELS:
        return _model(value)
    inner, module = dict(value["config"]), module_of(value)
    name = inner.pop("name", value.get("name"))
    if module in OPERATIONS:
        rest = {key: _plain(each, name) for key, each in inner.items()}
        return _object(module, kind, {**rest, "name": name})
    for key in ("trainable", "dtype") if kind != "InputLayer" else ():
        require_policy(inner.pop(key, None), name) if key == "dtype" else inner.pop(key, None)
    for key, default in {**LATER_DEFAULTS[""], **LATER_DEFAULTS.get(kind, {})}.items():
        if inner.get(key) == default:
            inner.pop(key, None)
    if set(inner) & {"quantization_config", "lora_rank"}:
        raise SpecError(f"has the quantized or LoRA layer {name!r:.60}; save the float32 network it was made from")
    config = {key: _value(key, each, name) for key, each in inner.items() if not key.endswith(_ONLY_TRAINING)}
    for key in inner:
        require_known_or_none(key, inner[key])
    return _object(module if module in APPLICATION_LAYERS else "keras.layers", kind, {**config, "name": name})


def _value(key: str, value: Any, name: str) -> Any:
    """Return the normalised argument `key` of the layer `name`. Raises SpecError if its value is not allowed."""
    if key.endswith("_initializer") and value is not None:
        return "zeros"  # the fastest initializer: the weights are loaded later
    if key.endswith("activation") and isinstance(value, str) and value not in ACTIVATIONS:
        raise SpecError(f"has the activation {value!r:.60} at {name!r:.60}, which is not Keras' own; {OWN_ONLY}")
    if key == "dtype":  # only an InputLayer still has this argument here
        if not isinstance(value, str) or not _DTYPES.fullmatch(value):
            raise SpecError(f"has the dtype {value!r:.60} at {name!r:.60}")
        return "float32" if value in _FLOATS else value
    return _plain(value, name)


def _plain(value: Any, name: str) -> Any:
    """Return a normalised argument of the layer `name`.

    It may consist of numbers, strings, layers, arrays, and Keras' notation for tensors, slices and activations.
    """
    if isinstance(value, list):
        return [_plain(each, name) for each in value]
    if not isinstance(value, dict):
        return value
    if "class_name" not in value:
        return {key: _plain(each, name) for key, each in value.items()}
    kind, inner = value["class_name"], value.get("config") or {}
    if kind == TENSOR:
        return tensor(inner["keras_history"])
    if kind == _ARRAY:
        if not _DTYPES.fullmatch(inner["dtype"]):
            raise SpecError(f"has an array of {inner['dtype']!r:.60} at {name!r:.60}")
        return {"class_name": kind, "config": {"value": _numbers(inner["value"]), "dtype": inner["dtype"]}}
    if kind == "__slice__":
        return {"class_name": kind, "config": {side: _plain(inner[side], name) for side in ("start", "stop", "step")}}
    if kind == "__ellipsis__":
        return {"class_name": kind, "config": {}}
    if kind == "function" and value.get("module") in _ACTIVATION_MODULES and inner in ACTIVATIONS:
        return str(inner)
    return renamed_layers([_layer(value)], {})[0]


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if not isinstance(value, bool | int | float):
        raise SpecError(f"has {value!r:.60} in an array, expected numbers")
    return value


_ACTIVATION_MODULES = ("builtins", "keras.activations", "keras.src.activations.activations")
# The input image.


def _input_layers(model: Config) -> Iterator[Config]:
    for layer in model["config"]["layers"]:
        if layer["class_name"] in MODELS:
            yield from _input_layers(layer)
        elif layer["class_name"] == "InputLayer":
            yield layer


def _input_layer(config: Config) -> Config:
    name = config["config"]["input_layers"][0]
    return next(layer for layer in config["config"]["layers"] if layer["name"] == name)


def _input_side(config: Config) -> int | None:
    """Return the side of the input image in pixels, None for any size.

    Raises SpecError if the input is not one square RGB image.
    """
    layer = _input_layer(config)
    if layer["class_name"] != "InputLayer":
        raise SpecError(f"begins with {layer['class_name']}, expected an input: keras.Input((height, width, 3))")
    batch, shape = layer["config"]["batch_shape"][0], layer["config"]["batch_shape"][1:]
    text = "(" + ", ".join(map(repr, shape)) + ")"
    if len(shape) != 3 or shape[2] != 3:
        raise SpecError(f"takes {text}, expected RGB images (height, width, 3)")
    if batch is not None:
        raise SpecError(
            f"takes batches of {batch!r:.20} images only; save it with a free batch size: keras.Input({text})"
        )
    if shape[0] != shape[1]:
        raise SpecError(f"takes images of {text}, expected square ones; save it for (None, None, 3) or (size, size, 3)")
    if shape[0] is not None and not (type(shape[0]) is int and 1 <= shape[0] <= _MOST_PIXELS):
        raise SpecError(f"takes images of {text}, expected sides of 1 to {_MOST_PIXELS} pixels")
    if layer["config"].get("dtype", "float32") != "float32":
        raise SpecError(f"takes {layer['config']['dtype']}, expected float pixels: keras.Input({text})")
    return shape[0]


_MOST_PIXELS = 4096  # on a side: the limit of a feature space's spec
