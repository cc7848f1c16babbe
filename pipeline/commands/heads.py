"""The commands of stage two: `train-head` and what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.depth import DepthOption
from pipeline.commands.network import BackboneOption, InputSizeOption, ScalingOption
from pipeline.commands.shared import (
    MAX_PIXELS,
    ArchiveOption,
    AugmentOption,
    DatasetOption,
    FitOption,
    ImageRootOption,
    JsonOption,
    LayerOption,
    LikeOption,
    LimitOption,
    MaxBadOption,
    MaxPixelsOption,
    MemoryOption,
    PrecisionOption,
    QuietOption,
    ResumeOption,
    SpaceOption,
    StorageOption,
    ViewsOption,
    WeightsOption,
    asked_features_line,
    dataset_choice,
    exit_for_bad,
    feature_choice,
    features_command,
    finish,
    memory_bytes,
    opened,
    refuse_beside_resume,
    typed,
    views_choice,
)

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.core.spec import HeadSpec
    from pipeline.runs.request import TrainRequest

_SETTINGS = (
    "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "weight_decay", "label_smoothing",
    "class_weight", "hidden", "dropout", "normalize", "patience", "seed", "C", "select", "calibrate", "max_iter",
)  # fmt: skip
_SHOWN = (
    "run", "accuracy", "val_accuracy", "train_rows", "val_rows", "test_rows", "classes", "views", "folds", "epochs",
    "best_epoch", "C", "seconds", "weights", "precision",
)  # fmt: skip


def train_head(
    context: typer.Context,
    head: Annotated[Literal["flatten", "gap", "logreg"], typer.Option(help="Which head to train.")] = "gap",
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows.  [default: 50]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.  [default: 64]")] = None,
    optimizer: Annotated[
        Literal["adam", "sgd", "adagrad", "rmsprop"] | None, typer.Option(help="How it steps.  [default: adam]")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The first step's.  [default: 0.001]")] = None,
    schedule: Annotated[
        Literal["constant", "cosine", "linear"] | None,
        typer.Option(help="How the learning rate falls, to 0 over all epochs.  [default: constant]"),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Decoupled from the gradient; biases are spared.  [default: 0]")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of the label spread over all classes.  [default: 0]")
    ] = None,
    class_weight: Annotated[
        Literal["none", "balanced"] | None,
        typer.Option(help="balanced: rare classes count more in the loss.  [default: none]"),
    ] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Units of the hidden layers, 256,128 or none.  [default: flatten 256, gap 64]")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share dropped after each hidden layer.  [default: flatten 0.5, gap 0]")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Normalise each channel by the training rows.  [default: normalize]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after N epochs without a better validation loss; 0: never.  [default: 0]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights, the order and dropout.  [default: 0]")] = None,
    c: Annotated[
        str | None,
        typer.Option(
            "--C",
            help="logreg: inverse strength of the penalty; of several, the best is taken."
            "  [default: 0.00001 to 10, in tens]",
        ),
    ] = None,
    select: Annotated[
        Literal["val", "cv"] | None,
        typer.Option(help="logreg: choose C by the validation split or by cross-validation.  [default: val]"),
    ] = None,
    calibrate: Annotated[
        bool | None, typer.Option(help="logreg: fit a temperature on the validation split.  [default: calibrate]")
    ] = None,
    max_iter: Annotated[int | None, typer.Option(help="logreg: iterations at most.  [default: 1000]")] = None,
    views: ViewsOption = 1,
    augment: AugmentOption = None,
    folds: Annotated[
        int, typer.Option(help="Train K heads by cross-validation over train and val, as one ensemble.", min=0, max=100)
    ] = 0,
    memory: MemoryOption = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard logs, too.")] = False,
    resume: ResumeOption = None,
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
    """Train a head from the cache. Computes no feature."""
    from pipeline.training.train_head import train_head as train

    request = _request(context) if resume is None else None
    with opened(context) as workspace:
        if request is None:
            resume, request = _resumed(context, str(resume), workspace)
            command, chosen = asked_features_line(context, request), request.images
        else:
            command, chosen = features_command(context), dataset_choice(context)
        images = chosen.open(workspace)
        run = train(images, workspace, request, command, resume=resume)
    finish(run.summary, as_json, _SHOWN, note=f"kept in {run.path}")
    exit_for_bad(run.quarantined, len(images), max_bad)


def _request(context: typer.Context) -> TrainRequest:
    from pipeline.runs.request import TrainRequest

    given = context.params
    return TrainRequest(
        images=dataset_choice(context).anchored(),
        features=feature_choice(context).anchored(),
        head=_head(context),
        max_pixels=given["max_pixels"],
        folds=given["folds"],
        memory=memory_bytes(given["memory"]),
        tensorboard=given["tensorboard"],
        views=views_choice(context),
    )


def _head(context: typer.Context) -> HeadSpec:
    """Return the head and its settings; what a file or --like says of another kind of head is left out, aloud."""
    from pipeline.commands import terminal
    from pipeline.core.spec import HEAD_DEFAULTS, HeadSpec

    head = context.params["head"]
    given = {name: context.params["c" if name == "C" else name] for name in _SETTINGS}
    said = typed(context)
    foreign = [
        name
        for name, value in given.items()
        if value is not None and name not in HEAD_DEFAULTS[head] and ("c" if name == "C" else name) not in said
    ]
    if foreign:
        terminal.warn(f"notice: a {head} head has no {', '.join(foreign)}; what was not typed of them is left out")
    return HeadSpec.make(head, **{name: value for name, value in given.items() if name not in foreign})


def _resumed(context: typer.Context, name: str, workspace: Workspace) -> tuple[str, TrainRequest]:
    from pipeline.runs.request import TrainRequest, stopped_run

    refuse_beside_resume(context)
    name, request = stopped_run(workspace, name, "train-head")
    return name, TrainRequest.of_request(request)
