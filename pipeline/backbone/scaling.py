"""How pixels go into a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.core.errors import UsageError, did_you_mean

# The three modes of keras.applications.imagenet_utils.preprocess_input ("tf", "torch", "caffe"), and two plain ones.
TANH, IMAGENET, BGR_MEANS, UNIT, NONE = "x/127.5-1", "imagenet", "bgr-means", "x/255", "none"
NAMED = (NONE, TANH, UNIT, IMAGENET, BGR_MEANS)
CHOICES = "none, x/127.5-1, x/255, imagenet, bgr-means, or MEAN,STD in grey levels"

# ImageNet's mean and deviation of red, green and blue in 0 … 1; its means of blue, green and red in grey levels.
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_BGR_MEANS = np.array([103.939, 116.779, 123.68], np.float32)

# What MEAN,STD says where it is a named scaling to the last bit. 127.5,127.5 is not: it rounds in another order.
_SAME = {"0,1": NONE, "0,255": UNIT}


def canonical(text: str) -> str:
    """Return the one text of a scaling: equal texts are equal arithmetic.

    Numbers are taken as float32, as pixels are: "127.0, 128" is "127,128", "0,255" is "x/255".

    Raises
    ------
    UsageError
        If it names no scaling.
    """
    plain = "".join(text.split()).lower()
    if plain in NAMED:
        return plain
    numbers = [number for part in plain.split(",") if (number := _number(part)) is not None]
    if plain.count(",") != 1 or len(numbers) != 2:
        raise UsageError(f"--scaling takes {CHOICES}; found {text!r:.60}{did_you_mean(plain, NAMED)}")
    mean, deviation = numbers
    if not (np.isfinite(mean) and np.isfinite(deviation) and deviation > 0):
        raise UsageError(f"--scaling MEAN,STD takes finite numbers, STD above 0; found {text!r:.60}")
    shortest = ",".join(np.format_float_positional(each, trim="-") for each in (mean + 0, deviation))  # no -0
    return _SAME.get(shortest, shortest)


def _number(text: str) -> np.float32 | None:
    try:
        with np.errstate(over="ignore"):
            return np.float32(text)
    except ValueError:
        return None


def scale(images: Any, scaling: str) -> Any:
    """Return RGB pixels 0 … 255 as a network takes them; float in, float of the same type out.

    `images` is (n, h, w, 3): float32 of NumPy, TensorFlow or Keras, symbolic or not. `scaling` is canonical.
    """
    if scaling == NONE:
        return images
    if scaling == TANH:
        return images / 127.5 - 1.0
    if scaling == UNIT:
        return images / 255.0
    if scaling == IMAGENET:
        return (images / 255.0 - _MEAN) / _DEVIATION
    if scaling == BGR_MEANS:
        return images[..., ::-1] - _BGR_MEANS
    mean, deviation = map(float, scaling.split(","))
    return (images - mean) / deviation
