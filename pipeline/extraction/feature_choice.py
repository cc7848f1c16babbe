"""Find the feature space that a user's options mean: one of those on disk, or a new one.

`FeatureChoice` has the options; `resolve_choice` looks up the network, and `find_space` finds the space.
"""

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
    """The user's options about features.

    "auto" takes the value of a space on disk, or if there is none, what is best on this machine. None takes the value
    of the space named by `space`, or if none is named, the backbone's default.
    """

    weights: str = "auto"
    layer: str | None = None
    fit: str | None = None
    precision: str = "auto"
    storage: str = "auto"
    space: str | None = None
    depth: int | None = None  # bits used of 16-bit channels; None: 16, or that of the named space
    backbone: str | None = None  # a row of the table, or the path of a .keras file
    input_size: int | None = None
    scaling: str | None = None

    def anchored(self) -> Self:
        """Return the choice with absolute file paths, so that it means the same in any current folder."""
        return replace(self, weights=anchored(self.weights), backbone=networks.anchored(self.backbone))


@dataclass(frozen=True)
class ResolvedChoice:
    """A choice with its network looked up.

    `space` is the space that was named, if any. `weights` is None if the choice leaves them open ("auto"): then the
    space on disk decides, or the default for a new space.
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
        """Return the fields of a feature spec that the user stated; a space on disk must agree with them."""
        choice, source, named = self.choice, self.source, self.space is not None
        any_depth = (
            named and choice.depth is None
        )  # a named space must agree only with the options that were given beside it
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
        """Return the spec of the new space to create if no space on disk agrees with the choice."""
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
    """Return the weights to compute with: those stated, else those of the space, else what `auto` means.

    Raises WeightsError if they are not available.
    """
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
        If there is no such network, or an own network lacks an option that it needs.
    WeightsError
        If the stated weights are not available.
    SpecError
        If the space named by `choice.space` differs from another stated option.
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
    """Return the network of a space, with the stated size and scaling; the file of an own network is not searched."""
    spec = space.spec
    size = choice.input_size or spec.input_size
    scaling = spec.scaling if choice.scaling is None else canonical(choice.scaling)
    return Source(spec.backbone, size, scaling, spec.layer)


def find_space(
    workspace: Workspace, resolved: ResolvedChoice, identities: Identities, views: Views = PLAIN_VIEW
) -> FeatureSpace | None:
    """Return the space on disk that a choice means, None if there is none.

    If the choice names no space, this is the agreeing space that has most of the images' rows in `views`.
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
    """Return the fields of `spec` that this version cannot compute: name → (its value, the values of this version)."""
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
    """Log a warning if the features come from untrained weights."""
    if spec.untrained:
        logger.warning(
            "the weights of %s are UNTRAINED: fine for trying Icebox out, no basis for judging your images",
            spec.backbone,
        )
