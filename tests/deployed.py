"""One trained run of each kind on a few images, of a tiny network and of InceptionV3, made once for all processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conftest import make_once
from own_networks import tiny, tiny_choice, write_sides

from pipeline.cache.digests import remembered_digest
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core.spec import HeadSpec
from pipeline.dataset import Dataset, open_dataset
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.runs.request import DatasetChoice, FinetuneRequest, TrainRequest
from pipeline.training.finetune import finetune
from pipeline.training.open_run import TrainedRun, open_run
from pipeline.training.train_head import train_head

MOST = decoding.DEFAULT_MAX_PIXELS
_SHORT = {"epochs": 2, "batch_size": 8}
_HEADS: dict[str, tuple[HeadSpec, int]] = {
    "logreg": (HeadSpec.make("logreg", C="10"), 0),
    "gap": (HeadSpec.make("gap", **_SHORT), 0),
    "flatten": (HeadSpec.make("flatten", hidden=8, **_SHORT), 0),
    "folds": (HeadSpec.make("gap", hidden=4, **_SHORT), 2),
}
_FULL: dict[str, dict[str, Any]] = {
    "freeze": {"stage": "freeze", "head": HeadSpec.make("gap", **_SHORT)},
    "finetune": {
        "stage": "finetune",
        "freeze_until": "middle",
        "from_cache": True,
        "head": HeadSpec.make("gap", learning_rate=1e-4, **_SHORT),
    },
}
KINDS = (*_HEADS, *_FULL)


@dataclass(frozen=True)
class Deployed:
    """A data directory with rows and runs that tests must leave as they are, and the folder of the images."""

    data: Path
    photos: Path

    @property
    def dataset(self) -> Dataset:
        return open_dataset(str(self.photos), downloads=self.data)

    @property
    def files(self) -> list[Path]:
        return sorted(self.photos.rglob("*.png"))

    def name(self, kind: str) -> str:
        return json.loads((self.data / "names.json").read_text())[kind]

    def run(self, kind: str) -> TrainedRun:
        return open_run(self.data / "runs", self.name(kind))

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        with closing(Cache(self.data / "cache")) as cache:
            yield Workspace(self.data, cache)


def deploy(root: Path) -> Deployed:
    """Make runs of every kind on the tiny network below `root`, unless another process has."""
    return _deployed(make_once(root, lambda root: _make(root, KINDS, replace(tiny_choice(), storage="float32"))))


def deploy_inception(root: Path) -> Deployed:
    """Make a `gap` run on untrained InceptionV3 below `root`, unless another process has."""
    features = FeatureChoice(weights="untrained", precision="float32")
    return _deployed(make_once(root, lambda root: _make(root, ("gap",), features)))


def know_tiny(cache: Cache) -> None:
    """Have a cache without rows know the tiny network, which it could not find otherwise."""
    remembered_digest(tiny(), cache.index)


def _deployed(root: Path) -> Deployed:
    return Deployed(root / "data", root / "photos")


def _make(root: Path, kinds: tuple[str, ...], features: FeatureChoice) -> None:
    place = _deployed(root)
    write_sides(place.photos, (20, 6, 6))
    chosen, names = DatasetChoice(str(place.photos)), dict[str, str]()
    with place.workspace() as workspace:
        extract(place.dataset, workspace, features, ComputeOptions())
        for kind in kinds:
            if kind in _HEADS:
                spec, folds = _HEADS[kind]
                request = TrainRequest(chosen, features, spec, MOST, folds=folds)
                names[kind] = train_head(place.dataset, workspace, request).name
            else:
                request = FinetuneRequest(images=chosen, features=features, max_pixels=MOST, **_FULL[kind])
                names[kind] = finetune(place.dataset, workspace, request).name
    (place.data / "names.json").write_text(json.dumps(names))
