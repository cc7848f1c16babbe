"""Make augmented views: one affine warp of an image, by numbers hashed from the image's key and the view's number."""

from __future__ import annotations

import hashlib
import math

import cv2
import numpy as np

from pipeline.core.spec import Augmentation

DRAWS = 8  # pseudo-random numbers that decide one warp
_BORDERS = {
    "nearest": cv2.BORDER_REPLICATE,
    "reflect": cv2.BORDER_REFLECT_101,
    "wrap": cv2.BORDER_WRAP,
    "black": cv2.BORDER_CONSTANT,
}


def draws(key: bytes, view: int) -> np.ndarray:
    """Return `DRAWS` pseudo-random numbers in [0, 1), float64, for an image's key (32 bytes) and a view's number.

    They come from a hash, not from a generator, so that every machine and every version of NumPy gives the same.
    """
    digest = hashlib.sha512(key + view.to_bytes(8, "big")).digest()
    return (np.frombuffer(digest, ">u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def warp(pixels: np.ndarray, recipe: Augmentation, drawn: np.ndarray) -> np.ndarray:
    """Return uint8 pixels (h, w, 3), warped about their centre within `recipe` by `DRAWS` numbers in [0, 1).

    Flips come first, then zoom, shear, rotation and shift, as one affine map with linear interpolation.
    """
    height, width = pixels.shape[:2]
    matrix = _matrix(width, height, recipe, drawn)
    border = _BORDERS[recipe.fill]
    return cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border)


def _matrix(width: int, height: int, recipe: Augmentation, drawn: np.ndarray) -> np.ndarray:
    """Return the affine matrix (2, 3) from pixel positions in the image to positions in its view."""
    sign = 2 * drawn - 1  # in [-1, 1)
    angle = math.radians(recipe.rotation * sign[0])
    shift = np.array([recipe.width_shift * width * sign[1], recipe.height_shift * height * sign[2]])
    flip = np.where([recipe.horizontal_flip, recipe.vertical_flip], np.where(drawn[6:8] < 0.5, -1, 1), 1)
    zoom = np.diag(flip * (1 + recipe.zoom * sign[4:6]))
    shear = np.array([[1, recipe.shear * sign[3]], [0, 1]])
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = rotation @ shear @ zoom
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    return np.column_stack([linear, centre + shift - linear @ centre])
