"""Download a published file once, check its hash, and report progress."""

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
    """Return the path of the file at `url` in `folder`, downloading it if it is missing or has another hash.

    pooch downloads to a temporary name and checks `known_hash`, "<algorithm>:<hex digits>". Then the file gets its
    final name `name`, by default the last part of `url`. If `known_hash` is None, any content is accepted.

    Raises
    ------
    OSError, ValueError
        If the download fails, or the file has another hash; `cause` returns the reason on one line.
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
    """Give a file the permissions of the umask: pooch's temporary files can be read by their owner only."""
    usual = path.with_name(f".{path.name}-{os.getpid()}")
    usual.touch()
    path.chmod(stat.S_IMODE(usual.stat().st_mode))
    usual.unlink()


def cause(error: Exception) -> str:
    """Return the innermost cause of an error on one line: network libraries wrap it several times."""
    inner: BaseException = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__  # type: ignore[assignment]
    return " ".join(str(inner).split())[:200]


class _Bar:
    """Progress bar with the interface that pooch expects.

    At the end pooch calls `reset` and reports all bytes once more; the repetition is ignored.
    """

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
        """Do nothing: the reported progress is kept."""

    def close(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
