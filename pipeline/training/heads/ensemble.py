"""Several heads as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.core.files import write_json
from pipeline.training.heads.base import JSON_FILE, Head
from pipeline.training.rows import Rows


def member_name(number: int) -> str:
    """Return the folder of the member `number`, 1 being the first."""
    return f"fold-{number}"


class Ensemble:
    """Heads over the same rows and classes, each saved in a folder of its own."""

    def __init__(self, members: Sequence[Head]) -> None:
        self.members = members

    def predict(self, rows: Rows) -> np.ndarray:
        """Return the mean of the members' class probabilities, (n, k) float32."""
        return np.stack([member.predict(rows) for member in self.members]).mean(axis=0)

    def save(self, directory: Path) -> None:
        """Write the members that are not there yet, and our JSON."""
        for number, member in enumerate(self.members, 1):
            folder = directory / member_name(number)
            folder.mkdir(exist_ok=True)
            if not (folder / JSON_FILE).exists():
                member.save(folder)
        write_json(directory / JSON_FILE, {"head": "ensemble", "members": len(self.members)})

    @property
    def kind(self) -> str:
        """The name of its members' head."""
        return self.members[0].kind

    @property
    def parameters(self) -> int:
        """Those of all members."""
        return sum(member.parameters for member in self.members)
