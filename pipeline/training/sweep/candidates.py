"""Find the feature spaces that a sweep compares, compute missing rows, and restrict all spaces to the same images."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.backbone import source as networks
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import MissingBackbonesError, MissingFeaturesError, RunError, UsageError
from pipeline.core.units import counted
from pipeline.dataset import Dataset
from pipeline.extraction import measured_rates
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.extraction.planning import Quarantined
from pipeline.extraction.workers.connect import ClusterChoice
from pipeline.runs.request import SweepRequest
from pipeline.training.labelled_features import LabelledFeatures, join_features
from pipeline.training.sweep.leaderboard import ExtractionCost

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Candidate:
    """The rows of a dataset in one of the compared feature spaces."""

    choice: FeatureChoice
    labelled: LabelledFeatures
    cost: ExtractionCost


def compute_missing(
    dataset: Dataset, workspace: Workspace, request: SweepRequest, cluster: ClusterChoice | None
) -> int:
    """Compute the missing rows of each backbone, one backbone after the other; return the number of rows computed."""
    options = ComputeOptions(max_pixels=request.max_pixels, threads=machine.usable_cores())
    return sum(
        extract(dataset, workspace, choice, options, views=request.views, cluster=cluster).computed
        for choice in request.features
    )


def find_candidates(dataset: Dataset, workspace: Workspace, request: SweepRequest) -> list[Candidate]:
    """Return the rows of `dataset` in the feature space of each of `request.features`. Computes none.

    Raises
    ------
    MissingFeaturesError
        If an image that can be decoded has no row in a space. If several were requested, it is a
        MissingBackbonesError, whose `lacking` are the indices of the choices that lack rows.
    UsageError
        If two choices name the same space.
    RunError
        If an image changed during the search.
    """
    found, lacking = list[LabelledFeatures](), list[int]()
    for number, choice in enumerate(request.features):
        try:
            found.append(join_features(dataset, workspace, choice, request.max_pixels, views=request.views))
        except MissingFeaturesError:
            if len(request.features) == 1:
                raise
            lacking.append(number)
    if lacking:
        raise _missing(lacking, len(request.features))
    _require_different(found)
    materials = _with_same_images(found)
    costs = _told_apart([_cost(workspace, labelled) for labelled in materials])
    return [Candidate(*each) for each in zip(request.features, materials, costs, strict=True)]


def digest(candidates: Sequence[Candidate]) -> str:
    """Return a hash of all that decides the training data of the sweep."""
    first, *others = (candidate.labelled.digest() for candidate in candidates)
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def _missing(lacking: Sequence[int], backbones: int) -> MissingBackbonesError:
    lack = "lacks" if len(lacking) == 1 else "lack"
    these = "this command" if len(lacking) == 1 else "these commands"
    return MissingBackbonesError(
        f"{len(lacking)} of {backbones} backbones {lack} features of some images; `--compute` makes them first, or "
        f"make them by {these}:",
        lacking,
    )


def _require_different(materials: Sequence[LabelledFeatures]) -> None:
    names = [labelled.space.name for labelled in materials]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two of the backbones mean the same features, {twice}; leave one of them out")


def _with_same_images(materials: Sequence[LabelledFeatures]) -> list[LabelledFeatures]:
    """Return `materials` restricted to the images that have rows in all spaces, so that results can be compared.

    An image may have a row in one space, and no longer be decodable for another.
    """
    common = functools.reduce(np.intersect1d, (labelled.usable for labelled in materials))
    if left_out := len(functools.reduce(np.union1d, (labelled.usable for labelled in materials))) - len(common):
        some = counted(left_out, "image is", "images are")
        logger.warning("%s left out: undecodable by now, with features of some of the backbones only", some)
    bad: dict[str, Quarantined] = {each.path: each for labelled in materials for each in labelled.quarantined}
    same = [_restricted(labelled, common, list(bad.values())) for labelled in materials]
    if len({labelled.content for labelled in same}) > 1:
        raise RunError("images changed while the sweep was looking at them; run the same command again")
    return [replace(labelled, keys=same[0].keys) for labelled in same]  # share one list: it may have millions of keys


def _restricted(labelled: LabelledFeatures, usable: np.ndarray, quarantined: list[Quarantined]) -> LabelledFeatures:
    if len(usable) == len(labelled.usable):
        return replace(labelled, quarantined=quarantined) if len(quarantined) > len(labelled.quarantined) else labelled
    at = np.flatnonzero(np.isin(labelled.usable, usable))
    keys = [labelled.keys[i] for i in at.tolist()]
    return replace(labelled, usable=usable, keys=keys, groups=labelled.groups[at], quarantined=quarantined)


def _cost(workspace: Workspace, labelled: LabelledFeatures) -> ExtractionCost:
    space = labelled.space
    return ExtractionCost(
        networks.label(space.spec, space.provenance.get("network")),
        space.name,
        measured_rates.recall(workspace, space.spec),
        space.totals().bytes_per_row,
    )


def _told_apart(costs: Sequence[ExtractionCost]) -> list[ExtractionCost]:
    """Return `costs` with distinct backbone names: networks of the same name get the name of their space added."""
    names = networks.distinct_labels([cost.backbone for cost in costs], [cost.space for cost in costs])
    return [replace(cost, backbone=name) for cost, name in zip(costs, names, strict=True)]
