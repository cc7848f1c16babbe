"""The options of the methods and commands that use trained runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal, TypedDict

from pipeline.api.options import (
    ConnectionsOptions,
    DecodingOptions,
    ImagesOptions,
    MemoryOptions,
    Option,
    SpaceOptions,
    Text,
    declared,
)

RunName = str | os.PathLike[str]  # a run as `runs` lists it, a path, "latest", "best", or a `Run`

_IMAGE_ROOT = declared(ImagesOptions)["image_root"][1]
_SPACE = declared(SpaceOptions)["space"][1]
_MAX_PIXELS = declared(DecodingOptions)["max_pixels"][1]


class RunWeightsOptions(TypedDict, total=False):
    """Where the weights of a run's backbone lie by now."""

    weights: Annotated[
        Text | None,
        Option(
            "The backbone's weights file, or your own network's .keras file, if it is not where it was when features "
            "were computed.",
            metavar="FILE",
            spelling=("--weights", "--backbone"),
        ),
    ]


class MaxPixelsOptions(TypedDict, total=False):
    """The largest image that is decoded."""

    max_pixels: Annotated[int, _MAX_PIXELS]


class EnsembleOptions(TypedDict, total=False):
    """Runs that predict together."""

    also: Annotated[
        Sequence[RunName] | None,
        Option("Another run; probabilities are averaged. May be repeated.", metavar="RUN", suggest="runs"),
    ]


class EvaluatedOptions(TypedDict, total=False):
    """Which images a run is measured on."""

    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        Option(
            "Which images; train and all include those that the run was trained on.  "
            "[default: test; of another dataset without splits: all]"
        ),
    ]
    dataset: Annotated[
        Text | None,
        Option("Another dataset, of classes that the run knows.  [default: the run's own]", suggest="datasets"),
    ]


class EvaluationOptions(TypedDict, total=False):
    """How a run is measured, and where the result is kept."""

    include_trained: Annotated[
        bool, Option("Measure images that the run was trained on, too.", False, spelling="--include-trained")
    ]
    out: Annotated[
        Text | None, Option("The folder to write.  [default: in the run's]", metavar="FOLDER", kind="folder")
    ]
    space: Annotated[str | None, _SPACE]


class EvaluateOptions(EvaluatedOptions, ImagesOptions, EvaluationOptions, MemoryOptions, MaxPixelsOptions, total=False):
    """The options of `evaluate`."""


class PredictionOptions(TypedDict, total=False):
    """What is listed of each image, and where images lie."""

    top: Annotated[int, Option("How many classes to list for each image, the likeliest first.", 3, 1)]
    image_root: Annotated[Text | None, _IMAGE_ROOT]


class PredictOptions(
    EnsembleOptions, PredictionOptions, RunWeightsOptions, MaxPixelsOptions, ConnectionsOptions, total=False
):
    """The options of `predict`."""


class ModelOptions(TypedDict, total=False):
    """A model to be written, and what it is compared on."""

    format: Annotated[
        Literal["keras", "savedmodel", "onnx", "litert", "openvino"], Option("The format of the model.", "keras")
    ]
    out: Annotated[
        Text | None,
        Option("The folder to write.  [default: exports/RUN-FORMAT in the data directory]", kind="folder"),
    ]
    images: Annotated[
        Text | Sequence[Text] | None,
        Option("Images to compare on, or folders of them.  [default: the run's own]", metavar="PATH"),
    ]
    image_root: Annotated[Text | None, _IMAGE_ROOT]


class ExportOptions(ModelOptions, RunWeightsOptions, MaxPixelsOptions, total=False):
    """The options of `export`."""


class ServerOptions(TypedDict, total=False):
    """Where a server listens, and what it takes and returns."""

    host: Annotated[str, Option("The address to listen at; 0.0.0.0 lets other machines connect.", "127.0.0.1")]
    port: Annotated[int, Option("The port; 0 takes a free one.", 8000, 0, 65535)]
    allow_host: Annotated[
        Sequence[str] | None,
        Option("Another host name to answer to, as of a proxy in front. May be repeated.", metavar="NAME"),
    ]
    top: Annotated[int, Option("How many classes to list for each image, the likeliest first.", 5, 1)]
    max_bytes: Annotated[str | int, Option("Refuse uploads larger than this.", "20MB", metavar="SIZE")]


class ServeOptions(EnsembleOptions, ServerOptions, RunWeightsOptions, MaxPixelsOptions, total=False):
    """The options of `serve`."""


class PageOptions(TypedDict, total=False):
    """What a page is about, and where it is written."""

    compare: Annotated[bool, Option("Compare several runs on one page.", False, spelling="--compare")]
    sweep: Annotated[bool, Option("RUN is a sweep: a page about all its settings.", False, spelling="--sweep")]
    out: Annotated[Text | None, Option("The page.  [default: reports/NAME.html in the data directory]", metavar="FILE")]
    map: Annotated[
        Literal["tsne", "pca"] | None,
        Option("How the map of the images is computed.  [default: tsne up to 5,000 images, else pca]"),
    ]


class ReportOptions(PageOptions, MaxPixelsOptions, total=False):
    """The options of `report`."""
