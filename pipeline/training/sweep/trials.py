"""List the settings that a sweep tries: all combinations of the given values, or a random draw from them."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.errors import UsageError
from pipeline.core.spec import HEADS, WHOLE, HeadSpec

logger = logging.getLogger(__name__)

MOST = 10_000  # largest number of trials in a sweep
_MOST_IN_VAIN = 1_000  # successive draws without a new setting, after which drawing stops
_LOGARITHMIC = {"learning_rate", "weight_decay", "C"}  # drawn uniformly on a logarithmic scale
_RANGE = re.compile(r"(?P<low>[^.]+(\.\d+)?)\.\.(?P<high>.+)")

# Values to try by default: few trials of the settings that matter most for each head.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "flatten": ("learning_rate=1e-4,1e-3", "patience=5"),
    "gap": ("learning_rate=3e-4,1e-3,3e-3", "hidden=64,256", "patience=5"),
    "logreg": ("class_weight=none",),
}


@dataclass(frozen=True)
class Range:
    """A range of numbers to draw from, both ends included."""

    low: float
    high: float

    def draw(self, name: str, random: np.random.Generator) -> float | int:
        """Return a random number of the range for the setting `name`.

        Settings that count something get an int. Rates and penalties are drawn on a logarithmic scale.
        """
        if name in WHOLE:
            return int(random.integers(int(self.low), int(self.high), endpoint=True))
        if name in _LOGARITHMIC:
            return float(math.exp(random.uniform(math.log(self.low), math.log(self.high))))
        return float(random.uniform(self.low, self.high))


Values = list[str] | Range


def make_trials(heads: Sequence[str], stated: Sequence[str], draws: int | None, seed: int) -> list[HeadSpec]:
    """Return the settings to try, all different.

    Parameters
    ----------
    heads
        Names of heads.
    stated
        Texts such as "learning_rate=1e-4,1e-3" for every head, or "gap.hidden=64,[128,64]" for one head. Values for
        one head override those for every head. Other settings keep their defaults. For a head without any text,
        the values in `DEFAULTS` are tried.
    draws
        The number of settings to draw at random; None for all combinations. A range such as "1e-4..1e-2" needs draws.
    seed
        The seed of the draw.

    Raises
    ------
    UsageError
        If a head or a setting is unknown, or a value is out of range.
    """
    if unknown := [head for head in heads if head not in HEADS]:
        raise UsageError(f"no head named {unknown[0]!r}; there are {', '.join(HEADS)}")
    tables = {head: _stated_for(head, heads, stated) for head in dict.fromkeys(heads)}
    if draws is not None:
        return _drawn(tables, draws, np.random.default_rng(seed))
    if ranges := [name for table in tables.values() for name, values in table.items() if isinstance(values, Range)]:
        raise UsageError(f"{ranges[0]} is a range, of which there is no grid: list values, or draw some by --random N")
    return _grid(tables)


def _grid(tables: Mapping[str, Mapping[str, Values]]) -> list[HeadSpec]:
    count = sum(math.prod(len(values) for values in table.values()) for table in tables.values())  # type: ignore[arg-type]
    if count > MOST:
        raise UsageError(f"{count:,} combinations are too many; draw some by --random N")
    specs = (
        HeadSpec.make(head, **dict(zip(table, values, strict=True)))
        for head, table in tables.items()
        for values in itertools.product(*table.values())  # type: ignore[arg-type]
    )
    return _different(specs)


def _drawn(tables: Mapping[str, Mapping[str, Values]], draws: int, random: np.random.Generator) -> list[HeadSpec]:
    if draws > MOST:
        raise UsageError(f"--random takes 1 to {MOST:,} settings, found {draws:,}")
    found: dict[str, HeadSpec] = {}
    names, in_vain = list(tables), 0
    while len(found) < draws and in_vain < _MOST_IN_VAIN:
        head = names[int(random.integers(len(names)))]
        spec = HeadSpec.make(head, **{name: _pick(name, some, random) for name, some in tables[head].items()})
        in_vain = in_vain + 1 if spec.identity in found else 0
        found[spec.identity] = spec
    if len(found) < draws:
        logger.warning("there are no more than %d different settings to draw from", len(found))
    return list(found.values())


def _pick(name: str, values: Values, random: np.random.Generator) -> Any:
    return values.draw(name, random) if isinstance(values, Range) else values[int(random.integers(len(values)))]


def _different(specs: Any) -> list[HeadSpec]:
    return list({spec.identity: spec for spec in specs}.values())


def _stated_for(head: str, heads: Sequence[str], stated: Sequence[str]) -> dict[str, Values]:
    """Return setting → values for one head. Raises UsageError if a value is not valid."""
    of_all, of_one = dict[str, Values](), dict[str, Values]()
    for text in stated:
        owner, name, values = _parsed(text)
        if owner is not None and owner not in heads:
            raise UsageError(f"{text!r} is for a head that is not tried; name it by --head {owner}")
        if owner not in (None, head):
            continue
        table = of_all if owner is None else of_one
        if name in table:
            raise UsageError(f"{text!r}: {name} was stated before; list all its values in one --set")
        table[name] = _values(head, name, values)
    if not of_all and not of_one:
        return _stated_for(head, heads, DEFAULTS[head])
    return {**of_all, **of_one}


def _parsed(text: str) -> tuple[str | None, str, str]:
    left, equals, values = text.partition("=")
    owner, dot, name = left.rpartition(".")
    name = name.replace("-", "_")
    if not equals or not name or not values or (dot and not owner):
        raise UsageError(f"--set takes NAME=VALUE,VALUE… or HEAD.NAME=…, found {text!r}")
    return owner or None, name, values


def _values(head: str, name: str, text: str) -> Values:
    if found := _RANGE.fullmatch(text):
        ends = [HeadSpec.make(head, **{name: found[end]}).settings[name] for end in ("low", "high")]
        ends = [end[0] if isinstance(end, tuple) else end for end in ends]
        if any(isinstance(end, bool | str) for end in ends) or not ends[0] < ends[1]:
            raise UsageError(f"{name} has no range {text!r}")
        if name in _LOGARITHMIC and ends[0] <= 0:
            raise UsageError(f"{name} is drawn on a logarithmic scale, which has no {ends[0]:g}")
        return Range(*ends)
    values = [value.strip("[]") for value in re.split(r",(?![^\[]*\])", text)]
    for value in values:
        HeadSpec.make(head, **{name: value})
    return values
