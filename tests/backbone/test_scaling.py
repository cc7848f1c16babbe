"""How pixels go into a network: the texts of `--scaling`, and what they do."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.backbone.scaling import NAMED, canonical, scale
from pipeline.backbone.table import BACKBONES, Backbone
from pipeline.core.errors import UsageError

EVERY = (*NAMED, "127,128", "127.5,127.5", "-3.5,0.25")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Every value, float32 (2, 16, 16, 3)."""
    return np.random.default_rng(0).permutation(np.arange(1536) % 256).reshape(2, 16, 16, 3).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("X/127.5 - 1", "x/127.5-1"),
        (" imagenet", "imagenet"),
        ("127.0, 128.", "127,128"),
        ("1.27e2,+128", "127,128"),
        ("127.00000001,128", "127,128"),  # one number as float32
        ("-0,2", "0,2"),
        ("0.001,1e3", "0.001,1000"),
        ("0,1", "none"),
        ("0,255.0", "x/255"),
        ("127.5,127.5", "127.5,127.5"),  # rounds otherwise than x/127.5-1
    ],
)
def test_equal_arithmetic_has_one_text(text: str, expected: str) -> None:
    assert canonical(text) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "127", "1,2,3", "1,,2", "a,b", "nan,1", "1,inf", "1,0", "1,-1", "1e39,1", "1,1e-50", "x/128"]
)
def test_nonsense_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match=r"--scaling .*MEAN,STD.*; found '"):
        canonical(text)


def test_the_nearest_scaling_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean imagenet"):
        canonical("imagnet")


def test_spaces_that_exist_keep_their_bits(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(scale(pixels, "x/127.5-1"), pixels / 127.5 - 1.0, strict=True)


def test_mean_and_deviation_are_in_grey_levels(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(scale(pixels, "127,128"), (pixels - 127) / 128, strict=True)
    np.testing.assert_array_equal(scale(pixels, "x/255"), (pixels - 0) / 255, strict=True)


@pytest.mark.parametrize("row", BACKBONES.values(), ids=list(BACKBONES))
def test_a_row_scales_as_the_preprocess_input_of_its_application(row: Backbone, pixels: np.ndarray) -> None:
    module = importlib.import_module(getattr(keras.applications, row.application).__module__)
    assert canonical(row.scaling) == row.scaling
    expected = module.preprocess_input(pixels.copy())
    np.testing.assert_array_equal(scale(pixels, row.scaling), expected, strict=True)


@pytest.mark.parametrize("scaling", EVERY)
def test_numpy_tensorflow_and_a_saved_model_scale_alike(scaling: str, pixels: np.ndarray, tmp_path: Path) -> None:
    expected = scale(pixels, scaling)
    assert expected.dtype == np.float32
    graph = tf.function(lambda images: scale(images, scaling))
    # TensorFlow multiplies by 1/x instead of dividing by x.
    np.testing.assert_allclose(graph(tf.constant(pixels)).numpy(), expected, rtol=1e-6, atol=1e-6)
    inputs = keras.Input((16, 16, 3), dtype="uint8")
    path = tmp_path / "model.keras"
    keras.Model(inputs, scale(keras.ops.cast(inputs, "float32"), scaling)).save(path)
    loaded: Any = keras.saving.load_model(path)
    np.testing.assert_allclose(np.asarray(loaded(pixels.astype(np.uint8))), expected, rtol=1e-6, atol=1e-6)
