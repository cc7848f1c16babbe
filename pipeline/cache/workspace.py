"""The data directory: the paths of its folders and its open cache, passed to every stage."""

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
    """The data directory, with cache/, runs/, sweeps/ and downloads/, and the way progress is reported.

    `program` is the command line that starts Icebox on this directory; messages suggest commands with it.
    """

    root: Path
    cache: Cache
    progress: Progress = silent
    program: Sequence[str] = ("python", "cli.py")

    def command(self, name: str) -> str:
        """Return the shell command line that starts the command `name`."""
        return shlex.join([*self.program, name])

    @property
    def runs(self) -> Path:
        """The folder of published runs."""
        return self.root / "runs"

    @property
    def sweeps(self) -> Path:
        """The folder of published sweeps."""
        return self.root / "sweeps"

    @property
    def downloads(self) -> Path:
        """The folder of downloaded weights and archives."""
        return self.root / "downloads"


@contextmanager
def open_workspace(
    root: Path, progress: Progress = silent, program: Sequence[str] = Workspace.program
) -> Iterator[Workspace]:
    """Open the data directory `root`; missing folders and files are created when they are needed."""
    with closing(Cache(root / "cache", progress)) as cache:
        yield Workspace(root, cache, progress, program)
