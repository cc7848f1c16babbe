"""Every command and snippet in the README and the docs does what it says, in a copy of the project."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import keras
import psutil
import pytest
import warm
from conftest import ROOT, environment, icebox, make_once, small_model, write_picture
from served import free_ports

from pipeline.deployment.export_formats import FORMATS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs these tests, and what only prepares the shell.
NOT_RUN = ("make test", "source .venv/bin/activate")
# Run by Python itself and with InceptionV3, as all of them are by --all.
STARTED = ("datasets.md", "remote.md")
# Accuracies of the quickstart: with InceptionV3 on all digits, and with the small network on 600 of them.
LEAST = {
    True: {"logreg": 0.92, "gap": 0.90, "flatten": 0.90},
    False: {"logreg": 0.65, "gap": 0.65, "flatten": 0.80},
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, code) of the fenced blocks of a page that are run, sh and python, or are files, toml."""
    return re.findall(r"^```(sh|python|toml)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(code: str) -> list[str]:
    return [line for line in map(str.strip, code.splitlines()) if line and not line.startswith(NOT_RUN)]


# The program `python` of the pages: `cli.py` runs in a warm process, with the data directory of the project and the
# options of small.toml, unless the page names a file of options; everything else runs by Python itself.
# Plots are not rendered: no page fails because of one that cannot be.
CLIENT = """#!{python} -IS
import os, sys
from pathlib import Path
if sys.argv[1:2] != ["cli.py"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
sys.path.insert(0, {tests!r})
import warm
warm.plots = False
own = ["--data-dir", {project!r} + "/data", "--config", {project!r} + "/small.toml"]
arguments = [*([] if "--config" in sys.argv else own), *sys.argv[2:]]
streams = dict(stdin=0, stdout=1, stderr=2)
process = warm.Process(arguments, cwd=Path.cwd(), env=dict(os.environ), listening={listening!r}, **streams)
sys.exit(process.wait())
"""
REAL = """#!/bin/sh
exec {python} "$@"
"""


def write_networks(folder: Path) -> None:
    """Save one with InceptionV3's input size and names of its last layers, and another of a user's."""
    layers = keras.layers
    keras.utils.set_random_seed(1)
    inputs = keras.Input((299, 299, 3))
    x = layers.AveragePooling2D(8)(inputs)
    for filters, name in ((16, "mixed8"), (32, "mixed9"), (64, "mixed10")):
        x = layers.BatchNormalization()(layers.Conv2D(filters, 3, 2, "same", use_bias=False)(x))
        x = layers.ReLU(name=name)(x)
    keras.Model(inputs, x).save(folder / "small.keras")
    (folder / "small.toml").write_text('backbone = "small.keras"\nlimit = 600\n')
    inputs = keras.Input((32, 32, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, strides=2, use_bias=False)(inputs))
    keras.Model(inputs, layers.Conv2D(8, 3, activation="relu")(x)).save(folder / "my.keras")


def make_project(folder: Path) -> None:
    """Write a copy of the project with a folder `photos` of its user's, whose features are there already."""
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "*.egg-info", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for i in range(40):
        write_picture(folder / "photos" / ("cats" if i % 2 else "dogs") / f"{i}.jpg", seed=i)
    write_networks(folder)
    # What the pages load, but do not export, as that takes its time: small models of the same form.
    model = small_model(299)
    for name in ("litert", "openvino", "savedmodel"):
        (export := folder / f"photos-{name}").mkdir()
        FORMATS[name].write(model, export / FORMATS[name].file, ["cats", "dogs", "others"])
    # No network here, so no ImageNet: `auto` then finds the features of untrained weights on disk and uses them.
    for network in (["--weights", "untrained"], ["--backbone", "small.keras", "--scaling", "127.5,127.5"]):
        done = icebox(folder / "data", "features", "--dataset", "photos", *network, cwd=folder)
        assert done.code == 0, done.err
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / ".ready").touch()


@pytest.fixture(scope="module")
def original(common: Path) -> Path:
    """The project that is copied for each page, made once for all test processes."""
    return make_once(common / "clone" / "icebox", make_project)


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Iterator[Path]:
    copy = tmp_path / "icebox"
    shutil.copytree(original, copy)
    yield copy
    for process in psutil.process_iter():  # a scheduler and workers that docs/cluster.md leaves in the background
        with suppress(psutil.Error):
            if process.cwd() == str(copy):
                process.kill()


def write_python(project: Path, real: bool) -> None:
    """Write what stands as `python` before the commands of a page."""
    path = project / ".venv" / "bin" / "python"
    tests = str(Path(__file__).parent)
    listening = None if real else warm.server()
    text = (REAL if real else CLIENT).format(
        python=sys.executable, tests=tests, project=str(project), listening=listening
    )
    path.write_text(text)
    path.chmod(0o755)


def run(project: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(project / ".venv" / "bin"), str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
    return subprocess.run(command, cwd=project, env=environment(PATH=path), capture_output=True, text=True, timeout=900)


# A page is one test, as some blocks work on what those above them made.
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_page(project: Path, page: Path, pytestconfig: pytest.Config) -> None:
    real = pytestconfig.getoption("all") or page.name in STARTED
    write_python(project, real)
    scheduler, dashboard = map(str, free_ports(2))
    ports = {"8786": scheduler, "8787": dashboard}  # the page's may be taken here
    for language, code in blocks(page):
        if language == "sh":
            for line in commands(code):
                check_command(project, re.sub(r"\b878[67]\b", lambda port: ports[str(port[0])], line), LEAST[real])
        elif language == "toml":
            write_options(project, code, real)
        else:
            check_snippet(project, code)


def write_options(project: Path, code: str, real: bool) -> None:
    """Write a page's file of options, whose first line is its name, with those of small.toml unless `real`."""
    small = "" if real else (project / "small.toml").read_text()
    (project / code.partition("\n")[0].removeprefix("# ")).write_text(small + code)


def check_command(project: Path, line: str, least: dict[str, float]) -> None:
    runs = set(project.glob("data/runs/*"))
    done = run(project, ["bash", "-c", line])
    assert done.returncode == 0, f"{line}: {done.stderr}"
    if "--config" in line:
        assert set(project.glob("data/runs/*")) > runs, "the file names the data directory"
    if line == "make quickstart":
        check_quickstart(done.stderr, least)


def check_snippet(project: Path, code: str) -> None:
    if "torch" in code and importlib.util.find_spec("torch") is None:
        warnings.warn(
            "NOT TESTED: the snippet for PyTorch, which is not installed: make setup EXTRAS=torch", stacklevel=1
        )
        return
    done = run(project, ["python", "-c", code])
    assert done.returncode == 0, f"{code}: {done.stderr}"
    assert re.search(r"\d+, \d+|\d\.\d+", done.stdout), code  # the shape of rows, or probabilities


def check_quickstart(said: str, least: dict[str, float]) -> None:
    lines = said.splitlines()
    head = next(
        number for number, line in enumerate(lines) if line.split()[:4] == ["run", "head", "dataset", "accuracy"]
    )
    accuracies = {line.split()[1]: float(line.split()[3]) for line in lines[head + 1 : head + 4]}
    assert accuracies.keys() == least.keys()
    assert all(accuracies[name] >= least[name] for name in least)
    assert "likely wrong labels" in "\n".join(lines[head + 4 :])  # of the report of the best


def test_every_command_stands_in_the_readme() -> None:
    listed = icebox(ROOT / "data", "--help").out.partition("Commands:")[2]
    names = re.findall(r"^  ([a-z-]+)  ", listed, re.MULTILINE)
    assert len(names) >= 7
    text = (ROOT / "README.md").read_text()
    missing = [name for name in names if f"cli.py {name}" not in text]
    assert not missing


def test_the_page_of_all_options_is_current() -> None:
    title = ("--name", "python cli.py", "--title", "The command line")
    made = subprocess.run(
        [sys.executable, "-m", "typer", "cli.py", "utils", "docs", *title],
        cwd=ROOT, env=environment(COLUMNS="80"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert made.stdout.strip() == (ROOT / "docs" / "cli.md").read_text().strip(), "run `make docs`"


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("  make ")} == set(phony[1].split())


@pytest.mark.parametrize(("target", "command"), [("freeze", "freeze"), ("finetune", "finetune --from-cache")])
def test_make_calls_the_commands(target: str, command: str) -> None:
    done = subprocess.run(
        ["make", "-n", target, "DATASET=photos"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"cli.py {command} --dataset " in done.stdout


def test_the_project_names_no_machine_and_no_registry() -> None:
    hosts = re.compile(r"p[y]pi\.org|python[h]osted|npm[j]s|deb\.de[b]ian|^/(?:home|root|work)/", re.MULTILINE)
    for path in [*PAGES, ROOT / "constraints.txt", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert not hosts.search(path.read_text()), path


def test_what_builds_it_can_read_how_the_license_is_written() -> None:
    """As an expression, which ends the build by setuptools before 77."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["license"] == "MIT"
    (required,) = project["build-system"]["requires"]
    assert required.startswith("setuptools>=")
    assert int(required.partition(">=")[2]) >= 77
