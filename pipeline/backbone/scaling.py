"""Scale the pixels of images for a network: the names of scalings (`canonical`) and their arithmetic (`scale`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.core.errors import UsageError, did_you_mean

# The three modes of keras.applications.imagenet_utils.preprocess_input ("tf", "torch", "caffe"), and two plain ones.
TANH, IMAGENET, BGR_MEANS, UNIT, NONE = "x/127.5-1", "imagenet", "bgr-means", "x/255", "none"
NAMED = (NONE, TANH, UNIT, IMAGENET, BGR_MEANS)
CHOICES = "none, x/127.5-1, x/255, imagenet, bgr-means, or MEAN,STD in grey levels"

# Mean and standard deviation of ImageNet's red, green and blue for pixels in 0 … 1.
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_BGR_MEANS = np.array([103.939, 116.779, 123.68], np.float32)  # ImageNet's means of blue, green and red in 0 … 255

# MEAN,STD → named scaling that gives exactly the same floats. "127.5,127.5" is not listed: it rounds differently from
# "x/127.5-1".
_SAME = {"0,1": NONE, "0,255": UNIT}


def canonical(text: str) -> str:
    """Return the canonical text of a scaling: equal texts mean equal arithmetic.

    Numbers are rounded to float32, the type of the pixels. "127.0, 128" gives "127,128", and "0,255" gives "x/255".

    Raises
    ------
    UsageError
        If `text` is not the name of a scaling or MEAN,STD.
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
    """Return RGB pixels in 0 … 255 scaled for a network, in the same float type.

    `images` is (n, h, w, 3) float32, a NumPy array or a tensor of TensorFlow or Keras, symbolic or not. `scaling` is a
    text that `canonical` returned. With "bgr-means" the channels are reversed too.
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
