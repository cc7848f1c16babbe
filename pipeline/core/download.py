"""One published file, fetched once and checked by its hash, with progress."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pipeline.core.progress import Progress

logger = logging.getLogger(__name__)

_TIMEOUT_S = 30


def fetch(url: str, known_hash: str | None, folder: Path, progress: Progress, name: str | None = None) -> Path:
    """Return the file at `url` in `folder`, downloaded if it is not there or not what `known_hash` says.

    pooch downloads under a temporary name and checks "<algorithm>:<hex digits>" before the file gets its own, `name`,
    by default the last part of `url`. Without a `known_hash` any file that is there, or comes, is taken.

    Raises
    ------
    OSError, ValueError
        If it cannot be downloaded, or is another file than was published; `cause` makes one line of it.
    """
    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    name = name or PurePosixPath(url).name
    if not (folder / name).exists():
        logger.info("downloading %s, once", url)
    bar = _Bar(f"downloading {name}", progress)
    downloader: Any = pooch.HTTPDownloader(timeout=_TIMEOUT_S, progressbar=cast(Any, bar))
    path = Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=downloader))
    if bar.began:
        _open_to_others(path)
    return path


def _open_to_others(path: Path) -> None:
    """Give a file the permissions that the umask leaves: pooch's temporary ones are their owner's alone."""
    usual = path.with_name(f".{path.name}-{os.getpid()}")
    usual.touch()
    path.chmod(stat.S_IMODE(usual.stat().st_mode))
    usual.unlink()


def cause(error: Exception) -> str:
    """Return the innermost cause on one line: network libraries wrap it several times over."""
    inner: BaseException = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__  # type: ignore[assignment]
    return " ".join(str(inner).split())[:200]


class _Bar:
    """What pooch calls while it downloads; in the end it starts over and reports the whole once more."""

    def __init__(self, title: str, progress: Progress) -> None:
        self.total = 0  # set by pooch, in bytes, when the server has answered
        self._title = title
        self._progress = progress
        self._phase = None
        self._advance: Callable[[int], None] = lambda n: None
        self._done = 0
        self.began = False

    def update(self, n: int) -> None:
        self.began = True
        if self._phase is None:
            self._phase = self._progress(self._title, self.total, "bytes")
            self._advance = self._phase.__enter__()
        some = min(n, self.total - self._done)
        if some > 0:
            self._done += some
            self._advance(some)

    def reset(self) -> None:
        """Ignore it: what was reported stays reported."""

    def close(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
