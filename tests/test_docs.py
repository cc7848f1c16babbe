"""Every command and snippet in the README and the docs does what it says, in a copy of the project."""

from __future__ import annotations

import ast
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
from conftest import ROOT, environment, icebox, small_model, write_picture

from pipeline.formats import FORMATS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs these tests, and what only prepares the shell.
NOT_RUN = ("make test", "source .venv/bin/activate")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, code) of the fenced blocks of a page that are run, sh and python, or are files, toml."""
    return re.findall(r"^```(sh|python|toml)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(code: str) -> list[str]:
    return [line for line in map(str.strip, code.splitlines()) if line and not line.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project with a folder `photos` of its user's, whose features are there already."""
    copy = tmp_path_factory.mktemp("clone") / "icebox"
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "*.egg-info", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(sys.prefix)
    for i in range(40):
        write_picture(copy / "photos" / ("cats" if i % 2 else "dogs") / f"{i}.jpg", seed=i)
    inputs = keras.Input((32, 32, 3))
    output = keras.layers.Conv2D(8, 3, strides=2, use_bias=False)(inputs)
    output = keras.layers.Conv2D(8, 3, activation="relu")(keras.layers.BatchNormalization()(output))
    keras.Model(inputs, output).save(copy / "my.keras")
    # What the pages load, but do not export, as that takes its time: small models of the same form.
    model = small_model(299)
    for name in ("litert", "openvino", "savedmodel"):
        (folder := copy / f"photos-{name}").mkdir()
        FORMATS[name].write(model, folder / FORMATS[name].file, ["cats", "dogs", "others"])
    # No network here, so no ImageNet: `auto` then finds these features on disk and uses them.
    done = icebox(copy / "data", "features", "--dataset", copy / "photos", "--weights", "untrained")
    assert done.code == 0, done.err
    yield copy
    for process in psutil.process_iter():  # a scheduler and workers that docs/cluster.md leaves in the background
        with suppress(psutil.Error):
            if process.cwd() == str(copy):
                process.kill()


def run(project: Path, command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=project, env=environment(PATH=path), capture_output=True, text=True, timeout=900
    )


# A page is one test, as some blocks work on what those above them made: tests are dealt out to processes, each of which
# has a project of its own.
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_page(project: Path, page: Path) -> None:
    for language, code in blocks(page):
        if language == "sh":
            for line in commands(code):
                check_command(project, line)
        elif language == "toml":  # whose first line is its name
            (project / code.partition("\n")[0].removeprefix("# ")).write_text(code)
        else:
            check_snippet(project, code)


def check_command(project: Path, line: str) -> None:
    if line.startswith("make") and not (Path(sys.prefix) / ".ready").exists():
        pytest.skip("not an environment that `make setup` made: run the tests by `make test`")
    done = run(project, line)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    if line == "make quickstart":
        check_quickstart(done.stderr)


def check_snippet(project: Path, code: str) -> None:
    if "torch" in code and importlib.util.find_spec("torch") is None:
        warnings.warn(
            "NOT TESTED: the snippet for PyTorch, which is not installed: make setup EXTRAS=torch", stacklevel=1
        )
        return
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}: {done.stderr}"
    assert re.search(r"\d+, \d+|\d\.\d+", done.stdout), code  # the shape of rows, or probabilities


def check_quickstart(said: str) -> None:
    lines = said.splitlines()
    head = next(
        number for number, line in enumerate(lines) if line.split()[:4] == ["run", "head", "dataset", "accuracy"]
    )
    accuracies = {line.split()[1]: float(line.split()[3]) for line in lines[head + 1 : head + 4]}
    assert accuracies["logreg"] >= 0.92
    assert accuracies["gap"] >= 0.90
    assert accuracies["flatten"] >= 0.90
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


def imported_modules(path: Path) -> set[str]:
    """Return what a module of `pipeline` imports of `pipeline`, as "images" or "cache/space"."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
            base = (node.module or "").split(".")[1:]
            names = [[*base, alias.name] for alias in node.names]
            found |= {"/".join(parts[:2]) for parts in names}
    return found


def test_a_module_imports_only_from_those_above_it() -> None:
    """In the table of docs/architecture.md, whose rows are floors."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| module |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w/]+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    floors = {name.strip("/"): number for number, names in enumerate(rows) for name in names}

    def floor(module: str) -> int | None:
        return floors.get(module, floors.get(module.split("/")[0]))

    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        module = str(path.relative_to(ROOT / "pipeline").with_suffix("")).removesuffix("/__init__")
        if module in ("__init__", "cache"):  # which lead to others, or are empty
            continue
        here = floor(module)
        assert here is not None, f"{module} is not in the table"
        for imported in imported_modules(path):
            there = floor(imported)
            assert there is not None, f"{module} imports {imported}, which is not in the table"
            assert there <= here, f"{module} imports {imported}, which stands below it in the table"


def test_what_builds_it_can_read_how_the_license_is_written() -> None:
    """As an expression, which ends the build by setuptools before 77."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["license"] == "MIT"
    (required,) = project["build-system"]["requires"]
    assert required.startswith("setuptools>=")
    assert int(required.partition(">=")[2]) >= 77
