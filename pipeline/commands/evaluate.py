"""`evaluate`: what a trained run is worth on some images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.completion import dataset_names
from pipeline.commands.shared import (
    MAX_PIXELS,
    ArchiveOption,
    ImageRootOption,
    JsonOption,
    LimitOption,
    MaxBadOption,
    MaxPixelsOption,
    MemoryOption,
    QuietOption,
    RunArgument,
    SpaceOption,
    dataset_choice,
    exit_for_bad,
    features_line,
    finish,
    memory_bytes,
    opened,
)
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.runs.request import DatasetChoice
    from pipeline.training.open_run import TrainedRun

_SHOWN = (
    "run", "dataset", "split", "images", "left_out", "accuracy", "accuracy_interval", "top5_accuracy",
    "balanced_accuracy", "macro_f1", "log_loss", "roc_auc", "expected_calibration_error",
)  # fmt: skip
_MOST_CLASSES = 20  # listed for people: those with the lowest F1


def evaluate(
    context: typer.Context,
    run: RunArgument,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        typer.Option(
            help="Which images; train and all include those it was trained on.  "
            "[default: test; of another dataset without splits: all]"
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Another dataset, of classes that the run knows.  [default: the run's own]",
            autocompletion=dataset_names,
        ),
    ] = None,
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    include_trained: Annotated[
        bool, typer.Option("--include-trained", help="Measure images that the run was trained on, too.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder to make.  [default: in the run's]", file_okay=False),
    ] = None,
    space: SpaceOption = None,
    memory: MemoryOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a trained run, with pictures.

    A head is measured on cached rows, a full model on images. Images it was trained on are left out.
    """
    from pipeline.deployment.evaluate_run import evaluate_run
    from pipeline.training.open_run import open_run

    with opened(context) as workspace:
        trained = open_run(workspace.runs, run)
        chosen, own = _images(context, trained)
        images = chosen.open(workspace)
        command = features_line(context, {**asdict(chosen), "space": trained.spec.directory, "max_pixels": max_pixels})
        done = evaluate_run(
            trained,
            images,
            workspace,
            command,
            max_pixels=max_pixels,
            split=split,
            space=space,
            own=own,
            memory=memory_bytes(memory),
            include_trained=include_trained,
            out=out,
        )
    result = {
        "run": done.run,
        "dataset": done.dataset,
        "split": done.split,
        **done.metrics,
        "trained_on": done.trained_on,
        "left_out": done.left_out,
        "path": str(done.path),
        "features_computed": 0,
        "quarantined": len(done.quarantined),
    }
    finish(result, as_json, _SHOWN)
    if not as_json:
        _list_classes(result["per_class"], f"pictures and predictions in {done.path}")
    exit_for_bad(done.quarantined, len(images), max_bad)


def _images(context: typer.Context, run: TrainedRun) -> tuple[DatasetChoice, bool]:
    """Return which images were named, and whether they are the run's own."""
    from pipeline.core.errors import UsageError

    given = context.params
    if given["dataset"] is None:
        if alone := [name for name in ("archive", "image_root", "limit") if given[name] is not None]:
            raise UsageError(f"--{alone[0].replace('_', '-')} goes with --dataset only")
        if run.request is None:
            raise UsageError(f"the run {run.name} does not say what it was trained on; name the images by --dataset")
        return run.request.images, True
    chosen = dataset_choice(context).anchored()
    return chosen, run.request is not None and chosen == run.request.images


def _list_classes(per_class: list[dict[str, Any]], note: str) -> None:
    from pipeline.commands import terminal

    listed = [each for each in per_class if each["support"]]
    hidden = len(listed) - _MOST_CLASSES
    if hidden > 0:
        listed = sorted(listed, key=lambda each: each["f1"])[:_MOST_CLASSES]
    names = ("class", "precision", "recall", "f1", "support")
    terminal.say("")
    terminal.table([tuple(_cell(each[name]) for name in names) for each in listed], names)
    if hidden > 0:
        terminal.say(f"and {counted(hidden, 'more class', 'more classes')}, with a higher f1")
    terminal.say(note)


def _cell(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value
