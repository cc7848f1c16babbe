"""`features`: stage one, every image through the backbone once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.depth import DepthOption
from pipeline.commands.network import BackboneOption, InputSizeOption, ScalingOption
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

if TYPE_CHECKING:
    from pipeline.extraction.extract import Extraction


def features(
    context: typer.Context,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
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
    views: ViewsOption = 1,
    augment: AugmentOption = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(help="Rows in a shard, at most.  [default: 256, fewer of rows above 1 MiB]", min=1, max=65_536),
    ] = None,
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
    from pipeline.commands import terminal
    from pipeline.core import machine
    from pipeline.dataset import remote
    from pipeline.extraction.compute import ComputeOptions
    from pipeline.extraction.extract import extract

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
    if done.stats.workers and not as_json:
        rows = [tuple(each.values()) for each in done.stats.workers]
        terminal.table(rows, ("worker", "rows", "images/s", "time in model"))
    exit_for_bad(done.quarantined, done.images, max_bad)


def _told(done: Extraction) -> dict[str, Any]:
    """Return what a computation has to tell, while the cache is open."""
    from dataclasses import asdict

    return {
        "images": done.images,
        "rows": done.rows,
        "computed": done.computed,
        "reused": done.reused,
        "duplicates": done.duplicates,
        "quarantined": len(done.quarantined),
        "quarantined_images": [asdict(bad) for bad in done.quarantined],
        "causes": causes(done.quarantined),
        "images_per_second": round(done.computed / done.stats.seconds, 2) if done.computed else None,
        "model_share": done.stats.model_share,
        "recomputed": done.stats.lost,
        "workers": done.stats.workers,
        "space": done.space.name if done.space else None,
        "bytes_per_row": done.space.totals().bytes_per_row if done.space else None,
        "weights": done.space.provenance.get("weights") if done.space else None,
        "precision": done.space.spec.precision if done.space else None,
        "largest_16_bit_value": done.stats.peak or None,
    }


_FEATURE_LINES = ("images_per_second", "space", "bytes_per_row", "weights", "precision")
