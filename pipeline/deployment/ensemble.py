"""Combine several published runs into an ensemble: the mean of their probabilities.

`group_runs` joins runs that read the same features into a `RunGroup`: one network with one backbone and several heads.
The backbone then computes once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.backbone import source as networks
from pipeline.backbone.weights import Weights
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import SpecError, UsageError, WeightsError
from pipeline.core.spec import FeatureSpec
from pipeline.extraction.feature_choice import version_differences, warn_untrained
from pipeline.training import heads
from pipeline.training.full_model import FullModel, to_dense_head
from pipeline.training.heads.dense import DenseHead, average
from pipeline.training.open_run import TrainedRun
from pipeline.training.rows import RowSelection, stored_rows

_ROOM = 2**28  # most bytes of cached rows in memory


@dataclass(frozen=True)
class RunGroup:
    """Runs that read the same features, or a single full model, which has a backbone of its own.

    `share` is the weight of the group in the mean: its number of runs over the number of all runs. `given` are the
    backbone's weights if the user named a file, else None.
    """

    runs: tuple[TrainedRun, ...]
    share: float
    workspace: Workspace
    given: Weights | None

    @property
    def spec(self) -> FeatureSpec:
        """The specification of the features that the group's heads read."""
        return self.runs[0].spec

    def space(self) -> FeatureSpace | None:
        """Return the feature space with the cached rows of these features; None if the cache has none."""
        cache, name = self.workspace.cache, self.spec.directory
        return cache.open(name) if name in cache.names() else None

    def of_rows(self, space: FeatureSpace, keys: Sequence[bytes]) -> np.ndarray:
        """Return the mean probabilities of the runs from cached rows, (n, k) float32. Every key must have a row."""
        at = [RowSelection(np.arange(len(keys)))]
        rows = {reads: stored_rows(space, keys, reads, at)[0] for reads in {run.reads for run in self.runs}}
        return np.stack([run.predict(rows[run.reads].within(_ROOM)) for run in self.runs]).mean(axis=0)

    def network(self, precision: str | None = None) -> FullModel:
        """Return backbone and heads as one network; the default precision is the one of the features.

        Raises
        ------
        RunError
            If a head does not belong to its run.
        WeightsError
            If the backbone's weights are not on this machine, or do not fit the backbone.
        """
        if self.runs[0].full:
            return self.runs[0].network(precision)
        weights = self._weights()

        def joined(shape: tuple[int, ...]) -> DenseHead:
            return average([_stitched(run, shape) for run in self.runs])

        made = FullModel(replace(self.spec, precision=precision or self.spec.precision), joined, weights.network)
        made.load_backbone(weights.identity, weights.path)
        return made

    def _weights(self) -> Weights:
        if self.given is not None:
            return self.given
        spec, run = self.spec, self.runs[0]
        return networks.require(spec, run.network_record, run.weights, f"the run {run.name}", self.workspace)


def _stitched(run: TrainedRun, shape: tuple[int, ...]) -> DenseHead:
    with heads.of_its_run(run.path, len(run.classes), shape):
        return to_dense_head(run.head, shape, len(run.classes))


def group_runs(runs: Sequence[TrainedRun], workspace: Workspace, weights: str | None = None) -> list[RunGroup]:
    """Return the runs grouped by the features they read; `weights` is a file with the weights of a backbone.

    Raises
    ------
    DatasetError
        If a run has other classes than the first run.
    SpecError
        If this version of Icebox reads images in another way than at a run's training, or `weights` belong to no run.
    """
    found: dict[object, list[TrainedRun]] = {}
    for run in runs:
        run.require_same_classes(runs[0])
        _require_same_reading(run)
        warn_untrained(run.base)
        found.setdefault(run.path if run.full else run.spec, []).append(run)
    given = {} if weights is None else _stated(runs, workspace, weights)
    return [RunGroup(tuple(some), len(some) / len(runs), workspace, given.get(some[0].spec)) for some in found.values()]


def _require_same_reading(run: TrainedRun) -> None:
    if differing := version_differences(run.spec):
        listed = ", ".join(f"{name} {theirs}, not {ours}" for name, (theirs, ours) in differing.items())
        raise SpecError(f"the run {run.name} was trained by another version of Icebox: {listed}")


def _stated(runs: Sequence[TrainedRun], workspace: Workspace, weights: str) -> dict[FeatureSpec, Weights]:
    """Return the weights that the user named (or the user's own network), by the features they compute."""
    found, refused = dict[FeatureSpec, Weights](), list[Exception]()
    first: dict[FeatureSpec, TrainedRun] = {}
    for run in runs:
        if not run.full:
            first.setdefault(run.spec, run)
    for spec, run in first.items():
        try:
            given = networks.backbone_text(spec, weights, workspace)
        except (SpecError, UsageError, WeightsError) as error:  # the file may belong to another run
            refused.append(error)
            continue
        if given is None:
            refused.append(_others(run, weights, workspace))
        else:
            found[spec] = given
    if not found:
        names = ", ".join(run.name for run in runs)
        raise refused[0] if refused else SpecError(f"{names}: a full model has its own weights; leave out {weights}")
    return found


def _others(run: TrainedRun, weights: str, workspace: Workspace) -> SpecError:
    """Return the error for weights, or for a network of the user's own, that do not belong to a run."""
    own = run.network_record is not None
    wanted = networks.file_of(run.network_record) if own else f"{run.weights} ({run.spec.weights})"
    at_hand = networks.find(run.spec, run.network_record, workspace)
    advice = "leave it out" if at_hand else f"give that file by {'--backbone' if own else '--weights'} FILE"
    return SpecError(f"the features of {run.name} were computed with {wanted}, not with {weights}; {advice}")
