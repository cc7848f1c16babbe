"""What a run was asked for: which images, which features, which head. Enough to go on with it, or to repeat it."""

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
    """What the user said about the images."""

    dataset: str
    archive: str | None = None
    image_root: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raise TypeError if a value is not what it should be: a run.json may come from elsewhere."""
        texts = all(isinstance(value, str | None) for value in (self.archive, self.image_root))
        if not isinstance(self.dataset, str) or not texts or not isinstance(self.limit, int | None):
            raise TypeError(f"{self} is no choice of images")

    def anchored(self) -> Self:
        """Return the same with absolute paths, so that it means the same from anywhere."""
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
    """Return the choice of the very space that an unfinished run began with: `auto` may mean another one by now."""
    space = stored.get("space")
    if not isinstance(space, str):
        raise RunError("the run does not say which feature space it began with; train anew")
    return FeatureChoice(space=space)


def _parts(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of what was asked for, of plain JSON values; raises whatever those stumble over."""
    parts = dict(value)
    head = dict(parts["head"])
    parts["head"] = HeadSpec.make(head.pop("head"), **head)
    parts["views"] = Views.from_dict(parts["views"])
    parts["images"], parts["features"] = DatasetChoice(**parts["images"]), FeatureChoice(**parts["features"])
    return parts


@dataclass(frozen=True)
class TrainRequest:
    """One head to be trained; `folds` 0 trains one, K trains K of them as an ensemble; `memory` in bytes.

    It is trained on all `views` of its training images.
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
        """Return it as plain JSON values."""
        return {**asdict(self), "head": self.head.to_dict()}

    @classmethod
    def of_request(cls, stored: Mapping[str, Any]) -> Self:
        """Return what the request of an unfinished run says, in the space it began with. Raises RunError."""
        return replace(cls.from_dict(stored.get("asked", {})), features=space_of_request(stored))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_dict` gave. Raises RunError if it is not that."""
        try:
            return cls(**_parts(value))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunError(f"what the run was asked for cannot be read ({error}); train anew") from error


@dataclass(frozen=True)
class FinetuneRequest:
    """A full model to be trained, by `stage` "freeze" or "finetune".

    `head` says how it is trained and, unless it begins with the run in the folder `init`, what its head is. It trains
    after the layer `freeze_until`, on images, each epoch augmented afresh by `augment` if that is given, or, with
    `from_cache`, on cached rows in all `views`.
    """

    stage: str
    images: DatasetChoice
    features: FeatureChoice
    head: HeadSpec
    max_pixels: int
    init: str | None = None
    freeze_until: str | None = None  # None: what is usual for the backbone
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
        """Return it as plain JSON values."""
        return {**asdict(self), "head": self.head.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_dict` gave. Raises RunError if it is not that."""
        try:
            parts = _parts(value)
            recipe = parts.pop("augment")
            return cls(augment=None if recipe is None else Augmentation(**recipe), **parts)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunError(f"what the run was asked for cannot be read ({error}); train anew") from error


@dataclass(frozen=True)
class SweepRequest:
    """The settings to be tried, all different, on the rows of each of `features`; `memory` in bytes."""

    images: DatasetChoice
    features: tuple[FeatureChoice, ...]
    specs: tuple[HeadSpec, ...]
    max_pixels: int
    memory: int | None = None
    views: Views = PLAIN_VIEW

    def head(self, features: FeatureChoice, spec: HeadSpec) -> TrainRequest:
        """Return the same for one of the settings, on one of the features."""
        return TrainRequest(self.images, features, spec, self.max_pixels, memory=self.memory, views=self.views)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values; `features` is an object, or a list of several."""
        several = [asdict(each) for each in self.features]
        specs = [spec.to_dict() for spec in self.specs]
        return {**asdict(self), "features": several if len(several) > 1 else several[0], "specs": specs}

    @classmethod
    def of_request(cls, stored: Mapping[str, Any]) -> Self:
        """Return what the request of an unfinished sweep says, in the spaces it began with. Raises RunError."""
        spaces = stored.get("space")
        several = spaces if isinstance(spaces, list) else [spaces]
        begun = tuple(space_of_request({"space": space}) for space in several)
        return replace(cls.from_dict(stored.get("asked", {})), features=begun)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_dict` gave. Raises RunError if it is not that."""
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
    """Return the command whose unfinished run left this request."""
    request = stored.get("asked")
    stage = request.get("stage") if isinstance(request, dict) else None
    return stage if stage in STAGES else "train-head"


def resume_commands(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return for each unfinished run the command that goes on with it; of those that cannot be read it is said why."""
    found = dict[str, str]()
    for name in names:
        try:
            found[name] = command_of(read_request(root, name))
        except RunError as error:
            logger.warning("%s", error)
    return found


def stopped_run(workspace: Workspace, name: str, command: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a stopped run, of "latest" that of the last one of `command`, and its request.

    Raises
    ------
    RunError
        If there is none, or another command left it.
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
    """Return the same for a stopped run, with the file of its own network where that lies by now.

    It is the file that is `given`, else the one that was asked for, else one that is known by its content.

    Raises
    ------
    UsageError
        If a file is given for a network of the table.
    SpecError
        If the file that is given is another network.
    WeightsError
        If none of them is that network.
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
        return request  # it began with a run, which says where its network lies
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
