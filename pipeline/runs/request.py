"""Define training requests: which images, which features, which head.

A `TrainRequest`, `FinetuneRequest` or `SweepRequest` is stored with its run as JSON. It holds all that is needed to
resume the run or to repeat it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pipeline import dataset
from pipeline.backbone import own
from pipeline.backbone import source as networks
from pipeline.backbone.own import OwnNetwork
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import RunError, SpecError, UsageError, WeightsError
from pipeline.core.spec import BATCH_NORMS, PLAIN_VIEW, STAGES, Augmentation, HeadSpec, Views
from pipeline.dataset import Dataset
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.runs.store import latest_of, read_request, unfinished

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetChoice:
    """The user's options that choose the images: a dataset name or path, and how to read it."""

    dataset: str
    archive: str | None = None
    image_root: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raise TypeError if a value has a wrong type: a run.json may come from an untrusted source."""
        texts = all(isinstance(value, str | None) for value in (self.archive, self.image_root))
        if not isinstance(self.dataset, str) or not texts or not isinstance(self.limit, int | None):
            raise TypeError(f"{self} is no choice of images")

    def anchored(self) -> Self:
        """Return the same choice with absolute paths, so that it does not depend on the working directory."""
        name = self.dataset if dataset.is_known(self.dataset) else _absolute(self.dataset)
        archive, root = (each and _absolute(each) for each in (self.archive, self.image_root))
        return replace(self, dataset=name, archive=archive, image_root=root)

    def open(self, workspace: Workspace) -> Dataset:
        """Open the dataset."""
        found = dataset.open_dataset(
            self.dataset,
            downloads=workspace.downloads,
            archive=Path(self.archive) if self.archive else None,
            image_root=Path(self.image_root) if self.image_root else None,
            progress=workspace.progress,
        )
        return found if self.limit is None else dataset.limit(found, self.limit)


def _absolute(path: str) -> str:
    return str(machine.expand_home(path).absolute())


def space_of_request(stored: Mapping[str, Any]) -> FeatureChoice:
    """Return a choice of exactly the feature space that an unfinished run began with.

    The choice names the space, because `auto` may mean another space by now. Raises RunError if none is stored.
    """
    space = stored.get("space")
    if not isinstance(space, str):
        raise RunError("the run does not say which feature space it began with; train anew")
    return FeatureChoice(space=space)


def _parts(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request from its JSON values; the caller handles the exceptions of invalid values."""
    parts = dict(value)
    head = dict(parts["head"])
    parts["head"] = HeadSpec.make(head.pop("head"), **head)
    parts["views"] = Views.from_dict(parts["views"])
    parts["images"], parts["features"] = DatasetChoice(**parts["images"]), FeatureChoice(**parts["features"])
    return parts


@dataclass(frozen=True)
class TrainRequest:
    """A request to train a head on cached features.

    `folds` is 0 for a single head, or K for an ensemble of K heads, one for each cross-validation fold. `memory` is in
    bytes. The head is trained on all `views` of its training images.
    """

    images: DatasetChoice
    features: FeatureChoice
    head: HeadSpec
    max_pixels: int
    folds: int = 0
    memory: int | None = None
    tensorboard: bool = False
    views: Views = PLAIN_VIEW

    def __post_init__(self) -> None:
        numbers = isinstance(self.max_pixels, int) and isinstance(self.memory, int | None)
        if not numbers or not isinstance(self.folds, int) or not isinstance(self.tensorboard, bool):
            raise TypeError("numbers that are none")
        if self.folds == 1 or self.folds < 0:
            raise UsageError(f"--folds must be 0 or at least 2, found {self.folds}")

    def to_dict(self) -> dict[str, Any]:
        """Return the request as plain JSON values."""
        return {**asdict(self), "head": self.head.to_dict()}

    @classmethod
    def of_request(cls, stored: Mapping[str, Any]) -> Self:
        """Return the request of an unfinished run, with the feature space it began with. Raises RunError."""
        return replace(cls.from_dict(stored.get("asked", {})), features=space_of_request(stored))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the request whose `to_dict` gave `value`. Raises RunError if `value` is not valid."""
        try:
            return cls(**_parts(value))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunError(f"what the run was asked for cannot be read ({error}); train anew") from error


@dataclass(frozen=True)
class FinetuneRequest:
    """A request to train a full model, by `stage` "freeze" or "finetune".

    `head` holds the training settings. It also defines the head, unless the initial model is the run in the folder
    `init`. Layers after `freeze_until` are trained. The training data are images, augmented anew each epoch by
    `augment` if given; with `from_cache` they are cached rows in all `views`.
    """

    stage: str
    images: DatasetChoice
    features: FeatureChoice
    head: HeadSpec
    max_pixels: int
    init: str | None = None
    freeze_until: str | None = None  # None: the backbone's default
    batch_norm: str = "frozen"
    from_cache: bool = False
    augment: Augmentation | None = None
    views: Views = PLAIN_VIEW
    memory: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        texts = isinstance(self.freeze_until, str | None) and isinstance(self.init, str | None)
        flags = isinstance(self.from_cache, bool) and isinstance(self.tensorboard, bool)
        numbers = isinstance(self.max_pixels, int) and isinstance(self.memory, int | None)
        if self.stage not in STAGES or self.batch_norm not in BATCH_NORMS or not (texts and flags and numbers):
            raise TypeError("values that cannot be")

    def to_dict(self) -> dict[str, Any]:
        """Return the request as plain JSON values."""
        return {**asdict(self), "head": self.head.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the request whose `to_dict` gave `value`. Raises RunError if `value` is not valid."""
        try:
            parts = _parts(value)
            recipe = parts.pop("augment")
            return cls(augment=None if recipe is None else Augmentation(**recipe), **parts)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunError(f"what the run was asked for cannot be read ({error}); train anew") from error


@dataclass(frozen=True)
class SweepRequest:
    """A request to try settings, all different, on the rows of each of `features`; `memory` is in bytes."""

    images: DatasetChoice
    features: tuple[FeatureChoice, ...]
    specs: tuple[HeadSpec, ...]
    max_pixels: int
    memory: int | None = None
    views: Views = PLAIN_VIEW

    def head(self, features: FeatureChoice, spec: HeadSpec) -> TrainRequest:
        """Return the request to train one of the settings on one of the features."""
        return TrainRequest(self.images, features, spec, self.max_pixels, memory=self.memory, views=self.views)

    def to_dict(self) -> dict[str, Any]:
        """Return the request as plain JSON values; `features` is an object, or a list if there are several."""
        several = [asdict(each) for each in self.features]
        specs = [spec.to_dict() for spec in self.specs]
        return {**asdict(self), "features": several if len(several) > 1 else several[0], "specs": specs}

    @classmethod
    def of_request(cls, stored: Mapping[str, Any]) -> Self:
        """Return the request of an unfinished sweep, with the feature spaces it began with. Raises RunError."""
        spaces = stored.get("space")
        several = spaces if isinstance(spaces, list) else [spaces]
        begun = tuple(space_of_request({"space": space}) for space in several)
        return replace(cls.from_dict(stored.get("asked", {})), features=begun)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the request whose `to_dict` gave `value`. Raises RunError if `value` is not valid."""
        try:
            rest = dict(value)
            specs, views = [dict(spec) for spec in rest.pop("specs")], Views.from_dict(rest.pop("views"))
            images, features = DatasetChoice(**rest.pop("images")), rest.pop("features")
            choices = tuple(FeatureChoice(**each) for each in (features if isinstance(features, list) else [features]))
            made = tuple(HeadSpec.make(spec.pop("head"), **spec) for spec in specs)
            return cls(images, choices, made, views=views, **rest)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunError(f"what the sweep was asked for cannot be read ({error}); begin it anew") from error


def command_of(stored: Mapping[str, Any]) -> str:
    """Return the command that made an unfinished run, from its stored request: `train-head` or a stage."""
    request = stored.get("asked")
    stage = request.get("stage") if isinstance(request, dict) else None
    return stage if stage in STAGES else "train-head"


def resume_commands(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return for each unfinished run the command that resumes it; skip runs that cannot be read, with a warning."""
    found = dict[str, str]()
    for name in names:
        try:
            found[name] = command_of(read_request(root, name))
        except RunError as error:
            logger.warning("%s", error)
    return found


def stopped_run(workspace: Workspace, name: str, command: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the stored request of a stopped run; "latest" is the last one that `command` made.

    Raises
    ------
    RunError
        If there is no such run, or another command made it.
    """
    if name == "latest":
        of = resume_commands(workspace.runs, unfinished(workspace.runs))
        name = latest_of([each for each, by in of.items() if by == command], workspace.runs)
    stored = read_request(workspace.runs, name)
    if (found := command_of(stored)) != command:
        raise RunError(f"{name} was begun by {found}; go on by: {workspace.command(found)} --resume {name}")
    return name, stored


def with_network(
    request: FinetuneRequest, stored: Mapping[str, Any], given: str | None, workspace: Workspace
) -> FinetuneRequest:
    """Return the request of a stopped run with the current path of the file of the user's own network.

    The path is `given`, else the path in the request, else a file that is known to have the same content.

    Raises
    ------
    UsageError
        If a file is given for a built-in backbone.
    SpecError
        If the given file is another network.
    WeightsError
        If none of the files is that network.
    """
    noted, former = stored.get("network"), request.features.backbone
    if not isinstance(noted, dict):
        if given is not None:
            raise UsageError(f"the run did not begin with a network of your own; leave out --backbone {given}")
        return request
    wanted = f"the run began with the network {networks.file_of(noted)}"
    if given is not None:
        path = machine.expand_home(given).absolute()
        if not _is_network(own.read_network(path), noted):
            raise SpecError(f"{wanted}, and {given} is another one; give that file")
        return _on_file(request, path)
    if former is None:
        return request  # the initial model is a run, which stores the path of its network
    at_hand = networks.network_file(noted, workspace.cache.index)
    for path in (Path(former), *([at_hand] if at_hand else [])):
        with suppress(SpecError, WeightsError):
            if _is_network(own.read_network(path), noted):
                return _on_file(request, path)
    problem = "is another one by now" if Path(former).exists() else "is no longer there"
    raise WeightsError(f"{wanted}, and {former} {problem}; give its file beside --resume: --backbone FILE")


def _is_network(found: OwnNetwork, noted: Mapping[str, Any]) -> bool:
    return (found.name, found.weights) == (noted.get("backbone"), noted.get("weights"))


def _on_file(request: FinetuneRequest, path: Path) -> FinetuneRequest:
    return replace(request, features=replace(request.features, backbone=str(path)))
