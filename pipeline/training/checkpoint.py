"""A training that was stopped goes on: named arrays and a little JSON in one file, replaced whole or not at all."""

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
_SHARE = 0.1  # of the time spent on training, at most, goes into checkpoints


class Checkpoint:
    """The checkpoint in a run's folder; `save` may be called after every epoch and writes when it is worth it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._cost = 0.0  # seconds that writing took last time
        self._since = time.monotonic()

    def load(self) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]] | None:
        """Return the groups of arrays and the state that were saved last; None if nothing was.

        Raises
        ------
        CheckpointError
            If the file is not one that `save` wrote.
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
            # Without the text: NumPy's advises to load such a file unsafely.
            raise CheckpointError(f"{self.path} is not a checkpoint; delete it and train from the start") from error
        return groups, state

    def save(self, groups: Mapping[str, Sequence[Any]], state: Mapping[str, Any]) -> None:
        """Write groups of arrays and a JSON state, unless the last time was too short ago for what it costs.

        The arrays may be variables: each becomes an array only when it is its turn to be written. Raises RunError if
        the file cannot be written; what was saved before stays.
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
        """Remove the file: the training has ended."""
        files.remove(self.path)
