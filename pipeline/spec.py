"""What the user chose, as frozen dataclasses with one canonical JSON form.

`FeatureSpec` holds everything that decides a feature's value and nothing else; its hash names the feature
space. `FeatureRequest` is the same with gaps: what was left at `auto` is None and matches anything.
`HeadSpec` holds the settings of one head.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from pipeline.errors import SpecError, UsageError

PRECISIONS = ("float32", "bfloat16", "float16")
STORAGES = ("float16", "float32")
_WEIGHTS = re.compile(r"sha256:[0-9a-f]{64}|untrained:\w+:[0-9]{1,18}")
_MOST_PIXELS = 4096  # on a side


def canonical_json(value: Mapping[str, Any]) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class FeatureSpec:
    """A feature space: two images with equal bytes get equal rows if and only if these fields agree.

    `weights` is "sha256:<hex digest of the file>" or "untrained:<recipe>:<seed>".
    """

    backbone: str
    weights: str
    layer: str
    input_size: int
    decode: str
    resize: str
    fit: str
    scaling: str
    precision: str
    engine: str
    storage: str

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("storage", self.storage, STORAGES)
        if not _WEIGHTS.fullmatch(self.weights):
            raise SpecError(f"weights must be 'sha256:…' or 'untrained:…', found {self.weights!r:.100}")
        if not 1 <= self.input_size <= _MOST_PIXELS:
            raise SpecError(f"input_size must lie in 1 … {_MOST_PIXELS}, found {self.input_size}")

    @property
    def untrained(self) -> bool:
        """Whether the weights were never trained, so that accuracies say little about real use."""
        return self.weights.startswith("untrained:")

    @property
    def directory(self) -> str:
        """Return the folder name of this space, "<backbone>-<layer>-<8 hex digits>"."""
        return f"{self.backbone}-{self.layer}-{self.fingerprint()[:8]}"

    def fingerprint(self) -> str:
        """Return the sha256 of the canonical JSON, as 64 hex digits."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the spec that `to_dict` gave.

        Raises
        ------
        SpecError
            If a field is missing or unknown: a space made by another version is refused, not guessed at.
        """
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            wrong = ", ".join(sorted(set(value) ^ names))
            raise SpecError(f"a feature spec with other fields than this version knows: {wrong}")
        for field in fields(cls):
            kind = int if field.type == "int" else str
            if type(value[field.name]) is not kind:
                raise SpecError(f"{field.name} must be {kind.__name__}, found {value[field.name]!r}")
        return cls(**value)


@dataclass(frozen=True)
class FeatureRequest:
    """The fields of a `FeatureSpec` that were stated; None stands for `auto` and agrees with any value."""

    backbone: str
    layer: str | None
    fit: str | None
    decode: str
    resize: str
    input_size: int
    scaling: str
    engine: str
    weights: str | None = None
    precision: str | None = None
    storage: str | None = None

    def differences(self, spec: FeatureSpec) -> list[str]:
        """Return the names of the stated fields in which `spec` is another space."""
        stated = {name: value for name, value in asdict(self).items() if value is not None}
        return [name for name, value in stated.items() if getattr(spec, name) != value]


# What each head can be told, with its defaults. A setting that is not listed for a head is refused.
_DENSE = {
    "epochs": 50,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "patience": 0,
    "normalize": True,
    "seed": 0,
}
HEAD_DEFAULTS: dict[str, dict[str, Any]] = {
    "flatten": {**_DENSE, "hidden": 256, "dropout": 0.5},
    "gap": {**_DENSE, "hidden": 64, "dropout": 0.0},
    "logreg": {"C": 1.0, "max_iter": 1000},
}
HEADS = tuple(HEAD_DEFAULTS)


@dataclass(frozen=True)
class HeadSpec:
    """One head and its settings, complete: defaults are filled in by `make`."""

    head: str
    settings: Mapping[str, Any]

    @classmethod
    def make(cls, head: str, **given: Any) -> Self:
        """Return the spec of `head` with `given` over its defaults; None means 'not given'.

        Raises
        ------
        UsageError
            If the head is unknown, a setting is not one of its own, or a value is out of range.
        """
        if head not in HEAD_DEFAULTS:
            raise UsageError(f"no head named {head!r}; there are {', '.join(HEADS)}")
        defaults = HEAD_DEFAULTS[head]
        stated = {name: value for name, value in given.items() if value is not None}
        if foreign := sorted(set(stated) - set(defaults)):
            has = ", ".join(defaults)
            raise UsageError(f"the {head} head has no {', '.join(foreign)}; its settings are {has}")
        settings = {**defaults, **stated}
        for name, value in settings.items():
            _check_setting(name, value)
        return cls(head, settings)

    def to_dict(self) -> dict[str, Any]:
        """Return {"head": …} and the settings as plain JSON values."""
        return {"head": self.head, **self.settings}


# (smallest, largest) legal value of each numeric setting; bounds are inclusive.
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 65_536),
    "learning_rate": (1e-12, 1e3),
    "patience": (0, 1_000_000),
    "seed": (0, 2**32 - 1),
    "hidden": (1, 65_536),
    "dropout": (0.0, 0.99),
    "C": (1e-12, 1e12),
    "max_iter": (1, 1_000_000),
}


def _check_setting(name: str, value: Any) -> None:
    if name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} must lie in {low:g} … {high:g}, found {value:g}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")
