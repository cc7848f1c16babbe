"""The packages of `pipeline`: their order, which docs/architecture.md has, and which modules import which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = ROOT / "pipeline"
TABLE = (ROOT / "docs" / "architecture.md").read_text().partition("| package |")[2].partition("\n\n")[0]
ORDER = [re.findall(r"`(\w+)`", line.split("|")[1])[0] for line in TABLE.splitlines()[2:]]


def module_name(path: Path) -> str:
    """Return the dotted name of a module, of a package's `__init__` that of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCES.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a module imports, within functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def package(module: str) -> str:
    return module.split(".")[1]


def test_the_library_is_packages_that_say_what_they_are_for() -> None:
    assert [path.name for path in SOURCES.glob("*.py")] == ["__init__.py"]
    assert sorted(ORDER) == sorted(path.parent.name for path in SOURCES.glob("*/__init__.py"))
    for path in SOURCES.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_module_imports_from_its_package_and_those_above_it() -> None:
    for module in MODULES.keys() - {"pipeline"}:
        for other in imported(MODULES[module]):
            if other.startswith("pipeline."):
                assert ORDER.index(package(other)) <= ORDER.index(package(module)), f"{module} imports {other}"


@pytest.mark.parametrize("name", ORDER)
def test_no_two_modules_of_a_package_import_each_other(name: str) -> None:
    inside = {module: path for module, path in MODULES.items() if module.startswith(f"pipeline.{name}")}
    graph = {module: set(imported(path)) & inside.keys() - {module} for module, path in inside.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(inside), "raises CycleError at a circle"


@pytest.mark.parametrize("name", ORDER[: ORDER.index("cache") + 1])
def test_up_to_the_cache_nothing_imports_tensorflow(name: str) -> None:
    for path in (SOURCES / name).rglob("*.py"):
        assert not {other.split(".")[0] for other in imported(path)} & {"tensorflow", "keras"}, path
