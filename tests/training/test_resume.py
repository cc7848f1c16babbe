"""A training that was stopped goes on as if it never had been, or says why it cannot."""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached import SPEC, fill, listed, write_images
from conftest import icebox
from faults import signalled

from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import RunError
from pipeline.core.spec import HeadSpec
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.runs import store
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.train_head import HeadResult, train_head

pytestmark = pytest.mark.usefixtures("no_plots")

SPECS = {
    "gap": HeadSpec.make("gap", epochs=6, learning_rate=0.02, batch_size=16, dropout=0.3, schedule="cosine"),
    "flatten": HeadSpec.make("flatten", epochs=4, learning_rate=0.01, batch_size=16, hidden=32, optimizer="rmsprop"),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", 40)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def rows(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))


def request(photos: Path, spec: HeadSpec, **more: Any) -> TrainRequest:
    return TrainRequest(DatasetChoice(str(photos)), FeatureChoice(), spec, decoding.DEFAULT_MAX_PIXELS, **more)


def go_on(workspace: Workspace, photos: Path, name: str) -> HeadResult:
    again = TrainRequest.of_request(store.read_request(workspace.runs, name))
    return train_head(listed(photos), workspace, again, resume=name)


def history(run: HeadResult) -> Any:
    return json.loads((run.path / "history.json").read_text())


def interrupted(at: int) -> Callable[..., None]:
    """Stand in for `Checkpoint.save`: save each time, and after the one numbered `at` be interrupted."""
    real, count = Checkpoint.save, 0

    def save(self: Checkpoint, *what: Any) -> None:
        nonlocal count
        self._since = -1e9
        real(self, *what)
        count += 1
        if count == at:
            raise KeyboardInterrupt

    return save


def stop(workspace: Workspace, photos: Path, wanted: TrainRequest, monkeypatch: pytest.MonkeyPatch, at: int = 2) -> str:
    """Train, be interrupted, and return the name of what is left."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupted(at))
        with pytest.raises(KeyboardInterrupt):
            train_head(listed(photos), workspace, wanted)
    (name,) = store.unfinished(workspace.runs)
    return name


@pytest.mark.parametrize("memory", [None, 4_000], ids=["held", "streamed"])
@pytest.mark.parametrize("head", SPECS)
def test_the_resumed_history_is_that_of_a_run_never_stopped(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, head: str, memory: int | None
) -> None:
    """Epoch, optimizer, order, dropout and learning rate: stopped twice."""
    wanted = request(photos, SPECS[head], memory=memory)
    whole = train_head(listed(photos), workspace, wanted)
    name = stop(workspace, photos, wanted, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupted(1))
        with pytest.raises(KeyboardInterrupt):
            go_on(workspace, photos, name)
    done = go_on(workspace, photos, name)
    assert history(done) == history(whole)
    assert (done.summary["accuracy"], done.summary["best_epoch"]) == (
        whole.summary["accuracy"], whole.summary["best_epoch"],
    )  # fmt: skip
    assert store.unfinished(workspace.runs) == []
    assert not list(done.path.rglob("checkpoint*"))
    assert not (done.path / store.REQUEST).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["killed", "full"])
def test_stopped_while_it_is_published_nothing_is_trained_again(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole = train_head(listed(photos), workspace, request(photos, SPECS["gap"]))
    real = files.publish

    def publish(partial: Path, final: Path) -> None:
        if final.parent == workspace.runs:
            raise error
        real(partial, final)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", publish)
        patch.setattr(Checkpoint, "save", interrupted(-1))
        with pytest.raises(type(error)):
            train_head(listed(photos), workspace, request(photos, SPECS["gap"]))
    (name,) = store.unfinished(workspace.runs)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.loop._epoch", None)  # there is no epoch left to train
        done = go_on(workspace, photos, name)
    assert history(done) == history(whole)


def test_folds_that_are_finished_are_not_trained_again(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(photos, SPECS["gap"], folds=3)
    whole = train_head(listed(photos), workspace, wanted)
    name = stop(workspace, photos, wanted, monkeypatch, at=8)  # in the second fold
    partial = workspace.runs / f".partial-{name}"
    before = (partial / "fold-1" / "head.json").stat().st_mtime_ns
    assert not (partial / "fold-3").exists(), "one that had not begun"
    done = go_on(workspace, photos, name)
    assert (done.path / "fold-1" / "head.json").stat().st_mtime_ns == before
    assert history(done) == history(whole)
    assert done.summary["accuracy"] == whole.summary["accuracy"]


def test_it_goes_on_in_the_space_it_began_with(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though `auto` would by now take another."""
    name = stop(workspace, photos, request(photos, SPECS["gap"]), monkeypatch)
    others = [replace(SPEC, precision=precision) for precision in ("bfloat16", "float16")]
    for other in others:
        fill(workspace, listed(photos), spec=other)
    assert min([SPEC, *others], key=lambda spec: spec.directory) is not SPEC
    assert go_on(workspace, photos, name).summary["space"] == SPEC.directory


def test_a_head_on_an_own_network_goes_on_without_its_file(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = fill(workspace, listed(photos), spec=replace(SPEC, backbone="own:" + "1" * 64, layer="last"))
    wanted = replace(request(photos, SPECS["gap"]), features=FeatureChoice(space=space.name))
    assert go_on(workspace, photos, stop(workspace, photos, wanted, monkeypatch)).summary["space"] == space.name


def relabel(photos: Path) -> None:
    (photos / "ant" / "000.png").rename(photos / "bee" / "moved.png")


def test_a_run_whose_images_changed_is_not_gone_on_with(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stop(workspace, photos, request(photos, SPECS["gap"]), monkeypatch)
    relabel(photos)
    with pytest.raises(RunError, match="no longer those it began with"):
        go_on(workspace, photos, name)


def test_nor_is_one_whose_groups_changed(
    workspace: Workspace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds held out by other groups would be answered by heads that saw them."""

    def manifest(size: int) -> Path:
        lines = ["path,label,split,group"]
        for i, path in enumerate(sorted(photos.glob("*/*.png"))):
            split = ("train", "train", "val", "test")[i % 4]
            lines.append(f"{path.relative_to(tmp_path)},{path.parent.name},{split},{split}{i // size}")
        (tmp_path / "list.csv").write_text("\n".join(lines))
        return tmp_path / "list.csv"

    wanted = request(manifest(1), SPECS["gap"], folds=2)
    name = stop(workspace, tmp_path / "list.csv", wanted, monkeypatch, at=8)  # in the second fold
    manifest(8)
    with pytest.raises(RunError, match="no longer those it began with"):
        go_on(workspace, tmp_path / "list.csv", name)


def test_one_that_somebody_works_on_is_left_to_them(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stop(workspace, photos, request(photos, SPECS["gap"]), monkeypatch)
    with store.reopened(workspace.runs, name), pytest.raises(RunError, match="is being worked on"):
        go_on(workspace, photos, name)


def test_where_nothing_is_there_to_go_on_with_nobody_is_told_to(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No checkpoint could be written, or there is but a head that is fitted anew each time."""
    real = files.new_file

    def full(path: Path) -> Any:
        if path.name == "checkpoint.npz":
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(files, "new_file", full)
    with pytest.raises(RunError, match=r"checkpoint\.npz cannot be written \(.*\); make room$"):
        train_head(listed(photos), workspace, request(photos, SPECS["gap"]))
    monkeypatch.setattr("pipeline.training.train_head._check_saved", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_head(listed(photos), workspace, request(photos, HeadSpec.make("logreg", C=1.0)))
    assert "--resume" not in caplog.text
    assert list(workspace.runs.iterdir()) == []


def test_where_a_checkpoint_was_written_before_the_disk_was_full_it_is_told_how_to_go_on(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, written = files.new_file, list[Path]()

    def full(path: Path) -> Any:
        written.extend([path] if path.name == "checkpoint.npz" else [])
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(files, "new_file", full)
    monkeypatch.setattr("pipeline.training.checkpoint._SHARE", 1e9)  # worth it after each epoch
    with pytest.raises(RunError, match=r"make room$"):
        train_head(listed(photos), workspace, request(photos, SPECS["gap"]))
    (name,) = store.unfinished(workspace.runs)
    assert f"train-head --resume {name}" in caplog.text


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "noise": lambda path: path.write_bytes(np.random.default_rng(1).bytes(1000)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"epoch": 3})),
    "another head's": lambda path: Checkpoint(path.parent).save(
        {"model": [], "optimizer": [], "best": []}, {"epoch": 1}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_none_is_refused(
    workspace: Workspace,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    name = stop(workspace, photos, request(photos, SPECS["gap"]), monkeypatch)
    DAMAGE[damage](workspace.runs / f".partial-{name}" / "checkpoint.npz")
    caplog.clear()
    with pytest.raises(RunError, match=r"checkpoint") as caught:
        go_on(workspace, photos, name)
    assert "unsafe" not in str(caught.value)
    assert "--resume" not in caplog.text, "which would end as this did"


def test_the_command_is_killed_listed_and_resumed(workspace: Workspace, photos: Path) -> None:
    command = ("train-head", "--dataset", photos, "--head", "gap", "--epochs", "5")
    whole = icebox(workspace.root, *command, "--json").json
    # Before the third file gets its name: those before are the request and a checkpoint.
    killed = signalled(3, workspace.root, *command, among=["rename"], within=[workspace.runs])
    assert killed.code == -signal.SIGKILL
    (name,) = icebox(workspace.root, "runs", "ls", "--json").json["unfinished"]
    assert (workspace.runs / f".partial-{name}" / "checkpoint.npz").exists()
    refused = icebox(workspace.root, "train-head", "--resume", name, "--epochs", "3")
    assert refused.code == 2
    assert "leave out --epochs" in refused.err
    done = icebox(workspace.root, "train-head", "--resume", name, "--json").json
    assert store.read_run(workspace.runs / done["run"])["summary"]["epochs"] == 5
    histories = [(workspace.runs / run["run"] / "history.json").read_text() for run in (whole, done)]
    assert histories[0] == histories[1]
    assert icebox(workspace.root, "train-head", "--resume", "").err.count("nothing named ''") == 1


def test_what_a_run_killed_right_after_it_was_published_no_longer_needs_is_removed(
    workspace: Workspace, photos: Path
) -> None:
    run = train_head(listed(photos), workspace, request(photos, SPECS["gap"]))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    extra = [run.path / store.REQUEST, run.path / "checkpoint.npz"]
    for path in extra:
        path.write_bytes(b"123")
    assert store.remove_leftovers(workspace.runs, resumable=False, dry_run=True) == (extra, 6)
    assert store.remove_leftovers(workspace.runs, resumable=False) == (extra, 6)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert store.unfinished(workspace.runs) == []
