"""Each export format: written, loaded in its own runtime, class names inside, for any number of images."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_model

from pipeline.backbone.keras_start import import_keras
from pipeline.backbone.scaling import scale
from pipeline.core import machine
from pipeline.core.errors import UsageError
from pipeline.deployment.export_formats import FORMATS

CLASSES = ['a "b"', "猫, cat", "c\nd"]


def in_onnx(path: Path) -> object:
    import onnx

    (found,) = [entry.value for entry in onnx.load(path).metadata_props if entry.key == "classes"]
    return json.loads(found)


def in_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("classes.json"))


def in_openvino(path: Path) -> object:
    import openvino

    return json.loads(openvino.Core().read_model(path).get_rt_info(["classes"]).astype(str))


def in_assets(path: Path) -> object:
    return json.loads((path / "assets.extra" / "classes.json").read_text())


INSIDE: dict[str, Callable[[Path], object]] = {
    "keras": in_zip,
    "savedmodel": in_assets,
    "onnx": in_onnx,
    "litert": in_zip,
    "openvino": in_openvino,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(37)


@pytest.mark.parametrize("name", FORMATS)
def test_written_and_loaded_it_says_the_same(model: Any, tmp_path: Path, name: str) -> None:
    form, pixels = FORMATS[name], np.random.default_rng(1).integers(0, 256, (5, 37, 37, 3), np.uint8)
    expected = np.asarray(model.predict_on_batch(pixels)["probabilities"])
    written = model if form.named else import_keras().Model(model.inputs, model.output["probabilities"])
    path = tmp_path / form.file
    form.require()
    form.write(written, path, CLASSES)
    assert INSIDE[name](path) == CLASSES
    made = {"model.xml", "model.bin"} if name == "openvino" else {form.file}
    assert {found.name for found in tmp_path.iterdir()} == made  # nothing is left beside it
    answer = form.load(path)
    for part in (slice(0, 5), slice(0, 1), slice(1, 4)):
        said = answer(pixels[part])
        assert said.dtype == np.float32
        assert np.abs(said - expected[part]).max() < 1e-5


@pytest.mark.parametrize("scaling", ["imagenet", "bgr-means", "127,128"])
@pytest.mark.parametrize("name", FORMATS)
def test_pixels_go_in_by_any_scaling(tmp_path: Path, name: str, scaling: str) -> None:
    keras, form = import_keras(), FORMATS[name]
    inputs = keras.Input((8, 8, 3), dtype="uint8", name="pixels")
    scaled = keras.layers.GlobalAveragePooling2D()(scale(keras.ops.cast(inputs, "float32"), scaling))
    output = keras.layers.Dense(3, "softmax")(scaled)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
    model = keras.Model(inputs, {"probabilities": output} if form.named else output)
    form.write(model, tmp_path / form.file, CLASSES)
    expected = np.asarray(keras.Model(inputs, output).predict_on_batch(pixels))
    assert np.abs(form.load(tmp_path / form.file)(pixels) - expected).max() < 1e-5


def test_what_a_converter_does_not_know_is_written(tmp_path: Path) -> None:
    """Normalisations, exact GELUs, convolutions by channel, as in ConvNeXt, or in wider groups; in models within."""
    keras, form = import_keras(), FORMATS["onnx"]
    inputs = keras.Input((9, 9, 3), dtype="uint8", name="pixels")
    output = keras.layers.Conv2D(6, 3, groups=3, activation="gelu")(
        keras.layers.Normalization(mean=[90.0, 120.0, 100.0], variance=[900.0, 1600.0, 2500.0])(inputs)
    )
    norm = keras.layers.Normalization(mean=0.1, variance=4.0, invert=True)
    block = [keras.layers.Conv2D(6, 3, groups=6, padding="same"), norm, keras.layers.Activation("gelu")]
    output = keras.ops.gelu(keras.Sequential(block)(output), approximate=False)
    output = keras.layers.Conv2D(4, 3, strides=(2, 1), groups=2, use_bias=False)(output)
    output = keras.layers.Dense(3, "softmax")(keras.layers.GlobalAveragePooling2D()(output))
    model = keras.Model(inputs, {"probabilities": output})
    pixels = np.random.default_rng(1).integers(0, 256, (4, 9, 9, 3), np.uint8)
    expected = np.asarray(model.predict_on_batch(pixels)["probabilities"])
    form.write(model, tmp_path / form.file, CLASSES)
    assert np.abs(form.load(tmp_path / form.file)(pixels) - expected).max() < 1e-5


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--format litert needs ai-edge-litert: make setup EXTRAS=litert"):
        FORMATS["litert"].require()
