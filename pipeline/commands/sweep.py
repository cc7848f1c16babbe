"""`sweep`: which head to take, and with which settings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.completion import backbone_names, stopped_names
from pipeline.commands.depth import DepthOption
from pipeline.commands.network import InputSizeOption, ScalingOption
from pipeline.commands.shared import (
    CLUSTER_OPTIONS,
    MAX_PIXELS,
    ArchiveOption,
    AugmentOption,
    DashboardOption,
    DatasetOption,
    FitOption,
    ImageRootOption,
    JsonOption,
    LayerOption,
    LimitOption,
    MaxBadOption,
    MaxPixelsOption,
    MemoryOption,
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
from pipeline.core.units import size_text

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.extraction.feature_choice import FeatureChoice
    from pipeline.runs.request import SweepRequest
    from pipeline.training.sweep.sweep import Sweep

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
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE,…",
            help="Networks to compare: names that `backbones` lists, or .keras files of your own; may be repeated. "
            "With several, --scaling is for the file among them that is not known with one, --weights (auto, imagenet, "
            "untrained) for the named ones.  [default: inception_v3]",
            autocompletion=backbone_names,
        ),
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="First compute the features that are missing, of each backbone.")
    ] = False,
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
    """Try heads and settings on the cache, of one backbone or several; keep the best as a run.

    No feature is computed, unless by --compute.
    """
    from pipeline.training.sweep.sweep import sweep as run_sweep

    start, cluster = time.perf_counter(), cluster_choice(context)
    choices = _choices(context) if resume is None else ()
    begun = _request(context, choices) if choices else None  # wrong usage is told before the cache is opened
    with opened(context) as workspace:
        if begun is None:
            resume, request, commands = _resumed(context, str(resume), workspace.sweeps)
        else:
            choices = _scaled(choices, workspace)
            request = replace(begun, features=tuple(choice.anchored() for choice in choices))
            commands = [_features_command(context, each, len(choices) > 1) for each in choices]
        images = (request.images if begun is None else dataset_choice(context)).open(workspace)
        done = run_sweep(images, workspace, request, commands, resume=resume, cluster=cluster, compute=compute)
    _finish(done, round(time.perf_counter() - start, 3), as_json)
    exit_for_bad(done.quarantined, len(images), max_bad)


def _choices(context: typer.Context) -> tuple[FeatureChoice, ...]:
    """Return what the options say about the features of each backbone."""
    from pipeline.backbone.source import is_file
    from pipeline.core.errors import UsageError

    texts = context.params["backbone"] or ()
    names = _backbones(texts)
    if texts and not names:
        raise UsageError("--backbone takes names of the table or .keras files, with commas between them; found none")
    if len(names) < 2:
        return (feature_choice(context, backbone=names[0] if names else None),)
    own = [name for name in names if is_file(name)]
    _refuse_for_several(context, own)
    return tuple(
        feature_choice(
            context,
            backbone=name,
            scaling=context.params["scaling"] if name in own else None,
            weights="auto" if name in own else context.params["weights"],
        )
        for name in names
    )


def _backbones(texts: Iterable[str]) -> list[str]:
    """Return the names and files in lists with commas, each once; a text that is a file is one, whatever its name."""
    from pipeline.core import machine

    parts = [[text] if machine.expand_home(text).is_file() else text.split(",") for text in texts]
    return list(dict.fromkeys(name.strip() for some in parts for name in some if name.strip()))


def _refuse_for_several(context: typer.Context, own: Sequence[str]) -> None:
    """Raise UsageError if an option can be meant for one backbone only."""
    from pipeline.core.errors import UsageError

    given = context.params
    for option, of in (("space", "features of one backbone"), ("layer", "a layer of one backbone")):
        if given[option] is not None:
            raise UsageError(f"--{option} names {of}, so it does not go with several --backbone; leave it out")
    if given["scaling"] is not None and not own:
        raise UsageError("--scaling is of a network of your own, found no file among --backbone; leave it out")
    weights = given["weights"]
    if weights not in ("auto", "imagenet") and weights.partition(":")[0] != "untrained":
        raise UsageError(
            f"--weights {weights!r:.80} are of one backbone; with several it takes auto, imagenet or untrained, and "
            "auto finds the features that were made by `features --weights FILE`"
        )


def _scaled(choices: Sequence[FeatureChoice], workspace: Workspace) -> tuple[FeatureChoice, ...]:
    """Return the same; of several files only the one that is not known with one scaling is meant by --scaling."""
    from pipeline.backbone.source import lacks_scaling
    from pipeline.core.errors import UsageError

    own = [str(choice.backbone) for choice in choices if choice.scaling is not None]
    if len(choices) == 1 or len(own) < 2:
        return tuple(choices)
    lacking = [name for name in own if lacks_scaling(name, workspace)]
    if not lacking:
        raise UsageError(f"--scaling: each of the {len(own)} files among --backbone is known with one; leave it out")
    if len(lacking) > 1:
        raise UsageError(
            f"--scaling is for one file, found {len(lacking)} that need it: {', '.join(lacking)}; a file that has "
            "features by one scaling needs none: `features --backbone FILE --scaling …` makes them"
        )
    return tuple(choice if choice.backbone in lacking else replace(choice, scaling=None) for choice in choices)


def _features_command(context: typer.Context, choice: FeatureChoice, is_one_of_several: bool) -> str:
    if not is_one_of_several:
        return features_command(context, backbone=choice.backbone)
    weights = None if choice.weights == "auto" else choice.weights
    return features_command(context, backbone=choice.backbone, scaling=choice.scaling, weights=weights)


def _request(context: typer.Context, choices: tuple[FeatureChoice, ...]) -> SweepRequest:
    from pipeline.core.errors import UsageError
    from pipeline.runs.request import SweepRequest
    from pipeline.training.sweep.trials import make_trials

    given = context.params
    if given["random"] is None and "seed" in typed(context):
        raise UsageError("--seed is of the draw, so it goes with --random only; of the heads: --set seed=0,1,2")
    specs = make_trials(given["head"] or _HEADS, given["settings"] or (), given["random"], given["seed"])
    return SweepRequest(
        images=dataset_choice(context).anchored(),
        features=tuple(choice.anchored() for choice in choices),
        specs=tuple(specs),
        max_pixels=given["max_pixels"],
        memory=memory_bytes(given["memory"]),
        views=views_choice(context),
    )


def _resumed(context: typer.Context, name: str, root: Path) -> tuple[str, SweepRequest, list[str]]:
    """Return the name of the sweep that is resumed, what it was asked for, and what makes its features."""
    from pipeline.runs import store
    from pipeline.runs.request import SweepRequest

    refuse_beside_resume(context, *CLUSTER_OPTIONS)
    name = store.latest_of(store.unfinished(root), root) if name == "latest" else name
    request = SweepRequest.of_request(store.read_request(root, name))
    return (
        name,
        request,
        [asked_features_line(context, request.head(each, request.specs[0])) for each in request.features],
    )


def _finish(done: Sweep, seconds: float, as_json: bool) -> None:
    from pipeline.commands import terminal
    from pipeline.training.sweep.leaderboard import (
        fastest_sentence,
        has_several_backbones,
        noise_sentence,
        unmeasured_sentence,
        varied,
    )

    if as_json:
        result = {"sweep": done.name, "runs": done.rows, "best": done.best, "reused": done.reused}
        terminal.emit_json({**result, "seconds": seconds, "features_computed": done.computed, "path": str(done.path)})
        return
    names, several = varied(done.rows), has_several_backbones(done.rows)
    rows = [_row(row, names[row["trial"]], several) for row in done.rows]
    terminal.table(rows[:_MOST_LISTED], _HEADERS_OF_SEVERAL if several else _HEADERS)
    if len(rows) > _MOST_LISTED:
        terminal.say(f"and {len(rows) - _MOST_LISTED:,} more in {done.path / 'leaderboard.csv'}")
    terminal.say(noise_sentence(done.rows))
    for sentence in (fastest_sentence(done.rows), unmeasured_sentence(done.rows)) if several else ():
        if sentence:
            terminal.say(sentence)
    low, high = done.best["accuracy_interval"]
    terminal.say(f"the best on the test split: accuracy {done.best['accuracy']:.4f} ({low:.4f} to {high:.4f})")
    terminal.say(f"kept as the run {done.best['run']}; the sweep, {seconds:,.0f} s, in {done.path}")


_HEADERS = ("rank", "head", "settings", "val", "95% interval", "p", "seconds", "parameters", "size")
_HEADERS_OF_SEVERAL = ("rank", "backbone", *_HEADERS[1:], "images/s", "a row")


def _row(row: dict[str, Any], settings: str, several: bool) -> tuple[Any, ...]:
    rank, *cells = _cells(row, settings)
    if not several:
        return (rank, *cells)
    rate, size = row["images_per_second"], row["bytes_per_row"]
    return (
        rank,
        row["backbone"],
        *cells,
        "" if rate is None else f"{rate:,.4g}",
        "" if size is None else size_text(size),
    )


def _cells(row: dict[str, Any], settings: str) -> tuple[Any, ...]:
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
