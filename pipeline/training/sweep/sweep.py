"""Try many settings of heads on the rows of one or several backbones (a sweep).

The trials are ranked on the validation split, and only the best one is measured on the test split.

<root>/<name>/trials/<id>/     one setting on one backbone: its outcome, and the head if it is the best
<root>/<name>/sweep.json       the request and the leaderboard, written when all settings are tried

An unfinished sweep has a hidden name; a finished setting is never tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import RunError
from pipeline.core.spec import HeadSpec
from pipeline.core.units import counted
from pipeline.dataset import Dataset
from pipeline.extraction.planning import Quarantined
from pipeline.extraction.workers.connect import ClusterChoice, connected
from pipeline.runs import store
from pipeline.runs.plots import draw_cost
from pipeline.runs.request import SweepRequest
from pipeline.training import heads
from pipeline.training.fitting import FitResult, predict_probabilities
from pipeline.training.sweep.candidates import Candidate, compute_missing, digest, find_candidates
from pipeline.training.sweep.leaderboard import (
    Trial,
    cost_points,
    draw_leaderboard,
    has_several_backbones,
    leaderboard,
    write_leaderboard,
)
from pipeline.training.sweep.on_dask import run_on_dask
from pipeline.training.sweep.trial import TRIAL, read_json, read_trial, run_trial
from pipeline.training.train_head import write_run
from pipeline.training.training_data import memory_needed, open_training_data

logger = logging.getLogger(__name__)

FORMAT = "icebox-sweep"
VERSION = 1
COMMAND = "sweep"
_ABOUT = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its leaderboard, the run of the best setting, and how many trials were reused."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    best: dict[str, Any]  # the summary of the run
    reused: int
    computed: int  # rows that were computed before the first trial
    quarantined: list[Quarantined]


def sweep(
    dataset: Dataset,
    workspace: Workspace,
    request: SweepRequest,
    *,
    resume: str | None = None,
    cluster: ClusterChoice | None = None,
    compute: bool = False,
) -> Sweep:
    """Try every setting on every backbone, rank them on the validation split, and publish the best as a run.

    `resume` names an unfinished sweep. The trials run in this process one after the other, or on the workers of
    `cluster`, which must see the same files. Missing features are computed first if `compute` is set, else never.

    Raises
    ------
    MissingRowsError
        If an image that can be decoded has no row in one of the spaces.
    DatasetError
        If a split has no image, or there is only one class to learn.
    RunError
        If no setting could be trained, or the data of the sweep to resume have changed.
    """
    computed = compute_missing(dataset, workspace, request, cluster) if compute else 0
    candidates = find_candidates(dataset, workspace, request)
    with _folder(workspace, request, candidates, resume) as (name, folder):
        settings = _settings(candidates, request.specs, folder / "trials")
        reused = sum(setting.is_finished for setting in settings)
        if reused:
            logger.info("%d of %s not tried again, as before", reused, counted(len(settings), "setting"))
        _try_all(settings, workspace, request.memory, cluster)
        trials = {setting.name: setting.outcome() for setting in settings}
        rows = leaderboard(list(trials.values()))
        best = min(settings, key=lambda setting: trials[setting.name].order)
        if (error := trials[best.name].error) is not None:
            files.remove_folder(folder / "trials")  # a resumed sweep would fail in the same way
            raise RunError(f"none of {counted(len(trials), 'setting')} could be trained, the first: {error}")
        summary = _publish_best(workspace, request, best, folder)
        _write(folder, name, request, candidates, best, rows, summary)
    quarantined = candidates[0].labelled.quarantined
    return Sweep(name, workspace.sweeps / name, rows, summary, reused, computed, quarantined)


@contextmanager
def _folder(
    workspace: Workspace, request: SweepRequest, candidates: Sequence[Candidate], resume: str | None
) -> Iterator[tuple[str, Path]]:
    command, content = workspace.command(COMMAND), digest(candidates)
    if resume is None:
        title, spaces = candidates[0].labelled.dataset.name, [each.cost.space for each in candidates]
        with store.new_run(workspace.sweeps, title, command) as (name, folder):
            (folder / "trials").mkdir()
            store.write_request(folder, request.to_dict(), content, spaces if len(spaces) > 1 else spaces[0])
            yield name, folder
        return
    store.require_same(workspace.sweeps, resume, content)
    with store.reopened(workspace.sweeps, resume, command) as found:
        yield found


# The trials


@dataclass(frozen=True, eq=False)
class _Setting:
    """One head with its settings, to try on the rows of one space; its outcome is stored in `folder`."""

    candidate: Candidate
    spec: HeadSpec
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / TRIAL).exists()

    def outcome(self) -> Trial:
        """Return the trial's stored outcome. Raises RunError if it cannot be read."""
        return read_trial(self.folder, self.spec, self.candidate.cost)


def _settings(candidates: Sequence[Candidate], specs: Sequence[HeadSpec], trials: Path) -> list[_Setting]:
    """Return every setting on every backbone. For a single backbone, folders are named as in earlier versions."""
    found = []
    for candidate in candidates:
        of_space = f"{candidate.labelled.space.spec.fingerprint()[:8]}-" if len(candidates) > 1 else ""
        found += [_Setting(candidate, spec, trials / f"{of_space}{spec.identity}") for spec in specs]
    return found


def _try_all(
    settings: Sequence[_Setting], workspace: Workspace, memory: int | None, cluster: ClusterChoice | None
) -> None:
    """Try the unfinished settings; write each outcome to its folder, and keep only the best head."""
    left = [setting for setting in settings if not setting.is_finished]
    podium = _Podium()
    for setting in settings:
        if setting not in left:
            podium.enter(setting)
    if not left:
        return
    steps = sum(heads.steps(setting.spec) for setting in left)
    with (
        _crew(cluster, len(left)) as pool,
        workspace.progress(f"trying {counted(len(left), 'setting')}", steps, "steps") as advance,
    ):
        for group in _by_rows(left):
            _try_group(group, memory, pool, podium, advance)


def _try_group(
    group: Sequence[_Setting],
    memory: int | None,
    pool: Callable[..., Iterator[str]] | None,
    podium: _Podium,
    advance: Callable[[float], None],
) -> None:
    """Try settings that read the same rows; the rows are freed on return."""
    labelled, specs = group[0].candidate.labelled, [setting.spec for setting in group]
    with open_training_data(labelled, specs, memory, sides=("train", "val"), held=pool is None) as training_data:
        data = training_data.data()
        if pool is not None:
            needed = memory_needed(specs, data.train.shape[1:], data.classes)
            finished = _on_workers(pool, group, data, memory, needed)
        else:
            finished = _here(group, data, advance)
        for setting in finished:
            _report(podium.enter(setting))
            if pool is not None:
                advance(heads.steps(setting.spec))


@contextmanager
def _crew(cluster: ClusterChoice | None, count: int) -> Iterator[Callable[..., Iterator[str]] | None]:
    """Yield a function that runs at most `count` trials on Dask workers; None to run them in this process."""
    if cluster is None:
        yield None
        return
    choice = cluster.at_most(count)
    with connected(choice) as client:
        yield partial(run_on_dask, client, choice)


def _by_rows(settings: Sequence[_Setting]) -> list[list[_Setting]]:
    """Return the settings in groups that read the same rows."""
    found = dict[tuple[str, str], list[_Setting]]()
    for setting in settings:
        found.setdefault((setting.candidate.cost.space, heads.READS[setting.spec.head]), []).append(setting)
    return list(found.values())


def _here(settings: Sequence[_Setting], data: heads.Data, advance: Callable[[float], None]) -> Iterator[_Setting]:
    for setting in settings:
        done = 0.0

        def step(n: float) -> None:
            nonlocal done
            done += n
            advance(n)

        run_trial(setting.spec, data, setting.folder, step)
        advance(heads.steps(setting.spec) - done)  # the steps that early stopping skipped
        yield setting


def _on_workers(
    pool: Callable[..., Iterator[str]],
    settings: Sequence[_Setting],
    data: heads.Data,
    memory: int | None,
    needed: int,
) -> Iterator[_Setting]:
    named = {setting.name: setting for setting in settings}
    tasks = {name: (setting.spec, str(setting.folder.absolute())) for name, setting in named.items()}
    for name in pool(run_trial, tasks, data, memory, needed):
        yield named[name]


def _report(trial: Trial) -> None:
    said = f"val {trial.accuracy:.4f}, {trial.seconds:.1f} s" if trial.error is None else f"failed: {trial.error}"
    logger.info("%s %s %s: %s", trial.cost.backbone, trial.spec.head, trial.name, said)


class _Podium:
    """Keep the head of the best trial so far and remove the others: a `flatten` head takes 134 MB on disk."""

    def __init__(self) -> None:
        self._best: tuple[Trial, Path] | None = None

    def enter(self, setting: _Setting) -> Trial:
        """Return the outcome of a finished setting, and remove its head or the previous best, whichever ranks lower."""
        trial = setting.outcome()
        both = [entry for entry in ((trial, setting.folder), self._best) if entry is not None]
        self._best, *others = sorted(both, key=lambda each: each[0].order)
        for _, folder in others:
            for path in folder.glob("head.*"):
                files.remove(path)
        return trial


# The results


def _publish_best(workspace: Workspace, request: SweepRequest, best: _Setting, folder: Path) -> dict[str, Any]:
    """Measure the best head once on the test split, publish it as a run, and return the run's summary."""
    if (known := _winner(workspace, folder)) is not None:
        return store.read_run(known)["summary"]
    found, candidate, spec = read_json(best.folder / TRIAL), best.candidate, best.spec
    title = f"{candidate.labelled.dataset.name}-{spec.head}"
    with (
        open_training_data(candidate.labelled, [spec], request.memory, sides=("val", "test")) as training_data,
        store.new_run(workspace.runs, title, workspace.command("train-head")) as (name, directory),
    ):
        files.write_json(folder / store.WINNER, {"run": name})  # so that a resumed sweep finds the run
        head = heads.load(best.folder)
        fitted = heads.Fitted(head, found["history"], found["x"], found["seconds_per_epoch"], found["facts"])
        said = (predict_probabilities(head, training_data.rows[side], side) for side in ("val", "test"))
        outcome = FitResult(fitted, training_data.members["val"], *said)
        return write_run(
            directory, name, training_data, request.head(candidate.choice, spec), outcome, found["seconds"]
        )


def _winner(workspace: Workspace, folder: Path) -> Path | None:
    """Return the folder of the run of the best setting; None if it was not published before the sweep was stopped."""
    noted = list[Any]()
    if (folder / store.WINNER).exists():
        noted.append(read_json(folder / store.WINNER).get("run"))
    if (folder / _ABOUT).exists():  # earlier versions removed `winner.json` before the sweep was published
        noted.append(dict(read_json(folder / _ABOUT).get("best") or {}).get("run"))
    found = (workspace.runs / str(name) for name in noted)
    return next((run for run in found if (run / "run.json").exists()), None)


def _write(
    folder: Path,
    name: str,
    request: SweepRequest,
    candidates: Sequence[Candidate],
    best: _Setting,
    rows: Sequence[dict[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    labelled = best.candidate.labelled
    about = {
        "format": FORMAT,
        "version": VERSION,
        "sweep": name,
        "created": store.now(),
        "dataset": {"name": labelled.dataset.name, "split": labelled.split.origin},
        "features": labelled.space.spec.to_dict(),
        "backbones": [_about(candidate) for candidate in candidates],
        "asked": request.to_dict(),
        "runs": rows,
        "best": summary,
    }
    files.write_json(folder / _ABOUT, about)
    write_leaderboard(folder / "leaderboard.csv", rows)
    draw_leaderboard(folder / "leaderboard.png", rows, f"{name}: {counted(len(rows), 'setting')}")
    if has_several_backbones(rows) and (points := cost_points(rows)):
        draw_cost(folder / "cost.png", points, f"{name}: the best head of each backbone")


def _about(candidate: Candidate) -> dict[str, Any]:
    space = candidate.labelled.space
    return {
        **asdict(candidate.cost),
        "weights": space.provenance.get("weights"),
        "features": space.spec.to_dict(),
    }
