"""The benchmarks can be run: each says how, and the one that runs the others knows what all of them take."""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = ROOT / "benchmarks"
PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py"))


@functools.cache
def help_of(name: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}  # which workers here have set
    command = [sys.executable, str(FOLDER / name), "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_says_what_it_does_and_how_it_is_called(name: str) -> None:
    text = help_of(name)
    assert f"benchmarks/{name}" in text, "an example"
    assert f"`{name}`" in (FOLDER / "README.md").read_text(), "and what came out"


def test_all_of_them_are_called_with_options_they_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from all import commands  # type: ignore[import-not-found]

    for quick, more in ((False, None), (True, tmp_path)):
        given = argparse.Namespace(
            dataset=tmp_path, weights=tmp_path, photos=tmp_path, thingsvision=more, quick=quick, only=None
        )
        for program, options in commands(given, "data").values():
            known = set(re.findall(r"--[\w-]+", help_of(f"{program}.py")))
            assert {each for each in options if each.startswith("--")} <= known


def test_nothing_is_measured_without_images_and_weights(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "all.py"), "--dataset", "digits", "--weights", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: digits is not there; DATASET= must be a folder of images, WEIGHTS= a file\n"
