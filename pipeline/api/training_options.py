"""The options of `features`, `train-head`, `freeze`, `finetune` and `sweep`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal, TypedDict

from pipeline.api.options import (
    CachedOptions,
    ClusterOptions,
    ConnectionsOptions,
    DecodingOptions,
    ImagesOptions,
    InputOptions,
    MemoryOptions,
    NetworkOptions,
    Option,
    PrecisionOptions,
    SpaceOptions,
    Text,
    ViewsOptions,
)


class FeaturesOptions(CachedOptions, ViewsOptions, ClusterOptions, ConnectionsOptions, total=False):
    """The options of `features`."""

    shard_rows: Annotated[
        int | None, Option("Rows in a shard, at most.  [default: 256, fewer for rows above 1 MiB]", None, 1, 65_536)
    ]
    batch_size: Annotated[
        int | None,
        Option(
            "Images in a batch of the network.  [default: that of the space; in a new one 16, on a GPU 32, or what is "
            "measured to be fastest if computing takes this process over five minutes; for workers 32]",
            None,
            1,
            512,
        ),
    ]
    retry_failed: Annotated[bool, Option("Try images again that could not be decoded before.", False)]
    on_error: Annotated[
        Literal["quarantine", "fail"], Option("What happens at an image that cannot be read or decoded.", "quarantine")
    ]


Optimizer = Literal["adam", "sgd", "adagrad", "rmsprop"]
Schedule = Literal["constant", "cosine", "linear"]


class HeadOptions(TypedDict, total=False):
    """The settings of a head; one that a head does not have is refused."""

    epochs: Annotated[int | None, Option("Passes over the training rows.  [default: 50]")]
    batch_size: Annotated[int | None, Option("Rows in a step.  [default: 64]")]
    optimizer: Annotated[Optimizer | None, Option("The optimizer.  [default: adam]")]
    learning_rate: Annotated[float | None, Option("The learning rate of the first step.  [default: 0.001]")]
    schedule: Annotated[
        Schedule | None, Option("How the learning rate falls, to 0 over all epochs.  [default: constant]")
    ]
    weight_decay: Annotated[float | None, Option("Decoupled weight decay; biases are spared.  [default: 0]")]
    label_smoothing: Annotated[float | None, Option("Share of the label spread over all classes.  [default: 0]")]
    class_weight: Annotated[
        Literal["none", "balanced"] | None, Option("balanced: rare classes count more in the loss.  [default: none]")
    ]
    hidden: Annotated[
        str | None, Option("Units of the hidden layers, 256,128 or none.  [default: flatten 256, gap 64]")
    ]
    dropout: Annotated[float | None, Option("Share dropped after each hidden layer.  [default: flatten 0.5, gap 0]")]
    normalize: Annotated[bool | None, Option("Normalise each channel by the training rows.  [default: normalize]")]
    patience: Annotated[
        int | None, Option("Stop after N epochs without a better validation loss; 0: never.  [default: 0]")
    ]
    seed: Annotated[int | None, Option("Seed of the initial weights, the order and dropout.  [default: 0]")]
    C: Annotated[
        str | float | None,
        Option(
            "logreg: inverse strength of the penalty; of several, the best is taken.  [default: 0.00001 to 10, in "
            "tens]",
            spelling="--C",
        ),
    ]
    select: Annotated[
        Literal["val", "cv"] | None,
        Option("logreg: choose C by the validation split or by cross-validation.  [default: val]"),
    ]
    calibrate: Annotated[
        bool | None, Option("logreg: fit a temperature on the validation split.  [default: calibrate]")
    ]
    max_iter: Annotated[int | None, Option("logreg: iterations, at most.  [default: 1000]")]


class TensorboardOptions(TypedDict, total=False):
    """Logs beside the run's own history."""

    tensorboard: Annotated[bool, Option("Write TensorBoard logs, too.", False)]


class ResumeOptions(TypedDict, total=False):
    """Going on with what was stopped."""

    resume: Annotated[
        str | None,
        Option(
            "Continue a run that was stopped, as it was requested; latest is the last one.",
            metavar="RUN",
            suggest="stopped",
        ),
    ]


class TrainHeadOptions(
    CachedOptions, HeadOptions, ViewsOptions, MemoryOptions, TensorboardOptions, ResumeOptions, total=False
):
    """The options of `train-head`."""

    folds: Annotated[int, Option("Train K heads by cross-validation over train and val, as one ensemble.", 0, 0, 100)]


class FullModelOptions(
    ImagesOptions, NetworkOptions, PrecisionOptions, DecodingOptions, TensorboardOptions, ResumeOptions, total=False
):
    """What `freeze` and `finetune` share: images, network, and how a full model is trained."""

    augment: Annotated[
        str | None,
        Option(
            "Augment the training images anew in each epoch: default, or rotation (degrees), width_shift, "
            "height_shift, shear, zoom, horizontal_flip, vertical_flip, fill (nearest, reflect, wrap, black); what is "
            "not named is as by default (rotation=30, shifts, shear and zoom 0.2, horizontal_flip=true, fill=nearest).",
            metavar="NAME=VALUE,…",
        ),
    ]
    epochs: Annotated[int, Option("Passes over the training images.", 10)]
    batch_size: Annotated[int, Option("Images in a step.", 64)]
    schedule: Annotated[Schedule, Option("How the learning rate falls, to 0 over all epochs.", "constant")]
    weight_decay: Annotated[float, Option("Decoupled weight decay; biases are spared.", 0.0)]
    label_smoothing: Annotated[float, Option("Share of the label spread over all classes.", 0.0)]
    class_weight: Annotated[
        Literal["none", "balanced"], Option("balanced: rare classes count more in the loss.", "none")
    ]
    patience: Annotated[int, Option("Stop after N epochs without a better validation loss; 0: never.", 0)]
    seed: Annotated[int, Option("Seed of a new head, the order, dropout and the augmentation.", 0)]
    hidden: Annotated[str | None, Option("Units of a new head's hidden layers, 256,128 or none.")]
    dropout: Annotated[float | None, Option("Share dropped after each hidden layer of a new head.")]
    normalize: Annotated[
        bool | None, Option("Normalise a new head's input by the training images.  [default: normalize]")
    ]


class FreezeOptions(FullModelOptions, total=False):
    """The options of `freeze`."""

    optimizer: Annotated[Optimizer, Option("The optimizer.", "adam")]
    learning_rate: Annotated[float, Option("The learning rate of the first step.", 1e-3)]


class FinetuneOptions(FullModelOptions, MemoryOptions, total=False):
    """The options of `finetune`."""

    optimizer: Annotated[Optimizer, Option("The optimizer.", "adagrad")]
    learning_rate: Annotated[float, Option("The learning rate of the first step.", 1e-4)]
    init: Annotated[
        str | os.PathLike[str] | None,
        Option("Begin with a trained run (a head, freeze or finetune), or latest.", metavar="RUN", suggest="runs"),
    ]
    freeze_until: Annotated[
        str | None,
        Option(
            "Train the layers after this one: its name, its number N (the first N+1 are frozen), or none.  "
            "[default: about the last two blocks train, for inception_v3 after 250]",
            metavar="LAYER",
        ),
    ]
    from_cache: Annotated[bool, Option("Train on cached rows of the frozen part, computing what is missing.", False)]
    batch_norm: Annotated[
        Literal["frozen", "trainable"],
        Option("Whether batch norms after that layer train, or stay in inference mode.", "frozen"),
    ]
    head: Annotated[Literal["flatten", "gap"] | None, Option("A new head.  [default: gap]")]
    views: Annotated[int, Option("With --from-cache: views of each image, the plain one included.", 1, 1, 100, "K")]
    storage: Annotated[
        Literal["auto", "float16", "float32"], Option("With --from-cache: what rows are stored as.", "auto")
    ]


class SweepOptions(
    ImagesOptions, InputOptions, SpaceOptions, DecodingOptions, ViewsOptions, MemoryOptions, ClusterOptions, total=False
):
    """The options of `sweep`."""

    backbone: Annotated[
        Sequence[Text] | None,
        Option(
            "Networks to compare: names that `backbones` lists, or .keras files of your own; may be repeated. With "
            "several, --scaling is for the file among them that is not known with one, --weights (auto, imagenet, "
            "untrained) for the named ones.  [default: inception_v3]",
            metavar="NAME|FILE,…",
            suggest="backbones",
        ),
    ]

    head: Annotated[Sequence[str] | None, Option("flatten, gap or logreg; may be repeated.  [default: all]")]
    settings: Annotated[
        Sequence[str] | None,
        Option(
            "Values of a setting of `train-head`, as learning_rate=1e-4,1e-3 or gap.hidden=64,[128,64]; with --random "
            "also a range, 1e-4..1e-2; may be repeated.  [default: a small grid for each head]",
            metavar="[HEAD.]NAME=VALUES",
            spelling="--set",
        ),
    ]
    random: Annotated[int | None, Option("Draw N settings instead of trying every combination.", None, 1, None, "N")]
    seed: Annotated[int, Option("Seed of the draw.", 0, 0)]
    resume: Annotated[
        str | None,
        Option(
            "Continue a sweep that was stopped, as it was requested; latest is the last one.",
            metavar="SWEEP",
            suggest="stopped",
        ),
    ]
    compute: Annotated[
        bool,
        Option("First compute the features that are missing, for each backbone.", False, spelling="--compute"),
    ]
