"""Options from a file: TOML named by --config, or [tool.icebox] of the pyproject.toml in the current folder.

Keys are options as they are typed, without the dashes; a table is a command. What is typed wins. A file that was not
named on the command line decides less.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

_PYPROJECT = Path("pyproject.toml")
_NO_FILE = Path(os.devnull)
_MOST_BYTES = 2**20
_DATA_DIR = "data-dir"  # the one key that is no command's option
# Keys above all tables reach the commands that make features and train on them. Elsewhere an option of the same name
# may mean another thing: `cache gc --dataset` removes what is not of that dataset.
_SHARING = {"features", "train-head", "freeze", "finetune", "sweep", "doctor", "cache explain", "cache export"}
# Full models take them for what they do to images in each epoch, cached rows for what their views are like.
_NOT_SHARED = {"freeze": {"augment"}, "finetune": {"augment", "views"}}
_NOT_FROM_A_FILE = {"help", "json"}  # the second belongs to whoever reads stdout
# A file that was not named on the command line came with the folder, perhaps from somebody else. It does not decide who
# computes (the answers of a scheduler are unpickled), who may ask, which other files, runs and addresses are read or
# written, nor what is removed or replaced. docs/security.md lists these options.
_ONLY_IF_NAMED = {
    "scheduler", "tls-ca", "tls-cert", "tls-key", "dashboard", "host", "port", "allow-host",
    "data-dir", "archive", "image-root", "images", "weights", "out", "like", "init", "also", "resume",
    "yes", "force", "repair", "damaged", "unfinished",
}  # fmt: skip
_ONLY_IF_NAMED_OF = {"cache gc": {"dataset", "space"}}  # which say what stays
_BACKBONE = "backbone"  # a file, or a name


def apply_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make what a file says the defaults of all commands; return the data directory it names, if it names one.

    Raises
    ------
    UsageError
        If the file is no TOML, or says something that no command knows.
    IceboxError
        If it cannot be read.
    """
    file, implied = path or _PYPROJECT, path is None
    if not (values := _stated(file, implied)):
        return None
    context.meta["config"] = str(file)
    left_out = [_DATA_DIR] if implied and _DATA_DIR in values else []
    data = _data_dir(file, values)
    config = _Config(file, context.command, implied)
    context.default_map = config.defaults(values)
    _say_left_out(file, [*left_out, *config.left_out(context.invoked_subcommand)])
    return None if implied else data


def data_dir_of(path: Path | None) -> Path | None:
    """Return the data directory that a file names, as `apply_config`, whatever else stands in it."""
    return None if path is None else _data_dir(path, _stated(path, implied=False))


def _say_left_out(file: Path, keys: Sequence[str]) -> None:
    if keys:
        from pipeline.core import console

        console.warn(
            f"notice: not taken from {file}, as it was not named on the command line: {', '.join(keys)}; "
            f"to take them, put --config {file} before the command"
        )


def _stated(file: Path, implied: bool) -> dict[str, Any]:
    """Return what a file says to Icebox; nothing, if it is only `implied` and says nothing."""
    if (implied and not file.is_file()) or file == _NO_FILE:
        return {}
    values: Any = _read(file)
    if file.name == _PYPROJECT.name:
        tools = values.get("tool")
        values = tools.get("icebox", {}) if isinstance(tools, dict) else {}
    if not isinstance(values, dict):
        raise _wrong(file, "tool.icebox is no table")
    return _with_dashes(values)


def _data_dir(file: Path, values: dict[str, Any]) -> Path | None:
    data = values.pop(_DATA_DIR, None)
    if data is None:
        return None
    if not isinstance(data, str) or not data:
        raise _wrong(file, f"data-dir must be a folder's name, found {data!r:.60}")
    from pipeline.core import machine

    return machine.expand_home(data)


def origin(error: Any) -> str:
    """Return " (in FILE)" if what a command line was refused for stands in a file, else ""."""
    context, option = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or option is None or not str(context.get_parameter_source(option.name)).endswith("DEFAULT_MAP"):
        return ""
    return f" (in {context.meta['config']})" if "config" in context.meta else ""


def _read(file: Path) -> dict[str, Any]:
    import tomllib

    from pipeline.core.errors import IceboxError
    from pipeline.core.files import read_small

    try:
        return tomllib.loads(read_small(file, _MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise IceboxError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(file, f"is no TOML ({error})") from error


def _wrong(file: Path, what: str) -> Exception:
    from pipeline.core.errors import UsageError

    return UsageError(f"{file}: {what}")


def _is_barred(command: str, key: str, value: Any) -> bool:
    """Return whether a file that was not named may not say this. It may name backbones of the table, but no file."""
    if key == _BACKBONE:
        from pipeline.backbone.table import BACKBONES

        return not set(_text(value).split(",")) <= BACKBONES.keys()
    return key in _ONLY_IF_NAMED or key in _ONLY_IF_NAMED_OF.get(command, ())


class _Config:
    """One file, named on the command line or `implied`, held against the commands there are."""

    def __init__(self, file: Path, program: Any, implied: bool) -> None:
        self._file = file
        self._program = program
        self._implied = implied
        self._left_out: dict[str, list[str]] = {}  # command → the keys that it does not take from this file

    def left_out(self, command: str | None) -> list[str]:
        """Return the keys that a command, or the commands of a group, did not take: the file was not named."""
        found = {key for name, keys in self._left_out.items() if name.split()[0] == command for key in keys}
        return sorted(found)

    def defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return command → option's parameter → value, groups of commands holding commands."""
        shared, tables = _split(values, self._program)
        known = [command for name, command in _commands(self._program) if name in _SHARING]
        for key in shared:
            if not any(key in _options(command) for command in known):
                names = {each for command in known for each in _options(command)} | {_DATA_DIR}
                raise self._unknown(key, "", names | set(self._program.commands), self._owners(key))
        return self._of_group(self._program, "", shared, tables)

    def _of_group(self, group: Any, path: str, shared: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
        found = dict[str, Any]()
        for name, command in group.commands.items():
            own, below = tables.get(name, {}), f"{path}{name}"
            if hasattr(command, "commands"):
                options, further = _split(self._table(own, below), command)
                for key in options:
                    raise self._unknown(key, f"[{below}]", command.commands)
                found[name] = self._of_group(command, f"{below} ", shared, further)
            else:
                own = _with_dashes(self._table(own, below))
                found[name] = self._of_command(command, below, shared if below in _SHARING else {}, own)
        return found

    def _table(self, value: Any, name: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(self._file, f"{name} is a command, so it must be a table, found {value!r:.60}")
        return value

    def _owners(self, key: str) -> list[str]:
        """Return the tables in which a key that is not shared may stand."""
        return [f"[{name.replace(' ', '.')}]" for name, command in _commands(self._program) if key in _options(command)]

    def _of_command(self, command: Any, name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        options = _options(command)
        for key in own:
            if key not in options:
                raise self._unknown(key, f"[{name.replace(' ', '.')}]", options)
        shared = {key: value for key, value in shared.items() if key not in _NOT_SHARED.get(name, ())}
        given = {**{key: value for key, value in shared.items() if key in options}, **own}
        if self._implied:
            self._left_out[name] = [key for key, value in given.items() if _is_barred(name, key, value)]
            given = {key: value for key, value in given.items() if key not in self._left_out[name]}
        return {options[key].name: self._typed(key, value, options[key]) for key, value in given.items()}

    def _typed(self, key: str, value: Any, option: Any) -> Any:
        """Return a value as the command line takes it: lists and tables as the text that would be typed."""
        if isinstance(value, bool):
            if not option.is_flag:
                raise _wrong(self._file, f"{key} takes a value, found {str(value).lower()}")
            return value
        if option.is_flag:
            raise _wrong(self._file, f"{key} must be true or false, found {value!r:.60}")
        if option.multiple:
            pairs = [f"{name}={_text(each)}" for name, each in value.items()] if isinstance(value, dict) else []
            return pairs or [_text(each) for each in (value if isinstance(value, list) else [value])]
        if isinstance(value, dict):
            return ",".join(f"{name}={_text(each)}" for name, each in value.items())
        return _text(value)

    def _unknown(self, key: str, where: str, names: Any, owners: Sequence[str] = ()) -> Exception:
        from pipeline.core.errors import did_you_mean

        place = f" in {where}" if where else ""
        hint = f"; it belongs into {' or '.join(owners)}" if owners else did_you_mean(key, names)
        return _wrong(self._file, f"there is no option {key!r:.60}{place}{hint}")


def _split(values: Mapping[str, Any], group: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options among the keys of a group of commands, and the tables that are commands."""
    dashed = _with_dashes(values)
    options = {option for _, command in _commands(group) for option in _options(command)}  # weights is both
    tables = {
        name: value
        for name, value in dashed.items()
        if name in group.commands and (isinstance(value, dict) or name not in options)
    }
    return {name: value for name, value in dashed.items() if name not in tables}, tables


def _text(value: Any) -> str:
    """Return a value as it would be typed: 64,[128,64] for a list in a list, none for an empty one."""
    if isinstance(value, list):
        return ",".join(f"[{_text(each)}]" if isinstance(each, list) else _text(each) for each in value) or "none"
    from pipeline.core import machine

    text = str(value).lower() if isinstance(value, bool) else str(value)
    return str(machine.expand_home(text)) if text.startswith("~") else text  # a value need not be a path


def _with_dashes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): value for key, value in values.items()}


def _commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def _options(command: Any) -> dict[str, Any]:
    """Return the options of a command by their keys in a file."""
    options = {each.opts[0].removeprefix("--"): each for each in command.params if each.opts[0].startswith("--")}
    return {key: option for key, option in options.items() if key not in _NOT_FROM_A_FILE}
