"""What a shell proposes after TAB, beside commands and options: names of runs, sweeps, spaces, datasets."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path

import typer


def _root(context: typer.Context) -> Path:
    """Return the data directory that the command is about, as far as it is typed."""
    from pipeline.commands.config import data_dir_of

    root = context.find_root()
    default = str(root.get_parameter_source("data_dir")).endswith(".DEFAULT")
    named = data_dir_of(root.params["config"]) if default else None
    return named or Path(root.params["data_dir"])


def _quiet(names: Callable[[typer.Context, str], list[str]]) -> Callable[[typer.Context, str], list[str]]:
    """Have what fails propose nothing: what it would say would stand in the middle of a command that is being typed."""

    @wraps(names)
    def of(context: typer.Context, incomplete: str) -> list[str]:
        from pipeline.core.errors import IceboxError

        try:
            return names(context, incomplete)
        except (IceboxError, OSError, TypeError, ImportError):  # TypeError where a data directory cannot be one
            return []

    return of


@_quiet
def run_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of published runs that begin so, the latest first."""
    from pipeline.runs.store import published_names

    names = ["latest", "best", *reversed(published_names(_root(context) / "runs"))]
    return [name for name in names if name.startswith(incomplete)]


@_quiet
def stopped_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of runs, or for `sweep` of sweeps, that were stopped, the latest first."""
    from pipeline.runs.store import unfinished

    folder = "sweeps" if context.info_name == "sweep" else "runs"
    return [name for name in reversed(unfinished(_root(context) / folder)) if name.startswith(incomplete)]


@_quiet
def space_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of feature spaces that begin so."""
    folder = _root(context) / "cache"
    return sorted(path.parent.name for path in folder.glob("*/space.json") if path.parent.name.startswith(incomplete))


def backbone_names(incomplete: str) -> list[str]:
    """Return the names of networks that begin so; for anything else the shell proposes files."""
    from pipeline.backbone.table import BACKBONES

    return [name for name in BACKBONES if name.startswith(incomplete)]


def dataset_names(incomplete: str) -> list[str]:
    """Return the names of known datasets that begin so; for anything else the shell proposes files."""
    return [name for name in ("digits", "cifar10", "cifar100") if incomplete and name.startswith(incomplete)]
