"""Choose the initial model of a full-model training: backbone weights, head, cut and last frozen layer.

The head is new, or comes from the run that `--init` names. `open_initial_model` returns an `InitialModel`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.backbone import source as networks
from pipeline.backbone.build import build
from pipeline.backbone.graph import cut_layers, layer_names
from pipeline.backbone.scaling import canonical
from pipeline.backbone.source import Source
from pipeline.backbone.table import DEFAULT_BACKBONE
from pipeline.backbone.weights import Weights
from pipeline.cache.digests import identify
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError, RunError, SpecError
from pipeline.core.spec import FREEZE_UNTIL, OWN, SHAPE, FeatureSpec, HeadSpec
from pipeline.dataset import Dataset
from pipeline.dataset.class_names import missing, with_classes
from pipeline.extraction.feature_choice import (
    FeatureChoice,
    ResolvedChoice,
    find_space,
    resolve_choice,
    weights_for,
    weights_of,
)
from pipeline.images.decoding import depth_of
from pipeline.runs.request import FinetuneRequest
from pipeline.runs.store import network_record, read_run
from pipeline.training import full_model, heads
from pipeline.training.heads.dense import DenseHead
from pipeline.training.heads.dense import build as build_head


@dataclass(frozen=True)
class InitialRun:
    """The run that gives a full model its initial head, and its backbone if that was trained too."""

    path: Path
    about: dict[str, Any]
    spec: FeatureSpec  # the features its head reads
    base: FeatureSpec  # the same features by the base weights, with which training of its backbone once started
    unchanged_until: str  # the last layer whose output is still that of the base weights; "" if there is none

    @property
    def full(self) -> bool:
        """Whether the run is a full model, which has its own backbone weights."""
        return "base" in self.about


@dataclass(frozen=True)
class InitialModel:
    """The initial state of a full model.

    Attributes
    ----------
    base
        The features by the base weights: those with which training of the backbone first started.
    weights
        The weights to load into the backbone.
    label
        The name of the base weights for people.
    resolved
        The choice of features that describes the rows, or the images, to train on.
    cut
        The layer whose cached rows the model is trained on; "" if it is trained on images.
    until
        The index of the last frozen layer; -1 if none is frozen.
    begun
        The initial run; None for a new head.
    """

    base: FeatureSpec
    weights: Weights
    label: str
    resolved: ResolvedChoice
    cut: str
    until: int
    begun: InitialRun | None

    @property
    def network_record(self) -> Mapping[str, Any] | None:
        """The initial run's record of an own network's file; None if there is no such run or record."""
        return network_record(self.begun.about) if self.begun else None

    @property
    def backbone(self) -> str:
        """The name of the network for people."""
        return networks.label(self.base, self.network_record) if self.begun else self.resolved.source.label

    def head(self, spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> DenseHead:
        """Return the initial head over tensors of `row_shape` (h, w, c): a new one, or that of the initial run.

        Raises DoNotFitError if a new head takes more memory than is free, RunError if the run's head does not fit.
        """
        if self.begun is None:
            heads.require_memory(spec, row_shape, classes)
            return DenseHead(build_head(spec, row_shape, classes), spec)
        with heads.of_its_run(self.begun.path, classes, row_shape):
            found = full_model.to_dense_head(heads.load(self.begun.path), row_shape, classes)
        shape = {name: found.spec.settings[name] for name in SHAPE}
        return DenseHead(found.model, HeadSpec.make(found.spec.head, **{**spec.settings, **shape}))

    def matched(self, dataset: Dataset) -> Dataset:
        """Return the dataset with its classes in the order of the initial run, if there is one."""
        return with_classes(dataset, self.begun.path.name, self.begun.about["classes"]) if self.begun else dataset

    def unchanged_until(self, names: Sequence[str], cuts: Sequence[str]) -> str:
        """Return the last of `cuts` up to which the base weights are unchanged; "" if there is none.

        `cuts` are the cuts in the frozen part, `names` all layers of the backbone.
        """
        if self.begun is not None and self.begun.full:
            before = self.begun.unchanged_until
            cuts = [name for name in cuts if before and names.index(name) <= names.index(before)]
        return cuts[-1] if cuts else ""


def open_initial_model(request: FinetuneRequest, dataset: Dataset, workspace: Workspace) -> InitialModel:
    """Return the initial model that `request` asks for.

    Raises
    ------
    DatasetError
        If the initial run has other classes than `dataset`.
    SpecError
        If the initial run does not fit the other options, or `--from-cache` finds no frozen part to cache.
    RunError
        If the folder of the initial run holds no trained model.
    WeightsError
        If the weights cannot be found or downloaded.
    """
    if request.init is not None:
        return _from_run(open_initial_run(Path(request.init), dataset), request, workspace)
    resolved = resolve_choice(workspace, request.features)
    cut, until, _ = _cut(request, resolved.source, resolved.layer)
    weights, found = _settled_weights(resolved, dataset, workspace, [cut, resolved.layer] if cut else [resolved.layer])
    choice = request.features
    choice = replace(
        choice,
        weights=_text(weights),
        layer=cut or resolved.layer,
        precision=found.precision if found and choice.precision == "auto" else choice.precision,
        input_size=resolved.source.input_size if weights.network else choice.input_size,
        scaling=resolved.source.scaling if weights.network else choice.scaling,
    )
    base = replace(resolved, choice=replace(choice, layer=resolved.layer)).new_spec(weights)
    return InitialModel(
        base, weights, weights.label, replace(resolved, choice=choice, weights=weights), cut, until, None
    )


def _cut(request: FinetuneRequest, source: Source, layer: str) -> tuple[str, int, list[str]]:
    """Return the cut where the cached part ends, the index of the last frozen layer, and the names of all layers.

    The cut is "" if nothing is cached.
    """
    names, cuts = _layers(source, layer)
    until = len(names) - 1
    if request.stage != "freeze":
        until = full_model.frozen_until(names, request.freeze_until or _usual(source, layer))
    return full_model.cut_at(names, cuts, until) if request.from_cache else "", until, names


def _layers(source: Source, layer: str) -> tuple[list[str], list[str]]:
    """Return the names of the backbone's layers up to `layer`, and of those among them where it can be cut."""
    names, cuts = _topology(source.name, source.input_size, source.file)
    if layer not in cuts:
        raise SpecError(f"no head can stand on {layer!r}; take one of {', '.join(cuts[-4:])}")
    names = names[: names.index(layer) + 1]
    return names, [name for name in cuts if name in names]


@functools.cache
def _topology(name: str, input_size: int, file: Path | None) -> tuple[list[str], list[str]]:
    whole = build(name, input_size=input_size, network=file)
    return layer_names(whole), cut_layers(whole)


def _usual(source: Source, layer: str) -> str:
    """Return the last frozen layer by default, when `--freeze-until` is not given."""
    if source.name == DEFAULT_BACKBONE:
        return FREEZE_UNTIL
    return full_model.default_freeze_until(build(source.name, input_size=source.input_size, network=source.file), layer)


def open_initial_run(path: Path, dataset: Dataset) -> InitialRun:
    """Return the run in the folder `path` as an initial run.

    Raises
    ------
    RunError
        If the folder holds no trained model.
    SpecError
        If the run is an ensemble of heads.
    DatasetError
        If the run has other classes than `dataset`.
    """
    about = read_run(path)
    try:
        spec, classes = FeatureSpec.from_dict(about["features"]), list(about["classes"])
        base = about.get("base", {"features": about["features"], "unchanged_until": spec.layer})
        begun = InitialRun(path, about, spec, FeatureSpec.from_dict(base["features"]), str(base["unchanged_until"]))
    except (KeyError, TypeError, SpecError) as error:
        raise RunError(f"{path / 'run.json'} is not that of a trained model ({error})") from error
    if isinstance(heads.load(path), heads.Ensemble):
        raise SpecError(f"{path.name} is an ensemble of heads; take a run that was trained without --folds")
    if missing(classes, dataset.classes) or missing(dataset.classes, classes):
        raise DatasetError(f"{path.name} knows other classes than {dataset.name}: {', '.join(classes)[:200]}")
    return begun


def _from_run(begun: InitialRun, request: FinetuneRequest, workspace: Workspace) -> InitialModel:
    stated, spec = request.features, begun.spec
    base = _base_weights(begun, stated, workspace)
    label = str(begun.about["summary"]["weights"])
    if begun.full:
        file = begun.path / full_model.JSON_FILE if spec.backbone.startswith(OWN) else None
    else:
        base = base or networks.require(begun.base, network_record(begun.about), label, begun.path.name, workspace)
        file = base.network
    source = Source(spec.backbone, spec.input_size, spec.scaling, spec.layer, file)
    cut, until, names = _cut(request, source, spec.layer)
    if begun.unchanged_until not in ("", *names):
        raise RunError(f"{begun.path / 'run.json'} is not that of a trained model ({begun.unchanged_until[:60]!r})")
    trained = full_model.saved_weights(begun.path) if begun.full else None
    weights = trained or base
    assert weights is not None  # a full model has its own weights; for a head, `base` was required above
    below = base is not None and (not trained or _at_most(cut, begun.unchanged_until, names))
    rows = base if below and base is not None else weights
    choice = FeatureChoice(
        weights=_text(rows),
        layer=cut or spec.layer,
        fit=spec.fit,
        precision=spec.precision if stated.precision == "auto" else stated.precision,
        storage=spec.storage if stated.storage == "auto" else stated.storage,
        depth=depth_of(spec.decode),
        backbone=stated.backbone,
        input_size=stated.input_size,
        scaling=stated.scaling,
    )
    resolved = ResolvedChoice(choice, replace(source, file=rows.network, weights=rows.identity), rows, None)
    return InitialModel(
        replace(resolved.new_spec(rows), layer=spec.layer, weights=begun.base.weights),
        weights, label, resolved, cut, until, begun,
    )  # fmt: skip


def _base_weights(begun: InitialRun, stated: FeatureChoice, workspace: Workspace) -> Weights | None:
    """Return the base weights of the run, with which training of its backbone started; None if not available.

    Raises
    ------
    SpecError
        If `stated` differs from the features or weights of the run.
    """
    spec, name = begun.spec, begun.path.name
    if stated.layer not in (None, spec.layer):
        raise SpecError(f"the head of {begun.path} stands on {spec.layer}, not on {stated.layer}")
    if stated.fit not in (None, spec.fit):
        raise SpecError(f"{name} was trained on images made square by {spec.fit}, not {stated.fit}")
    depth = depth_of(spec.decode)
    if stated.depth not in (None, depth):
        raise SpecError(f"{name} was trained on images of --depth {depth}, not {stated.depth}")
    size = stated.input_size or spec.input_size
    scaling = spec.scaling if stated.scaling is None else canonical(stated.scaling)
    source = Source(spec.backbone, size, scaling, spec.layer)
    if stated.backbone is not None:
        source = networks.open_source(stated.backbone, size, scaling, workspace)
    for what, mine, theirs in (
        ("backbone", spec.backbone, source.name),
        ("input size", spec.input_size, source.input_size),
        ("scaling", spec.scaling, source.scaling),
    ):
        if mine != theirs:
            raise SpecError(f"{name} was trained with the {what} {mine}, not {theirs}")
    found = networks.stated(source, stated.weights, workspace)
    if found is None:
        return networks.find(begun.base, network_record(begun.about), workspace)
    if found.identity != begun.base.weights:
        if stated.backbone is not None and spec.backbone.startswith(OWN):
            wanted = networks.file_of(network_record(begun.about))
            raise SpecError(f"{name} began with {wanted}, not with the weights in {stated.backbone}; give that file")
        raise SpecError(f"{name} began with other weights than {stated.weights}; leave out --weights")
    return found


def _at_most(layer: str, last: str, names: Sequence[str]) -> bool:
    return bool(layer and last) and names.index(layer) <= names.index(last)


def _settled_weights(
    resolved: ResolvedChoice, dataset: Dataset, workspace: Workspace, layers: Sequence[str]
) -> tuple[Weights, FeatureSpec | None]:
    """Return the weights to use, and the spec of the feature space that they were taken from, if any.

    They are the stated weights, else those of the space that holds most of the dataset's rows, else the default ones.
    """
    if resolved.weights is not None:
        return resolved.weights.require(), None
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, workspace.cache.index, advance, read_unseen=False)
    for layer in layers:
        space = find_space(workspace, replace(resolved, choice=replace(resolved.choice, layer=layer)), identities)
        if space is not None:
            return weights_of(space, workspace), space.spec
    return weights_for(resolved, None, dataset, workspace), None


def _text(weights: Weights) -> str:
    """Return the value of `--weights` that names these weights."""
    if weights.network is not None and weights.network == weights.path:
        return "auto"  # weights stored in an own network's file
    return str(weights.path) if weights.path else f"untrained:{weights.identity.rsplit(':', 1)[1]}"
