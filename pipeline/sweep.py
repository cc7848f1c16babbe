"""Many settings of heads tried on one cache: ranked by the validation split, the best one measured on the test split.

<root>/<name>/trials/<id>/     one setting each: what came of it, and of the best one its head
<root>/<name>/sweep.json       what was asked and the leaderboard, once all are tried

An unfinished sweep lies under a hidden name; a setting that is finished is never tried again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline import heads, runs
from pipeline.asked import Asked, DatasetChoice, begun_with
from pipeline.cache import storage
from pipeline.cache.lock import exclusive
from pipeline.checkpoint import Checkpoint
from pipeline.choice import FeatureChoice
from pipeline.cluster import ClusterChoice, connected
from pipeline.dataset import Dataset
from pipeline.errors import DoNotFitError, RunError
from pipeline.fitting import Outcome, answers, fit_head
from pipeline.gather import Material, gather
from pipeline.heads.base import measure
from pipeline.leaderboard import Trial, draw_leaderboard, leaderboard, write_leaderboard
from pipeline.loop import NotFiniteError, OtherCheckpointError
from pipeline.planning import Quarantined
from pipeline.prepare import memory_needed, prepared
from pipeline.progress import counted
from pipeline.spec import PLAIN_VIEW, HeadSpec, Views
from pipeline.train import write_run
from pipeline.trial_tasks import submitted
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

FORMAT = "icebox-sweep"
VERSION = 1
COMMAND = "sweep"
_TRIAL = "trial.json"
_ABOUT = "sweep.json"
_MOST_BYTES = 2**26  # of a JSON file in an unfinished sweep


@dataclass(frozen=True)
class SweepAsked:
    """The settings to be tried, all different; `memory` in bytes."""

    images: DatasetChoice
    features: FeatureChoice
    specs: tuple[HeadSpec, ...]
    max_pixels: int
    memory: int | None = None
    views: Views = PLAIN_VIEW

    def head(self, spec: HeadSpec) -> Asked:
        """Return the same for one of the settings."""
        return Asked(self.images, self.features, spec, self.max_pixels, memory=self.memory, views=self.views)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "specs": [spec.to_dict() for spec in self.specs]}

    @classmethod
    def of_request(cls, request: Mapping[str, Any]) -> Self:
        """Return what the request of an unfinished sweep says, in the space it began with. Raises RunError."""
        return replace(cls.from_dict(request.get("asked", {})), features=begun_with(request))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_dict` gave. Raises RunError if it is not that."""
        try:
            rest = dict(value)
            specs, views = [dict(spec) for spec in rest.pop("specs")], Views.from_dict(rest.pop("views"))
            images, features = DatasetChoice(**rest.pop("images")), FeatureChoice(**rest.pop("features"))
            made = tuple(HeadSpec.make(spec.pop("head"), **spec) for spec in specs)
            return cls(images, features, made, views=views, **rest)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunError(f"what the sweep was asked for cannot be read ({error}); begin it anew") from error


@dataclass(frozen=True)
class Sweep:
    """What a sweep made: its leaderboard, the run that the best setting became, and how many were tried before."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    best: dict[str, Any]  # the summary of the run
    reused: int
    quarantined: list[Quarantined]


def sweep(
    dataset: Dataset,
    workspace: Workspace,
    asked: SweepAsked,
    features_command: str,
    *,
    resume: str | None = None,
    cluster: ClusterChoice | None = None,
) -> Sweep:
    """Try every setting, rank them by the validation split, publish the best as a run. Computes no feature.

    `resume` names an unfinished sweep. The trials run one after the other here, or on the workers of `cluster`, which
    must see the same files.

    Raises
    ------
    MissingRowsError
        If an image that can be decoded has no row; the text names `features_command`.
    DatasetError
        If a split has no image, or there is only one class to learn.
    RunError
        If no setting could be trained, or what is to be resumed has changed.
    """
    material = gather(dataset, workspace, asked.features, asked.max_pixels, features_command, views=asked.views)
    with _folder(workspace, asked, material, resume) as (name, folder):
        folders = {spec.identity: folder / "trials" / spec.identity for spec in asked.specs}
        reused = sum((path / _TRIAL).exists() for path in folders.values())
        if reused:
            logger.info("%d of %s not tried again, as before", reused, counted(len(folders), "setting"))
        _try_all(material, workspace, asked, folders, cluster)
        trials = [_read(folders[spec.identity], spec) for spec in asked.specs]
        rows = leaderboard(trials)
        best = min(trials, key=lambda trial: trial.order)
        if best.error is not None:
            storage.remove_folder(folder / "trials")  # going on with them would end as this does
            raise RunError(f"none of {counted(len(trials), 'setting')} could be trained, the first: {best.error}")
        summary = _publish_best(workspace, material, asked, best.spec, folder)
        _write(folder, name, asked, material, rows, summary)
    return Sweep(name, workspace.sweeps / name, rows, summary, reused, material.quarantined)


@contextmanager
def _folder(
    workspace: Workspace, asked: SweepAsked, material: Material, resume: str | None
) -> Iterator[tuple[str, Path]]:
    if resume is None:
        with runs.new_run(workspace.sweeps, material.dataset.name, workspace.command(COMMAND)) as (name, folder):
            (folder / "trials").mkdir()
            runs.write_request(folder, asked.to_dict(), material.digest(), material.space.name)
            yield name, folder
        return
    runs.require_same(workspace.sweeps, resume, material.digest())
    with runs.reopened(workspace.sweeps, resume, workspace.command(COMMAND)) as found:
        yield found


# The trials


def _try_all(
    material: Material,
    workspace: Workspace,
    asked: SweepAsked,
    folders: Mapping[str, Path],
    cluster: ClusterChoice | None,
) -> None:
    """Leave every setting's outcome in its folder, and of the best one the head."""
    left = [spec for spec in asked.specs if not (folders[spec.identity] / _TRIAL).exists()]
    podium = _Podium(folders)
    for spec in asked.specs:
        if spec not in left:
            podium.enter(spec)
    if not left:
        return
    steps = sum(heads.steps(spec) for spec in left)
    with (
        _crew(cluster, len(left)) as crew,
        workspace.progress(f"trying {counted(len(left), 'setting')}", steps, "steps") as advance,
    ):
        for specs in _by_kind(left):
            with prepared(material, specs, asked.memory, sides=("train", "val"), held=crew is None) as ready:
                data = ready.data()
                if crew is not None:
                    needed = memory_needed(specs, data.train.shape[1:], data.classes)
                    finished = _on_workers(crew, specs, data, folders, asked.memory, needed)
                else:
                    finished = _here(specs, data, folders, advance)
                for spec in finished:
                    _report(podium.enter(spec))
                    if crew is not None:
                        advance(heads.steps(spec))


@contextmanager
def _crew(cluster: ClusterChoice | None, count: int) -> Iterator[Callable[..., Iterator[str]] | None]:
    """Give the way to have `count` trials, at most, run on workers; None if they are to be run here."""
    if cluster is None:
        yield None
        return
    choice = cluster.at_most(count)
    with connected(choice) as client:
        yield partial(submitted, client, choice)


def _by_kind(specs: Sequence[HeadSpec]) -> list[list[HeadSpec]]:
    """Return the settings in groups that read the same rows."""
    kinds = dict.fromkeys(heads.READS[spec.head] for spec in specs)
    return [[spec for spec in specs if heads.READS[spec.head] == kind] for kind in kinds]


def _here(
    specs: Sequence[HeadSpec], data: heads.Data, folders: Mapping[str, Path], advance: Callable[[float], None]
) -> Iterator[HeadSpec]:
    for spec in specs:
        done = 0.0

        def step(n: float) -> None:
            nonlocal done
            done += n
            advance(n)

        run_trial(spec, data, folders[spec.identity], step)
        advance(heads.steps(spec) - done)  # what early stopping spared
        yield spec


def _on_workers(
    crew: Callable[..., Iterator[str]],
    specs: Sequence[HeadSpec],
    data: heads.Data,
    folders: Mapping[str, Path],
    memory: int | None,
    needed: int,
) -> Iterator[HeadSpec]:
    tasks = {spec.identity: (spec, str(folders[spec.identity].absolute())) for spec in specs}
    for identity in crew(run_trial, tasks, data, memory, needed):
        yield tasks[identity][0]


def run_trial(
    spec: HeadSpec, data: heads.Data, folder: Path, advance: Callable[[float], None] = lambda n: None
) -> None:
    """Fit one setting and leave head and outcome in `folder`, going on with what lies there."""
    folder.mkdir(exist_ok=True)
    with exclusive(folder / ".lock", lambda holder: logger.info("waiting: %s is trying %s", holder, spec.identity)):
        if (folder / _TRIAL).exists():
            return
        start = time.perf_counter()
        try:
            fitted = _fitted(spec, data, folder, advance)
        except (NotFiniteError, DoNotFitError) as error:
            runs.write_json(folder / _TRIAL, {"error": str(error), "seconds": time.perf_counter() - start})
            return
        said = answers(fitted.head, data.val, "val")
        val_loss, _ = measure(said, data.val_labels)
        fitted.head.save(folder)
        outcome = {
            "error": None,
            "val_loss": val_loss,
            "right": np.packbits(said.argmax(axis=1) == data.val_labels).tobytes().hex(),
            "images": len(data.val_labels),
            "seconds": round(time.perf_counter() - start + fitted.seconds_before, 3),
            "parameters": fitted.head.parameters,
            "bytes": sum(path.stat().st_size for path in folder.glob("head.*")),
            "x": fitted.x,
            "history": fitted.history,
            "seconds_per_epoch": fitted.seconds_per_epoch,
            "facts": fitted.facts,
        }
        runs.write_json(folder / _TRIAL, outcome)
        Checkpoint(folder).remove()
        heads.release()


def _fitted(spec: HeadSpec, data: heads.Data, folder: Path, advance: Callable[[float], None]) -> heads.Fitted:
    try:
        return fit_head(spec, data, folder, advance)
    except OtherCheckpointError as error:
        logger.warning("%s: tried anew, as %s", spec.identity, error)
        Checkpoint(folder).remove()
        return fit_head(spec, data, folder, advance)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_small(path, _MOST_BYTES)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it and resume the sweep") from error


def _read(folder: Path, spec: HeadSpec) -> Trial:
    found = _read_json(folder / _TRIAL)
    if found["error"] is not None:
        return Trial(spec, np.zeros(0, bool), float("inf"), found["seconds"], 0, 0, found["error"])
    bits = np.frombuffer(bytes.fromhex(found["right"]), np.uint8)
    right = np.unpackbits(bits, count=found["images"]).astype(bool)
    return Trial(spec, right, *(found[name] for name in ("val_loss", "seconds", "parameters", "bytes")))


def _report(trial: Trial) -> None:
    said = f"val {trial.accuracy:.4f}, {trial.seconds:.1f} s" if trial.error is None else f"failed: {trial.error}"
    logger.info("%s %s: %s", trial.spec.head, trial.spec.identity, said)


class _Podium:
    """Keeps the head of the best trial so far and removes those of the others: a `flatten` head takes 134 MB."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self._best: Trial | None = None

    def enter(self, spec: HeadSpec) -> Trial:
        """Compare a finished trial with the best one before it, and return it."""
        trial = _read(self._folders[spec.identity], spec)
        both = [trial] if self._best is None else [trial, self._best]
        self._best, *others = sorted(both, key=lambda each: each.order)
        for other in others:
            for path in self._folders[other.spec.identity].glob("head.*"):
                storage.remove(path)
        return trial


# What comes of it


def _publish_best(
    workspace: Workspace, material: Material, asked: SweepAsked, spec: HeadSpec, folder: Path
) -> dict[str, Any]:
    """Measure the best head on the test split, once, and publish it as a run; return its summary."""
    if (known := _winner(workspace, folder)) is not None:
        return runs.read_run(known)["summary"]
    trial = folder / "trials" / spec.identity
    found = _read_json(trial / _TRIAL)
    with (
        prepared(material, [spec], asked.memory, sides=("val", "test")) as ready,
        runs.new_run(workspace.runs, f"{material.dataset.name}-{spec.head}", workspace.command("train-head")) as (
            name,
            directory,
        ),
    ):
        runs.write_json(folder / runs.WINNER, {"run": name})  # first: published, the run is known to be the winner
        head = heads.load(trial)
        fitted = heads.Fitted(head, found["history"], found["x"], found["seconds_per_epoch"], found["facts"])
        said = (answers(head, ready.rows[side], side) for side in ("val", "test"))
        outcome = Outcome(fitted, ready.members["val"], *said)
        return write_run(directory, name, ready, asked.head(spec), outcome, found["seconds"])


def _winner(workspace: Workspace, folder: Path) -> Path | None:
    """Return the folder of the run that the best setting became before the sweep was stopped, None if it did not."""
    noted = list[Any]()
    if (folder / runs.WINNER).exists():
        noted.append(_read_json(folder / runs.WINNER).get("run"))
    if (folder / _ABOUT).exists():  # earlier versions removed their note before the sweep was published
        noted.append(dict(_read_json(folder / _ABOUT).get("best") or {}).get("run"))
    found = (workspace.runs / str(name) for name in noted)
    return next((run for run in found if (run / "run.json").exists()), None)


def _write(
    folder: Path,
    name: str,
    asked: SweepAsked,
    material: Material,
    rows: Sequence[dict[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    about = {
        "format": FORMAT,
        "version": VERSION,
        "sweep": name,
        "created": runs.now(),
        "dataset": {"name": material.dataset.name, "split": material.split.origin},
        "features": material.space.spec.to_dict(),
        "asked": asked.to_dict(),
        "runs": rows,
        "best": summary,
    }
    runs.write_json(folder / _ABOUT, about)
    write_leaderboard(folder / "leaderboard.csv", rows)
    draw_leaderboard(folder / "leaderboard.png", rows, f"{name}: {counted(len(rows), 'setting')}")
