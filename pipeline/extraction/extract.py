"""Stage one, the command `features`: choose the feature space, plan which rows are missing, and compute them.

`extract` does all of it. TensorFlow is loaded only if rows are missing, or if many files are new.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.backbone import source as networks
from pipeline.backbone.keras_start import import_keras
from pipeline.backbone.weights import Weights
from pipeline.cache.digests import identify, read_some
from pipeline.cache.index import Index
from pipeline.cache.keys import Keys
from pipeline.cache.shard import SHARD_BYTES
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import InterruptedComputationError
from pipeline.core.spec import PLAIN_VIEW, FeatureSpec, Views
from pipeline.dataset import Dataset, remote
from pipeline.extraction import measured_rates
from pipeline.extraction.compute import (
    DEFAULT_SHARD_ROWS,
    ComputeOptions,
    ComputeStats,
    Job,
    LocalPool,
    WorkerPool,
    batch_of,
    compute,
    largest_batch_to_try,
    require_memory,
    row_bytes,
    strict_error,
)
from pipeline.extraction.feature_choice import (
    FeatureChoice,
    ResolvedChoice,
    find_space,
    resolve_choice,
    warn_untrained,
    weights_for,
)
from pipeline.extraction.planning import Plan, Planning, Quarantined, name_quarantined, warn_dark
from pipeline.extraction.shard_task import ShardWorker, TaskSetup, check_room
from pipeline.extraction.workers.connect import ClusterChoice
from pipeline.images import decoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`, in rows: computed + reused + duplicates = views x (images - quarantined)."""

    images: int
    computed: int
    reused: int
    duplicates: int
    quarantined: list[Quarantined]
    stats: ComputeStats
    space: FeatureSpace | None  # None if no row was ever computed

    @property
    def rows(self) -> int:
        """The number of rows of the dataset: one for each image that has features, in each view."""
        return self.computed + self.reused + self.duplicates


def extract(
    dataset: Dataset,
    workspace: Workspace,
    choice: FeatureChoice | ResolvedChoice,
    options: ComputeOptions,
    *,
    views: Views = PLAIN_VIEW,
    retry_failed: bool = False,
    cluster: ClusterChoice | None = None,
) -> Extraction:
    """Compute the missing rows of `dataset`, so that every image that can be decoded has a row in each view.

    Rows are computed in this process, or by the workers of `cluster`. `retry_failed` retries undecodable images.

    Raises
    ------
    IceboxError
        If the weights, the layer or the space are not available, or the cache cannot be written.
    DecodeError
        With `options.strict`, at the first image that cannot be read or decoded.
    """
    cache = workspace.cache
    load = _Early(cache) if cluster is None else lambda keys: None
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, cache.index, advance, read_unseen=False, much_to_hash=load)
    if cluster is None:  # else only the workers fetch remote images
        read_some(dataset, identities)
    if retry_failed:
        cache.index.forget_quarantined(key for key in identities.keys if key is not None)
    resolved = choice if isinstance(choice, ResolvedChoice) else resolve_choice(workspace, choice)
    space = find_space(workspace, resolved, identities, views)
    planning = Planning(dataset, identities, cache.index, options.max_pixels, views)
    unseen = cluster is not None and identities.unseen
    plan = planning.plan(space) if unseen else planning.meet_undecodable(space)
    if options.strict:
        _refuse_bad(dataset, plan)
    before, stats = plan.reused, ComputeStats()
    if plan.todo:
        source = _Source(planning, resolved, options, cluster)
        try:
            space, before, plan, stats = _compute_missing(source, workspace, space, plan.missing)
        except KeyboardInterrupt as stop:
            stop.add_note("features computed so far are kept, and the same command computes the rest")
            raise
        _keep_rate(workspace, space.spec, plan.reused - before, stats, cluster)
    if space is not None:
        warn_untrained(space.spec)
        warn_dark(stats.peak, decoding.depth_of(space.spec.decode))
    failed = name_quarantined(dataset, plan)
    return Extraction(len(dataset), plan.reused - before, before, plan.duplicates, failed, stats, space)


_TELLING_ROWS = 64  # or those of `_TELLING_S` seconds: over fewer, the first and last batch distort the rate
_TELLING_S = 10.0


def _keep_rate(
    workspace: Workspace, spec: FeatureSpec, computed: int, stats: ComputeStats, cluster: ClusterChoice | None
) -> None:
    """Store the rate at which this machine computed rows, if it computed them itself, and enough of them."""
    elsewhere = cluster is not None and cluster.scheduler is not None
    if computed > 0 and not elsewhere and (computed >= _TELLING_ROWS or stats.seconds >= _TELLING_S):
        measured_rates.remember(workspace, spec, computed / stats.seconds, computed)


LOADING = "loading TensorFlow"  # the name of the thread, by which `cli.py` finds it


class _Early:
    """Starts to load TensorFlow in a thread while many new files are still being hashed.

    `identify` calls it with the keys of the first new files. If one of these has a row, TensorFlow is not loaded:
    the folder or the cache was moved, and perhaps no row is missing.
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
            # `cli.py` does not wait for this thread if the command ends earlier.
            threading.Thread(target=_try_to_load, name=LOADING).start()


def _try_to_load() -> None:
    with suppress(Exception):  # the code that needs TensorFlow raises the same error again
        import_keras()


@dataclass(frozen=True)
class _Source:
    """The arguments of a computation: the planning, the feature choice, its options, and the workers."""

    planning: Planning
    resolved: ResolvedChoice
    options: ComputeOptions
    cluster: ClusterChoice | None


def _compute_missing(
    source: _Source, workspace: Workspace, space: FeatureSpace | None, count: int
) -> tuple[FeatureSpace, int, Plan, ComputeStats]:
    """Compute missing rows under the space's lock; return the space, its rows before, the last plan and the stats."""
    cache, planning, options, stats = workspace.cache, source.planning, source.options, ComputeStats()
    weights = weights_for(source.resolved, space, planning.dataset, workspace)
    spec = space.spec if space else source.resolved.new_spec(weights)
    if space is None and spec.directory in cache.names():  # created for other images, or by a run killed early
        space = cache.open(spec.directory)
    if space is None:
        cache.index.require_writable()  # else TensorFlow and weights would be loaded for nothing
    warn_untrained(spec)
    setup = _setup(source, spec, weights, space, cache.root)
    with ExitStack() as stack:
        pool = None
        if space is None:
            # Created only after the weights are loaded: a mistake in an option leaves no empty space behind.
            pool = stack.enter_context(_crew(setup, source, stats, count, new=True))
            space = cache.create(spec, {**_made_by(weights, pool, cache.index), "row_shape": list(pool.row_shape)})
        else:
            logger.info("adding to the feature space %s", space.name)
            check_room(setup.directory, count, space.totals().bytes_per_row or 0)
        with space.lock(_waiting):
            space.require_writable()
            space.remove_leftovers()
            plan = planning.plan(space)
            before, rows = plan.reused, space.totals().rows
            if not plan.todo:  # another process, which held the lock, has computed all rows
                return space, before, plan, stats
            pool = pool or stack.enter_context(_crew(setup, source, stats, plan.missing, new=False))
            shard_rows = options.task_rows(pool.batch_size, row_bytes(pool.row_shape, spec))
            if source.cluster is None or source.cluster.scheduler is None:  # else workers may be elsewhere
                require_memory(min(shard_rows, plan.missing), pool.row_shape, spec, pool.size)
            job = Job(
                planning.dataset,
                planning.identities,
                space,
                cache.index,
                setup,
                shard_rows,
                workspace.progress,
                stats,
            )
            plan = _compute_all(planning, plan, job, pool)
            # Remote images with unknown hashes may turn out to have rows, which `before` does not count.
            return space, max(before, plan.reused - (space.totals().rows - rows)), plan, stats


def _setup(source: _Source, spec: FeatureSpec, weights: Weights, space: FeatureSpace | None, root: Path) -> TaskSetup:
    options = source.options
    return TaskSetup(
        spec,
        weights.path and weights.path.absolute(),
        options.model_batch(batch_of(space), of_cluster=source.cluster is not None),
        (root / spec.directory / "shards").absolute(),
        options.max_pixels,
        source.planning.views,
        options.strict,
        remote.connections(),
        weights.network and weights.network.absolute(),
        None if options.batch_size or batch_of(space) else SHARD_BYTES,
    )


@contextmanager
def _crew(setup: TaskSetup, source: _Source, stats: ComputeStats, rows: int, new: bool) -> Iterator[WorkerPool]:
    """Give the pool that computes `rows` rows: this process, which chooses the batch of a `new` space, or a cluster."""
    if source.cluster is not None:
        from pipeline.extraction.workers.pool import open_dask_pool

        choice = source.cluster.at_most(-(-rows // setup.batch_size))
        with open_dask_pool(choice, setup, source.planning.dataset, stats) as pool:
            yield pool
        return
    logger.info("loading TensorFlow and %s", source.resolved.source.label)
    with ShardWorker(setup, source.options.threads) as worker:
        if source.options.batch_size is None and new:
            worker.choose_batch(rows, min(source.options.shard_rows or DEFAULT_SHARD_ROWS, largest_batch_to_try()))
        yield LocalPool(worker, stats)


def _refuse_bad(dataset: Dataset, plan: Plan) -> None:
    if bad := name_quarantined(dataset, plan):
        raise strict_error(bad[0].path, bad[0].reason, more=len(bad) - 1)


def _compute_all(planning: Planning, plan: Plan, job: Job, pool: WorkerPool) -> Plan:
    """Compute until no row is missing; return the last plan, which has none to compute.

    One pass is enough unless a file changes after it was hashed: copies of its former content may then lack a row.
    """
    while plan.todo:
        try:
            compute(job, plan.todo.images, plan.todo.views, pool)
        except InterruptedComputationError as error:
            error.recover()
            job.space.sync()  # shards published meanwhile are not computed again
        plan = planning.plan(job.space)
    return plan


def _waiting(holder: str) -> None:
    logger.warning("waiting: %s is writing to this feature space", holder)


def _made_by(weights: Weights, pool: WorkerPool, index: Index) -> dict[str, Any]:
    recorded = networks.record(weights, index)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": weights.label,
        "cpu": machine.inspect_machine().cpu,
        "gpus": machine.gpu_count(),
        "batch_size": pool.batch_size,
        "versions": machine.versions((*machine.FEATURE_PACKAGES, "numpy")),
        **({"network": recorded} if recorded else {}),
    }
