"""Find the likely cause if a manifest cannot be read, or if the files that it names do not exist."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import filterfalse, islice
from pathlib import Path, PureWindowsPath

from pipeline.dataset import remote

_HEAD = 32  # first bytes of a file, by which its format is recognised
_ENDINGS = (".jpg", ".jpeg", ".png")
_TRIED = 100  # unusual paths that are checked; a manifest may have millions
_FIRST = 3  # first paths of a manifest, checked even if they look usual
_UTF_16 = "UTF-16 text; save it as UTF-8 (in spreadsheets: CSV UTF-8)"
_UTF_32 = "UTF-32 text; save it as UTF-8"

# The first bytes of a format, its name, and how to fix the file.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xfe\0\0", _UTF_32),
    (b"\0\0\xfe\xff", _UTF_32),
    (b"\xff\xfe", _UTF_16),
    (b"\xfe\xff", _UTF_16),
    (b"PK\x03\x04", "a spreadsheet or ZIP file; save it as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an Excel file; save it as CSV UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself by `git lfs pull`"),
)


def foreign_format(path: Path) -> str | None:
    """Return the format of a file that is not a text or Parquet manifest, and how to fix it; None if not recognised.

    Raises OSError if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    nulls = head[:8].count(0)  # the header is ASCII, even if the rows use another alphabet
    return None if nulls < 3 or head.startswith(b"PAR1") else _UTF_16 if nulls < 6 else _UTF_32


def line_that_is_not_utf8(path: Path) -> int:
    """Return the number of the first line that is not UTF-8, counted from 1; 0 if all are. Raises OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def missing_file(root: Path, names: Sequence[str]) -> str | None:
    """Return a message about a path that is not a file, but would be if written differently; None if there is none.

    Only some paths are tried: the first three, and up to a hundred with backslashes, outer spaces or non-ASCII letters.
    """
    some = [(name, _more_complete(root, name)) for name in names[:_FIRST]]
    some += [(name, _written_otherwise(name)) for name in islice(filterfalse(_is_plain, names), _TRIED)]
    for name, ways in some:
        if not remote.is_url(name) and not _is_file(root, name):
            for other, cause in ways.items():
                if _is_file(root, other):
                    return f"no file '{name}', but '{other}' is there: {cause}"
    return None


def _is_plain(name: str) -> bool:
    return name.isascii() and "\\" not in name and name == name.strip()


def _more_complete(root: Path, name: str) -> Mapping[str, str]:
    """Return longer paths that `name` may stand for, each with the fault of `name`."""
    lacking = dict.fromkeys((f"{name}{ending}" for ending in _ENDINGS), "the path lacks its ending")
    above = os.path.join("..", name)  # noqa: PTH118
    return {**lacking, above: f"paths start from {root.parent}: give --image-root"}


def _written_otherwise(name: str) -> Mapping[str, str]:
    """Return other ways to write the path `name`, each with the fault of `name`."""
    plain = name.strip().replace("\\", "/")
    drive, *parts = PureWindowsPath(plain).parts or (plain,)
    from_drive = ["/".join(parts[at:]) for at in range(len(parts))] if ":" in drive else []
    ways = [
        (name.strip(), "there are blanks around the path"),
        (name.replace("\\", "/"), "the path has backslashes in place of /"),
        (plain, "the path has backslashes in place of /, and blanks around it"),
        *((unicodedata.normalize(form, plain), f"the file's name has Unicode form {form}") for form in ("NFC", "NFD")),
        *((other, "the path starts from a drive of Windows") for other in from_drive),
    ]
    return {other: cause for other, cause in reversed(ways) if other != name}


def _is_file(root: Path, name: str) -> bool:
    return os.path.isfile(os.path.join(root, name))  # noqa: PTH113, PTH118  Path.is_file raises if a name is too long
