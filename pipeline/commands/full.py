"""The commands that train full models: `freeze` and `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.completion import run_names
from pipeline.commands.depth import DepthOption
from pipeline.commands.network import BackboneOption, InputSizeOption, ScalingOption
from pipeline.commands.shared import (
    MAX_PIXELS,
    ArchiveOption,
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
    StorageOption,
    ViewsOption,
    WeightsOption,
    dataset_choice,
    exit_for_bad,
    finish,
    memory_bytes,
    opened,
    refuse_beside_resume,
    typed,
    views_choice,
)

if TYPE_CHECKING:
    from pipeline.core.spec import Augmentation
    from pipeline.runs.request import FinetuneRequest

_TRAINING = (
    "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "weight_decay", "label_smoothing",
    "class_weight", "patience", "seed",
)  # fmt: skip
_SHOWN = (
    "run", "accuracy", "val_accuracy", "train_accuracy", "train_rows", "val_rows", "test_rows", "classes", "views",
    "init", "frozen_until", "trainable_parameters", "features_computed", "epochs", "best_epoch", "seconds_per_epoch",
    "max_difference", "seconds", "weights", "precision",
)  # fmt: skip
EpochsOption = Annotated[int, typer.Option(help="Passes over the training images.")]
BatchSizeOption = Annotated[int, typer.Option(help="Images a step.")]
OptimizerOption = Annotated[Literal["adam", "sgd", "adagrad", "rmsprop"], typer.Option(help="How it steps.")]
LearningRateOption = Annotated[float, typer.Option(help="The first step's.")]
ScheduleOption = Annotated[
    Literal["constant", "cosine", "linear"], typer.Option(help="How the learning rate falls, to 0 over all epochs.")
]
WeightDecayOption = Annotated[float, typer.Option(help="Decoupled from the gradient; biases are spared.")]
LabelSmoothingOption = Annotated[float, typer.Option(help="Share of the label spread over all classes.")]
ClassWeightOption = Annotated[
    Literal["none", "balanced"], typer.Option(help="balanced: rare classes count more in the loss.")
]
PatienceOption = Annotated[int, typer.Option(help="Stop after N epochs without a better validation loss; 0: never.")]
SeedOption = Annotated[int, typer.Option(help="Of a new head, the order, dropout and the augmentation.")]
HiddenOption = Annotated[str | None, typer.Option(help="Units of a new head's hidden layers, 256,128 or none.")]
DropoutOption = Annotated[float | None, typer.Option(help="Share dropped after each hidden layer of a new head.")]
NormalizeOption = Annotated[
    bool | None, typer.Option(help="Normalise what a new head reads, by the training images.  [default: normalize]")
]
AfreshOption = Annotated[
    str | None,
    typer.Option(
        "--augment",
        metavar="NAME=VALUE,…",
        help="Warp the training images afresh each epoch: default, or rotation (degrees), width_shift, height_shift, "
        "shear, zoom, horizontal_flip, vertical_flip, fill (nearest, reflect, wrap, black); what is not named is as "
        "by default (rotation=30, shifts, shear and zoom 0.2, horizontal_flip=true, fill=nearest).",
    ),
]
TensorboardOption = Annotated[bool, typer.Option(help="Write TensorBoard logs, too.")]
_CACHED = "of cached rows; it goes with --from-cache"


def freeze(
    context: typer.Context,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    augment: AfreshOption = None,
    epochs: EpochsOption = 10,
    batch_size: BatchSizeOption = 64,
    optimizer: OptimizerOption = "adam",
    learning_rate: LearningRateOption = 1e-3,
    schedule: ScheduleOption = "constant",
    weight_decay: WeightDecayOption = 0.0,
    label_smoothing: LabelSmoothingOption = 0.0,
    class_weight: ClassWeightOption = "none",
    patience: PatienceOption = 0,
    seed: SeedOption = 0,
    hidden: HiddenOption = None,
    dropout: DropoutOption = None,
    normalize: NormalizeOption = None,
    tensorboard: TensorboardOption = False,
    resume: ResumeOption = None,
    backbone: BackboneOption = None,
    input_size: InputSizeOption = None,
    scaling: ScalingOption = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    fit: FitOption = None,
    depth: DepthOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a gap head on the whole, frozen backbone, from images."""
    _run("freeze", context)


def finetune(
    context: typer.Context,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Begin with a trained run (a head, freeze or finetune), or latest.",
            autocompletion=run_names,
        ),
    ] = None,
    freeze_until: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Train what comes after this layer: its name, its number N (the first N+1 are frozen), or none.  "
            "[default: about the last two blocks train, for inception_v3 after 250]",
        ),
    ] = None,
    from_cache: Annotated[
        bool, typer.Option(help="Train on cached rows of the frozen part, computing what is missing.")
    ] = False,
    batch_norm: Annotated[
        Literal["frozen", "trainable"],
        typer.Option(help="Whether batch norms after that layer train, or stay in inference mode."),
    ] = "frozen",
    head: Annotated[Literal["flatten", "gap"] | None, typer.Option(help="A new head.  [default: gap]")] = None,
    like: LikeOption = None,
    dataset: DatasetOption = "digits",
    archive: ArchiveOption = None,
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    augment: AfreshOption = None,
    views: ViewsOption = 1,
    epochs: EpochsOption = 10,
    batch_size: BatchSizeOption = 64,
    optimizer: OptimizerOption = "adagrad",
    learning_rate: LearningRateOption = 1e-4,
    schedule: ScheduleOption = "constant",
    weight_decay: WeightDecayOption = 0.0,
    label_smoothing: LabelSmoothingOption = 0.0,
    class_weight: ClassWeightOption = "none",
    patience: PatienceOption = 0,
    seed: SeedOption = 0,
    hidden: HiddenOption = None,
    dropout: DropoutOption = None,
    normalize: NormalizeOption = None,
    memory: MemoryOption = None,
    tensorboard: TensorboardOption = False,
    resume: ResumeOption = None,
    backbone: BackboneOption = None,
    input_size: InputSizeOption = None,
    scaling: ScalingOption = None,
    weights: WeightsOption = "auto",
    layer: LayerOption = None,
    precision: PrecisionOption = "auto",
    storage: StorageOption = "auto",
    fit: FitOption = None,
    depth: DepthOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the backbone's last layers and the head.

    From images, or with --from-cache from cached rows of the part that stays frozen.
    """
    _run("finetune", context)


def _run(stage: str, context: typer.Context) -> None:
    from pipeline.runs.request import FinetuneRequest, stopped_run, with_network
    from pipeline.training.finetune import finetune

    given = context.params
    resume: str | None = given["resume"]
    if resume is None:
        _refuse_what_does_not_go_together(context)
    else:
        refuse_beside_resume(context, "backbone")
    with opened(context) as workspace:
        if resume is None:
            request = _request(stage, context, workspace.runs)
        else:
            resume, stored = stopped_run(workspace, resume, stage)
            file = given["backbone"] if "backbone" in typed(context) else None
            request = with_network(FinetuneRequest.from_dict(stored.get("asked", {})), stored, file, workspace)
        images = request.images.open(workspace)
        run = finetune(images, workspace, request, resume=resume)
    finish(run.summary, given["as_json"], _SHOWN, note=f"kept in {run.path}")
    exit_for_bad(run.quarantined, len(images), given["max_bad"])


def _refuse_what_does_not_go_together(context: typer.Context) -> None:
    from pipeline.core.errors import UsageError

    given, said = context.params, typed(context)
    if given.get("init") is not None:
        for name in ("head", "hidden", "dropout", "normalize"):
            if name in said:
                raise UsageError(f"--{name} is of a new head, and --init brings one; leave one of them out")
    if given.get("from_cache"):
        if given["augment"] is not None and given["views"] == 1:
            raise UsageError("--augment says what cached views are like; ask for some by --views 2 or more")
    else:
        if given.get("views", 1) != 1:
            raise UsageError(f"--views is {_CACHED}; for new warps each epoch, take --augment alone")
        for name in ("memory", "storage"):
            if name in said:
                raise UsageError(f"--{name} is {_CACHED}")


def _request(stage: str, context: typer.Context, root: Path) -> FinetuneRequest:
    from pipeline.core.spec import HeadSpec, Views
    from pipeline.extraction.feature_choice import FeatureChoice
    from pipeline.runs import store
    from pipeline.runs.request import FinetuneRequest

    given = context.params
    cached = given.get("from_cache", False)
    shape = {name: given[name] for name in ("hidden", "dropout", "normalize")}
    init = given.get("init")
    return FinetuneRequest(
        stage=stage,
        images=dataset_choice(context).anchored(),
        features=FeatureChoice(
            backbone=given["backbone"],
            input_size=given["input_size"],
            scaling=given["scaling"],
            weights=given["weights"],
            layer=given["layer"],
            fit=given["fit"],
            depth=given["depth"],
            precision=given["precision"],
            storage=given.get("storage", "auto"),
        ).anchored(),
        head=HeadSpec.make(given.get("head") or "gap", **shape, **{name: given[name] for name in _TRAINING}),
        max_pixels=given["max_pixels"],
        init=None if init is None else str(store.find_run(root, init).absolute()),
        freeze_until=given.get("freeze_until"),
        batch_norm=given.get("batch_norm", "frozen"),
        from_cache=cached,
        augment=None if cached else _afresh(given["augment"]),
        views=views_choice(context) if cached else Views(),
        memory=memory_bytes(given.get("memory")),
        tensorboard=given["tensorboard"],
    )


def _afresh(text: str | None) -> Augmentation | None:
    from pipeline.core.spec import Augmentation

    return None if text is None else Augmentation.parse(text)
