"""How a command gets its options: those of a group in `pipeline.api.options` become options of Typer."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from pipeline.api.options import Option, declared
from pipeline.commands import completion

P = ParamSpec("P")
T = TypeVar("T")

_SUGGESTIONS: dict[str, Callable[..., list[str]]] = {
    "datasets": completion.dataset_names,
    "backbones": completion.backbone_names,
    "runs": completion.run_names,
    "stopped": completion.stopped_names,
    "spaces": completion.space_names,
}


def takes(group: type) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Give a command, whose last parameter is `**options`, the options of a group.

    They stand after the command's other options, but before its keyword-only ones.
    """

    def decorate(command: Callable[P, T]) -> Callable[P, T]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        first = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        last = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        taken = {each.name for each in own}
        added = [_parameter(name, *about) for name, about in declared(group).items() if name not in taken]
        signature = inspect.Signature([*first, *added, *last])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        return command

    return decorate


def _parameter(name: str, kind: Any, option: Option) -> inspect.Parameter:
    spelling = (option.spelling,) if isinstance(option.spelling, str) else option.spelling or ()
    about = typer.Option(
        *spelling,
        help=option.help,
        metavar=option.metavar,
        min=option.low,
        max=option.high,
        autocompletion=_SUGGESTIONS.get(option.suggest or ""),
        dir_okay=option.kind != "file",
        file_okay=option.kind != "folder",
    )
    annotation = Annotated[_typed(kind, option), about]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def _typed(kind: Any, option: Option) -> Any:
    """Return the type that Typer is told: one alternative of several, and None where that is legal."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    optional = type(None) in parts
    named = [part for part in parts if part is not type(None)]
    if option.kind is not None:
        chosen: Any = Path
    elif any(get_origin(part) is Sequence for part in named):
        chosen = list[str]
    else:
        chosen = str if str in named else named[0]
    return chosen | None if optional else chosen
