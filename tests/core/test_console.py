"""What people read, on terminals of several widths and without one; and what a shell completes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, command_line, environment, finished, icebox, write_picture
from deployed import Deployed

import cli
from pipeline.core import console
from pipeline.core.units import size_text

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

WORK = """
import time
from pipeline.core import console
console.begin(quiet={quiet})
with console.progress("computing features", 300) as advance:
    for _ in range(30):
        advance(10, note="2 workers, 17.3 and 18.1/s")
        time.sleep(0.01)
console.warn("notice: weights are UNTRAINED")
console.table([("20261126-130655-digits-logreg", "logreg", 0.989, "0.962 … 0.997", 0.995, "a" * 30)] * 2,
               ("run", "head", "accuracy", "95% interval", "val", "weights"))
console.pairs({{"page": "/a/" + "long/" * 30 + "page.html", "seconds": 3}})
"""


def on_terminal(columns: int, command: list[str], **env: str) -> str:
    """Run a command on a terminal of its own; return all that it wrote there."""
    pid, handle = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        kept = {name: value for name, value in environment(**env).items() if name != "COLUMNS"}
        os.execve(command[0], command, {**kept, "TERM": "xterm-256color"})
    fcntl.ioctl(handle, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    while True:
        assert select.select([handle], [], [], 300)[0], written.decode()
        try:
            part = os.read(handle, 65536)
        except OSError:  # how Linux says that nobody has the terminal any more
            part = b""
        if not part:
            break
        written += part
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written.decode()
    return written.decode()


def script(quiet: bool = False) -> list[str]:
    return [sys.executable, "-c", WORK.format(quiet=quiet)]


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_bars_and_tables_fit_the_terminal(columns: int) -> None:
    lines = re.split(r"[\r\n]+", ESCAPE.sub("", on_terminal(columns, script())))
    assert any("computing featu" in line and "300/300 images" in line for line in lines)
    assert re.search(r"[\d.]+/s +\d:\d\d:\d\d", "\n".join(lines))
    whole = [line for line in lines if "/a/long" not in line and not line.startswith("(too narrow")]
    assert max(map(len, whole)) <= columns
    assert f"page     /a/{'long/' * 30}page.html" in lines, "whole, so that it can be copied"
    narrow = any("too narrow here for: " in line and "weights" in line for line in lines)
    assert narrow == (columns < 120)


def test_colours_are_for_terminals() -> None:
    yellow = "\x1b[33mnotice"
    assert yellow in on_terminal(80, script())
    assert yellow not in on_terminal(80, script(), NO_COLOR="1")
    assert "\x1b[3" not in on_terminal(80, script(), NO_COLOR="1")
    piped = subprocess.run(script(), cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stderr
    assert "\r" not in piped.stderr
    assert piped.stdout == ""


def test_quiet_leaves_warnings(deployed: Deployed) -> None:
    assert ESCAPE.sub("", on_terminal(80, script(quiet=True))).split() == ["notice:", "weights", "are", "UNTRAINED"]
    done = icebox(deployed.data, "runs", "ls", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    both = icebox(deployed.data, "runs", "ls", "--quiet", "--json")
    assert len(both.json["runs"]) == 6
    assert both.err == ""
    wrong = icebox(deployed.data, "report", "nothing", "-q")
    assert wrong.err.startswith("error: no run named 'nothing'")


@pytest.mark.parametrize("encoding", ["cp437", "latin-1"])
def test_what_an_encoding_lacks_is_spelt(tmp_path: Path, encoding: str) -> None:
    """In help, tables and notices alike, on both streams."""

    env = environment(PYTHONIOENCODING=encoding)

    def said(*words: str | Path) -> str:
        done = finished(command_line(tmp_path / "data", *words)[2:], env=env)
        assert done.code == 0, done.err
        text = (done.out + done.err).encode("utf-8", "surrogateescape").decode(encoding)
        assert "Traceback" not in text
        return text

    line = command_line(tmp_path / "data", "train-head", "--help")
    helped = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, check=True).stdout.decode(encoding)
    assert re.search(r"NAME=VALUE,\.\.\.", helped)
    for i, name in enumerate(("caf\u00e9", "\u732b")):
        write_picture(tmp_path / "photos" / name / f"{i}.png", seed=i)
    shown = said("doctor", tmp_path / "photos", "--json") + said("doctor", tmp_path / "photos")
    assert '"\\u732b"' in shown, "in JSON"
    assert re.search(r"^\\u732b +[01] ", shown, re.MULTILINE), "in the table"
    assert "caf\u00e9 " in shown


def test_odd_bytes_of_names_are_spelt_too() -> None:
    error = UnicodeEncodeError("cp437", "a\udcff\u2026\u2192\u2265", 1, 5, "character maps to <undefined>")
    assert cli._spelt(error) == ("\\udcff...->>=", 5)


def complete(line: str, shell: str = "bash") -> list[str]:
    words = line.split(" ")
    env = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_CLI.PY_COMPLETE": f"complete_{shell}"}
    return finished([], env=environment(**env)).out.split()


def test_a_shell_completes_commands_options_and_names(deployed: Deployed, tmp_path: Path) -> None:
    before = f"cli.py --data-dir {deployed.data}"
    assert complete("cli.py fe") == ["features"]
    assert complete("cli.py cache ex") == ["explain", "export"]
    assert complete("cli.py train-head --sp") == ["--space"]
    assert complete("cli.py train-head --head ") == ["flatten", "gap", "logreg"]
    assert complete("cli.py features --dataset cifar") == ["cifar10", "cifar100"]
    assert complete(f"{before} report ")[:2] == ["latest", "best"]
    assert deployed.name("gap") in complete(f"{before} predict {deployed.name('gap')[:12]}")
    assert deployed.name("gap") in complete(f"{before} finetune --init {deployed.name('gap')[:12]}")
    named = tmp_path / "mine.toml"
    named.write_text(f'data-dir = "{deployed.data}"')
    assert deployed.name("gap") in complete(f"cli.py --config {named} predict {deployed.name('gap')[:12]}")
    assert complete(f"cli.py --data-dir {named} predict ") == [], "it is no folder"
    spaces = {path.parent.name for path in (deployed.data / "cache").glob("*/space.json")}
    assert set(complete(f"{before} train-head --space ")) == spaces


def test_the_installed_program_is_the_same(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "icebox"
    if not program.exists():
        pytest.skip("not an environment that `make setup` made")
    done = subprocess.run(
        [program, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: icebox [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (9_999, "10.0 kB"), (38_400, "38.4 kB"),
        (99_999, "100 kB"), (999_500, "1.00 MB"), (134e6, "134 MB"), (999_999_999, "1.00 GB"), (12.24e9, "12.2 GB"),
        (1.5e13, "15,000 GB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert size_text(count) == text


def test_columns_stand_in_line_whatever_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([("猫", 3), ("a\x1bb", 4), ("dog", 5)], ("class", "images"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["class   images", "猫      3", "a\\x1bb  4", "dog     5"]
