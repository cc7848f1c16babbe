"""What a limit leaves too little of is said in one line, before a library ends the process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Finished, command_line, environment

from pipeline.core import machine
from pipeline.core.errors import IceboxError

FEW_THREADS = "error: NumPy starts threads, and of"


def limited(limit: str, data: Path, *arguments: str, unprivileged: bool = False) -> Finished:
    """Run a command under a limit of `prlimit`. How many processes root may start is not limited, so it is nobody."""
    if shutil.which("prlimit") is None:
        pytest.skip("NOT TESTED: there is no prlimit here; install Debian's package util-linux")
    line = ["prlimit", limit, *command_line(data, *arguments)]
    if unprivileged and machine.os.geteuid() == 0:
        rights = "+dac_override,+dac_read_search"  # of root it keeps this alone: to read the program, wherever it lies
        line = ["setpriv", "--reuid=65534", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}", *line]
        if subprocess.run([*line[:5], "true"], capture_output=True).returncode:
            pytest.skip("NOT TESTED: root may not become another user here")
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


def test_a_limit_of_address_space_is_one_line(tmp_path: Path) -> None:
    done = limited("--as=1500000000", tmp_path, "doctor", "--json")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: TensorFlow takes 2.50 GB of address space, and ")
    assert line.endswith("raise the limit of this one (ulimit -v, or its container's)")
    assert done.json == {"error": line.removeprefix("error: ")}


def test_so_is_one_that_holds_no_library_at_all(tmp_path: Path) -> None:
    done = limited("--as=300000000", tmp_path, "runs", "ls")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: NumPy takes 700 MB of address space, and ")


def test_a_limit_of_threads_is_one_line() -> None:
    """Where NumPy would end the program by the signal of Ctrl-C, and TensorFlow by a crash."""
    done = limited("--nproc=1", Path("/nowhere"), "runs", "ls", unprivileged=True)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith(FEW_THREADS)
    assert line.endswith("(ulimit -u, or its container's)")


def test_tensorflow_is_not_begun_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(machine.threading.Thread):
        count = 0

        def start(self) -> None:
            Started.count += 1
            if Started.count > 3:
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(machine.threading, "Thread", Started)
    before = machine.threading.active_count()
    with pytest.raises(IceboxError, match=r"^TensorFlow starts threads, and of 16 only 3 may be: "):
        machine.require_room("TensorFlow", 10**9, 16)
    assert machine.threading.active_count() == before


@pytest.mark.parametrize(
    ("place", "prefix", "command"),
    [
        ("checkout", "checkout/.venv", "make setup EXTRAS=serve"),
        ("check out", "elsewhere", "pip install --editable '{root}[serve]'"),
        ("site-packages", "elsewhere", "pip install 'icebox[serve]'"),
    ],
)
def test_an_extra_is_installed_as_icebox_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, prefix: str, command: str
) -> None:
    root = tmp_path / place
    root.mkdir()
    if place != "site-packages":
        (root / "pyproject.toml").touch()
    monkeypatch.setattr(machine, "__file__", str(root / "pipeline" / "core" / "machine.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / prefix))
    assert machine.installs("serve") == command.format(root=root)
