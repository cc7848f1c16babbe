"""How pixels go into a network."""

from __future__ import annotations

from typing import Any


def scale(images: Any) -> Any:
    """Return pixels 0 … 255 as -1 … 1, the scaling InceptionV3 was trained with; float in, float out."""
    return images / 127.5 - 1.0


def canonical(text: str) -> str:
    return text
