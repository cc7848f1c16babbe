"""The key of an image: a hash of its content."""

from __future__ import annotations

import hashlib

import numpy as np


def image_key(data: bytes | np.ndarray) -> bytes:
    """Return the key of an image: sha256 of its encoded bytes, or of its raw pixels in C order."""
    return hashlib.sha256(np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data).digest()
