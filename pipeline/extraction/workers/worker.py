"""The functions that Dask workers run: `check_worker` checks the worker process, `run_task` runs a shard task."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.backbone import own
from pipeline.core import files, machine
from pipeline.core.errors import SpecError, UnfitWorkerError, UsageError, WeightsError
from pipeline.dataset import remote
from pipeline.extraction.shard_task import (
    KnownRows,
    ShardResult,
    ShardTask,
    ShardWorker,
    TaskSetup,
    There,
    no_known_rows,
)


@dataclass(frozen=True)
class Requirements:
    """What a worker must have to do the work; picklable.

    Parameters
    ----------
    setup
        What all tasks share.
    versions
        Package → version, None if the package is not installed. The worker must have the same.
    samples
        Image files that the worker must be able to read.
    urls
        One address of each kind in the dataset (https, s3, …). The worker must have the packages that fetch them.
    threads
        Number of cores that the worker uses. None: as many as Dask gave it threads.
    topic
        Dask topic under which the worker reports its progress.
    """

    setup: TaskSetup
    versions: Mapping[str, str | None]
    samples: tuple[Path, ...]
    urls: tuple[str, ...]
    threads: int | None
    topic: str


def check_worker(requirements: Requirements) -> tuple[int, ...]:
    """Check this process, load the model, and return the shape of a row, (h, w, c).

    Raises
    ------
    UnfitWorkerError
        If this worker lacks something that the work needs; the message says what.
    SpecError, WeightsError
        If no worker could do the work.
    """
    _check_versions(requirements.versions)
    _check_files(requirements)
    try:
        remote.require(requirements.urls)
    except UsageError as error:
        raise UnfitWorkerError(f"cannot fetch images: {error}") from error
    with _ready(requirements) as worker:
        return worker.row_shape


def run_task(task: ShardTask, requirements: Requirements, number: int, unseen: str | None) -> ShardResult:
    """Run a task and return its result, reporting progress under `number`.

    `unseen` is an identifier of the whole computation, given if it has images whose hashes are unknown (remote
    images). Then copies of one image that come to this process are computed once.

    Raises
    ------
    UnfitWorkerError
        If this worker does not see the folder of the shards, or lacks the weights.
    """
    from distributed import get_worker

    if not requirements.setup.directory.is_dir():
        raise UnfitWorkerError(f"does not see the folder {requirements.setup.directory}")
    here = get_worker()

    def advance(n: float) -> None:
        here.log_event(requirements.topic, {"task": number, "rows": n})

    with _ready(requirements) as worker:
        return worker.run(task, advance, lambda: False, _there(unseen))


def _check_versions(wanted: Mapping[str, str | None]) -> None:
    found = machine.versions(tuple(wanted)).items()
    differing = [
        f"{name} {has or 'none'} (here {wanted[name] or 'none'})" for name, has in found if has != wanted[name]
    ]
    if differing:
        raise UnfitWorkerError(f"has {', '.join(differing)}")


def _check_files(requirements: Requirements) -> None:
    cache = requirements.setup.directory.parent.parent
    if not cache.is_dir():
        raise UnfitWorkerError(f"does not see the cache {cache}; it needs the same files under the same paths")
    if not os.access(cache, os.W_OK):
        raise UnfitWorkerError(f"may not write to the cache {cache}")
    for path in requirements.samples:
        try:
            files.try_to_read(path)
        except OSError as error:
            raise UnfitWorkerError(f"cannot read the image {path} ({error.strerror or error})") from error


def _check_weights(setup: TaskSetup) -> None:
    if setup.weights is None:
        return
    for path in (setup.weights, setup.network):
        if path is not None and not path.is_file():
            raise UnfitWorkerError(f"does not see the weights {path}")
    if _identity(setup.weights, setup.network) != setup.spec.weights:
        raise UnfitWorkerError(f"has other weights at {setup.weights}")


def _identity(weights: Path, network: Path | None) -> str:
    """Return the identity of the weights in a file.

    Weights in the .keras file of an own network are identified by their values, others by the sha256 of the file.
    """
    if network is None or weights != network:
        return f"sha256:{files.sha256_file(weights)}"
    try:
        return own.read_network(network).weights
    except (SpecError, WeightsError) as error:
        raise UnfitWorkerError(f"cannot read {network} ({error})") from error


_theres: dict[str, KnownRows] = {}  # of the running computation: its identifier → the rows known here


def _there(unseen: str | None) -> There:
    if unseen is None:
        return no_known_rows
    with _loading:
        if unseen not in _theres:
            _theres.clear()
            _theres[unseen] = KnownRows(np.zeros(0, np.uint64))
        return _theres[unseen]


# One model a process, shared by its threads. The model of another setup is freed as soon as no thread uses it.
_loading = threading.Lock()
_loaded: dict[TaskSetup, ShardWorker] = {}
_users: dict[TaskSetup, int] = {}


@contextmanager
def _ready(requirements: Requirements) -> Iterator[ShardWorker]:
    from distributed import get_worker

    setup = requirements.setup
    with _loading:
        for other in [each for each in _loaded if each != setup and not _users[each]]:
            _loaded.pop(other).__exit__()
            gc.collect()
        if setup not in _loaded:
            _check_weights(setup)
            _loaded[setup] = ShardWorker(setup, requirements.threads or get_worker().state.nthreads)
        _users[setup] = _users.get(setup, 0) + 1
    try:
        yield _loaded[setup]
    finally:
        with _loading:
            _users[setup] -= 1
