"""The settings that decide features and heads, as frozen dataclasses with one canonical JSON form.

`FeatureSpec` holds the settings that decide a feature's value, and no others; its hash names the feature space.
`FeatureRequest` has the same fields, where None stands for `auto` and matches any value.
`Views` describes the augmented views of an image, `HeadSpec` the settings of one head.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from pipeline.core.errors import SpecError, UsageError

PRECISIONS = ("float32", "bfloat16", "float16")
STORAGES = ("float16", "float32")
OWN = "own:"  # prefix of the name of a user's own network, before the sha256 of its architecture
_WEIGHTS = re.compile(r"sha256:[0-9a-f]{64}|untrained:\w+:[0-9]{1,18}")
_MOST_PIXELS = 4096  # largest input size, in pixels per side
_MOST_NAME = 80  # characters of each name in a folder's name
_OWN_DIGITS = 12  # characters of an own network's name in a folder's name


def canonical_json(value: Mapping[str, Any]) -> str:
    """Return the canonical JSON text of `value`: sorted keys, no spaces, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _plain(name: str) -> str:
    """Return `name` for use in a folder's name: ASCII letters, digits, _ and ., and at most `_MOST_NAME` characters."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)[:_MOST_NAME]


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
        """Whether the weights were never trained, so that accuracies are not typical of real use."""
        return self.weights.startswith("untrained:")

    @property
    def directory(self) -> str:
        """Return the folder name of this space, "<backbone>-<layer>-<8 hex digits>"."""
        backbone = self.backbone.replace(OWN, "own_")[:_OWN_DIGITS] if self.backbone.startswith(OWN) else self.backbone
        # A layer of an own network may have any name, so `_plain` replaces special characters.
        return f"{_plain(backbone)}-{_plain(self.layer)}-{self.fingerprint()[:8]}"

    def fingerprint(self) -> str:
        """Return the sha256 of the canonical JSON, as 64 hex digits."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the spec whose `to_dict` is `value`.

        Raises
        ------
        SpecError
            If a field is missing, unknown or out of range. A space made by another version is refused.
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
    """The fields of a `FeatureSpec` that the user stated; None stands for `auto` and matches any value."""

    backbone: str | None
    layer: str | None
    fit: str | None
    decode: str | tuple[str, ...]  # a tuple matches any of its values
    resize: str
    input_size: int | None
    scaling: str | None
    engine: str | tuple[str, ...]  # a tuple matches any of its values
    weights: str | None = None
    precision: str | None = None
    storage: str | None = None

    def differences(self, spec: FeatureSpec) -> list[str]:
        """Return the names of the stated fields that `spec` does not match."""
        stated = {name: value for name, value in asdict(self).items() if value is not None}
        any_of = {name: value if isinstance(value, tuple) else (value,) for name, value in stated.items()}
        return [name for name, values in any_of.items() if getattr(spec, name) not in values]


# The version of the affine warp in `images.augment`. Change it whenever the same recipe gives other pixels.
AUGMENT_POLICY = "affine-linear-1"
FILLS = ("nearest", "reflect", "wrap", "black")
MOST_VIEWS = 100
# The largest allowed value of each number in a recipe; the smallest is 0.
_MOST_AUGMENTED = {"rotation": 180.0, "width_shift": 1.0, "height_shift": 1.0, "shear": 2.0, "zoom": 0.9}


@dataclass(frozen=True)
class Augmentation:
    """The largest random changes of an augmented view.

    `rotation` is in degrees, in both directions. `width_shift` and `height_shift` are fractions of the image's width
    and height. `shear` is the horizontal displacement per height. `zoom` is a relative change of width and of height,
    drawn separately. Each flip applies to half of the views. `fill` names the way in which empty borders are filled.
    """

    rotation: float = 30.0
    width_shift: float = 0.2
    height_shift: float = 0.2
    shear: float = 0.2
    zoom: float = 0.2
    horizontal_flip: bool = True
    vertical_flip: bool = False
    fill: str = "nearest"

    def __post_init__(self) -> None:
        for name, most in _MOST_AUGMENTED.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise UsageError(f"{name} must be a number in 0 … {most:g}, found {str(value)!r:.60}")
            object.__setattr__(self, name, float(value) + 0.0)  # 30 and 30.0 give the same recipe, as do 0 and -0.0
        for name in ("horizontal_flip", "vertical_flip"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, found {str(getattr(self, name))!r:.60}")
        if self.fill not in FILLS:
            raise UsageError(f"fill must be one of {', '.join(FILLS)}, found {str(self.fill)!r:.60}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the recipe of a text like "rotation=15,fill=reflect", or "default" for all default settings.

        Settings that the text does not name have their defaults.

        Raises
        ------
        UsageError
            If a setting is unknown or out of range.
        """
        defaults, stated = asdict(cls()), dict[str, Any]()
        for part in filter(None, "" if text.strip() == "default" else text.split(",")):
            name, _, value = (word.strip() for word in part.partition("="))
            name = name.replace("-", "_")
            if name not in defaults:
                raise UsageError(f"--augment has no {part!r:.60}; it takes NAME=VALUE,… of {', '.join(defaults)}")
            if name in stated:
                raise UsageError(f"--augment has {name} twice; state it once")
            stated[name] = _like(defaults[name], value)
        return cls(**stated)

    def __str__(self) -> str:
        """Return the settings that differ from the defaults, as a text for `parse`."""
        defaults = asdict(type(self)())
        differing = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return ",".join(f"{name}={str(value).lower()}" for name, value in differing.items())

    def view(self, index: int) -> dict[str, Any]:
        """Return the description of augmented view `index`, 1 being the first, as plain JSON values."""
        return {"policy": AUGMENT_POLICY, **asdict(self), "index": index}

    @classmethod
    def from_view(cls, about: Mapping[str, Any], number: int) -> Self:
        """Return the recipe of the view description `about`.

        Raises UsageError, KeyError or TypeError if `about` is no description by `view`, or `number` is not its number.
        """
        fields_of_recipe = {name: value for name, value in dict(about).items() if name not in ("policy", "index")}
        recipe = cls(**fields_of_recipe)
        if about != recipe.view(about["index"]) or number != view_number(about):
            raise UsageError(f"view {number} is not the one that its description says")
        return recipe


def _like(default: Any, text: str) -> Any:
    """Return `text` converted to the type of `default`; if that fails, return it unchanged, to be refused later."""
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if not isinstance(default, float):
        return text
    try:
        return float(text)
    except ValueError:
        return text


def view_number(about: Mapping[str, Any]) -> int:
    """Return the number of the view with description `about`: 63 bits of the sha256 of its canonical JSON."""
    digest = hashlib.sha256(canonical_json(about).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # index and shards store signed 64-bit integers


@dataclass(frozen=True)
class Views:
    """The `count` views of each image: view 0 is the plain image, the others are augmented by `recipe`."""

    count: int = 1
    recipe: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= MOST_VIEWS:
            raise UsageError(f"--views must be a whole number in 1 … {MOST_VIEWS}, found {str(self.count)!r:.60}")

    @property
    def recipes(self) -> dict[int, Any]:
        """Return view number → "plain" or the description of the view, view 0 first."""
        augmented = [self.recipe.view(index) for index in range(1, self.count)]
        return {0: "plain", **{view_number(about): about for about in augmented}}

    @property
    def numbers(self) -> tuple[int, ...]:
        """Return the numbers of the views, 0 first."""
        return tuple(self.recipes)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the views whose `dataclasses.asdict` is `value`. Raises UsageError, KeyError or TypeError."""
        return cls(value["count"], Augmentation(**value["recipe"]))


PLAIN_VIEW = Views()  # the plain view alone


# The settings of each head, with their defaults. A setting that is not listed for a head is refused.
_DENSE: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 64,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "schedule": "constant",
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "class_weight": "none",
    "patience": 0,
    "normalize": True,
    "seed": 0,
}
C_PATH = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HEAD_DEFAULTS: dict[str, dict[str, Any]] = {
    "flatten": {**_DENSE, "hidden": (256,), "dropout": 0.5},
    "gap": {**_DENSE, "hidden": (64,), "dropout": 0.0},
    "logreg": {"C": C_PATH, "select": "val", "class_weight": "none", "calibrate": True, "max_iter": 1000},
}
HEADS = tuple(HEAD_DEFAULTS)
SHAPE = ("hidden", "dropout", "normalize")  # the settings that define a dense head's layers; others affect training
STAGES = ("freeze", "finetune")  # of full models
# With InceptionV3 the last two blocks are trained, as in the fine-tuning example of the Keras Applications docs.
FREEZE_UNTIL = "250"
BATCH_NORMS = ("frozen", "trainable")

# (smallest, largest) allowed value of each numeric setting, inclusive; for a list, of each of its values.
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 65_536),
    "learning_rate": (1e-12, 1e3),
    "weight_decay": (0.0, 1e3),
    "label_smoothing": (0.0, 0.99),
    "patience": (0, 1_000_000),
    "seed": (0, 2**32 - 1),
    "hidden": (1, 65_536),
    "dropout": (0.0, 0.99),
    "C": (1e-12, 1e12),
    "max_iter": (1, 1_000_000),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "sgd", "adagrad", "rmsprop"),
    "schedule": ("constant", "cosine", "linear"),
    "class_weight": ("none", "balanced"),
    "select": ("val", "cv"),
}
_MOST_VALUES = 32  # hidden layers, or values of C
WHOLE = {"epochs", "batch_size", "patience", "seed", "hidden", "max_iter"}
_YES_OR_NO = {"normalize", "calibrate"}
_SEVERAL = {"hidden": "none", "C": None}  # settings that take a list → the text for an empty list, None if not allowed


@dataclass(frozen=True)
class HeadSpec:
    """One head with all of its settings; `make` fills in the defaults."""

    head: str
    settings: Mapping[str, Any]

    @classmethod
    def make(cls, head: str, /, **given: Any) -> Self:
        """Return the spec of `head` with the settings `given`, and its defaults where they are absent or None.

        A value may be of the type that `to_dict` returns, or text as on the command line: "256,128", "1e-3".

        Raises
        ------
        UsageError
            If the head is unknown, the head does not have a setting, or a value is out of range.
        """
        if head not in HEAD_DEFAULTS:
            raise UsageError(f"no head named {head!r}; there are {', '.join(HEADS)}")
        defaults = HEAD_DEFAULTS[head]
        stated = {name: value for name, value in given.items() if value is not None}
        if foreign := sorted(set(stated) - set(defaults)):
            has = ", ".join(defaults)
            raise UsageError(f"the {head} head has no {', '.join(foreign)}; its settings are {has}")
        return cls(head, {**defaults, **{name: _setting(name, value) for name, value in stated.items()}})

    @property
    def identity(self) -> str:
        """The first 12 hex digits of the sha256 of the spec's canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return {"head": …} and the settings as plain JSON values."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings.items()}
        return {"head": self.head, **plain}


def _setting(name: str, value: Any) -> Any:
    """Return the value of a setting, converted to its type and checked. Raises UsageError."""
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise UsageError(f"{_option(name)} must be one of {', '.join(CHOICES[name])}, found {str(value)!r:.60}")
        return value
    if name in _YES_OR_NO:
        return _flag(name, value)
    if name not in _SEVERAL:
        return _number(name, value)
    if isinstance(value, str):
        value = [] if value == _SEVERAL[name] else value.split(",")
    values = tuple(_number(name, each) for each in (value if isinstance(value, Sequence) else [value]))
    if len(values) > _MOST_VALUES or not (values or _SEVERAL[name]):
        raise UsageError(f"{_option(name)} takes 1 to {_MOST_VALUES} values, found {len(values)}")
    return tuple(sorted(set(values))) if name == "C" else values


def _flag(name: str, value: Any) -> bool:
    known = {"true": True, "false": False, True: True, False: False}
    if value not in known:
        raise UsageError(f"{_option(name)} must be true or false, found {str(value)!r:.60}")
    return known[value]


def _number(name: str, value: Any) -> int | float:
    low, high = _RANGES[name]
    try:
        number = int(value) if name in WHOLE else float(value)
        legal = low <= number <= high and not isinstance(value, bool) and number == float(value)
    except (TypeError, ValueError, OverflowError):
        legal, number = False, 0
    if not legal:
        kind = "a whole number" if name in WHOLE else "a number"
        raise UsageError(f"{_option(name)} must be {kind} in {low:g} … {high:g}, found {str(value)!r:.60}")
    return number


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")
