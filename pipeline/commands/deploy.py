"""`export` and `serve`: a run where it is to be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.shared import (
    MAX_PIXELS,
    AlsoOption,
    ImageRootOption,
    JsonOption,
    MaxPixelsOption,
    QuietOption,
    RunArgument,
    RunWeightsOption,
    finish,
    open_runs,
    opened,
    size_in_bytes,
)

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.dataset import Dataset
    from pipeline.training.open_run import TrainedRun

_SHOWN = ("bytes", "compared_images", "max_difference", "run_precision", "difference_to_run", "seconds")


def export(
    context: typer.Context,
    run: RunArgument,
    form: Annotated[
        Literal["keras", "savedmodel", "onnx", "litert", "openvino"], typer.Option("--format", help="What to write.")
    ] = "keras",
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to make.  [default: exports/RUN-FORMAT in the data directory]", file_okay=False),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Images to compare on, or folders of them.  [default: the run's own]"),
    ] = None,
    image_root: ImageRootOption = None,
    weights: RunWeightsOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a deployable model: pixels in, probabilities out."""
    from pipeline.deployment.export import export_run
    from pipeline.training.open_run import open_run

    with opened(context) as workspace:
        trained = open_run(workspace.runs, run)
        some = _images(trained, workspace, images, image_root)
        done = export_run(trained, form, some, workspace, max_pixels=max_pixels, out=out, weights=weights)
    about = {name: value for name, value in done.about.items() if name not in ("format", "version")}
    finish({"path": str(done.path), **about}, as_json, _SHOWN, note=f"kept in {done.path}")


def _images(run: TrainedRun, workspace: Workspace, named: list[str] | None, image_root: Path | None) -> Dataset:
    from pipeline.core.errors import IceboxError, RunError, UsageError
    from pipeline.dataset import open_images

    if named:
        return open_images(named, image_root)
    if image_root is not None:
        raise UsageError("--image-root goes with a manifest given by --images")
    if run.request is None:
        raise RunError(f"the run {run.name} does not say what it was trained on; name some images by --images")
    try:
        return run.request.images.open(workspace)
    except IceboxError as error:
        raise RunError(f"the images of {run.name} are not to be had ({error}); name some by --images") from error


def serve(
    context: typer.Context,
    run: RunArgument,
    also: AlsoOption = None,
    host: Annotated[str, typer.Option(help="The address to answer at; 0.0.0.0 lets other machines ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another host name to answer to, as of a proxy in front. May be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many classes to name, the likeliest first.", min=1)] = 5,
    max_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Refuse uploads larger than this.")] = "20MB",
    weights: RunWeightsOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer over HTTP: a page to drop images on, and an endpoint."""
    from pipeline.commands import terminal
    from pipeline.core.errors import UsageError
    from pipeline.deployment.serve import serve as serve_runs

    most = size_in_bytes("--max-bytes", max_bytes)
    if most < 1:
        raise UsageError(f"--max-bytes must be at least 1, found {max_bytes!r}")

    def on_ready(url: str) -> None:
        if as_json:
            terminal.emit_json({"url": url, "runs": [each.name for each in trained], "classes": trained[0].classes})
        terminal.say(f"answering at {url} (Ctrl-C ends it)")

    with opened(context) as workspace:
        trained = open_runs(workspace, run, also)
        serve_runs(
            trained,
            workspace,
            host=host,
            port=port,
            allowed=allow_host or (),
            top=top,
            max_bytes=most,
            max_pixels=max_pixels,
            weights=weights,
            on_ready=on_ready,
        )
