"""What published runs say of images, together: the mean of their probabilities.

Runs that read the same features are one network with several heads, so that the backbone works once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from pipeline import images
from pipeline.backbone import BACKBONES, DEFAULT_BACKBONE, ENGINE, KerasModel, import_keras
from pipeline.cache.space import FeatureSpace
from pipeline.errors import IceboxError, RunError, SpecError
from pipeline.heads.dense import DenseHead, average
from pipeline.network import Network, stitched
from pipeline.rows import Wanted, stored_rows
from pipeline.spec import FeatureSpec
from pipeline.trained import TrainedRun
from pipeline.weights import Weights, require_by_identity, resolve
from pipeline.workspace import Workspace

_ROOM = 2**28  # bytes that cached rows may take in memory

Answerer = Callable[[np.ndarray], np.ndarray]  # pixels (n, size, size, 3) uint8 RGB → probabilities (n, k) float32


@dataclass(frozen=True)
class Group:
    """Runs that read the same features, or a full model, which has a backbone of its own."""

    runs: tuple[TrainedRun, ...]

    @property
    def full(self) -> bool:
        """Whether it is a full model."""
        return self.runs[0].full

    @property
    def spec(self) -> FeatureSpec:
        """The features that its heads read."""
        return self.runs[0].spec

    def space(self, workspace: Workspace) -> FeatureSpace | None:
        """Return the cached rows of these features, if there are any."""
        name = self.spec.directory
        return workspace.cache.open(name) if name in workspace.cache.names() else None

    def of_rows(self, space: FeatureSpace, keys: Sequence[bytes]) -> np.ndarray:
        """Return what the runs say on average of images by their rows, (n, k) float32. All must have one."""
        said = [self._of_rows(run, space, keys) for run in self.runs]
        return np.stack(said).mean(axis=0)

    def _of_rows(self, run: TrainedRun, space: FeatureSpace, keys: Sequence[bytes]) -> np.ndarray:
        (rows,) = stored_rows(space, keys, run.reads, [Wanted(np.arange(len(keys)))])
        try:
            said = run.head.predict(rows.within(_ROOM))
        except ValueError as error:
            if isinstance(error, IceboxError):
                raise
            raise _of_another_run(run, rows.shape[1:]) from error
        if said.shape[1] != len(run.classes):
            raise _of_another_run(run, rows.shape[1:])
        return require_numbers(said)

    def network(self, weights: Weights | None, precision: str | None = None) -> Network:
        """Return backbone and heads as one network, in the precision of the features if no other is given.

        `weights` are those of the features; a full model has its own and needs none.

        Raises
        ------
        RunError
            If a head is not of its run.
        WeightsError
            If the weights do not fit.
        """
        first = self.runs[0]
        if self.full:
            loaded = Network.load(first.path, first.spec, precision)
            if loaded.model.output_shape[-1] != len(first.classes):
                raise _of_another_run(first, loaded.below.output_shape[1:])
            return loaded
        if weights is None:
            raise ValueError("heads need the weights that their features were computed with")

        def joined(shape: tuple[int, ...]) -> DenseHead:
            return average([_stitched(run, shape) for run in self.runs])

        made = Network(replace(self.spec, precision=precision or self.spec.precision), joined)
        made.load_backbone(weights.identity, weights.path)
        return made


def _stitched(run: TrainedRun, shape: tuple[int, ...]) -> DenseHead:
    try:
        return stitched(run.head, shape, len(run.classes))
    except ValueError as error:
        if isinstance(error, IceboxError):
            raise
        raise _of_another_run(run, shape) from error


def _of_another_run(run: TrainedRun, shape: tuple[int, ...]) -> RunError:
    rows = "x".join(map(str, shape))
    return RunError(
        f"the head in {run.path} does not tell {len(run.classes)} classes apart by rows of {rows}: it is of another run"
    )


def grouped(runs: Sequence[TrainedRun]) -> list[Group]:
    """Return the runs by what they read.

    Raises
    ------
    DatasetError
        If they know other classes than the first.
    SpecError
        If one was trained on images that were read in another way than this version does.
    """
    found: dict[object, list[TrainedRun]] = {}
    for run in runs:
        run.require_classes(runs[0].classes)
        _require_same_reading(run)
        found.setdefault(run.path if run.full else run.spec, []).append(run)
    return [Group(tuple(some)) for some in found.values()]


def _require_same_reading(run: TrainedRun) -> None:
    row = BACKBONES[DEFAULT_BACKBONE]
    ours = {
        "backbone": row.name,
        "decode": images.DECODE_POLICY,
        "resize": images.RESIZE_POLICY,
        "input_size": row.input_size,
        "scaling": row.scaling,
        "engine": ENGINE,
    }
    theirs = asdict(run.spec)
    if differing := [f"{name} {theirs[name]}, not {mine}" for name, mine in ours.items() if theirs[name] != mine]:
        raise SpecError(f"the run {run.name} was trained by another version of Icebox: {', '.join(differing)}")


def stated_weights(groups: Sequence[Group], workspace: Workspace, stated: str | None) -> Weights | None:
    """Return the weights that were stated. Raises SpecError if they belong to none of the runs."""
    if stated is None:
        return None
    index, progress = workspace.cache.index, workspace.progress
    given = resolve(stated, DEFAULT_BACKBONE, workspace.downloads, index, progress=progress)
    if all(group.full or group.spec.weights != given.identity for group in groups):
        names = ", ".join(run.name for group in groups for run in group.runs)
        raise SpecError(f"the features of {names} were computed with other weights than {stated}; leave out --weights")
    return given


def weights_of(group: Group, workspace: Workspace, given: Weights | None) -> Weights | None:
    """Return the weights of a group's backbone: those stated, or found on this machine; None of a full model.

    Raises
    ------
    WeightsError
        If they are not there.
    """
    spec, run = group.spec, group.runs[0]
    if group.full or (given is not None and given.identity == spec.weights):
        return None if group.full else given
    return require_by_identity(spec.weights, run.weights, f"the run {run.name}", spec.backbone, workspace)


def compiled(model: KerasModel, size: int) -> Answerer:
    """Return `Network.on_pixels` as a function, compiled once for any number of images."""
    import_keras()
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)])
    def run(pixels: tf.Tensor) -> tf.Tensor:
        return tf.cast(model(pixels, training=False), tf.float32)

    return lambda pixels: require_numbers(run(tf.constant(pixels)).numpy())


def require_numbers(said: np.ndarray) -> np.ndarray:
    """Return probabilities. Raises IceboxError if one of them is NaN or infinite."""
    if not np.isfinite(said).all():
        raise IceboxError("the model's answers are not numbers (NaN or infinite): it overflows in its precision")
    return said
