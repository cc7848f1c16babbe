"""Combine several heads into an ensemble: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.core.files import write_json
from pipeline.training.heads.base import JSON_FILE, Head
from pipeline.training.rows import Rows


def member_name(number: int) -> str:
    """Return the folder name of the member `number`, counted from 1."""
    return f"fold-{number}"


class Ensemble:
    """An ensemble of heads over the same rows and classes, each saved in its own folder."""

    def __init__(self, members: Sequence[Head]) -> None:
        self.members = members

    def predict(self, rows: Rows) -> np.ndarray:
        """Return the mean of the members' class probabilities, (n, k) float32."""
        return np.stack([member.predict(rows) for member in self.members]).mean(axis=0)

    def save(self, directory: Path) -> None:
        """Write the members that are not saved yet, and `head.json`."""
        for number, member in enumerate(self.members, 1):
            folder = directory / member_name(number)
            folder.mkdir(exist_ok=True)
            if not (folder / JSON_FILE).exists():
                member.save(folder)
        write_json(directory / JSON_FILE, {"head": "ensemble", "members": len(self.members)})

    @property
    def kind(self) -> str:
        """The name of the members' head."""
        return self.members[0].kind

    @property
    def parameters(self) -> int:
        """The number of learned parameters of all members."""
        return sum(member.parameters for member in self.members)
