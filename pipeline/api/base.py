"""A data directory, as all methods of `Icebox` open it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipeline.api.options import Text

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.core.progress import Progress


class DataDirectory:
    """Where everything lies. Each method opens it anew, so that several programs may use it at once."""

    def __init__(self, data_dir: Text | None = None, *, quiet: bool = False, progress: Progress | None = None) -> None:
        self.data_dir = Path(data_dir or os.environ.get("ICEBOX_DATA") or "data")
        self.quiet = quiet
        self._progress = progress
        self._program: Sequence[str] = ("python", "cli.py")

    @classmethod
    def of_program(cls, data_dir: Path, program: Sequence[str], *, quiet: bool) -> Self:
        """Return the same for a program whose command line begins with these words: messages name it."""
        made = cls(data_dir, quiet=quiet)
        made._program = program
        return made

    def __repr__(self) -> str:
        return f"Icebox({str(self.data_dir)!r})"

    @contextmanager
    def _open(self) -> Iterator[Workspace]:
        """Open the data directory for one method; notices and progress go to the console."""
        from pipeline.cache.workspace import open_workspace
        from pipeline.core import console, environment
        from pipeline.core.progress import silent

        console.begin(quiet=self.quiet)
        environment.tell()
        progress = self._progress or (silent if self.quiet else console.progress)
        with open_workspace(self.data_dir, progress, self._program) as workspace:
            yield workspace
