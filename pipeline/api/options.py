"""The options of Icebox, each declared once: for the methods of `Icebox` and for the command line.

A group is a `TypedDict` whose fields are `Annotated` with an `Option`; a method takes it as keyword arguments
(`**options: Unpack[FeaturesOptions]`), a command as options of the same names. Options that several stages share have
one name and one meaning everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from pipeline.core.errors import UsageError

Text = str | Path  # a path, or a name


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name and type.

    Parameters
    ----------
    help
        One sentence, as the command line prints it.
    default
        The value where nothing is given; None often means "the network's own", as `help` then says.
    low, high
        The least and the greatest legal number.
    metavar
        What stands for the value in a usage line.
    spelling
        How the command line spells it, in one way or several, where that is not its name with dashes.
    suggest
        What a shell proposes after TAB: "datasets", "backbones", "runs", "stopped" or "spaces".
    kind
        "file" or "folder" for a path that must not be the other.
    """

    help: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    metavar: str | None = None
    spelling: str | tuple[str, ...] | None = None
    suggest: str | None = None
    kind: Literal["file", "folder"] | None = None


MAX_PIXELS = 180_000_000  # pipeline.images.decoding.DEFAULT_MAX_PIXELS, not imported here as it brings OpenCV
CONNECTIONS = 16  # pipeline.dataset.remote.DEFAULT_CONNECTIONS


class LocationOptions(TypedDict, total=False):
    """Where the images of a dataset lie."""

    archive: Annotated[Text | None, Option("The published CIFAR archive, if you have it already.", kind="file")]
    image_root: Annotated[
        Text | None, Option("The folder that a manifest's paths start from and may not leave.", kind="folder")
    ]


class ImagesOptions(LocationOptions, total=False):
    """Which images of a dataset, and where they lie."""

    limit: Annotated[int | None, Option("Take only the first N images of a fixed, class-balanced order.", low=1)]


class InputSizeOptions(TypedDict, total=False):
    """The size of the network's input."""

    input_size: Annotated[
        int | None,
        Option("Width and height of the network's input, in pixels.  [default: the network's own]", None, 1, 4096, "N"),
    ]


class LayerOptions(TypedDict, total=False):
    """The layer that is cached."""

    layer: Annotated[
        str | None,
        Option("The layer whose output is cached.  [default: the network's last, mixed10 of inception_v3]"),
    ]


class InputOptions(InputSizeOptions, LayerOptions, total=False):
    """How pixels reach the network, its weights, and the layer that is cached."""

    scaling: Annotated[
        str | None,
        Option(
            "How pixels are scaled: none, x/127.5-1, x/255, imagenet, bgr-means, or MEAN,STD in grey levels.  "
            "[default: the named network's own; for your own file, that of its features and runs on disk]",
            metavar="HOW",
        ),
    ]
    weights: Annotated[
        Text,
        Option(
            "auto, imagenet, untrained[:SEED], a Keras weights file, or sha256:DIGEST of one that was used before.",
            "auto",
        ),
    ]


class BackboneOptions(TypedDict, total=False):
    """Which frozen network."""

    backbone: Annotated[
        Text | None,
        Option(
            "The network: a name that `backbones` lists, or a .keras file of your own.  [default: inception_v3]",
            metavar="NAME|FILE",
            suggest="backbones",
        ),
    ]


class NetworkOptions(InputOptions, BackboneOptions, total=False):
    """Which frozen network, and how pixels reach it."""


class DecodingOptions(TypedDict, total=False):
    """How image files become pixels."""

    fit: Annotated[
        Literal["squash", "crop", "pad"] | None,
        Option("How an image that is not square becomes square.  [default: squash]"),
    ]
    depth: Annotated[
        int | None,
        Option(
            "How many bits images with 16 bits a channel really hold, e.g. 12 from a camera.  [default: 16]",
            None,
            9,
            16,
            "BITS",
        ),
    ]
    max_pixels: Annotated[int, Option("Quarantine images with more pixels than this.", MAX_PIXELS, 1)]


class PrecisionOptions(TypedDict, total=False):
    """What the backbone computes in."""

    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Option("What the backbone computes in.", "auto")
    ]


class SpaceNameOptions(TypedDict, total=False):
    """A feature space, named outright."""

    space: Annotated[str | None, Option("A feature space by its name in `cache ls`.", suggest="spaces")]


class SpaceOptions(PrecisionOptions, SpaceNameOptions, total=False):
    """Which feature space: how rows were computed and stored."""

    storage: Annotated[Literal["auto", "float16", "float32"], Option("What features are stored as.", "auto")]


class ViewsOptions(TypedDict, total=False):
    """Augmented views of the training images, cached like the plain one."""

    views: Annotated[int, Option("Views of each image, the plain one included.", 1, 1, 100, "K")]
    augment: Annotated[
        str | None,
        Option(
            "How the other views are augmented, with --views: rotation (degrees), width_shift, height_shift, shear, "
            "zoom, horizontal_flip, vertical_flip, fill (nearest, reflect, wrap, black).  [default: rotation=30,"
            "width_shift=0.2,height_shift=0.2,shear=0.2,zoom=0.2,horizontal_flip=true,fill=nearest]",
            metavar="NAME=VALUE,…",
        ),
    ]


class CachedOptions(ImagesOptions, NetworkOptions, SpaceOptions, DecodingOptions, total=False):
    """Which cached features, of which images."""


class ClusterOptions(TypedDict, total=False):
    """Whose processes do the work, if it is not this one."""

    workers: Annotated[int | None, Option("Share the work among N processes on this machine.", None, 1, 512, "N")]
    scheduler: Annotated[
        str | None,
        Option("Let the workers of this Dask scheduler do the work, e.g. tcp://host:8786.", metavar="ADDRESS"),
    ]
    tls_ca: Annotated[
        Text | None,
        Option("The certificate authority of a --scheduler tls://…, PEM.", metavar="FILE", kind="file"),
    ]
    tls_cert: Annotated[Text | None, Option("Our certificate for that scheduler, PEM.", metavar="FILE", kind="file")]
    tls_key: Annotated[Text | None, Option("The key of that certificate, PEM.", metavar="FILE", kind="file")]
    dashboard: Annotated[
        str | None,
        Option(
            "Where the dashboard of --workers listens.  [default: 127.0.0.1, any free port]", metavar="ADDRESS:PORT"
        ),
    ]


class ConnectionsOptions(TypedDict, total=False):
    """How addresses are read."""

    connections: Annotated[
        int, Option("How many images at addresses (https://, s3://, …) are fetched at once.", CONNECTIONS, 1, 256, "N")
    ]


class MemoryOptions(TypedDict, total=False):
    """How much memory rows may take."""

    memory: Annotated[
        str | int | None,
        Option(
            "Memory for cached rows, e.g. 2GB; what does not fit is streamed.  [default: half of what is free]",
            metavar="SIZE",
        ),
    ]


def declared(group: type) -> dict[str, tuple[Any, Option]]:
    """Return name → (type, `Option`) of all fields of a group, those of the groups it extends first."""
    return _declared(group)


@cache
def _declared(group: type) -> dict[str, tuple[Any, Option]]:
    found = {}
    for name, hint in get_type_hints(group, include_extras=True).items():
        kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found[name] = (kind, about[0])
    return found


def complete(group: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a group: those `given`, checked, and the others at their defaults.

    Raises
    ------
    TypeError
        If an option is not of the group, as for an unknown keyword argument.
    UsageError
        If a value is none of the choices, or out of range.
    """
    known = declared(group)
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; there are {', '.join(known)}")
    for name, value in given.items():
        _check(name, value, *known[name])
    return {name: given.get(name, option.default) for name, (_, option) in known.items()}


def _check(name: str, value: Any, kind: Any, option: Option) -> None:
    choices = [each for part in (kind, *get_args(kind)) if get_origin(part) is Literal for each in get_args(part)]
    if choices and value is not None and value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r:.60}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = option.low, option.high
        if (low is not None and value < low) or (high is not None and value > high):
            legal = f"in {low} … {high}" if low is not None and high is not None else f"at least {low}"
            raise UsageError(f"{name} must be {legal}, found {value!r:.60}")
