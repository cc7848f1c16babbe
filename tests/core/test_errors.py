"""What ran out is told by one line that says what to do."""

from __future__ import annotations

import errno
import os

import pytest

import cli
from pipeline.core.errors import CacheError, exhausted


class ResourceExhaustedError(Exception):
    """As TensorFlow's is called."""


def failed(number: int, text: str = "") -> OSError:
    return OSError(number, text or os.strerror(number))


def caused(by: BaseException) -> ImportError:
    error = ImportError("pages of advice")
    error.__cause__ = by
    return error


UNMAPPED = ImportError("libx.so: failed to map segment from shared object")
RAN_OUT = {
    "memory": (MemoryError(), "there is no more memory (MemoryError): ", "ulimit -v"),
    "fork": (failed(errno.ENOMEM), "there is no more memory ([Errno 12] Cannot allocate memory): ", "ulimit -v"),
    "library": (UNMAPPED, "there is no more memory (libx.so: failed to map", "ulimit -v"),
    "numpy": (caused(UNMAPPED), "there is no more memory (libx.so: failed to map", "ulimit -v"),
    "gpu": (ResourceExhaustedError("OOM when\nallocating"), "there is no more memory for TensorFlow", "--batch-size"),
    "thread": (RuntimeError("can't start new thread"), "no more threads or processes may be started", "ulimit -u"),
    "process": (failed(errno.EAGAIN), "no more threads or processes may be started", "ulimit -u"),
    "files": (failed(errno.EMFILE), "no more files may be opened", "ulimit -n"),
    "scratch": (FileNotFoundError(2, "No usable temporary directory found in ['/']"), "no folder takes", "TMPDIR"),
}
ANOTHER = (
    RuntimeError("a bug"),
    ImportError("No module named x"),
    caused(ValueError("an odd backend")),
    failed(errno.ENOSPC),
    failed(errno.EAGAIN, "unable to lock file, errno = 11, error message = 'Resource temporarily unavailable'"),
    FileNotFoundError(2, "No such file or directory", "a.jpg"),
    CacheError("a shard is damaged"),
)


@pytest.mark.parametrize("kind", RAN_OUT)
def test_what_ran_out_and_what_to_do(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, begins, way_out = RAN_OUT[kind]

    def fails(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fails)
    monkeypatch.setattr(cli, "_stops_noted", list)
    assert cli.main(["doctor"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {begins}")
    assert way_out in line


@pytest.mark.parametrize("error", ANOTHER, ids=str)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert exhausted(error) is None
