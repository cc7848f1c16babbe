"""What the commands share: options with one name and one meaning everywhere, and how results are printed."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.completion import dataset_names, run_names, space_names, stopped_names
from pipeline.core.units import counted, size_text

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.core.spec import Views
    from pipeline.dataset import Dataset
    from pipeline.extraction.feature_choice import FeatureChoice
    from pipeline.extraction.planning import Quarantined
    from pipeline.extraction.workers.connect import ClusterChoice
    from pipeline.runs.request import DatasetChoice, TrainRequest
    from pipeline.training.open_run import TrainedRun

DatasetOption = Annotated[
    str,
    typer.Option(
        help="digits, cifar10, cifar100, a folder of class folders, or a .csv or .parquet manifest.",
        autocompletion=dataset_names,
    ),
]
ArchiveOption = Annotated[
    Path | None, typer.Option(help="The published CIFAR archive, if it is at hand.", dir_okay=False)
]
ImageRootOption = Annotated[
    Path | None,
    typer.Option(help="The folder that a manifest's paths start from and may not leave.", file_okay=False),
]
LimitOption = Annotated[
    int | None, typer.Option(help="Take only the first N images of a fixed, class-balanced order.", min=1)
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="auto, imagenet, untrained[:SEED], a Keras weights file, or sha256:DIGEST of one that was used before."
    ),
]
LayerOption = Annotated[
    str | None,
    typer.Option(help="The layer whose output is cached.  [default: the network's last, mixed10 of inception_v3]"),
]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="What the backbone computes in.")
]
StorageOption = Annotated[Literal["auto", "float16", "float32"], typer.Option(help="What features are stored as.")]
SpaceOption = Annotated[
    str | None, typer.Option(help="A feature space by its name in `cache ls`.", autocompletion=space_names)
]
FitOption = Annotated[
    Literal["squash", "crop", "pad"] | None,
    typer.Option(help="How an image that is not square becomes square.  [default: squash]"),
]
MaxPixelsOption = Annotated[int, typer.Option(help="Quarantine images with more pixels than this.", min=1)]
MaxBadOption = Annotated[
    float, typer.Option(help="Share of images that may be quarantined before the exit code is 3.", min=0, max=1)
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="What cached rows may take, e.g. 2GB; more are streamed.  [default: half of what is free]"
    ),
]
ViewsOption = Annotated[
    int, typer.Option(metavar="K", help="Views of each image, the plain one included.", min=1, max=100)
]
AugmentOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=VALUE,…",
        help="What the other views are like, with --views: rotation (degrees), width_shift, height_shift, shear, zoom, "
        "horizontal_flip, vertical_flip, fill (nearest, reflect, wrap, black).  "
        "[default: rotation=30,width_shift=0.2,height_shift=0.2,shear=0.2,zoom=0.2,horizontal_flip=true,fill=nearest]",
    ),
]
ConnectionsOption = Annotated[
    int, typer.Option(metavar="N", help="How many images behind addresses are asked for at once.", min=1, max=256)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but warnings and errors.")]

WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="Share the work out to N processes of this machine.", min=1, max=512)
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Have the workers of this Dask scheduler do the work, e.g. tcp://host:8786."),
]
TlsCaOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Who vouches for a --scheduler tls://…, PEM.", dir_okay=False)
]
TlsCertOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Our certificate for that scheduler, PEM.", dir_okay=False)
]
TlsKeyOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The key of that certificate, PEM.", dir_okay=False)
]
DashboardOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS:PORT", help="Where the dashboard of --workers listens.  [default: 127.0.0.1, any free port]"
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Go on with a run that was stopped, as it was asked for; latest is the last one.",
        autocompletion=stopped_names,
    ),
]


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
AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RUN", help="Another run; probabilities are averaged. May be repeated.", autocompletion=run_names
    ),
]
RunWeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "--backbone",
        metavar="FILE",
        help="The backbone's weights file, or your own network's .keras file, if it is not where it was when features "
        "were made.",
    ),
]

CONNECTIONS = 16  # pipeline.dataset.remote.DEFAULT_CONNECTIONS
MAX_PIXELS = 180_000_000  # pipeline.images.decoding.DEFAULT_MAX_PIXELS, not imported here as it brings OpenCV


@contextmanager
def opened(context: typer.Context) -> Iterator[Workspace]:
    """Open the workspace of a command, its notices and progress going to the terminal.

    Raises
    ------
    StoppedError
        If the command is interrupted.
    """
    from pipeline.cache.workspace import open_workspace
    from pipeline.commands import terminal
    from pipeline.core import environment
    from pipeline.core.errors import StoppedError

    terminal.begin(quiet=context.params["quiet"])
    environment.tell()
    try:
        with open_workspace(context.obj, terminal.progress, program(context)) as workspace:
            yield workspace
    except KeyboardInterrupt as stop:
        raise StoppedError(stop) from stop


def dataset_choice(context: typer.Context) -> DatasetChoice:
    """Return what `--dataset`, `--archive`, `--image-root` and `--limit` of a command say."""
    from pipeline.runs.request import DatasetChoice

    name, archive, root = (context.params[option] for option in ("dataset", "archive", "image_root"))
    return DatasetChoice(name, archive and str(archive), root and str(root), context.params.get("limit"))


def open_dataset(workspace: Workspace, context: typer.Context) -> Dataset:
    """Open what `--dataset`, `--archive`, `--image-root` and `--limit` of a command say."""
    return dataset_choice(context).open(workspace)


def open_runs(workspace: Workspace, run: str, also: Sequence[str] | None) -> list[TrainedRun]:
    """Open the runs that RUN and `--also` name."""
    from pipeline.training.open_run import open_run

    return [open_run(workspace.runs, name) for name in (run, *(also or ()))]


_CHOICE_OPTIONS = (
    "backbone", "input_size", "scaling", "weights", "layer", "precision", "storage", "space", "fit", "depth",
)  # fmt: skip
_FEATURE_OPTIONS = ("dataset", "archive", "image_root", "limit", *_CHOICE_OPTIONS, "max_pixels", "views", "augment")


def feature_choice(context: typer.Context, **instead: Any) -> FeatureChoice:
    """Return what the options of a command say about the features, or what is said `instead` of them."""
    from pipeline.extraction.feature_choice import FeatureChoice

    return FeatureChoice(**{**{name: context.params[name] for name in _CHOICE_OPTIONS}, **instead})


def views_choice(context: typer.Context) -> Views:
    """Return what `--views` and `--augment` say."""
    from pipeline.core.errors import UsageError
    from pipeline.core.spec import Augmentation, Views

    count, augment = context.params["views"], context.params["augment"]
    if count == 1 and "augment" not in typed(context):
        return Views()  # in a file it says what they are like where there are some
    if augment is not None and count == 1:
        raise UsageError("--augment says what the augmented views are like; ask for some by --views 2 or more")
    return Views(count, Augmentation.parse(augment or ""))


CLUSTER_OPTIONS = ("workers", "scheduler", "tls_ca", "tls_cert", "tls_key", "dashboard")


def cluster_choice(context: typer.Context) -> ClusterChoice | None:
    """Return whose workers `--workers` or `--scheduler` mean, None if the work is done in this process."""
    from pipeline.extraction.workers.connect import ClusterChoice

    given = {name: context.params[name] for name in CLUSTER_OPTIONS}
    return ClusterChoice(**given) if any(value is not None for value in given.values()) else None


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


def asked_features_line(context: typer.Context, request: TrainRequest) -> str:
    """Return the command line that makes the features a run was asked to be trained on."""
    from dataclasses import asdict

    choice = {name: value for name, value in asdict(request.features).items() if value != "auto"}
    views = (
        {"views": request.views.count, "augment": str(request.views.recipe) or None} if request.views.count > 1 else {}
    )
    return features_line(context, {**asdict(request.images), **choice, "max_pixels": request.max_pixels, **views})


def refuse_beside_resume(context: typer.Context, *allowed: str) -> None:
    """Raise UsageError if more was said beside `--resume` than how to report, or what is `allowed`."""
    from pipeline.core.errors import UsageError

    fine = ("resume", "as_json", "quiet", "max_bad", *allowed)
    if others := [option for option in typed(context) if option not in fine]:
        spelt = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        listed = ", ".join(spelt[option] for option in others)
        raise UsageError(f"--resume goes on with what was asked for before; leave out {listed}")


def memory_bytes(text: str | None) -> int | None:
    """Return the bytes that `--memory` says. Raises UsageError."""
    return None if text is None else size_in_bytes("--memory", text)


def size_in_bytes(option: str, text: str) -> int:
    """Return the bytes that "1.5GB", "800MiB" or "200000" say. Raises UsageError."""
    from dask.utils import parse_bytes

    from pipeline.core.errors import UsageError

    try:
        return int(parse_bytes(text))
    except (ValueError, OverflowError) as error:  # the latter of an infinite number
        raise UsageError(f"{option} must be a size such as 2GB or 500MiB, found {text!r}") from error


def finish(result: dict[str, Any], as_json: bool, lines: tuple[str, ...], note: str | None = None) -> None:
    """Print the JSON object, or the named lines of it for people."""
    from pipeline.commands import terminal

    if as_json:
        terminal.emit_json(result)
        return
    shown = {name.replace("_", " "): _readable(name, result[name]) for name in lines if result.get(name) is not None}
    terminal.pairs(shown)
    if note:
        terminal.say(note)


def _readable(name: str, value: Any) -> Any:
    """Return sizes in units people read, and intervals as `runs ls` has them; other values as they are."""
    from pipeline.commands import terminal

    if name.endswith("interval"):
        return terminal.interval(value)
    sizes = ("memory", "bytes", "bytes_read", "bytes_freed", "free")
    return size_text(value) if name.endswith(sizes) else value


_MOST_CAUSES = 10  # counted for people


def causes(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """Return reason → how many images were quarantined for it, the most frequent first."""
    return dict(Counter(bad.reason for bad in quarantined).most_common())


def exit_for_bad(quarantined: list[Quarantined], images: int, max_bad: float) -> None:
    """List what was quarantined; exit with 3 if it is more than was allowed for."""
    from pipeline.commands import terminal

    for bad in quarantined[:20]:
        terminal.warn(f"quarantined {bad.path}: {bad.reason}")
    if len(quarantined) > 20:
        terminal.warn(f"and {len(quarantined) - 20:,} more; --json lists them all")
    found = list(causes(quarantined).items())
    if 1 < len(quarantined) > len(found):
        told = ", ".join(f"{count:,} {reason}" for reason, count in found[:_MOST_CAUSES])
        further = len(found) - _MOST_CAUSES
        others = f", and {counted(further, 'other cause')}" if further > 0 else ""
        terminal.warn(f"in all: {told}{others}")
    if len(quarantined) / images > max_bad:
        raise typer.Exit(3)
