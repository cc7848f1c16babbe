"""What the commands share: options with one name and one meaning everywhere, and how results are printed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from pipeline.commands.completion import dataset_names, run_names
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.api.icebox import Icebox
    from pipeline.api.results import Result
    from pipeline.api.run import Run
    from pipeline.extraction.planning import Quarantined

Options = TypeVar("Options", bound=Mapping[str, Any])

DatasetOption = Annotated[
    str,
    typer.Option(
        help="digits, cifar10, cifar100, a folder of class folders, or a .csv or .parquet manifest.",
        autocompletion=dataset_names,
    ),
]
MaxBadOption = Annotated[
    float, typer.Option(help="Share of images that may be quarantined before the exit code is 3.", min=0, max=1)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but warnings and errors.")]


_FEATURE_OPTIONS = (
    "dataset", "archive", "image_root", "limit", "backbone", "input_size", "scaling", "weights", "layer", "precision",
    "storage", "space", "fit", "depth", "max_pixels", "views", "augment",
)  # fmt: skip


def _take_over(context: typer.Context, name: str | None) -> str | None:
    """Make what a run was asked for the defaults of a command, before its other options are looked at."""
    if name is None or context.resilient_parsing:
        return name
    from pipeline.deployment.reproduce import options_like
    from pipeline.training.open_run import open_run

    options = {option.opts[0].removeprefix("--"): option.name for option in context.command.params}
    like = options_like(open_run(context.obj / "runs", name), str(context.info_name))
    taken = {options[key]: value for key, value in like.items()}
    by_file = {key: value for key, value in (context.default_map or {}).items() if not _asks(context, key)}
    context.default_map = {**by_file, **taken}
    return name


def _asks(context: typer.Context, option: str) -> bool:
    """Return whether an option is part of what a run was asked for, not of the machine and the moment."""
    return option in _FEATURE_OPTIONS if context.info_name == "features" else option not in _NOT_ASKED


_NOT_ASKED = ("memory", "max_bad", "tensorboard", "as_json", "quiet")


LikeOption = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Take over everything that RUN was asked for: images, features, settings; what is typed wins.",
        is_eager=True,
        callback=_take_over,
        autocompletion=run_names,
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run as `runs ls` lists it, a path, latest, or best.", autocompletion=run_names
    ),
]


@contextmanager
def icebox(context: typer.Context, *, quiet: bool) -> Iterator[Icebox]:
    """Give the data directory of a command, as programs have it; messages name this program.

    Raises
    ------
    StoppedError
        If the command is interrupted.
    """
    from pipeline.api.icebox import Icebox
    from pipeline.core.errors import MissingFeaturesError, StoppedError

    try:
        yield Icebox.of_program(context.obj, program(context), quiet=quiet)
    except MissingFeaturesError as error:
        error.commands = tuple(features_line(context, options) for options in error.options)
        raise
    except KeyboardInterrupt as stop:
        raise StoppedError(stop) from stop


def without_unused_views(context: typer.Context, options: Options) -> Options:
    """Return the options without an `augment` that only a file gives: there it says what views are like if any are."""
    if options.get("views") == 1 and "augment" not in typed(context):
        return cast(Options, {**options, "augment": None})
    return options


def only_what_was_typed(context: typer.Context, options: Mapping[str, Any]) -> Any:
    """Return the options that go with --resume, refusing others; what a file says is of new runs."""
    stated = typed(context)
    spelt = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if others := [name for name in stated if name not in options and name not in _BESIDE_RESUME]:
        from pipeline.core.errors import UsageError

        listed = ", ".join(spelt[name] for name in others)
        raise UsageError(f"--resume continues with what was requested before; leave out {listed}")
    return {name: value for name, value in options.items() if name in stated}


_BESIDE_RESUME = ("as_json", "quiet", "max_bad")


def show_run(run: Run, as_json: bool) -> None:
    """Print the summary of a run that was trained just now."""
    show(run, as_json, note=f"kept in {run.path}")


def show(result: Result, as_json: bool, note: str | None = None) -> None:
    """Print a result: the JSON object to stdout, or its lines for people."""
    from pipeline.core import console

    if as_json:
        console.emit_json(result.to_dict())
        return
    console.pairs(result.lines())
    if note:
        console.say(note)


def typed(context: typer.Context) -> list[str]:
    """Return the names of the options that were given on the command line."""
    return _from(context, "COMMANDLINE")


def stated(context: typer.Context) -> list[str]:
    """Return the names of the options that were given on the command line, by a file, or by --like."""
    return [*typed(context), *_from(context, "DEFAULT_MAP")]


def _from(context: typer.Context, source: str) -> list[str]:
    return [name for name in context.params if str(context.get_parameter_source(name)).endswith(f".{source}")]


def features_command(context: typer.Context, **instead: Any) -> str:
    """Return the command line that makes the features this one lacks; options `instead` of those that were given."""
    given = {name: context.params[name] for name in stated(context) if name in _FEATURE_OPTIONS}
    return features_line(context, {"dataset": context.params["dataset"], **given, **instead})


def program(context: typer.Context) -> list[str]:
    """Return how this program is called, on the data directory that was given."""
    root = context.find_root()
    was_typed = str(root.get_parameter_source("data_dir")).endswith(".COMMANDLINE")
    by_file = context.obj != root.params["data_dir"]
    return [*called(root.info_name), *(["--data-dir", str(context.obj)] if was_typed or by_file else [])]


def called(name: str | None) -> list[str]:
    """Return the words that start this program from the current folder, as far as it is not another by now."""
    script = Path(sys.argv[0])
    if name == "icebox":
        return [name]
    away = script.name == "cli.py" and script.absolute() != Path("cli.py").absolute()
    return ["python", str(script.absolute()) if away else "cli.py"]


def features_line(context: typer.Context, options: Mapping[str, Any]) -> str:
    """Return the command line of `features` with these options, on the data directory of this one."""
    words = [*program(context), "features"]
    for name in _FEATURE_OPTIONS:
        if options.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(options[name])]
    return shlex.join(words)


_MOST_CAUSES = 10  # counted for people


def exit_for_bad(quarantined: Sequence[Quarantined], images: int, max_bad: float) -> None:
    """List what was quarantined; exit with 3 if it is more than was allowed for."""
    from pipeline.api.results import causes
    from pipeline.core import console

    for bad in quarantined[:20]:
        console.warn(f"quarantined {bad.path}: {bad.reason}")
    if len(quarantined) > 20:
        console.warn(f"and {len(quarantined) - 20:,} more; --json lists them all")
    found = list(causes(quarantined).items())
    if 1 < len(quarantined) > len(found):
        told = ", ".join(f"{count:,} {reason}" for reason, count in found[:_MOST_CAUSES])
        further = len(found) - _MOST_CAUSES
        others = f", and {counted(further, 'other cause')}" if further > 0 else ""
        console.warn(f"in all: {told}{others}")
    if len(quarantined) / images > max_bad:
        raise typer.Exit(3)
