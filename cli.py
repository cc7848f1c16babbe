#!/usr/bin/env python3
"""Icebox on the command line: parses, calls `pipeline`, prints. Nothing heavy is imported at the top."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from pipeline.commands.cache import cache_app
from pipeline.commands.config import apply_config, origin
from pipeline.commands.deploy import export, serve
from pipeline.commands.doctor import doctor
from pipeline.commands.evaluate import evaluate
from pipeline.commands.full import finetune, freeze
from pipeline.commands.heads import train_head
from pipeline.commands.predict import predict
from pipeline.commands.report import report
from pipeline.commands.shared import (
    CONNECTIONS,
    MAX_PIXELS,
    ArchiveOption,
    AugmentOption,
    ConnectionsOption,
    DashboardOption,
    DatasetOption,
    FitOption,
    ImageRootOption,
    JsonOption,
    LayerOption,
    LikeOption,
    LimitOption,
    MaxBadOption,
    MaxPixelsOption,
    PrecisionOption,
    QuietOption,
    SchedulerOption,
    SpaceOption,
    StorageOption,
    TlsCaOption,
    TlsCertOption,
    TlsKeyOption,
    ViewsOption,
    WeightsOption,
    WorkersOption,
    causes,
    cluster_choice,
    exit_for_bad,
    feature_choice,
    finish,
    open_dataset,
    opened,
    views_choice,
)
from pipeline.commands.sweep import sweep

if TYPE_CHECKING:
    from pipeline.extract import Extraction

app = typer.Typer(
    help="Freeze InceptionV3 once, keep its features on disk, train heads from them for ever.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")
runs_app = typer.Typer(help="Look at the trained heads.", rich_markup_mode=None)
app.add_typer(runs_app, name="runs")
app.command("train-head")(train_head)
app.command("freeze")(freeze)
app.command("finetune")(finetune)
app.command("sweep")(sweep)
app.command("evaluate")(evaluate)
app.command("predict")(predict)
app.command("export")(export)
app.command("serve")(serve)
app.command("doctor")(doctor)
app.command("report")(report)

_DATA_DIR = Path(__file__).parent / "data"


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
    named = apply_config(context, config)
    default = str(context.get_parameter_source("data_dir")).endswith(".DEFAULT")
    context.obj = named if named is not None and default else data_dir


@app.command()
def features(
    context: typer.Context,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    storage: StorageOption = "auto",
    space: SpaceOption = None,
    fit: FitOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    views: ViewsOption = 1,
    augment: AugmentOption = None,
    shard_rows: Annotated[int, typer.Option(help="Rows in a shard, at most.", min=1, max=65_536)] = 256,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images the model is given at once.  [default: that of the space; in a new one 16, on a GPU 32, "
            "or what is measured to be fastest if computing takes this process over five minutes; for workers 32]",
            min=1,
            max=512,
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option(help="Try images again that could not be decoded before.")] = False,
    on_error: Annotated[
        Literal["quarantine", "fail"], typer.Option(help="What an image that cannot be read or decoded does.")
    ] = "quarantine",
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    tls_ca: TlsCaOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    dashboard: DashboardOption = None,
    max_bad: MaxBadOption = 0.0,
    connections: ConnectionsOption = CONNECTIONS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute the features that are missing, and keep them."""
    import time

    from pipeline import machine, terminal
    from pipeline.compute import ComputeOptions
    from pipeline.dataset import remote
    from pipeline.extract import extract

    start = time.perf_counter()
    remote.limit_connections(connections)
    strict, threads = on_error == "fail", machine.usable_cores()
    options = ComputeOptions(shard_rows, batch_size, max_pixels, strict, threads)
    wanted, cluster = views_choice(context), cluster_choice(context)
    with opened(context) as workspace:
        images = open_dataset(workspace, context)
        choice = feature_choice(context)
        done = extract(images, workspace, choice, options, views=wanted, retry_failed=retry_failed, cluster=cluster)
        told = _told(done)
    result = {**told, "views": views, "seconds": round(time.perf_counter() - start, 3)}
    finish(result, as_json, ("rows", "computed", "reused", "duplicates", "quarantined", "seconds", *_FEATURE_LINES))
    if done.effort.workers and not as_json:
        rows = [tuple(each.values()) for each in done.effort.workers]
        terminal.table(rows, ("worker", "rows", "images/s", "time in model"))
    exit_for_bad(done.quarantined, done.images, max_bad)


def _told(done: Extraction) -> dict[str, Any]:
    """Return what a computation has to tell, while the cache is open."""
    from dataclasses import asdict

    totals = done.space.totals() if done.space else None
    return {
        "images": done.images,
        "rows": done.rows,
        "computed": done.computed,
        "reused": done.reused,
        "duplicates": done.duplicates,
        "quarantined": len(done.quarantined),
        "quarantined_images": [asdict(bad) for bad in done.quarantined],
        "causes": causes(done.quarantined),
        "images_per_second": round(done.computed / done.effort.seconds, 2) if done.computed else None,
        "model_share": done.effort.model_share,
        "recomputed": done.effort.lost,
        "workers": done.effort.workers,
        "space": done.space.name if done.space else None,
        "bytes_per_row": round(totals.bytes / totals.rows) if totals and totals.rows else None,
        "weights": done.space.provenance.get("weights") if done.space else None,
        "precision": done.space.spec.precision if done.space else None,
    }


_FEATURE_LINES = ("images_per_second", "space", "bytes_per_row", "weights", "precision")


@runs_app.command("ls")
def runs_ls(context: typer.Context, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the trained heads and their accuracies, the oldest first."""
    from pipeline import runs, terminal
    from pipeline.asked import resume_commands

    with opened(context) as workspace:
        found, stopped = runs.list_runs(workspace.runs), runs.unfinished(workspace.runs)
        commands = resume_commands(workspace.runs, stopped)
        sweeps = runs.unfinished(workspace.sweeps)
    if as_json:
        listed = [{"dataset": about["dataset"]["name"], **about["summary"]} for about in found]
        terminal.emit_json({"runs": listed, "unfinished": stopped, "unfinished_sweeps": sweeps})
        return
    if not found:
        terminal.say("there are no runs; `train-head` makes them")
    else:
        rows = [_run_row(about["summary"]) for about in found]
        terminal.table(rows, ("run", "head", "accuracy", "95% interval", "val", "seconds", "weights"))
    for name, command in (*commands.items(), *((name, "sweep") for name in sweeps)):
        terminal.warn(f"stopped, go on by: {command} --resume {name}")


def _run_row(summary: dict[str, Any]) -> tuple[object, ...]:
    low, high = summary["accuracy_interval"]
    return (
        summary["run"],
        summary["head"] if summary.get("stage", "head") == "head" else f"{summary['head']}, {summary['stage']}",
        f"{summary['accuracy']:.3f}",
        f"{low:.3f} … {high:.3f}",
        f"{summary['val_accuracy']:.3f}",
        f"{summary['seconds']:.1f}",
        summary["weights"],
    )


@app.command("weights")
def weights_command(
    context: typer.Context,
    weights: Annotated[
        str | None, typer.Option(help="Get these weights ready: imagenet, untrained[:SEED], or a file.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tell where weights come from; with --weights, get them and tell their digest."""
    from pipeline.weights import describe

    with opened(context) as workspace:
        result = describe(weights, workspace)
    finish(result, as_json, tuple(result))


@app.command()
def summary(
    head: Annotated[Literal["flatten", "gap"], typer.Option(help="The head on top.")] = "gap",
    classes: Annotated[int, typer.Option(help="How many classes it tells apart.", min=2)] = 10,
    layer: LayerOption = None,
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer, not only those where to cut.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the layers and count the parameters of backbone and head."""
    from pipeline import terminal
    from pipeline.summary import summarize

    terminal.begin(quiet=quiet)
    result = summarize(head, classes, layer)
    layers = result["layers"] if as_json else result.pop("layers")
    if not as_json:
        listed = [each for each in layers if every_layer or each["cut"]]
        headers = ("index", "layer", "type", "output", "parameters", "KiB an image", "work after it")
        terminal.table([_layer_row(each) for each in listed], headers)
    finish(result, as_json, tuple(result))


def _layer_row(layer: dict[str, Any]) -> tuple[object, ...]:
    shape = "x".join(map(str, layer["shape"]))
    stored, after = (f"{layer['bytes'] / 1024:,.0f}", f"{layer['share_after']:.1%}") if layer["cut"] else ("", "")
    return layer["index"], layer["name"], layer["type"], shape, layer["parameters"], stored, after


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage, 3 done but images are bad."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    from typer.exceptions import TyperException

    stopped = _stops_noted()
    try:
        code = _run(arguments)
    except TyperException as error:
        return _fail(error.format_message() + origin(error), error.exit_code, arguments)
    except Exception as error:
        import sqlite3

        from pipeline.errors import IceboxError, UsageError

        if isinstance(error, sqlite3.Error):
            full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
            otherwise = (
                "if it stays so, delete cache.db (or what ICEBOX_INDEX names), it is derived again; on a network file "
                "system put it on a disk of this machine by ICEBOX_INDEX=FILE"
            )
            hint = "make room and run again; what was published is kept" if full else otherwise
            return _fail(f"the cache's index: {error}; {hint}", 1, arguments)
        if isinstance(error, (IceboxError, OSError)):
            return _fail(str(error), 2 if isinstance(error, UsageError) else 1, arguments)
        if not stopped:
            raise  # a bug: the traceback is what helps
        code = _INTERRUPTED  # native code that is interrupted may turn that into an error of its own
    return _fail("stopped", 1, arguments) if code == _INTERRUPTED else code


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
        return app(arguments, prog_name="cli.py", standalone_mode=False) or 0
    except OSError as error:
        from pipeline.errors import IndexDamagedError

        if not isinstance(error, IndexDamagedError):
            raise
        from pipeline.cache.index_file import set_aside

        set_aside(error)
        return app(arguments, prog_name="cli.py", standalone_mode=False) or 0


_INTERRUPTED = 130  # how Typer reports Ctrl-C where no workspace is open yet


def _fail(message: str, code: int, arguments: list[str]) -> int:
    import json

    text = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    print(f"error: {text}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": text}))
    return code


def run_and_exit() -> NoReturn:
    """Run the command line as a program of its own."""
    import threading

    if sys.stderr is not None:
        # A descriptor of our own: what native libraries print on theirs is held back while they load.
        own, encoding = os.dup(2), sys.stderr.encoding
        sys.stderr = os.fdopen(own, "w", buffering=1, encoding=encoding, errors="backslashreplace")
    code = main()
    extract = sys.modules.get("pipeline.extract")
    if extract is not None and any(thread.name == extract.LOADING for thread in threading.enumerate()):
        # All is said and done, and TensorFlow, which is being loaded for nothing, would take its time to see that.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit()
