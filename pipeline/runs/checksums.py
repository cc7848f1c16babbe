"""Write the checksums of a run's files when the run is published, and check them when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import files
from pipeline.core.errors import RunError

CHECKSUMS = "SHA256SUMS"  # lists all files of a published run, in the format of `sha256sum --check`
_VOUCHING = ("run.json", "network.json", "head.json", "fold-*/head.json")  # the last three hold digests of weights


def write_checksums(folder: Path, but: Sequence[str]) -> None:
    """Write the checksums of all files in a run's folder, except files with the names `but`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (CHECKSUMS, *but)]
    lines = [f"{files.sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    files.write_whole(folder / CHECKSUMS, "".join(lines).encode("utf-8", "surrogateescape"))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return file name → sha256, 64 hex digits, of a run's files; an empty dict for a run without checksums.

    Raises
    ------
    RunError
        If the checksums cannot be read.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    try:
        lines = files.read_small(path, files.MOST_JSON_BYTES).decode("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise _unknown(path, error) from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_files(folder: Path, named: object) -> None:
    """Raise RunError if run.json, or a file that holds digests of weights, was changed after publishing.

    `named` is the value "checksums" of run.json. A run of version 0.1.0 has neither this value nor checksums; nothing
    is compared then.
    """
    path = folder / CHECKSUMS
    if named is None and not path.exists():
        return
    if not path.exists():
        raise _unknown(path, FileNotFoundError(2, "No such file or directory"))
    known = read_checksums(folder)
    for found in [each for pattern in _VOUCHING for each in sorted(folder.glob(pattern))]:
        if known.get(found.relative_to(folder).as_posix()) != hashlib.sha256(_content(found)).hexdigest():
            raise not_published(found)


def not_published(path: Path) -> RunError:
    """Return the error for a file of a run that was changed after publishing."""
    return RunError(
        f"{path} is not the file that was published, as {CHECKSUMS} has another digest; restore it, or train anew"
    )


def _unknown(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be read ({error}), so nobody knows whether the run is whole")


def _content(path: Path) -> bytes:
    try:
        return files.read_small(path, files.MOST_JSON_BYTES)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or train anew") from error
