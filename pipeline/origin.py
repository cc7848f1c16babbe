"""What a full model begins with: which weights its backbone has, a new head or that of a run, where it is cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import heads, network
from pipeline.asked import FullAsked
from pipeline.backbone.build import build
from pipeline.backbone.graph import cut_layers
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
from pipeline.backbone.weights import Weights, find_by_identity, require_by_identity, resolve
from pipeline.cache.digests import identify
from pipeline.class_names import missing, with_classes
from pipeline.dataset import Dataset
from pipeline.errors import DatasetError, RunError, SpecError
from pipeline.extract import FeatureChoice, find_space, new_spec, weights_of
from pipeline.heads.dense import DenseHead
from pipeline.heads.dense import build as build_head
from pipeline.images import depth_of
from pipeline.runs import read_run
from pipeline.spec import SHAPE, FeatureSpec, HeadSpec
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Begun:
    """The run that a full model begins with."""

    path: Path
    about: dict[str, Any]
    spec: FeatureSpec  # the features its head reads
    base: FeatureSpec  # the same of the weights that its backbone once began with
    unchanged_until: str  # the last layer whose output is still that of the base weights; "" if none is

    @property
    def full(self) -> bool:
        """Whether it has a backbone of its own."""
        return "base" in self.about


@dataclass(frozen=True)
class Origin:
    """Where a full model begins.

    `weights` are loaded into its backbone; `base` describes the features of the weights that backbone once began with.
    `cut` is the layer whose rows it is trained on, "" if it is trained on images; `choice` says what those rows, or
    the images, are like.
    """

    base: FeatureSpec
    weights: Weights
    label: str
    choice: FeatureChoice
    cut: str
    begun: Begun | None

    def head(self, asked: HeadSpec, row_shape: tuple[int, ...], classes: int) -> DenseHead:
        """Return the head to begin with, over tensors (h, w, c)."""
        if self.begun is None:
            return DenseHead(build_head(asked, row_shape, classes), asked)
        with heads.of_its_run(self.begun.path, classes, row_shape):
            found = network.stitched(heads.load(self.begun.path), row_shape, classes)
        shape = {name: found.spec.settings[name] for name in SHAPE}
        return DenseHead(found.model, HeadSpec.make(found.spec.head, **{**asked.settings, **shape}))

    def matched(self, dataset: Dataset) -> Dataset:
        """Return the dataset with the classes in the order of the run that the model begins with, if there is one."""
        return with_classes(dataset, self.begun.path.name, self.begun.about["classes"]) if self.begun else dataset

    def unchanged_until(self, names: Sequence[str], cuts: Sequence[str]) -> str:
        """Return the last of `cuts` up to which the base weights are what they were, "" if there is none.

        `cuts` are those below what is about to be trained, `names` the backbone's layers.
        """
        if self.begun is not None and self.begun.full:
            before = self.begun.unchanged_until
            cuts = [name for name in cuts if before and names.index(name) <= names.index(before)]
        return cuts[-1] if cuts else ""


def origin_of(asked: FullAsked, dataset: Dataset, workspace: Workspace) -> Origin:
    """Settle what a full model begins with.

    Raises
    ------
    DatasetError
        If the run to begin with has other classes.
    SpecError
        If it does not fit what else was stated, or nothing is frozen that could be cached.
    WeightsError
        If the weights cannot be had.
    """
    begun = begun_from(Path(asked.init), dataset) if asked.init else None
    layer = begun.spec.layer if begun else asked.features.layer or BACKBONES[DEFAULT_BACKBONE].default_layer
    if asked.features.layer not in (None, layer):
        raise SpecError(f"the head of {asked.init} stands on {layer}, not on {asked.features.layer}")
    names, cuts = _layers(layer)
    until = len(names) - 1 if asked.stage == "freeze" else network.frozen_until(names, asked.freeze_until)
    cut = network.cut_at(names, cuts, until) if asked.from_cache else ""
    if begun is not None and begun.unchanged_until not in ("", *cuts):
        raise RunError(f"{begun.path / 'run.json'} is not that of a trained model ({begun.unchanged_until[:60]!r})")
    if begun is not None:
        return _from_run(begun, asked, cut, names, workspace)
    weights, found = _settled_weights(asked, dataset, workspace, [cut, layer] if cut else [layer])
    precision = found.precision if found and asked.features.precision == "auto" else asked.features.precision
    choice = replace(asked.features, weights=_text(weights), layer=cut or layer, precision=precision)
    return Origin(replace(new_spec(choice, weights), layer=layer), weights, weights.label, choice, cut, None)


def _layers(layer: str) -> tuple[list[str], list[str]]:
    """Return the names of the backbone's layers up to `layer`, and of those where it can be cut."""
    names, cuts = _topology()
    if layer not in cuts:
        raise SpecError(f"no head can stand on {layer!r}; take one of {', '.join(cuts[-4:])}")
    names = names[: names.index(layer) + 1]
    return names, [name for name in cuts if name in names]


@functools.cache
def _topology() -> tuple[list[str], list[str]]:
    whole = build(DEFAULT_BACKBONE)
    return [each.name for each in whole.layers], cut_layers(whole)


def begun_from(path: Path, dataset: Dataset) -> Begun:
    """Return the run in a folder to begin with, if it has the dataset's classes. Raises what `origin_of` does."""
    about = read_run(path)
    try:
        spec, classes = FeatureSpec.from_dict(about["features"]), list(about["classes"])
        base = about.get("base", {"features": about["features"], "unchanged_until": spec.layer})
        begun = Begun(path, about, spec, FeatureSpec.from_dict(base["features"]), str(base["unchanged_until"]))
    except (KeyError, TypeError, SpecError) as error:
        raise RunError(f"{path / 'run.json'} is not that of a trained model ({error})") from error
    if isinstance(heads.load(path), heads.Ensemble):
        raise SpecError(f"{path.name} is an ensemble of heads; take a run that was trained without --folds")
    if missing(classes, dataset.classes) or missing(dataset.classes, classes):
        raise DatasetError(f"{path.name} knows other classes than {dataset.name}: {', '.join(classes)[:200]}")
    return begun


def _from_run(begun: Begun, asked: FullAsked, cut: str, names: Sequence[str], workspace: Workspace) -> Origin:
    stated, index = asked.features, workspace.cache.index
    base: Weights | None
    if stated.weights == "auto":
        base = find_by_identity(begun.base.weights, begun.base.backbone, workspace.downloads, index)
    else:
        base = resolve(stated.weights, DEFAULT_BACKBONE, workspace.downloads, index, progress=workspace.progress)
        if base.identity != begun.base.weights:
            raise SpecError(f"{begun.path.name} began with other weights than {stated.weights}; leave out --weights")
    if stated.fit not in (None, begun.spec.fit):
        raise SpecError(f"{begun.path.name} was trained on images made square by {begun.spec.fit}, not {stated.fit}")
    depth = depth_of(begun.spec.decode)
    if stated.depth not in (None, depth):
        raise SpecError(f"{begun.path.name} was trained on images of --depth {depth}, not {stated.depth}")
    own = network.saved_weights(begun.path) if begun.full else None
    label = str(begun.about["summary"]["weights"])
    weights = (
        own or base or require_by_identity(begun.base.weights, label, begun.path.name, DEFAULT_BACKBONE, workspace)
    )
    below = base is not None and (not own or _at_most(cut, begun.unchanged_until, names))
    rows = base if below and base is not None else weights
    choice = FeatureChoice(
        weights=_text(rows),
        layer=cut or begun.spec.layer,
        fit=begun.spec.fit,
        precision=begun.spec.precision if stated.precision == "auto" else stated.precision,
        storage=begun.spec.storage if stated.storage == "auto" else stated.storage,
        depth=depth,
    )
    spec = replace(new_spec(choice, rows), layer=begun.spec.layer, weights=begun.base.weights)
    return Origin(spec, weights, label, choice, cut, begun)


def _at_most(layer: str, last: str, names: Sequence[str]) -> bool:
    return bool(layer and last) and names.index(layer) <= names.index(last)


def _settled_weights(
    asked: FullAsked, dataset: Dataset, workspace: Workspace, layers: Sequence[str]
) -> tuple[Weights, FeatureSpec | None]:
    """Return the stated weights, or those of the space that holds most of the dataset's rows, and that space's spec."""
    choice, index = asked.features, workspace.cache.index
    if choice.weights != "auto":
        return resolve(choice.weights, DEFAULT_BACKBONE, workspace.downloads, index, progress=workspace.progress), None
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, index, advance, read_unseen=False)
    for layer in layers:
        space, _ = find_space(workspace, replace(choice, layer=layer), identities)
        if space is not None:
            return weights_of(space, dataset, workspace), space.spec
    return weights_of(None, dataset, workspace), None


def _text(weights: Weights) -> str:
    """Return what `--weights` takes to mean these."""
    return str(weights.path) if weights.path else f"untrained:{weights.identity.rsplit(':', 1)[1]}"
