"""Each row of the table is a claim: it is compared with what Keras has and builds itself."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import imagenet_utils
from keras.src.legacy.saving import legacy_h5_format
from keras.src.utils import file_utils

from pipeline.backbone.build import build, load_weights
from pipeline.backbone.scaling import scale
from pipeline.backbone.table import BACKBONES, Backbone, find_backbone
from pipeline.core.errors import SpecError, UsageError

# Of each module of keras.applications, the first in the table.
FIRST = {getattr(keras.applications, row.application).__module__: row.name for row in reversed(BACKBONES.values())}


@dataclass
class Asked:
    """What a builder asked for: files with address and hash, and its default size."""

    files: list[tuple[str, str, str | None]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Keras downloads nothing, but notes what it would, and its layers have the names of a new process."""
    asked, obtain = Asked(), imagenet_utils.obtain_input_shape

    def get_file(fname: str, origin: str, cache_subdir: str, file_hash: str | None = None) -> str:
        asked.files.append((fname, origin, file_hash))
        return "downloaded"

    def obtain_input_shape(*arguments: Any, default_size: int, **options: Any) -> Any:
        asked.sizes.append(default_size)
        return obtain(*arguments, default_size=default_size, **options)

    monkeypatch.setattr(file_utils, "get_file", get_file)
    monkeypatch.setattr(imagenet_utils, "obtain_input_shape", obtain_input_shape)
    keras.utils.clear_session(free_memory=False)
    return asked


def keras_own(row: Backbone, size: int) -> Any:
    """Return the network as its builder in Keras makes it for ImageNet's weights."""
    builder = getattr(keras.applications, row.application)
    return builder(include_top=False, weights="imagenet", input_shape=(size, size, 3))


def graph_of(model: Any) -> str:
    """Return the graph as JSON, without the model's own name and those of the inputs of nested models."""
    config = json.dumps({**model.get_config(), "name": None}, default=str)
    return re.sub(r"\binput_layer_\d+\b", "input_layer", config)


def multiplications(layer: Any) -> int:
    if isinstance(layer, keras.Model):
        return sum(map(multiplications, layer.layers))
    kernels = [getattr(layer, name, None) for name in ("kernel", "depthwise_kernel", "pointwise_kernel")]
    return math.prod(layer.output.shape[1:-1]) * sum(math.prod(each.shape) for each in kernels if each is not None)


def test_the_table_has_every_builder() -> None:
    builders = {name for name in dir(keras.applications) if name[0].isupper()}
    assert {row.application for row in BACKBONES.values()} == builders
    assert len(BACKBONES) == len(builders) == 40
    assert len({row.weights_file for row in BACKBONES.values()}) == 40


def test_weights_come_over_tls() -> None:
    assert all(row.weights_url.startswith("https://") for row in BACKBONES.values())


def test_the_rows_are_those_that_were_compared() -> None:
    """If it fails: run `make test-all`, which compares all of them, then set this anew."""
    rows = "\n".join(map(repr, BACKBONES.values()))
    assert (
        hashlib.sha256(rows.encode()).hexdigest() == "3892132f46980dac93922a7651b5552e34cb48d7b30a8212d9f88541cef18502"
    )


def first_of_a_module(row: Backbone) -> Any:
    return pytest.param(row, id=row.name, marks=() if row.name in FIRST.values() else pytest.mark.long)


# Others of a module have the same code, and their numbers are held by the test above.
@pytest.mark.parametrize("row", [first_of_a_module(row) for row in BACKBONES.values()])
def test_a_row_says_what_keras_builds(row: Backbone, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.Model, "load_weights", lambda model, path: None)
    with keras.StatelessScope(initialize_variables=False):  # shapes without numbers: the largest have gigabytes
        theirs = keras_own(row, row.input_size)
        ours = build(row.name) if row.name in FIRST.values() else theirs  # others of its module have the same code
    _, _, digest = (row.weights_hash or "").partition(":")
    assert asked.files == [(row.weights_file, row.weights_url, digest or None)]
    assert row.input_size in asked.sizes or "_224_" in row.weights_file
    if ours is not theirs:
        assert ours.name == row.name
        assert graph_of(ours) == graph_of(theirs)
    assert ours.get_layer(row.default_layer).output is ours.output
    assert ours.count_params() == row.parameters
    assert tuple(ours.output_shape[1:]) == row.row
    assert sum(map(multiplications, ours.layers)) == row.multiplications


def draw(model: Any) -> None:
    """Give every variable numbers as after training, so that none is 0 or 1 and the features are of ordinary size."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        shape, name = tuple(variable.shape), variable.name
        if name in ("gamma", "variance", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, shape))
        elif "kernel" in name:
            inputs = math.prod(shape[:2]) if "depthwise" in variable.path else math.prod(shape[:-1])
            variable.assign(rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / inputs)))
        elif name != "count":
            variable.assign(rng.normal(0, 0.1, shape))


MORE = ("mobilenet_v2", "mobilenet_v3_small", "resnet50", "densenet121", "efficientnet_v2_b0")


# Those left out by default have no layers with weights that those four have not.
@pytest.mark.parametrize(
    "name",
    [
        *("mobilenet", "vgg16", "efficientnet_b0", "convnext_tiny"),
        *(pytest.param(name, marks=pytest.mark.long) for name in MORE),
    ],
)
def test_a_weights_file_gives_what_it_gives_in_keras(
    name: str, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, path, size = BACKBONES[name], tmp_path / "published.h5", 32
    ours = build(name, input_size=size)
    draw(ours)
    with h5py.File(path, "w") as file:  # as Keras' files are: older than .weights.h5
        legacy_h5_format.save_weights_to_hdf5_group(file, ours)
    for variable in ours.weights:
        variable.assign(np.zeros(variable.shape))
    load_weights(ours, "sha256:", path)
    monkeypatch.setattr(file_utils, "get_file", lambda *names, **options: str(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`input_shape` is undefined")  # Keras has other weights for some sizes
        theirs = keras_own(row, size)
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    scaled = scale(pixels, row.scaling)
    expected = np.asarray(theirs(scaled, training=False))
    np.testing.assert_array_equal(np.asarray(ours(scaled, training=False)), expected)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 74), ("xception", 70), ("mobilenet_v3_small", 31)])
def test_a_size_that_a_network_does_not_take_is_told(name: str, size: int) -> None:
    with pytest.raises(SpecError, match=rf"{name} does not take images of {size}x{size} pixels \(Input size must be"):
        build(name, input_size=size)
    assert keras.config.dtype_policy().name == "float32"


def test_a_backbone_is_found_by_its_name_or_the_nearest_is_named() -> None:
    assert find_backbone("vgg16") is BACKBONES["vgg16"]
    with pytest.raises(UsageError, match=r"no backbone 'MobileNetV2' .*did you mean mobilenet_v2\?"):
        find_backbone("MobileNetV2")
