from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OwnNetwork:
    path: Path
    name: str
    weights: str
    input_size: int | None
    default_layer: str


def read(path: Path) -> OwnNetwork:
    raise NotImplementedError
