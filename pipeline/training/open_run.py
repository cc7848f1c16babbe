"""Open a published run: its feature space, classes, head and request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone import source as networks
from pipeline.core.errors import RunError, SpecError
from pipeline.core.spec import FeatureSpec
from pipeline.dataset import Dataset
from pipeline.dataset.class_names import listed, missing, normalised, other_classes, with_classes
from pipeline.runs import store
from pipeline.runs.request import FinetuneRequest, TrainRequest
from pipeline.training import heads
from pipeline.training.full_model import FullModel
from pipeline.training.rows import Rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """A published run: its folder, feature space, classes and request. The head is read when first used."""

    path: Path
    spec: FeatureSpec
    classes: list[str]
    kind: str  # the head's name
    base: FeatureSpec  # of a full model the features by its base weights, before training; of a head equal to `spec`
    request: TrainRequest | FinetuneRequest | None  # None for a run of version 0.1.0, which did not store it
    weights: str  # the name of the weights of `base`
    content: str | None  # the hash `LabelledImages.content` of its images, labels and splits; None for an older run
    network_record: Mapping[str, Any] | None = None  # record of an own network's file, as `source.record` returns it

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def backbone(self) -> str:
        """The name of its network for people: from the backbone table, or that of an own network's file."""
        return networks.label(self.base, self.network_record)

    @property
    def reads(self) -> str:
        """The kind of rows that its head reads: "features" or "pooled"."""
        return "features" if self.full else heads.READS[self.kind]

    @property
    def full(self) -> bool:
        """Whether the run is a full model, which reads images instead of rows."""
        return isinstance(self.request, FinetuneRequest)

    @property
    def saw_validation(self) -> bool:
        """Whether the run was trained on the images of the validation split too."""
        return isinstance(self.request, TrainRequest) and self.request.folds > 0

    @cached_property
    def head(self) -> heads.Head:
        """The head, read at first use. Raises RunError if unreadable, or of another kind than in run.json."""
        head = heads.load(self.path)
        if head.kind != self.kind:
            raise RunError(f"{self.path} holds a {head.kind} head, and its run.json says {self.kind}")
        return head

    def predict(self, rows: Rows) -> np.ndarray:
        """Return the probabilities of `rows`, (n, k) float32. Raises RunError if the head is of another run."""
        with heads.of_its_run(self.path, len(self.classes), rows.shape[1:]):
            said = self.head.predict(rows)
        if said.shape[1] != len(self.classes):
            raise heads.not_of_its_run(self.path, len(self.classes), rows.shape[1:])
        return said

    def network(self, precision: str | None = None) -> FullModel:
        """Return the network of a full model, in `precision` if given, else in the precision of its training.

        Raises RunError if the network cannot be loaded, or is of another run.
        """
        loaded = FullModel.load(self.path, self.spec, precision)
        if loaded.model.output_shape[-1] != len(self.classes):
            raise heads.not_of_its_run(self.path, len(self.classes), loaded.below.output_shape[1:])
        return loaded

    def require_space(self, spec: FeatureSpec) -> None:
        """Raise SpecError, naming each field that differs, unless `spec` is the run's feature space."""
        mine, other = asdict(self.spec), asdict(spec)
        if differing := [name for name in mine if mine[name] != other[name]]:
            listed = ", ".join(f"{name} {mine[name]}, not {other[name]}" for name in differing)
            raise SpecError(f"the run {self.name} was trained in another feature space: {listed}")

    def matched(self, dataset: Dataset) -> Dataset:
        """Return the dataset with the classes of the run, in the run's order; labels become indices into them.

        Classes are matched by name, in any order and Unicode form. The dataset may have only some of the classes.

        Raises
        ------
        DatasetError
            If the dataset has a class that the run does not have.
        """
        found = with_classes(dataset, self.name, self.classes)
        if absent := missing(self.classes, dataset.classes):
            count = f"{len(absent):,} of the {len(self.classes):,} classes"
            logger.warning("%s has no image of %s of the run %s: %s", dataset.name, count, self.name, listed(absent))
        return found

    def require_same_classes(self, other: TrainedRun) -> None:
        """Raise DatasetError, naming the difference, unless both runs have the same classes in the same order."""
        mine, theirs = (list(map(normalised, run.classes)) for run in (self, other))
        if mine != theirs:
            raise other_classes(self.name, self.classes, other.classes)


def open_run(root: Path, name: str) -> TrainedRun:
    """Return the run `name`: a name that `runs ls` lists, a path, "latest" or "best".

    Raises RunError if there is no such run, or its run.json is not that of a trained model.
    """
    path = store.find_run(root, name)
    about = store.read_run(path)
    try:
        classes, spec = [str(each) for each in about["classes"]], FeatureSpec.from_dict(about["features"])
        if len(set(classes)) < len(classes):
            raise KeyError("a class stands twice")
        kind = about["head"]["head"]
        if kind not in heads.READS:
            raise KeyError(kind)
        base = FeatureSpec.from_dict(about["base"]["features"]) if "base" in about else spec
        request = _request(about["asked"]) if "asked" in about else None
        weights, content = str(about["summary"]["weights"]), about["dataset"].get("content")
    except (KeyError, TypeError, SpecError) as error:
        raise RunError(f"{path / 'run.json'} is not that of a trained head ({error})") from error
    return TrainedRun(path, spec, classes, kind, base, request, weights, content, store.network_record(about))


def _request(value: Any) -> TrainRequest | FinetuneRequest:
    return FinetuneRequest.from_dict(value) if "stage" in value else TrainRequest.from_dict(value)
