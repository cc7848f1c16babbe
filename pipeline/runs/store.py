"""Store runs as folders, each with its request, its results and its model.

`new_run` and `reopened` fill a hidden folder and publish it by one rename. A run is therefore complete or absent.
`find_run`, `read_run` and `list_runs` find published runs; `unfinished` and `remove_leftovers` deal with stopped ones.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import CheckpointError, RunError, did_you_mean
from pipeline.core.files import MOST_JSON_BYTES
from pipeline.core.locks import find_abandoned, held_if_abandoned, new_folder_held, remove_abandoned, without_locks
from pipeline.runs.checksums import check_files, write_checksums
from pipeline.runs.run_dataset import RunDataset

logger = logging.getLogger(__name__)

FORMAT = "icebox-run"
VERSION = 1
_SUMMARY = {"run", "head", "accuracy", "accuracy_interval", "val_accuracy", "seconds", "weights"}  # listed by `runs ls`
MOST_ABOUT = 2**26  # largest size of a run.json in bytes: `runs ls` reads every one, also from untrusted sources
REQUEST = "request.json"  # the training request, in an unfinished run's folder
WINNER = "winner.json"  # the name of the run made from a sweep's best setting, in an unfinished sweep's folder
_CHECKPOINT = "checkpoint.npz"
_SPENT = (REQUEST, _CHECKPOINT)  # files that only an unfinished run needs
_KEPT = (f"**/{_CHECKPOINT}", "fold-*/head.json", "trials/*/trial.json")  # finished work that --resume does not repeat
_LONGEST_SLUG = 120  # file names have at most 255 bytes; time, number and prefix are added to the slug


@contextmanager
def new_run(root: Path, title: str, command: str = "train-head") -> Iterator[tuple[str, Path]]:
    """Yield the name of a new run and a folder to fill; on exit without an error, publish it as `root/<name>`.

    After an error the folder is removed, unless finished work in it (a checkpoint, for example) allows a resume. After
    a kill a hidden ".partial-…" folder remains: `unfinished` lists it and `reopened` continues it. `command` is the
    command that resumes such a run, for the message about it.

    Raises
    ------
    RunError
        If `root` cannot be written.
    """
    with ExitStack() as held:
        try:
            root.mkdir(parents=True, exist_ok=True)
            name, partial = _reserve(root, f"{datetime.now():%Y%m%d-%H%M%S}-{slug(title)}", held)
        except OSError as error:
            raise RunError(f"no run can be written to {root}: {error}") from error
        with _published(partial, root / name, command):
            yield name, partial


@contextmanager
def new_folder(final: Path, ending: str = "") -> Iterator[Path]:
    """Yield a folder to fill; on exit without an error, replace `final` with it. After an error `final` is unchanged.

    After a kill a ".partial-…" folder without a lock remains, whose name has this `ending`.
    """
    partial, former = (files.partial_name(final.parent, ending) for _ in range(2))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with new_folder_held(partial):
            yield partial
            for path in partial.rglob("*"):
                files.fsync(path)
            if final.exists():
                final.rename(former)
            try:
                files.publish(partial, final)
            except BaseException:
                if former.exists():
                    former.rename(final)
                raise
    finally:
        for folder in (partial, former):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reopened(root: Path, name: str, command: str = "train-head") -> Iterator[tuple[str, Path]]:
    """Yield name and folder of an unfinished run, to be filled and published as with `new_run`.

    Raises
    ------
    RunError
        If there is no such run, it is finished, or another process works on it.
    """
    partial = _partial(root, name)
    if not partial.is_dir():
        raise RunError(_not_resumable(root, name))
    with held_if_abandoned(partial) as held:
        if not partial.is_dir():  # another process has published the run meanwhile
            raise RunError(_not_resumable(root, name))
        if not held:
            raise RunError(f"the run {name} is being worked on by another process")
        if without_locks():
            logger.warning("without locks, nothing keeps another process from going on with %s too", name)
        for path in partial.rglob(f"{files.PARTIAL_PREFIX}*"):  # files whose writing the kill interrupted
            files.remove(path)
        with _published(partial, root / name, command):
            yield name, partial


@contextmanager
def _published(partial: Path, final: Path, command: str) -> Iterator[None]:
    try:
        yield
        if (partial / "run.json").exists():  # a sweep has none
            write_checksums(partial, _SPENT)
        for path in partial.rglob("*"):
            files.fsync(path)
        files.publish(partial, final)
    except BaseException as error:
        if not _can_resume(partial):
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(f"what was trained so far is kept; go on by: {command} --resume {final.name}")
        elif not isinstance(error, CheckpointError):
            logger.warning("what was trained so far is kept; go on by: %s --resume %s", command, final.name)
        raise
    for path in _of_unfinished(final):  # only after the rename: a run killed before it can still be resumed
        try:
            files.remove(path)
        except OSError as error:  # only a warning: the published run is complete
            logger.warning("%s cannot be removed (%s) and is of no use any more; `cache gc` removes it", path, error)


def _of_unfinished(folder: Path) -> list[Path]:
    """Return the files that only an unfinished run needs; a run killed right after publishing still has some."""
    spent = (folder / REQUEST, folder / WINNER, *folder.rglob(_CHECKPOINT), *folder.glob("trials/*/head.*"))
    return [path for path in spent if path.exists()]


def write_request(
    folder: Path,
    request: Mapping[str, Any],
    rows_digest: str,
    space: str | Sequence[str] | None,
    network: Mapping[str, Any] | None = None,
) -> None:
    """Write into an unfinished run's folder the request, the digest of its rows or images, and their feature spaces.

    For a `network` of the user's own, the record of `source.record` with its two hashes is stored too.
    """
    stored = {"asked": dict(request), "material": rows_digest, "space": space, "created": now()}
    if network is not None:
        stored["network"] = dict(network)
    files.write_json(folder / REQUEST, stored)


def now() -> str:
    """Return the current time as `created` stores it: ISO 8601, UTC, in milliseconds.

    Runs are ordered by this time, not by their names: names have local time, which can jump back.
    """
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _in_order(described: Mapping[str, Path]) -> list[str]:
    """Return the names ordered by the `created` time in their JSON files, the oldest first."""
    return sorted(described, key=lambda name: (_created(described[name]), name))


def _created(path: Path) -> float:
    """Return the `created` time of a JSON file in POSIX seconds; without one, the file's modification time."""
    try:
        return datetime.fromisoformat(json.loads(files.read_small(path, MOST_ABOUT))["created"]).timestamp()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # the function that reads the file reports it
        return path.stat().st_mtime if path.exists() else 0.0


def read_request(root: Path, name: str) -> dict[str, Any]:
    """Return the content of request.json of the unfinished run `name`. Raises RunError."""
    path = _partial(root, name) / REQUEST
    try:
        stored = json.loads(files.read_small(path, MOST_JSON_BYTES))
        if not isinstance(stored, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise RunError(_not_resumable(root, name)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove its folder and train anew") from error
    return stored


def require_same(root: Path, name: str, rows_digest: str) -> None:
    """Raise RunError unless the unfinished run `name` began with the rows whose digest is `rows_digest`."""
    if read_request(root, name).get("material") != rows_digest:
        raise RunError(
            f"the images, labels, splits or features of {name} are no longer those it began with; begin anew"
        )


def latest_of(names: Sequence[str], root: Path) -> str:
    """Return the last of the names of stopped runs. Raises RunError if `names` is empty."""
    if not names:
        raise RunError(f"nothing in {root} was stopped so that it could be resumed by this command")
    return names[-1]


def unfinished(root: Path) -> list[str]:
    """Return the names of the runs that were stopped and can be resumed, the oldest first."""
    found = [name.removeprefix(files.PARTIAL_PREFIX) for name in files.list_folders(root) if files.is_partial(name)]
    some = [name for name in found if _can_resume(_partial(root, name)) and find_abandoned(_partial(root, name))]
    return _in_order({name: _partial(root, name) / REQUEST for name in some})


def remove_leftovers(root: Path, *, resumable: bool, dry_run: bool = False) -> tuple[list[Path], int]:
    """Remove the folders of killed runs and evaluations, and the files that published runs no longer need.

    Folders of runs that can be resumed are removed only with `resumable`. With `dry_run` nothing is removed. Returns
    the paths that are (or would be) removed, and their size in bytes.
    """
    folders = [root / name for name in files.list_folders(root)]
    unnamed = [folder for folder in folders if files.is_partial(folder.name)]
    unnamed += sorted(root.glob(f"[!.]*/evaluations/{files.PARTIAL_PREFIX}*"))
    killed = [] if without_locks() else [folder for folder in unnamed if find_abandoned(folder)]
    dead = [folder for folder in killed if resumable or not _can_resume(folder)]
    spent = [path for folder in folders if not files.is_partial(folder.name) for path in _of_unfinished(folder)]
    sizes = {folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in dead}
    sizes |= {path: path.stat().st_size for path in spent}
    if not dry_run:
        for folder in dead:
            if not remove_abandoned(folder):  # another process has resumed the run meanwhile
                del sizes[folder]
        for path in spent:
            files.remove(path)
    return list(sizes), sum(sizes.values())


def find_run(root: Path, name: str) -> Path:
    """Return the folder of the run `name`: a name in `runs ls`, a path, "latest", or "best".

    "best" is the run with the highest validation accuracy among the runs on the dataset and classes of the latest run.
    Raises RunError if there is no such run.
    """
    if name in ("latest", "best"):
        names = published_names(root)
        if not names:
            raise RunError(f"there are no runs in {root}; `train-head` makes them")
        return root / names[-1] if name == "latest" else _best(root)
    for folder in (root / name, Path(name).resolve()):  # resolved, because "." has no folder name
        if name and (folder / "run.json").exists():
            return folder
    near = did_you_mean(name, ("latest", "best", *published_names(root)))
    raise RunError(f"no run named {name!r} in {root}{near or '; `runs ls` lists them'}")


def published_names(root: Path, description: str = "run.json") -> list[str]:
    """Return the names of the published folders that contain a file `description`, the oldest first.

    The default finds runs; "sweep.json" finds sweeps.
    """
    return _in_order({path.parent.name: path for path in root.glob(f"[!.]*/{description}")})


def _best(root: Path) -> Path:
    found = list_datasets(root)
    if not found:
        raise RunError(f"no run in {root} can be read")
    latest = found[-1]
    same = [each for each in found if each.classes == latest.classes and each.is_same(latest)]
    return max(same, key=lambda each: each.about["summary"]["val_accuracy"]).folder


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of run.json in a run's folder.

    Raises
    ------
    RunError
        If run.json cannot be read, or a file that holds digests of weights was changed after publishing.
    """
    about = _read_about(folder / "run.json")
    check_files(folder, about.get("checksums"))
    return about


def network_record(about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what run.json stores of the file of the user's own network; None for a built-in backbone."""
    found = about.get("network") or dict(about.get("made_by") or {}).get("network")
    return found if isinstance(found, dict) else None


def backbone_of(about: Mapping[str, Any]) -> str:
    """Return the name of a run's backbone from its run.json; early runs store it only under `features`."""
    features = about.get("features")
    named = features.get("backbone", "") if isinstance(features, dict) else ""
    return str(about["summary"].get("backbone", named))


def _partial(root: Path, name: str) -> Path:
    if name != slug(name):
        raise RunError(_not_resumable(root, name))
    return root / f"{files.PARTIAL_PREFIX}{name}"


def _can_resume(folder: Path) -> bool:
    """Return whether a folder can be resumed: it has a request and a checkpoint, a fold's head or a sweep's trial."""
    return (folder / REQUEST).exists() and any(True for pattern in _KEPT for _ in folder.glob(pattern))


def _not_resumable(root: Path, name: str) -> str:
    if name and (root / name).is_dir():
        return f"{name} is finished; it lies in {root / name}"
    return f"nothing named {name!r} can be resumed in {root}; there are: {', '.join(unfinished(root)) or 'none'}"


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Return the content of run.json of every run under `root`, the oldest first.

    A run that cannot be read is skipped with a warning.
    """
    return [dict(each.about) for each in list_datasets(root)]


def list_datasets(root: Path) -> list[RunDataset]:
    """Return a `RunDataset` for each run that `list_runs` lists, in the same order."""
    found = []
    for name in published_names(root):
        try:
            found.append(RunDataset(root / name, read_run(root / name)))
        except RunError as error:
            logger.warning("%s", error)
    return found


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(files.read_small(path, MOST_ABOUT))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); move its folder out of the runs") from error
    if not _whole(about):
        raise RunError(f"{path} is not an {FORMAT} of version {VERSION}; move its folder out of the runs")
    return about


def _whole(about: Any) -> bool:
    """Return whether a run.json has all values that are listed of a run, with valid types and finite numbers."""
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        return False
    dataset, summary = about.get("dataset"), about.get("summary")
    if not isinstance(dataset, dict) or not isinstance(summary, dict) or "name" not in dataset:
        return False
    interval = summary.get("accuracy_interval")
    numbers = [summary.get(name) for name in ("accuracy", "val_accuracy", "seconds")]
    numbers += interval if isinstance(interval, list) and len(interval) == 2 else [None]
    finite = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    return finite and summary.keys() >= _SUMMARY


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write a CSV file with one line for each entry; its columns are the keys of the first entry."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def slug(text: str) -> str:
    """Return a text as part of a file name: at most 120 ASCII letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:_LONGEST_SLUG] or "run"


def _reserve(root: Path, wanted: str, held: ExitStack) -> tuple[str, Path]:
    """Return a free run name and its hidden folder, created and locked (`held`) now, which reserves the name."""
    for number in itertools.count(1):
        name = wanted if number == 1 else f"{wanted}-{number}"
        partial = root / f"{files.PARTIAL_PREFIX}{name}"
        try:
            held.enter_context(new_folder_held(partial))
        except FileExistsError:
            continue
        if not (root / name).exists():
            return name, partial
        partial.rmdir()
        held.close()
    raise AssertionError("there is always a next number")
