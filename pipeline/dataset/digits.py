"""Read the handwritten digits that come with scikit-learn: a dataset that needs no download."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.dataset.base import ArraySource, Dataset


def open_digits() -> Dataset:
    """Return the digits: 1,797 grey images, (8, 8) uint8, of the classes "0" to "9", without splits."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), grey levels 0 to 16 become 0 to 255
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        names=[f"digits/{i}" for i in range(len(pixels))],
        labels=bunch.target.astype(np.int32),
        splits=None,
        groups=None,
        source=ArraySource(pixels),
        embedded=True,
    )
