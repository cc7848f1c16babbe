"""Datasets whose files some processes cannot read, or not yet. Workers import only this module of the tests."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from pipeline.dataset import Dataset
from pipeline.dataset.base import FileSource


@dataclass(frozen=True)
class _Hindered(FileSource):
    def take(self, rows: np.ndarray) -> Self:
        return replace(self, names=super().take(rows).names)


@dataclass(frozen=True)
class Held(_Hindered):
    """Files of which those in `held` are read once `folder / "open"` exists; processes that wait write their number."""

    folder: Path
    held: frozenset[str]

    def read(self, i: int) -> bytes:
        if self.names[i] in self.held:
            (self.folder / str(os.getpid())).touch()
            _wait_for(self.folder / "open")
        return super().read(i)


@dataclass(frozen=True)
class Poison(_Hindered):
    """Files of which "poison.png" kills any process that reads it, except the one numbered `spared`."""

    spared: int

    def read(self, i: int) -> bytes:
        if self.names[i].endswith("poison.png") and os.getpid() != self.spared:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)


@dataclass(frozen=True)
class Blind(_Hindered):
    """Files that no process with the variable BLIND can read; others, except `spared`, wait until one has failed."""

    failed: Path
    spared: int

    def read(self, i: int) -> bytes:
        if os.environ.get("BLIND"):
            self.failed.touch()
            raise PermissionError(13, "Permission denied")
        if os.getpid() != self.spared:
            _wait_for(self.failed)
        return super().read(i)


def _wait_for(path: Path) -> None:
    """Wait until something is there. Raises OSError if it never is, as for a file that cannot be read."""
    end = time.monotonic() + 600
    while not path.exists():
        if time.monotonic() > end:
            raise OSError(f"{path} was waited for in vain")
        time.sleep(0.02)


def hindered(kind: type[_Hindered], dataset: Dataset, *settings: object) -> Dataset:
    """Return the dataset with a source of this kind, which gets the settings, in place of its own."""
    source = dataset.source
    assert isinstance(source, FileSource)
    return replace(dataset, source=kind(source.root, source.names, *settings))
