#!/usr/bin/env python3
"""Icebox on the command line: parses, calls `pipeline`, prints. Nothing heavy is imported at the top."""

from __future__ import annotations

import codecs
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun yet that would have to be ended in order

try:
    import typer
except ModuleNotFoundError:
    sys.exit("error: Icebox's packages are not here: `make setup`, then `source .venv/bin/activate`")

from pipeline.commands.backbones import backbones
from pipeline.commands.cache import cache_app
from pipeline.commands.config import apply_config, origin
from pipeline.commands.doctor import doctor
from pipeline.commands.evaluate import evaluate
from pipeline.commands.export import export
from pipeline.commands.features import features
from pipeline.commands.finetune import finetune, freeze
from pipeline.commands.predict import predict
from pipeline.commands.report import report
from pipeline.commands.runs import runs_app
from pipeline.commands.serve import serve
from pipeline.commands.summary import summary
from pipeline.commands.sweep import sweep
from pipeline.commands.train_head import train_head
from pipeline.commands.weights import weights_command
from pipeline.core import environment

app = typer.Typer(
    help="Freeze a pretrained network once, keep its features on disk, train as many heads from them as you like.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in {
    "features": features,
    "train-head": train_head,
    "freeze": freeze,
    "finetune": finetune,
    "sweep": sweep,
    "evaluate": evaluate,
    "report": report,
    "predict": predict,
    "export": export,
    "serve": serve,
    "doctor": doctor,
    "backbones": backbones,
    "weights": weights_command,
    "summary": summary,
}.items():
    app.command(_name)(_command)
app.add_typer(runs_app, name="runs")
app.add_typer(cache_app, name="cache")

# What the program is called by: `cli.py`, or the `icebox` that `make setup` puts into the environment.
_NAME = "icebox" if Path(sys.argv[0]).stem == "icebox" else "cli.py"
# `icebox` is called from anywhere, on what lies there.
_DATA_DIR = Path("data") if _NAME == "icebox" else Path(__file__).parent / "data"


@app.callback()
def main_options(
    context: typer.Context,
    data_dir: Annotated[
        Path,
        typer.Option(
            help="Where cache, runs and downloads are kept.", envvar="ICEBOX_DATA", file_okay=False, show_default="data"
        ),
    ] = _DATA_DIR,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Options from a TOML file.  [default: [tool.icebox] of pyproject.toml here]",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Options that stand before the command."""
    helped = not {"-h", "--help"}.isdisjoint(context.obj)  # which tells of the program, not of a file
    named = None
    if not helped:
        from pipeline.core.machine import limit_libraries, require_room, usable_cores

        limit_libraries()  # before any of them is loaded
        require_room("NumPy", 700_000_000, 2 * usable_cores())  # with what else every command imports
        named = apply_config(context, config)
    default = str(context.get_parameter_source("data_dir")).endswith(".DEFAULT")
    context.obj = named if named is not None and default else data_dir


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage, 3 done but images are bad."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    from typer.exceptions import TyperException

    stopped = _stops_noted()
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # before Typer has begun, or after it has ended
        code = _INTERRUPTED
    except TyperException as error:
        return _fail(_explained(error, arguments), error.exit_code, arguments)
    except Exception as error:
        import sqlite3

        from pipeline.core.errors import IceboxError, MissingBackbonesError, UsageError, exhausted
        from pipeline.core.lazy_imports import failed_import

        if not stopped and (text := exhausted(error) or failed_import(error)):
            return _fail(text, 1, arguments)
        if isinstance(error, sqlite3.Error):
            return _fail(f"the cache's index: {error}; {_index_hint(error)}", 1, arguments)
        if isinstance(error, MissingBackbonesError):
            return _fail(str(error), 1, arguments, error.commands)
        if isinstance(error, (IceboxError, OSError)):
            return _fail(str(error), 2 if isinstance(error, UsageError) else 1, arguments)
        if not stopped:
            raise  # a bug: the traceback is what helps
        code = _INTERRUPTED  # native code that is interrupted may turn that into an error of its own
    if code == _INTERRUPTED:
        from pipeline.core.errors import StoppedError

        return _fail(str(StoppedError(KeyboardInterrupt())), 1, arguments)
    return code


def _explained(error: Any, arguments: list[str]) -> str:
    """Return what Typer says of a wrong usage, what was found, and on which side of the command an option stands."""
    text = error.format_message().replace("Value error, ", "")  # the words of the library that reads values
    spelt = getattr(getattr(error, "param", None), "opts", ())
    given = [value for name, value in itertools.pairwise(arguments) if name in spelt]
    given += [value for name, equals, value in (each.partition("=") for each in arguments) if equals and name in spelt]
    if given and not any(value in text for value in given):
        text += f", found {given[-1]!r:.60}"
    text += origin(error)
    if text == "Missing command.":
        return f"{text} There are: {', '.join(error.ctx.command.commands)}"
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if context is None or not text.startswith("No such option"):
        return text
    if option in ("--data-dir", "--config") and context.parent is not None:
        return f"No such option here: {option} stands before the command"
    if context.parent is None and "(" not in text:
        return f"{text.rstrip('.')}; options of a command stand behind it"
    return text


def _index_hint(error: Exception) -> str:
    import sqlite3

    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return "make room and run again; what was published is kept"
    return (
        "if it stays so, delete cache.db (or what ICEBOX_INDEX names), it is derived again; on a network file "
        "system put it on a disk of this machine by ICEBOX_INDEX=FILE"
    )


def _stops_noted() -> list[int]:
    """Have Ctrl-C and a batch system's stop end the program alike; return the list of those that came."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in the background of a shell
        signal.signal(signal.SIGINT, stop)
    return came


def _run(arguments: list[str]) -> int:
    """Run the command; if the index turns out to be damaged on the way, once more with a new one."""
    try:
        return _command()(arguments, prog_name=_NAME, standalone_mode=False, obj=arguments) or 0
    except OSError as error:
        from pipeline.core.errors import IndexDamagedError

        if not isinstance(error, IndexDamagedError):
            raise
        from pipeline.cache.index_file import set_aside

        set_aside(error)
        return _command()(arguments, prog_name=_NAME, standalone_mode=False, obj=arguments) or 0


@cache
def _command() -> Callable[..., int | None]:
    """Return the commands as Typer makes them of the functions above, which takes it a while."""
    return typer.main.get_command(app)


_INTERRUPTED = 130  # how Typer reports Ctrl-C where no workspace is open yet


def _fail(message: str, code: int, arguments: list[str], commands: Sequence[str] = ()) -> int:
    """Say what is wrong in one line; `commands` that mend it follow, a line each."""
    import json

    text, *mending = (_one_line(each) for each in (message, *commands))
    print("\n".join([f"error: {text}", *mending]), file=sys.stderr)
    if "--json" in arguments:
        try:
            print(json.dumps({"error": text, **({"commands": mending} if mending else {})}), flush=True)
        except OSError:  # it is full or closed, as stderr has said; what is still to be written would say it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def run_and_exit() -> NoReturn:
    """Run the command line as a program of its own."""
    import threading

    environment.isolate()
    _open_what_is_closed()
    codecs.register_error(_SPELLING, _spelt)
    # A descriptor of our own: what native libraries print on theirs is held back while they load.
    own, encoding = os.dup(2), sys.stderr.encoding
    sys.stderr = os.fdopen(own, "w", buffering=1, encoding=encoding, errors=_SPELLING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_SPELLING)
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what it came to is settled
    extract = sys.modules.get("pipeline.extraction.extract")
    if extract is not None and any(thread.name == extract.LOADING for thread in threading.enumerate()):
        # All is said and done, and TensorFlow, which is being loaded for nothing, would take its time to see that.
        from pipeline.core.native_stderr import drop

        drop()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


_SPELLING = "icebox-spelling"
_IN_ASCII = {"…": "...", "→": "->", "·": "-", "≤": "<=", "≥": ">="}


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """Return how characters are written that a terminal's encoding does not have, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


def _open_what_is_closed() -> None:
    """Lead the standard streams that whoever called has closed to nowhere: else files would get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))


if __name__ == "__main__":
    run_and_exit()
