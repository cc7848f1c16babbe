"""What the user said about the features, and which feature space on disk, or which new one, that means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from pipeline.backbone import source as networks
from pipeline.backbone.frozen import ENGINE, ENGINES
from pipeline.backbone.scaling import canonical
from pipeline.backbone.source import Source
from pipeline.backbone.table import BACKBONES
from pipeline.backbone.weights import Weights, anchored
from pipeline.cache.digests import Identities
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import SpecError
from pipeline.core.spec import OWN, PLAIN_VIEW, FeatureRequest, FeatureSpec, Views
from pipeline.dataset import Dataset
from pipeline.extraction.planning import DEFAULT_FIT
from pipeline.images import decoding

logger = logging.getLogger(__name__)

_DEFAULT_STORAGE = "float16"


@dataclass(frozen=True)
class FeatureChoice:
    """What the user said about the features; "auto" leaves a field to the spaces on disk, then to the machine.

    None stands for the backbone's default, or for that of the space that is named.
    """

    weights: str = "auto"
    layer: str | None = None
    fit: str | None = None
    precision: str = "auto"
    storage: str = "auto"
    space: str | None = None
    depth: int | None = None  # bits of 16-bit channels; None: 16, or that of the space that is named
    backbone: str | None = None  # a row of the table, or the path of a .keras file
    input_size: int | None = None
    scaling: str | None = None

    def anchored(self) -> Self:
        """Return the same with absolute paths of files, so that it means the same from anywhere."""
        return replace(self, weights=anchored(self.weights), backbone=networks.anchored(self.backbone))


@dataclass(frozen=True)
class ResolvedChoice:
    """A choice with its network looked up.

    `space` is the one that was named. `weights` are None where they were left to the spaces on disk, or to what `auto`
    means.
    """

    choice: FeatureChoice
    source: Source
    weights: Weights | None
    space: FeatureSpace | None

    @property
    def layer(self) -> str:
        """The layer whose output is cached."""
        return self.choice.layer or (self.space.spec.layer if self.space else self.source.default_layer)

    def request(self) -> FeatureRequest:
        """Return the fields of a spec that were stated."""
        choice, source, named = self.choice, self.source, self.space is not None
        any_depth = (
            named and choice.depth is None
        )  # a space named outright need agree only with what was said beside it
        return FeatureRequest(
            backbone=source.name,
            layer=choice.layer if named else self.layer,
            fit=choice.fit if named else choice.fit or DEFAULT_FIT,
            decode=tuple(decoding.DECODE_POLICIES) if any_depth else decoding.decode_policy(choice.depth),
            resize=decoding.RESIZE_POLICY,
            input_size=source.input_size,
            scaling=source.scaling,
            engine=ENGINES,
            weights=self.weights.identity if self.weights else None,
            precision=None if choice.precision == "auto" else choice.precision,
            storage=None if choice.storage == "auto" else choice.storage,
        )

    def new_spec(self, weights: Weights) -> FeatureSpec:
        """Return the space that the choice means where none on disk agrees with it."""
        choice, source = self.choice, self.source
        return FeatureSpec(
            backbone=source.name,
            weights=weights.identity,
            layer=self.layer,
            input_size=source.input_size,
            decode=decoding.decode_policy(choice.depth),
            resize=decoding.RESIZE_POLICY,
            fit=choice.fit or DEFAULT_FIT,
            scaling=source.scaling,
            precision=machine.best_precision() if choice.precision == "auto" else choice.precision,
            engine=ENGINE,
            storage=_DEFAULT_STORAGE if choice.storage == "auto" else choice.storage,
        )


def weights_for(
    resolved: ResolvedChoice, space: FeatureSpace | None, dataset: Dataset, workspace: Workspace
) -> Weights:
    """Return the weights to compute with: those stated, else those of the space, else what `auto` means."""
    if resolved.weights is not None:
        return resolved.weights.require()
    if space is not None:
        return weights_of(space, workspace)
    return networks.resolve(resolved.source, "auto", workspace, offline=dataset.embedded)


def resolve_choice(workspace: Workspace, choice: FeatureChoice) -> ResolvedChoice:
    """Look up the network, the weights and the space that a choice names.

    Raises
    ------
    UsageError
        If there is no such network, or what must be said of an own one is not.
    WeightsError
        If the weights that were stated cannot be had.
    SpecError
        If the space that `choice.space` names differs from what else was stated.
    """
    space = workspace.cache.open(choice.space) if choice.space is not None else None
    if space is not None and choice.backbone is None:
        source = _source_of(space, choice)
    else:
        size, scaling = choice.input_size, choice.scaling
        if space is not None:
            size, scaling = size or space.spec.input_size, space.spec.scaling if scaling is None else scaling
        source = networks.open_source(choice.backbone, size, scaling, workspace)
    resolved = ResolvedChoice(choice, source, networks.stated(source, choice.weights, workspace), space)
    if space is not None and (differing := resolved.request().differences(space.spec)):
        found = {**space.spec.to_dict(), "backbone": networks.label(space.spec, space.provenance.get("network"))}
        pairs = ", ".join(f"{name} is {found[name]}" for name in differing)
        raise SpecError(f"the space {space.name} is not the one asked for: {pairs}")
    return resolved


def _source_of(space: FeatureSpace, choice: FeatureChoice) -> Source:
    """Return the network of a space, as far as nothing else was said: the file of an own one is not looked for."""
    spec = space.spec
    size = choice.input_size or spec.input_size
    scaling = spec.scaling if choice.scaling is None else canonical(choice.scaling)
    return Source(spec.backbone, size, scaling, spec.layer)


def find_space(
    workspace: Workspace, resolved: ResolvedChoice, identities: Identities, views: Views = PLAIN_VIEW
) -> FeatureSpace | None:
    """Return the space on disk that a choice means, None if there is none.

    Left to itself, it is the one that holds most of the rows, in `views`.
    """
    if resolved.space is not None:
        return resolved.space
    return workspace.cache.choose(resolved.request(), identities.keys, views.numbers)


def weights_of(space: FeatureSpace, workspace: Workspace) -> Weights:
    """Return the weights that a space was computed with. Raises WeightsError if they are not on this machine."""
    made_by = space.provenance
    label, of = made_by.get("weights", "weights"), f"the space {space.name}"
    return networks.require(space.spec, made_by.get("network"), label, of, workspace)


def version_differences(spec: FeatureSpec) -> dict[str, tuple[str, str]]:
    """Return the fields in which `spec` could not be of this version: name → what it has, what this version has."""
    ours: dict[str, Sequence[str]] = {
        "decode": tuple(decoding.DECODE_POLICIES),
        "resize": (decoding.RESIZE_POLICY,),
        "engine": ENGINES,
    }
    if not spec.backbone.startswith(OWN):
        ours["backbone"] = tuple(BACKBONES)
    found = {name: str(getattr(spec, name)) for name in ours}
    return {name: (found[name], " or ".join(known)) for name, known in ours.items() if found[name] not in known}


def warn_untrained(spec: FeatureSpec) -> None:
    """Say it loudly when features come from weights that were never trained."""
    if spec.untrained:
        logger.warning(
            "the weights of %s are UNTRAINED: fine for trying Icebox out, no basis for judging your images",
            spec.backbone,
        )
