"""Stage one, `features`: choose the feature space, plan what is missing, have it computed.

Nothing here loads TensorFlow unless rows are missing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pipeline import images, machine
from pipeline.backbone.frozen import ENGINE, ENGINES
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
from pipeline.backbone.weights import Weights, anchored, by_digest, require_by_identity, resolve
from pipeline.cache.digests import Identities, identify, read_some
from pipeline.cache.keys import Keys
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cluster import ClusterChoice
from pipeline.compute import (
    ComputeOptions,
    Crew,
    Effort,
    Here,
    Job,
    batch_of,
    compute,
    most_to_try,
    refusal,
    require_memory,
)
from pipeline.dataset import Dataset, remote
from pipeline.errors import InterruptedComputationError, SpecError
from pipeline.keras_start import import_keras
from pipeline.planning import DEFAULT_FIT, Plan, Planning, Quarantined, name_quarantined, warn_dark
from pipeline.shard_task import Setup, ShardWorker, check_room
from pipeline.spec import PLAIN_VIEW, FeatureRequest, FeatureSpec, Views
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

_DEFAULT_STORAGE = "float16"


@dataclass(frozen=True)
class FeatureChoice:
    """What the user said about the features; "auto" leaves a field to the spaces on disk, then to the machine."""

    weights: str = "auto"
    layer: str | None = None  # None: the backbone's default, or that of the space that is named
    fit: str | None = None
    precision: str = "auto"
    storage: str = "auto"
    space: str | None = None
    depth: int | None = None  # bits of 16-bit channels; None: 16, or that of the space that is named

    def anchored(self) -> Self:
        """Return the same with an absolute path of the weights, so that it means the same from anywhere."""
        return replace(self, weights=anchored(self.weights))


@dataclass(frozen=True)
class Extraction:
    """What `features` did; rows = computed + reused + duplicates = views x (images - quarantined)."""

    images: int
    computed: int
    reused: int
    duplicates: int
    quarantined: list[Quarantined]
    effort: Effort
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
    cluster: ClusterChoice | None = None,
) -> Extraction:
    """Make sure that every image of `dataset` that can be decoded has its rows, computing only what is missing.

    The work is done in this process, or by the workers that `cluster` names.

    Raises
    ------
    IceboxError
        If the weights, the layer or the space cannot be had, or the cache cannot be written.
    DecodeError
        With `options.strict`, at the first image that cannot be read or decoded.
    """
    cache = workspace.cache
    load = _Early(cache) if cluster is None else lambda keys: None
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, cache.index, advance, read_unseen=False, much_to_hash=load)
    if cluster is None:  # else workers fetch what is behind addresses, and nobody else
        read_some(dataset, identities)
    if retry_failed:
        cache.index.forget_quarantined(key for key in identities.keys if key is not None)
    space, weights = find_space(workspace, choice, identities, views)
    planning = Planning(dataset, identities, cache.index, options.max_pixels, views)
    unseen = cluster is not None and identities.unseen
    plan = planning.plan(space) if unseen else planning.meet_undecodable(space)
    if options.strict:
        _refuse_bad(dataset, plan)
    before, effort = plan.reused, Effort()
    if plan.todo:
        source = _Source(planning, choice, weights, options, cluster)
        try:
            space, before, plan, effort = _compute_missing(source, workspace, space, plan.missing)
        except KeyboardInterrupt as stop:
            stop.add_note("features computed so far are kept, and the same command computes the rest")
            raise
    if space is not None:
        warn_untrained(space.spec)
        warn_dark(effort.peak, images.depth_of(space.spec.decode))
    failed = name_quarantined(dataset, plan)
    return Extraction(len(dataset), plan.reused - before, before, plan.duplicates, failed, effort, space)


LOADING = "loading TensorFlow"  # the name of the thread


class _Early:
    """Loads TensorFlow while many files are hashed that were never seen: one core of several does both at once.

    Not if some of the first of them are known images after all, as where a folder was moved, or the cache came from
    elsewhere: then perhaps nothing is missing.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._decided = False

    def __call__(self, keys: Keys) -> None:
        if self._decided:
            return
        self._decided, some = True, keys.grouped().first
        index = self._cache.index
        if not any(index.has_any(space.name, keys.digests, some, 0) for space in self._cache.spaces()):
            # `cli.py` does not wait for it if it has come to an end without.
            threading.Thread(target=_try_to_load, name=LOADING).start()


def _try_to_load() -> None:
    with suppress(Exception):  # whoever needs TensorFlow meets it again, and says it
        import_keras()


@dataclass(frozen=True)
class _Source:
    """What is to be computed, and as what, and by whom."""

    planning: Planning
    choice: FeatureChoice
    weights: Weights | None
    options: ComputeOptions
    cluster: ClusterChoice | None


def _compute_missing(
    source: _Source, workspace: Workspace, space: FeatureSpace | None, count: int
) -> tuple[FeatureSpace, int, Plan, Effort]:
    """Compute what is missing, alone in the space; return it, the rows there before, the last plan, what it took."""
    cache, planning, options, effort = workspace.cache, source.planning, source.options, Effort()
    weights = (source.weights or weights_of(space, planning.dataset, workspace)).require()
    spec = space.spec if space else new_spec(source.choice, weights)
    if space is None and spec.directory in cache.names():  # made for other images, or by a run killed early
        space = cache.open(spec.directory)
    if space is None:
        cache.index.require_writable()  # before TensorFlow and weights are loaded for nothing
    warn_untrained(spec)
    setup = _setup(source, spec, weights, space, cache.root)
    with ExitStack() as stack:
        crew = None
        if space is None:
            # Made only after the weights turned out to fit: a mistake in an option leaves no empty space behind.
            crew = stack.enter_context(_crew(setup, source, effort, count, new=True))
            space = cache.create(spec, {**_made_by(weights, crew), "row_shape": list(crew.row_shape)})
        else:
            logger.info("adding to the feature space %s", space.name)
            totals = space.totals()
            check_room(setup.directory, count, totals.bytes / totals.rows if totals.rows else 0)
        with space.lock(_waiting):
            space.require_writable()
            space.remove_leftovers()
            plan = planning.plan(space)
            before, rows = plan.reused, space.totals().rows
            if not plan.todo:  # whoever held the lock has computed it all
                return space, before, plan, effort
            crew = crew or stack.enter_context(_crew(setup, source, effort, plan.missing, new=False))
            shard_rows = options.task_rows(crew.batch_size)
            if source.cluster is None or source.cluster.scheduler is None:  # whose workers have memory of their own
                require_memory(min(shard_rows, plan.missing), crew.row_shape, spec, crew.size)
            job = Job(
                planning.dataset,
                planning.identities,
                space,
                cache.index,
                setup,
                shard_rows,
                workspace.progress,
                effort,
            )
            plan = _compute_all(planning, plan, job, crew)
            # More than were known to be there may have turned out to be, of images that nobody had read.
            return space, max(before, plan.reused - (space.totals().rows - rows)), plan, effort


def _setup(source: _Source, spec: FeatureSpec, weights: Weights, space: FeatureSpace | None, root: Path) -> Setup:
    options = source.options
    return Setup(
        spec,
        weights.path and weights.path.absolute(),
        options.model_batch(batch_of(space), of_cluster=source.cluster is not None),
        (root / spec.directory / "shards").absolute(),
        options.max_pixels,
        source.planning.views,
        options.strict,
        remote.connections(),
    )


@contextmanager
def _crew(setup: Setup, source: _Source, effort: Effort, rows: int, new: bool) -> Iterator[Crew]:
    """Give whoever computes `rows` rows, of a `new` space or not: this process, or the workers of a cluster."""
    if source.cluster is not None:
        from pipeline.fleet import fleet

        choice = source.cluster.at_most(-(-rows // setup.batch_size))
        with fleet(choice, setup, source.planning.dataset, effort) as crew:
            yield crew
        return
    logger.info("loading TensorFlow and %s", setup.spec.backbone)
    with ShardWorker(setup, source.options.threads) as worker:
        if source.options.batch_size is None and new:
            worker.choose_batch(rows, min(source.options.shard_rows, most_to_try()))
        yield Here(worker, effort)


def _refuse_bad(dataset: Dataset, plan: Plan) -> None:
    if bad := name_quarantined(dataset, plan):
        raise refusal(bad[0].path, bad[0].reason, more=len(bad) - 1)


def _compute_all(planning: Planning, plan: Plan, job: Job, crew: Crew) -> Plan:
    """Compute until nothing is missing; return the plan that says so.

    One pass is enough unless a file changes after it was hashed: its former copies may then lack a row.
    """
    while plan.todo:
        try:
            compute(job, plan.todo.images, plan.todo.views, crew)
        except InterruptedComputationError as error:
            error.recover()
            job.space.sync()  # what was published meanwhile is not computed again
        plan = planning.plan(job.space)
    return plan


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
    if choice.weights.startswith("sha256:"):  # the file is not needed where nothing is computed
        weights = by_digest(choice.weights, DEFAULT_BACKBONE, workspace.downloads, cache.index)
    elif choice.weights != "auto":
        weights = resolve(
            choice.weights, DEFAULT_BACKBONE, workspace.downloads, cache.index, progress=workspace.progress
        )
    request = request_of(choice, weights)
    if choice.space is None:
        return cache.choose(request, identities.keys, views.numbers), weights
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
    any_depth = named and choice.depth is None
    row = BACKBONES[DEFAULT_BACKBONE]
    return FeatureRequest(
        backbone=row.name,
        layer=choice.layer if named else _layer(choice),
        fit=choice.fit if named else _fit(choice),
        decode=tuple(images.DECODE_POLICIES) if any_depth else images.decode_policy(choice.depth),
        resize=images.RESIZE_POLICY,
        input_size=row.input_size,
        scaling=row.scaling,
        engine=ENGINES,
        weights=weights.identity if weights else None,
        precision=None if choice.precision == "auto" else choice.precision,
        storage=None if choice.storage == "auto" else choice.storage,
    )


def _layer(choice: FeatureChoice) -> str:
    return choice.layer or BACKBONES[DEFAULT_BACKBONE].default_layer


def _fit(choice: FeatureChoice) -> str:
    return choice.fit or DEFAULT_FIT


def new_spec(choice: FeatureChoice, weights: Weights) -> FeatureSpec:
    """Return the space that a choice means where none on disk agrees with it."""
    row = BACKBONES[DEFAULT_BACKBONE]
    return FeatureSpec(
        backbone=row.name,
        weights=weights.identity,
        layer=_layer(choice),
        input_size=row.input_size,
        decode=images.decode_policy(choice.depth),
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
        index, progress = workspace.cache.index, workspace.progress
        return resolve(
            "auto", DEFAULT_BACKBONE, workspace.downloads, index, offline=dataset.embedded, progress=progress
        )
    label = space.provenance.get("weights", "weights")
    return require_by_identity(space.spec.weights, label, f"the space {space.name}", space.spec.backbone, workspace)


def _made_by(weights: Weights, crew: Crew) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": weights.label,
        "cpu": machine.look().cpu,
        "gpus": machine.gpu_count(),
        "batch_size": crew.batch_size,
        "versions": machine.versions((*machine.FEATURE_PACKAGES, "numpy")),
    }
