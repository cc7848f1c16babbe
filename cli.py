#!/usr/bin/env python3
"""Icebox on the command line: parses, calls `pipeline`, prints. Nothing heavy is imported at the top."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pipeline.dataset import Dataset
    from pipeline.extract import FeatureChoice, Quarantined
    from pipeline.workspace import Workspace

app = typer.Typer(
    help="Freeze InceptionV3 once, keep its features on disk, train heads from them for ever.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at the feature cache.", rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
runs_app = typer.Typer(help="Look at the trained heads.", rich_markup_mode=None)
app.add_typer(runs_app, name="runs")

# Options that several commands share have one name and one meaning everywhere.
DatasetOption = Annotated[
    str,
    typer.Option(help="digits, cifar10, cifar100, a folder of class folders, or a .csv or .parquet manifest."),
]
ArchiveOption = Annotated[
    Path | None, typer.Option(help="The published CIFAR archive, if it is at hand.", dir_okay=False)
]
LimitOption = Annotated[
    int | None, typer.Option(help="Take only the first N images of a fixed, class-balanced order.", min=1)
]
WeightsOption = Annotated[str, typer.Option(help="auto, imagenet, untrained[:SEED], or a Keras weights file.")]
LayerOption = Annotated[str | None, typer.Option(help="The layer whose output is cached.  [default: mixed10]")]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="What the backbone computes in.")
]
StorageOption = Annotated[Literal["auto", "float16", "float32"], typer.Option(help="What features are stored as.")]
SpaceOption = Annotated[str | None, typer.Option(help="A feature space by its name in `cache ls`.")]
FitOption = Annotated[
    Literal["squash", "crop", "pad"] | None,
    typer.Option(help="How an image that is not square becomes square.  [default: squash]"),
]
MaxPixelsOption = Annotated[int, typer.Option(help="Quarantine images with more pixels than this.", min=1)]
MaxBadOption = Annotated[
    float, typer.Option(help="Share of images that may be quarantined before the exit code is 3.", min=0, max=1)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]

_DATA_DIR = Path(__file__).parent / "data"
_MAX_PIXELS = 180_000_000  # pipeline.images.DEFAULT_MAX_PIXELS, not imported here as it brings OpenCV


@app.callback()
def main_options(
    context: typer.Context,
    data_dir: Annotated[
        Path,
        typer.Option(
            help="Where cache, runs and downloads are kept.", envvar="ICEBOX_DATA", file_okay=False, show_default="data"
        ),
    ] = _DATA_DIR,
) -> None:
    """Options that stand before the command."""
    context.obj = data_dir


@app.command()
def features(
    context: typer.Context,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    limit: LimitOption = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    storage: StorageOption = "auto",
    space: SpaceOption = None,
    fit: FitOption = None,
    max_pixels: MaxPixelsOption = _MAX_PIXELS,
    shard_rows: Annotated[int, typer.Option(help="Rows in a shard, at most.", min=1, max=65_536)] = 256,
    batch_size: Annotated[int, typer.Option(help="Images the model is given at once.", min=1, max=512)] = 32,
    retry_failed: Annotated[bool, typer.Option(help="Try images again that could not be decoded before.")] = False,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Compute the features that are missing, and keep them."""
    import time
    from dataclasses import asdict

    from pipeline.compute import ComputeOptions
    from pipeline.extract import extract

    start = time.perf_counter()
    choice = _choice(weights, layer, precision, storage, space, fit)
    options = ComputeOptions(shard_rows, batch_size, max_pixels)
    with _workspace(context) as workspace:
        images = _open_dataset(workspace, dataset, archive, limit)
        done = extract(images, workspace, choice, options, retry_failed=retry_failed)
        totals = done.space.totals() if done.space else None
    result = {
        "images": done.images,
        "rows": done.rows,
        "computed": done.computed,
        "reused": done.reused,
        "duplicates": done.duplicates,
        "quarantined": len(done.quarantined),
        "quarantined_images": [asdict(bad) for bad in done.quarantined],
        "seconds": round(time.perf_counter() - start, 3),
        "images_per_second": round(done.computed / done.compute_seconds, 2) if done.computed else None,
        "space": done.space.name if done.space else None,
        "bytes_per_row": round(totals.bytes / totals.rows) if totals and totals.rows else None,
        "weights": done.space.provenance.get("weights") if done.space else None,
        "precision": done.space.spec.precision if done.space else None,
    }
    _finish(result, as_json, ("rows", "computed", "reused", "duplicates", "quarantined", "seconds", *_FEATURE_LINES))
    _exit_for_bad(done.quarantined, done.images, max_bad)


_FEATURE_LINES = ("images_per_second", "space", "bytes_per_row", "weights", "precision")


@app.command("train-head")
def train_head(
    context: typer.Context,
    head: Annotated[Literal["flatten", "gap", "logreg"], typer.Option(help="Which head to train.")] = "gap",
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    limit: LimitOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows.  [default: 50]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.  [default: 64]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's step.  [default: 0.001]")] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Units of the hidden layer.  [default: flatten 256, gap 64]")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share dropped before the softmax.  [default: flatten 0.5, gap 0]")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Normalise each channel by the training rows.  [default: normalize]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after N epochs without a better validation loss; 0: never.  [default: 0]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights, the order and dropout.  [default: 0]")] = None,
    c: Annotated[
        float | None, typer.Option("--C", help="logreg: inverse strength of the penalty.  [default: 1]")
    ] = None,
    max_iter: Annotated[int | None, typer.Option(help="logreg: iterations at most.  [default: 1000]")] = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    storage: StorageOption = "auto",
    space: SpaceOption = None,
    fit: FitOption = None,
    max_pixels: MaxPixelsOption = _MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Train a head from the cache. Computes no feature."""
    from pipeline.spec import HeadSpec
    from pipeline.train import train_head as train

    spec = HeadSpec.make(
        head,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        hidden=hidden,
        dropout=dropout,
        normalize=normalize,
        patience=patience,
        seed=seed,
        C=c,
        max_iter=max_iter,
    )
    choice = _choice(weights, layer, precision, storage, space, fit)
    with _workspace(context) as workspace:
        images = _open_dataset(workspace, dataset, archive, limit)
        run = train(images, workspace, choice, spec, max_pixels, _features_command(context))
    _finish(run.summary, as_json, _HEAD_LINES, note=f"kept in {run.path}")
    _exit_for_bad(run.quarantined, len(images), max_bad)


_HEAD_LINES = (
    "run", "accuracy", "val_accuracy", "train_rows", "val_rows", "test_rows", "classes", "epochs",
    "seconds", "weights", "precision",
)  # fmt: skip


@cache_app.command("ls")
def cache_ls(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the feature spaces on disk."""
    from dataclasses import asdict

    from pipeline import terminal

    with _workspace(context) as workspace:
        spaces = [
            {
                "space": space.name,
                **asdict(space.totals()),
                "spec": space.spec.to_dict(),
                "made_by": dict(space.provenance),
            }
            for space in workspace.cache.spaces()
        ]
    result = {"spaces": spaces, **{key: sum(space[key] for space in spaces) for key in ("shards", "rows", "bytes")}}
    if as_json:
        terminal.emit_json(result)
        return
    if not spaces:
        terminal.say("the cache is empty; `features` fills it")
        return
    headers = ("space", "rows", "shards", "MB", "weights", "precision")
    terminal.table(
        [
            (s["space"], s["rows"], s["shards"], s["bytes"] / 1e6, s["made_by"].get("weights"), s["spec"]["precision"])
            for s in spaces
        ],
        headers,
    )


@runs_app.command("ls")
def runs_ls(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the trained heads and their accuracies, the oldest first."""
    from pipeline import runs, terminal

    with _workspace(context) as workspace:
        found = runs.list_runs(workspace.runs)
    if as_json:
        terminal.emit_json({"runs": [{"dataset": about["dataset"]["name"], **about["summary"]} for about in found]})
        return
    if not found:
        terminal.say("there are no runs; `train-head` makes them")
        return
    rows = [_run_row(about["summary"]) for about in found]
    terminal.table(rows, ("run", "head", "accuracy", "95% interval", "val", "seconds", "weights"))


def _run_row(summary: dict[str, Any]) -> tuple[object, ...]:
    low, high = summary["accuracy_interval"]
    return (
        summary["run"],
        summary["head"],
        f"{summary['accuracy']:.3f}",
        f"{low:.3f} … {high:.3f}",
        f"{summary['val_accuracy']:.3f}",
        f"{summary['seconds']:.1f}",
        summary["weights"],
    )


@app.command()
def doctor(context: typer.Context, as_json: JsonOption = False) -> None:
    """Tell what this machine has, and what Icebox would do with it."""
    from pipeline.doctor import examine

    with _workspace(context) as workspace:
        result = examine(workspace)
    _finish(result, as_json, tuple(result))


@app.command("weights")
def weights_command(
    context: typer.Context,
    weights: Annotated[
        str | None, typer.Option(help="Get these weights ready: imagenet, untrained[:SEED], or a file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell where weights come from; with --weights, get them and tell their digest."""
    from pipeline.weights import describe

    with _workspace(context) as workspace:
        result = describe(weights, workspace)
    _finish(result, as_json, tuple(result))


@app.command()
def summary(
    head: Annotated[Literal["flatten", "gap"], typer.Option(help="The head on top.")] = "gap",
    classes: Annotated[int, typer.Option(help="How many classes it tells apart.", min=2)] = 10,
    layer: LayerOption = None,
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer, not only those where to cut.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the layers and count the parameters of backbone and head."""
    from pipeline import terminal
    from pipeline.summary import summarize

    _show_notices()
    result = summarize(head, classes, layer)
    layers = result["layers"] if as_json else result.pop("layers")
    if not as_json:
        rows = [
            (each["index"], each["name"], each["type"], "x".join(map(str, each["shape"])), each["parameters"])
            for each in layers
            if every_layer or each["cut"]
        ]
        terminal.table(rows, ("index", "layer", "type", "output", "parameters"))
    _finish(result, as_json, tuple(result))


# Helpers of the commands


@contextmanager
def _workspace(context: typer.Context) -> Iterator[Workspace]:
    from pipeline import terminal
    from pipeline.workspace import open_workspace

    _show_notices()
    with open_workspace(context.obj, terminal.progress) as workspace:
        yield workspace


def _show_notices() -> None:
    from pipeline import terminal

    terminal.show_notices()


def _open_dataset(workspace: Workspace, name: str, archive: Path | None, count: int | None) -> Dataset:
    from pipeline import dataset, terminal

    found = dataset.open_dataset(name, downloads=workspace.downloads, archive=archive, progress=terminal.progress)
    if found.ignored:
        listed = ", ".join(f"{ending or 'no ending'} {n:,}" for ending, n in sorted(found.ignored.items()))
        terminal.say(f"notice: passed over, as their endings are not of images: {listed}", "yellow")
    return found if count is None else dataset.limit(found, count)


def _choice(
    weights: str, layer: str | None, precision: str, storage: str, space: str | None, fit: str | None
) -> FeatureChoice:
    from pipeline.extract import FeatureChoice

    return FeatureChoice(weights, layer, fit, precision, storage, space)


_FEATURE_OPTIONS = (
    "dataset",
    "archive",
    "limit",
    "weights",
    "layer",
    "precision",
    "storage",
    "space",
    "fit",
    "max_pixels",
)


def _features_command(context: typer.Context) -> str:
    """Return the command line that makes the features this one lacks."""
    words = ["python", "cli.py"]
    parent = context.parent
    if parent and str(parent.get_parameter_source("data_dir")).endswith("COMMANDLINE"):
        words += ["--data-dir", str(context.obj)]
    words.append("features")
    for name in _FEATURE_OPTIONS:
        if name == "dataset" or str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            words += [f"--{name.replace('_', '-')}", str(context.params[name])]
    return shlex.join(words)


def _finish(result: dict[str, Any], as_json: bool, lines: tuple[str, ...], note: str | None = None) -> None:
    """Print the JSON object, or the named lines of it for people."""
    from pipeline import terminal

    if as_json:
        terminal.emit_json(result)
        return
    shown = {name.replace("_", " "): _readable(name, result[name]) for name in lines if result.get(name) is not None}
    terminal.pairs(shown)
    if note:
        terminal.say(note)


def _readable(name: str, value: Any) -> Any:
    """Return sizes in units people read; other values as they are."""
    if not name.endswith(("memory", "bytes", "free")):
        return value
    return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.2f} MB"


def _exit_for_bad(quarantined: list[Quarantined], images: int, max_bad: float) -> None:
    """List what was quarantined; exit with 3 if it is more than was allowed for."""
    from pipeline import terminal

    for bad in quarantined[:20]:
        terminal.say(f"quarantined {bad.path}: {bad.reason}", "yellow")
    if len(quarantined) > 20:
        terminal.say(f"and {len(quarantined) - 20:,} more; --json lists them all", "yellow")
    if len(quarantined) / images > max_bad:
        raise typer.Exit(3)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage, 3 done but images are bad."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    from typer.exceptions import TyperException

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is as clean as Ctrl-C
    try:
        code = app(arguments, prog_name="cli.py", standalone_mode=False) or 0
    except TyperException as error:
        return _fail(error.format_message(), error.exit_code, arguments)
    except Exception as error:
        import sqlite3

        from pipeline.errors import IceboxError, UsageError

        if isinstance(error, sqlite3.Error):
            hint = "if it stays so, delete cache.db (or what ICEBOX_INDEX names): it is derived again"
            return _fail(f"the cache's index: {error}; {hint}", 1, arguments)
        if not isinstance(error, (IceboxError, OSError)):
            raise  # a bug: the traceback is what helps
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1, arguments)
    if code == _INTERRUPTED:
        kept = "features computed so far are kept, and the same command computes the rest"
        return _fail(f"stopped; {kept if 'features' in arguments else 'nothing was published'}", 1, arguments)
    return code


_INTERRUPTED = 130  # how Typer reports Ctrl-C


def _fail(message: str, code: int, arguments: list[str]) -> int:
    import json

    text = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    print(f"error: {text}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": text}))
    return code


if __name__ == "__main__":
    sys.exit(main())
