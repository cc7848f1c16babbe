"""`sweep`: which head to take, and with which settings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.completion import stopped_names
from pipeline.commands.depth import DepthOption
from pipeline.commands.shared import (
    CLUSTER_OPTIONS,
    MAX_PIXELS,
    ArchiveOption,
    AugmentOption,
    BackboneOption,
    DashboardOption,
    DatasetOption,
    FitOption,
    ImageRootOption,
    InputSizeOption,
    JsonOption,
    LayerOption,
    LimitOption,
    MaxBadOption,
    MaxPixelsOption,
    MemoryOption,
    PrecisionOption,
    QuietOption,
    ScalingOption,
    SchedulerOption,
    SpaceOption,
    StorageOption,
    TlsCaOption,
    TlsCertOption,
    TlsKeyOption,
    ViewsOption,
    WeightsOption,
    WorkersOption,
    asked_features_line,
    cluster_choice,
    dataset_choice,
    exit_for_bad,
    feature_choice,
    features_command,
    memory_bytes,
    opened,
    refuse_beside_resume,
    typed,
    views_choice,
)
from pipeline.progress import size_text

if TYPE_CHECKING:
    from pipeline.sweep import Sweep, SweepAsked

_HEADS = ("flatten", "gap", "logreg")
_MOST_LISTED = 30


def sweep(
    context: typer.Context,
    head: Annotated[
        list[str] | None,
        typer.Option(help="flatten, gap or logreg; may be repeated.  [default: all]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[HEAD.]NAME=VALUES",
            help="Values of a setting of `train-head`, as learning_rate=1e-4,1e-3 or gap.hidden=64,[128,64]; "
            "with --random also a range, 1e-4..1e-2; may be repeated.  [default: a small grid for each head]",
        ),
    ] = None,
    random: Annotated[
        int | None, typer.Option(metavar="N", help="Draw N settings instead of trying every combination.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.", min=0)] = 0,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    tls_ca: TlsCaOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    dashboard: DashboardOption = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    views: ViewsOption = 1,
    augment: AugmentOption = None,
    memory: MemoryOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="SWEEP",
            help="Go on with a sweep that was stopped, as it was asked for; latest is the last one.",
            autocompletion=stopped_names,
        ),
    ] = None,
    backbone: BackboneOption = None,
    input_size: InputSizeOption = None,
    scaling: ScalingOption = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    storage: StorageOption = "auto",
    space: SpaceOption = None,
    fit: FitOption = None,
    depth: DepthOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Try heads and settings on the cache; keep the best as a run. Computes no feature."""
    from pipeline.sweep import sweep as run_sweep

    start, cluster = time.perf_counter(), cluster_choice(context)
    asked = _asked(context) if resume is None else None
    with opened(context) as workspace:
        if asked is None:
            resume, asked = _resumed(context, str(resume), workspace.sweeps)
            command, chosen = asked_features_line(context, asked), asked.images
        else:
            command, chosen = features_command(context), dataset_choice(context)
        images = chosen.open(workspace)
        done = run_sweep(images, workspace, asked, command, resume=resume, cluster=cluster)
    _finish(done, round(time.perf_counter() - start, 3), as_json)
    exit_for_bad(done.quarantined, len(images), max_bad)


def _asked(context: typer.Context) -> SweepAsked:
    from pipeline.errors import UsageError
    from pipeline.sweep import SweepAsked
    from pipeline.trials import make_trials

    given = context.params
    if given["random"] is None and "seed" in typed(context):
        raise UsageError("--seed is of the draw, so it goes with --random only; of the heads: --set seed=0,1,2")
    specs = make_trials(given["head"] or _HEADS, given["settings"] or (), given["random"], given["seed"])
    return SweepAsked(
        images=dataset_choice(context).anchored(),
        features=feature_choice(context).anchored(),
        specs=tuple(specs),
        max_pixels=given["max_pixels"],
        memory=memory_bytes(given["memory"]),
        views=views_choice(context),
    )


def _resumed(context: typer.Context, name: str, root: Path) -> tuple[str, SweepAsked]:
    from pipeline import runs
    from pipeline.sweep import SweepAsked

    refuse_beside_resume(context, *CLUSTER_OPTIONS)
    name = runs.latest_of(runs.unfinished(root), root) if name == "latest" else name
    return name, SweepAsked.of_request(runs.read_request(root, name))


def _finish(done: Sweep, seconds: float, as_json: bool) -> None:
    from pipeline import terminal
    from pipeline.leaderboard import noise_sentence, varied

    if as_json:
        result = {"sweep": done.name, "runs": done.rows, "best": done.best, "reused": done.reused}
        terminal.emit_json({**result, "seconds": seconds, "features_computed": 0, "path": str(done.path)})
        return
    names = varied(done.rows)
    headers = ("rank", "head", "settings", "val", "95% interval", "p", "seconds", "parameters", "size")
    rows = [_row(row, names[row["trial"]]) for row in done.rows]
    terminal.table(rows[:_MOST_LISTED], headers)
    if len(rows) > _MOST_LISTED:
        terminal.say(f"and {len(rows) - _MOST_LISTED:,} more in {done.path / 'leaderboard.csv'}")
    terminal.say(noise_sentence(done.rows))
    low, high = done.best["accuracy_interval"]
    terminal.say(f"the best on the test split: accuracy {done.best['accuracy']:.4f} ({low:.4f} to {high:.4f})")
    terminal.say(f"kept as the run {done.best['run']}; the sweep, {seconds:,.0f} s, in {done.path}")


def _row(row: dict[str, Any], settings: str) -> tuple[Any, ...]:
    if row["error"] is not None:
        return (row["rank"], row["head"], settings, "failed", row["error"], "", f"{row['seconds']:.1f}", "", "")
    return (
        row["rank"],
        row["head"],
        settings,
        f"{row['val_accuracy']:.4f}",
        f"{row['low']:.3f} … {row['high']:.3f}",
        "best" if row["rank"] == 1 else f"{row['p_value']:.2g}",
        f"{row['seconds']:.1f}",
        row["parameters"],
        size_text(row["bytes"]),
    )
