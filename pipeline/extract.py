"""Stage one, `features`: choose the feature space, plan what is missing, have it computed.

Nothing here loads TensorFlow unless rows are missing.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline import images, machine
from pipeline.backbone import BACKBONES, DEFAULT_BACKBONE, ENGINE, FrozenBackbone
from pipeline.cache.digests import Identities, identify
from pipeline.cache.index import Index
from pipeline.cache.space import FeatureSpace
from pipeline.compute import ComputeOptions, Job, check_room, compute, note_bad, refusal
from pipeline.dataset import Dataset
from pipeline.decoder import Loaded, Loader, decoding_pool, first_good, in_threads
from pipeline.errors import SpecError
from pipeline.progress import Progress
from pipeline.spec import PLAIN_VIEW, FeatureRequest, FeatureSpec, Views
from pipeline.weights import Weights, require_by_identity, resolve
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

_OFFLINE_DATASETS = ("digits",)  # for these `--weights auto` never touches the network
_DEFAULT_STORAGE = "float16"
_DEFAULT_FIT = "squash"
_CHECKED_AHEAD = 64  # images


@dataclass(frozen=True)
class FeatureChoice:
    """What the user said about the features; "auto" leaves a field to the spaces on disk, then to the machine."""

    weights: str = "auto"
    layer: str | None = None  # None: the backbone's default, or that of the space that is named
    fit: str | None = None
    precision: str = "auto"
    storage: str = "auto"
    space: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be done for a dataset; indices count its images, and a row is one view of one image."""

    todo: dict[int, list[int]]  # the first image of each key that lacks rows → the numbers of those views
    reused: int  # rows that are there
    duplicates: int  # rows of images that are copies of another image of the dataset
    quarantined: dict[int, tuple[str, str | None]]  # image → why it cannot be read or decoded, since when

    @property
    def missing(self) -> int:
        """How many rows are to be computed."""
        return sum(map(len, self.todo.values()))

    @property
    def rows(self) -> int:
        """How many rows the dataset's images have, or will have once `todo` is done."""
        return self.missing + self.reused + self.duplicates


@dataclass(frozen=True)
class Planning:
    """What a plan is made from: the images, who they are, what is known of them, in which views they are wanted."""

    dataset: Dataset
    identities: Identities
    index: Index
    max_pixels: int
    views: Views = PLAIN_VIEW

    def plan(self, space: FeatureSpace | None) -> Plan:
        """Return which rows need computing, given what `space` holds; None holds nothing."""
        first: dict[bytes, int] = {}
        for i, key in enumerate(self.identities.keys):
            if key is not None:
                first.setdefault(key, i)
        lacking = self._lacking(space, list(first))
        refused = self.index.quarantined(list(lacking), images.decoder_version(), self.max_pixels)
        todo = {first[key]: views for key, views in lacking.items() if key not in refused}
        quarantined: dict[int, tuple[str, str | None]] = {}
        copies = 0
        for i, key in enumerate(self.identities.keys):
            if key is None:
                quarantined[i] = (self.identities.unread[i], None)
            elif key in refused:
                quarantined[i] = (refused[key].reason, refused[key].since)
            else:
                copies += first[key] != i
        missing = sum(map(len, todo.values()))
        reused = (len(first) - len(refused)) * self.views.count - missing
        return Plan(dict(sorted(todo.items())), reused, copies * self.views.count, quarantined)

    def _lacking(self, space: FeatureSpace | None, keys: list[bytes]) -> dict[bytes, list[int]]:
        """Return key → the numbers of the views it has no row of, for those of `keys` that lack any."""
        lacking: dict[bytes, list[int]] = {}
        for view in self.views.numbers:
            found = space.locate(keys, [view] * len(keys)).found if space else np.zeros(len(keys), bool)
            for at in np.flatnonzero(~found).tolist():
                lacking.setdefault(keys[at], []).append(view)
        return lacking

    def meet_undecodable(self, space: FeatureSpace | None) -> Plan:
        """Return the plan after decoding images that lack rows until one can be decoded; those before it are
        quarantined.

        So neither TensorFlow is loaded nor is anything demanded when what lacks rows can have none, as after the
        index, which remembers the quarantine, was lost.
        """
        plan = self.plan(space)
        if not plan.todo:
            return plan
        fit = space.spec.fit if space else _DEFAULT_FIT
        with Loader(self.dataset, BACKBONES[DEFAULT_BACKBONE].input_size, fit, self.max_pixels) as loader:
            first_good(loader, plan.todo, self._note_bad)
        return self.plan(space)

    def try_to_decode(self, some: Iterable[int], fit: str, progress: Progress) -> None:
        """Decode these images, to know which of them cannot be."""
        some = list(some)
        size = BACKBONES[DEFAULT_BACKBONE].input_size
        with (
            Loader(self.dataset, size, fit, self.max_pixels) as loader,
            decoding_pool() as pool,
            progress("checking images", len(some)) as advance,
        ):
            for image in in_threads(pool, loader, some, ahead=_CHECKED_AHEAD):
                if image.pixels is None:
                    self._note_bad(image)
                advance(1)

    def _note_bad(self, bad: Loaded) -> None:
        note_bad(bad, self.dataset, self.identities, self.index, self.max_pixels)


@dataclass(frozen=True)
class Quarantined:
    """An image without a row, by the name people know it under, and why. Names may repeat in a manifest.

    `since` is when its content was first refused (ISO 8601, UTC); None if it could not be read, which is not kept.
    """

    path: str
    reason: str
    since: str | None = None


@dataclass(frozen=True)
class Extraction:
    """What `features` did; rows = computed + reused + duplicates = views x (images - quarantined)."""

    images: int
    computed: int
    reused: int
    duplicates: int
    quarantined: list[Quarantined]
    compute_seconds: float  # from the first batch asked of the model to the last shard published
    space: FeatureSpace | None  # None if nothing was computed ever

    @property
    def rows(self) -> int:
        """Images that have features, times their views."""
        return self.computed + self.reused + self.duplicates


def extract(
    dataset: Dataset,
    workspace: Workspace,
    choice: FeatureChoice,
    options: ComputeOptions,
    *,
    views: Views = PLAIN_VIEW,
    retry_failed: bool = False,
) -> Extraction:
    """Make sure that every image of `dataset` that can be decoded has its rows, computing only what is missing.

    Raises
    ------
    IceboxError
        If the weights, the layer or the space cannot be had, or the cache cannot be written.
    DecodeError
        With `options.strict`, at the first image that cannot be read or decoded.
    """
    cache = workspace.cache
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, cache.index, advance)
    if retry_failed:
        cache.index.forget_quarantined([key for key in identities.keys if key is not None])
    space, weights = find_space(workspace, choice, identities, views)
    planning = Planning(dataset, identities, cache.index, options.max_pixels, views)
    plan = planning.meet_undecodable(space)
    if options.strict:
        _refuse_bad(dataset, plan)
    before, seconds = plan.reused, 0.0
    if plan.todo:
        source = _Source(planning, choice, weights)
        space, before, plan, seconds = _compute_missing(source, workspace, space, options, plan.missing)
    if space is not None:
        warn_untrained(space.spec)
    failed = name_quarantined(dataset, plan)
    return Extraction(len(dataset), plan.reused - before, before, plan.duplicates, failed, seconds, space)


@dataclass(frozen=True)
class _Source:
    """What is to be computed, and as what."""

    planning: Planning
    choice: FeatureChoice
    weights: Weights | None


def _compute_missing(
    source: _Source, workspace: Workspace, space: FeatureSpace | None, options: ComputeOptions, count: int
) -> tuple[FeatureSpace, int, Plan, float]:
    """Compute what is missing, alone in the space; return it, the rows there before, the last plan, the seconds."""
    cache, planning = workspace.cache, source.planning
    weights = source.weights or weights_of(space, planning.dataset, workspace)
    spec = space.spec if space else new_spec(source.choice, weights)
    warn_untrained(spec)
    if space is None:
        # Made only after the weights turned out to fit: a mistake in an option leaves no empty space behind.
        backbone = _load(spec, weights, options)
        space = cache.create(spec, {**_made_by(weights, options), "row_shape": list(backbone.row_shape)})
    else:
        backbone = None
        logger.info("adding to the feature space %s", space.name)
        check_room(space, count)
    with space.lock(_waiting):
        space.remove_leftovers()
        plan = planning.plan(space)
        before = plan.reused
        if not plan.todo:  # whoever held the lock has computed it all
            return space, before, plan, 0.0
        backbone = backbone or _load(spec, weights, options)
        progress = workspace.progress
        job = Job(
            planning.dataset, planning.identities, space, backbone, cache.index, options, progress, planning.views
        )
        plan, seconds = _compute_all(planning, job)
    return space, before, plan, seconds


def _load(spec: FeatureSpec, weights: Weights, options: ComputeOptions) -> FrozenBackbone:
    logger.info("loading TensorFlow and %s", spec.backbone)
    return FrozenBackbone(spec, weights.path, min(options.batch_size, options.shard_rows))


def _refuse_bad(dataset: Dataset, plan: Plan) -> None:
    if bad := name_quarantined(dataset, plan):
        raise refusal(bad[0].path, bad[0].reason, more=len(bad) - 1)


def name_quarantined(dataset: Dataset, plan: Plan) -> list[Quarantined]:
    """Return the quarantined images in the dataset's order."""
    return [Quarantined(dataset.names[i], *why) for i, why in sorted(plan.quarantined.items())]


def _compute_all(planning: Planning, job: Job) -> tuple[Plan, float]:
    """Compute until nothing is missing; return the plan that says so and the seconds it took.

    One pass is enough unless a file changes after it was hashed: its former copies may then lack a row.
    """
    seconds = 0.0
    while (plan := planning.plan(job.space)).todo:
        seconds += compute(job, plan.todo)
    return plan, seconds


def _waiting(holder: str) -> None:
    logger.warning("waiting: %s is writing to this feature space", holder)


def find_space(
    workspace: Workspace, choice: FeatureChoice, identities: Identities, views: Views = PLAIN_VIEW
) -> tuple[FeatureSpace | None, Weights | None]:
    """Return the space on disk that `choice` means, if there is one, and the weights if they were stated.

    Left to itself, it is the one that holds most of the rows, in `views`.

    Raises
    ------
    SpecError
        If the space that `choice.space` names differs from what else was stated.
    """
    cache, weights = workspace.cache, None
    if choice.weights != "auto":
        weights = resolve(
            choice.weights, DEFAULT_BACKBONE, workspace.downloads, cache.index, progress=workspace.progress
        )
    request = request_of(choice, weights)
    if choice.space is None:
        keys = list({key for key in identities.keys if key is not None})
        return cache.choose(request, keys, views.numbers), weights
    space = cache.open(choice.space)
    if differing := request.differences(space.spec):
        pairs = ", ".join(f"{name} is {getattr(space.spec, name)}" for name in differing)
        raise SpecError(f"the space {space.name} is not the one asked for: {pairs}")
    return space, weights


def warn_untrained(spec: FeatureSpec) -> None:
    """Say it loudly when features come from weights that were never trained."""
    if spec.untrained:
        logger.warning(
            "the backbone's weights are UNTRAINED: fine for trying Icebox out, no basis for judging your images"
        )


def request_of(choice: FeatureChoice, weights: Weights | None) -> FeatureRequest:
    """Return the fields of a spec that were stated."""
    named = choice.space is not None  # a space named outright need agree only with what was said beside it
    row = BACKBONES[DEFAULT_BACKBONE]
    return FeatureRequest(
        backbone=row.name,
        layer=choice.layer if named else _layer(choice),
        fit=choice.fit if named else _fit(choice),
        decode=images.DECODE_POLICY,
        resize=images.RESIZE_POLICY,
        input_size=row.input_size,
        scaling=row.scaling,
        engine=ENGINE,
        weights=weights.identity if weights else None,
        precision=None if choice.precision == "auto" else choice.precision,
        storage=None if choice.storage == "auto" else choice.storage,
    )


def _layer(choice: FeatureChoice) -> str:
    return choice.layer or BACKBONES[DEFAULT_BACKBONE].default_layer


def _fit(choice: FeatureChoice) -> str:
    return choice.fit or _DEFAULT_FIT


def new_spec(choice: FeatureChoice, weights: Weights) -> FeatureSpec:
    """Return the space that a choice means where none on disk agrees with it."""
    row = BACKBONES[DEFAULT_BACKBONE]
    return FeatureSpec(
        backbone=row.name,
        weights=weights.identity,
        layer=_layer(choice),
        input_size=row.input_size,
        decode=images.DECODE_POLICY,
        resize=images.RESIZE_POLICY,
        fit=_fit(choice),
        scaling=row.scaling,
        precision=machine.best_precision() if choice.precision == "auto" else choice.precision,
        engine=ENGINE,
        storage=_DEFAULT_STORAGE if choice.storage == "auto" else choice.storage,
    )


def weights_of(space: FeatureSpace | None, dataset: Dataset, workspace: Workspace) -> Weights:
    """Return the weights for computing when none were stated: those of the space, or what `auto` means."""
    if space is None:
        offline = dataset.name in _OFFLINE_DATASETS
        index, progress = workspace.cache.index, workspace.progress
        return resolve("auto", DEFAULT_BACKBONE, workspace.downloads, index, offline=offline, progress=progress)
    label = space.provenance.get("weights", "weights")
    return require_by_identity(space.spec.weights, label, f"the space {space.name}", space.spec.backbone, workspace)


def _made_by(weights: Weights, options: ComputeOptions) -> dict[str, Any]:
    packages = ("icebox", "tensorflow", "keras", "opencv-python", "pillow", "h5py", "hdf5plugin", "numpy")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": weights.label,
        "cpu": machine.look().cpu,
        "batch_size": min(options.batch_size, options.shard_rows),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
