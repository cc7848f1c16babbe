"""Where things lie under the data directory, opened once and handed to every stage."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.space import Cache
from pipeline.core.progress import Progress, silent


@dataclass(frozen=True)
class Workspace:
    """The data directory: cache/, runs/, sweeps/ and downloads/, and how progress is reported.

    `program` is how the command line is called on it, for what is to be typed next.
    """

    root: Path
    cache: Cache
    progress: Progress = silent
    program: Sequence[str] = ("python", "cli.py")

    def command(self, name: str) -> str:
        """Return what is to be typed for a command."""
        return shlex.join([*self.program, name])

    @property
    def runs(self) -> Path:
        """Where run directories are published."""
        return self.root / "runs"

    @property
    def sweeps(self) -> Path:
        """Where sweeps are published."""
        return self.root / "sweeps"

    @property
    def downloads(self) -> Path:
        """Where weights and archives are kept."""
        return self.root / "downloads"


@contextmanager
def open_workspace(
    root: Path, progress: Progress = silent, program: Sequence[str] = Workspace.program
) -> Iterator[Workspace]:
    """Open the data directory `root`; what it lacks is made when it is needed."""
    with closing(Cache(root / "cache", progress)) as cache:
        yield Workspace(root, cache, progress, program)
