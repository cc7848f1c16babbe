"""The typed objects that the library takes, made of the options of a method."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.api import options as groups
from pipeline.api import training_options

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.api.options import Text
    from pipeline.core.spec import Views
    from pipeline.extraction.feature_choice import FeatureChoice
    from pipeline.extraction.workers.connect import ClusterChoice
    from pipeline.runs.request import DatasetChoice, FinetuneRequest, TrainRequest

_CHOICE = ("backbone", "input_size", "scaling", "weights", "layer", "precision", "storage", "space", "fit", "depth")
_CLUSTER = tuple(groups.declared(groups.ClusterOptions))


def dataset_choice(dataset: Text, given: Mapping[str, Any]) -> DatasetChoice:
    """Return which images the options of a method name."""
    from pipeline.runs.request import DatasetChoice

    archive, root = (given[name] and str(given[name]) for name in ("archive", "image_root"))
    return DatasetChoice(str(dataset), archive, root, given.get("limit"))


def feature_choice(given: Mapping[str, Any]) -> FeatureChoice:
    """Return which features the options of a method name; what it does not take is left at its default."""
    from pipeline.extraction.feature_choice import FeatureChoice

    chosen = {name: given[name] for name in _CHOICE if name in given}
    paths = {name: str(chosen[name]) for name in ("backbone", "weights") if chosen.get(name) is not None}
    return FeatureChoice(**{**chosen, **paths})


def views_choice(given: Mapping[str, Any]) -> Views:
    """Return in which views images are wanted. Raises UsageError if `augment` is given for the plain view alone."""
    from pipeline.core.errors import UsageError
    from pipeline.core.spec import Augmentation, Views

    if given["views"] == 1 and given["augment"] is not None:
        raise UsageError("--augment says how the other views are augmented; ask for some by --views 2 or more")
    return Views(given["views"], Augmentation.parse(given["augment"] or ""))


def cluster_choice(given: Mapping[str, Any]) -> ClusterChoice | None:
    """Return whose workers are meant, None if the work is done in this process."""
    from pipeline.extraction.workers.connect import ClusterChoice

    named = {name: given[name] for name in _CLUSTER}
    return ClusterChoice(**named) if any(value is not None for value in named.values()) else None


def memory_bytes(memory: str | int | None) -> int | None:
    """Return how many bytes cached rows may take: of "2GB" or a number. Raises UsageError."""
    return memory if memory is None or isinstance(memory, int) else size_in_bytes("--memory", memory)


def size_in_bytes(option: str, size: str | int) -> int:
    """Return the bytes of "1.5GB", "800MiB", "200000" or 200000. Raises UsageError."""
    if isinstance(size, int):
        return size
    from dask.utils import parse_bytes

    from pipeline.core.errors import UsageError

    try:
        return int(parse_bytes(size))
    except (ValueError, OverflowError) as error:  # the latter of an infinite number
        raise UsageError(f"{option} must be a size such as 2GB or 500MiB, found {size!r}") from error


def refuse_beside_resume(options: Mapping[str, Any], *allowed: str) -> None:
    """Raise UsageError if more is given beside `resume` than what is `allowed`."""
    from pipeline.core.errors import UsageError

    if others := [name for name in options if name not in ("resume", *allowed)]:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UsageError(f"--resume continues with what was requested before; leave out {listed}")


@contextmanager
def naming_features(
    images: DatasetChoice, choices: Sequence[FeatureChoice], max_pixels: int, views: Views
) -> Iterator[None]:
    """Have a `MissingFeaturesError` carry the options of `features` that compute the rows of `choices` it lacks."""
    from pipeline.core.errors import MissingFeaturesError

    try:
        yield
    except MissingFeaturesError as error:
        error.options = tuple(features_options(images, choices[i], max_pixels, views) for i in error.lacking)
        raise


def features_options(images: DatasetChoice, choice: FeatureChoice, max_pixels: int, views: Views) -> dict[str, Any]:
    """Return the options of `features`, as far as they are not its defaults, that compute these rows."""
    from dataclasses import asdict

    declared = groups.declared(training_options.FeaturesOptions)
    augment = str(views.recipe) or None
    given = {
        **asdict(images), **asdict(choice), "max_pixels": max_pixels,
        "views": views.count, "augment": augment if views.count > 1 else None,
    }  # fmt: skip
    return {name: each for name, each in given.items() if name == "dataset" or each != declared[name][1].default}


def train_request(images: DatasetChoice, choice: FeatureChoice, head: str, given: Mapping[str, Any]) -> TrainRequest:
    """Return what `train_head` is requested to train, with absolute paths. Raises UsageError."""
    from pipeline.core.spec import HeadSpec
    from pipeline.runs.request import TrainRequest

    return TrainRequest(
        images=images.anchored(),
        features=choice.anchored(),
        head=HeadSpec.make(head, **{name: given[name] for name in groups.declared(training_options.HeadOptions)}),
        max_pixels=given["max_pixels"],
        folds=given["folds"],
        memory=memory_bytes(given["memory"]),
        tensorboard=given["tensorboard"],
        views=views_choice(given),
    )


_TRAINING = (
    "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "weight_decay", "label_smoothing",
    "class_weight", "patience", "seed",
)  # fmt: skip
_OF_CACHED_ROWS = "is of cached rows; it goes with --from-cache"


def refuse_what_does_not_go_together(given: Mapping[str, Any]) -> None:
    """Raise UsageError if options of `freeze` or `finetune` contradict each other."""
    from pipeline.core.errors import UsageError

    if given.get("init") is not None:
        for name in ("head", "hidden", "dropout", "normalize"):
            if given[name] is not None:
                raise UsageError(f"--{name} is of a new head, and --init brings one; leave one of them out")
    if given.get("from_cache"):
        if given["augment"] is not None and given["views"] == 1:
            raise UsageError("--augment says what cached views are like; ask for some by --views 2 or more")
        return
    if given.get("views", 1) != 1:
        raise UsageError(f"--views {_OF_CACHED_ROWS}; for new warps each epoch, take --augment alone")
    if given.get("memory") is not None:
        raise UsageError(f"--memory {_OF_CACHED_ROWS}")
    if given.get("storage", "auto") != "auto":
        raise UsageError(f"--storage {_OF_CACHED_ROWS}")


def finetune_request(stage: str, images: DatasetChoice, given: Mapping[str, Any], runs: Path) -> FinetuneRequest:
    """Return what `freeze` or `finetune` is requested to train, with absolute paths. Raises UsageError or RunError."""
    from pipeline.core.spec import Augmentation, HeadSpec, Views
    from pipeline.runs import store
    from pipeline.runs.request import FinetuneRequest

    cached, init, augment = given.get("from_cache", False), given.get("init"), given["augment"]
    settings = {name: given[name] for name in (*_TRAINING, "hidden", "dropout", "normalize")}
    return FinetuneRequest(
        stage=stage,
        images=images.anchored(),
        features=feature_choice(given).anchored(),
        head=HeadSpec.make(given.get("head") or "gap", **settings),
        max_pixels=given["max_pixels"],
        init=None if init is None else str(store.find_run(runs, os.fspath(init)).absolute()),
        freeze_until=given.get("freeze_until"),
        batch_norm=given.get("batch_norm", "frozen"),
        from_cache=cached,
        augment=None if cached or augment is None else Augmentation.parse(augment),
        views=views_choice(given) if cached else Views(),
        memory=memory_bytes(given.get("memory")),
        tensorboard=given["tensorboard"],
    )


def listed(given: Text | Sequence[Text] | None) -> list[Text]:
    """Return what an option names that takes one or several."""
    if given is None:
        return []
    return [given] if isinstance(given, str | Path) else list(given)


def path_or_none(path: Text | None) -> Path | None:
    """Return a path that may not be given."""
    return None if path is None else Path(path)


def texts(values: Text | Sequence[Text]) -> list[str]:
    """Return one path or several as a list of text."""
    return [str(each) for each in ([values] if isinstance(values, str | Path) else values)]
