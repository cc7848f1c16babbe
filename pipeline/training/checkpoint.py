"""Save and load training checkpoints: named arrays and a JSON state in one file, replaced atomically."""

from __future__ import annotations

import json
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import files
from pipeline.core.errors import CheckpointError, RunError

FILE = "checkpoint.npz"
_STATE = "state.json"
_UNREADABLE = (EOFError, MemoryError, OverflowError, RecursionError, zipfile.BadZipFile, zlib.error)
_SHARE = 0.1  # largest share of the training time that goes into writing checkpoints


class Checkpoint:
    """The checkpoint in a run's folder. Call `save` after every epoch: it skips writing if the last was too recent."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._cost = 0.0  # seconds that the last write took
        self._since = time.monotonic()

    def load(self) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]] | None:
        """Return the groups of arrays and the state that were saved last; None if there is no checkpoint.

        Raises
        ------
        CheckpointError
            If `save` did not write the file.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path) as file:  # never unpickles
                state = json.loads(file[_STATE].tobytes())
                groups = {
                    name: [file[f"{name}/{i}"] for i in range(count)] for name, count in state.pop("groups").items()
                }
        except (*_UNREADABLE, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            # Leave out NumPy's message: it advises to load such a file with pickle, which is unsafe.
            raise CheckpointError(f"{self.path} is not a checkpoint; delete it and train from the start") from error
        return groups, state

    def save(self, groups: Mapping[str, Sequence[Any]], state: Mapping[str, Any]) -> None:
        """Write groups of arrays and a JSON state, or skip it so that writing takes at most 10% of the time.

        Arrays may be Keras variables; each is copied to NumPy only when it is written. Raises RunError if the file
        cannot be written; the previous checkpoint stays.
        """
        start = time.monotonic()
        if start - self._since < self._cost / _SHARE:
            return
        counts = {"groups": {name: len(arrays) for name, arrays in groups.items()}}
        text = np.frombuffer(json.dumps({**state, **counts}).encode(), np.uint8)
        named = {f"{name}/{i}": each for name, arrays in groups.items() for i, each in enumerate(arrays)}
        try:
            with files.new_file(self.path) as file, zipfile.ZipFile(file, "w") as archive:
                for name, each in {_STATE: text, **named}.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.asarray(each), allow_pickle=False)
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error}); make room") from error
        self._since = time.monotonic()
        self._cost = self._since - start

    def remove(self) -> None:
        """Remove the file, when the training has ended."""
        files.remove(self.path)
