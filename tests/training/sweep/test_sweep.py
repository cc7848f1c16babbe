"""Many settings on one cache: each tried once, whatever is killed; the winner alone sees the test split."""

from __future__ import annotations

import csv
import json
import logging
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from cached import CLASSES, SPEC, fill, listed, row_of, spec_of, write_images
from clusters import by_hand
from conftest import icebox, wait_until, write_picture
from distributed import Client, LocalCluster
from faults import signalled

import pipeline.extraction.workers.connect
import pipeline.extraction.workers.health
import pipeline.extraction.workers.scheduler_client
import pipeline.training.sweep.sweep
from pipeline.backbone.keras_start import import_keras
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core import hashing
from pipeline.core.errors import IceboxError, MissingFeaturesError, RunError, UsageError
from pipeline.core.spec import HeadSpec
from pipeline.dataset import assign
from pipeline.extraction import measured_rates
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.extraction.workers.connect import ClusterChoice
from pipeline.images import decoding
from pipeline.runs import store
from pipeline.runs.request import DatasetChoice, SweepRequest, TrainRequest
from pipeline.training import heads
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.labelled_features import join_features
from pipeline.training.rows import StoredRows
from pipeline.training.sweep import on_dask
from pipeline.training.sweep.sweep import Sweep, sweep
from pipeline.training.sweep.trial import run_trial
from pipeline.training.train_head import train_head
from pipeline.training.training_data import open_training_data

pytestmark = pytest.mark.usefixtures("no_plots")

GRID = (
    *(HeadSpec.make("gap", epochs=4, batch_size=16, learning_rate=rate) for rate in (1e-4, 0.02)),
    HeadSpec.make("flatten", epochs=4, batch_size=16, hidden=16, learning_rate=0.01),
    HeadSpec.make("logreg", C=1.0),
)
BOTH_KINDS = GRID[2:]  # one head that reads tensors, one that reads their means
LINEAR = tuple(HeadSpec.make("logreg", C=c) for c in (1e-4, 1.0, 1e-2))  # tried at once: TensorFlow has no part in it
SMALL = ("--head", "gap", "--head", "logreg", "--set", "gap.epochs=4", "--set", "gap.learning_rate=1e-4,0.02")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", 40)
    return tmp_path / "photos"


def run(workspace: Workspace, photos: Path, specs: tuple[HeadSpec, ...] = GRID, **more: Any) -> Sweep:
    request = SweepRequest(DatasetChoice(str(photos)), (FeatureChoice(),), specs, decoding.DEFAULT_MAX_PIXELS)
    return sweep(listed(photos), workspace, request, **more)


def about(done: Sweep) -> dict[str, Any]:
    return json.loads((done.path / "sweep.json").read_text())


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Sweep]]:
    """A sweep over the grid, which tests only read, and the workspace it was made in."""
    root = tmp_path_factory.mktemp("ranked")
    write_images(root / "photos", 40)
    with closing(Cache(root / "data" / "cache")) as cache:
        workspace = Workspace(root / "data", cache)
        fill(workspace, listed(root / "photos"))
        yield workspace, run(workspace, root / "photos")


def test_every_setting_is_ranked_and_the_best_is_a_run(ranked: tuple[Workspace, Sweep]) -> None:
    workspace, done = ranked
    assert {row["trial"] for row in done.rows} == {spec.identity for spec in GRID}
    accuracies = [row["val_accuracy"] for row in done.rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert done.rows[-1]["settings"]["learning_rate"] == 1e-4, "which learns next to nothing in four epochs"
    assert all(row["low"] <= row["val_accuracy"] <= row["high"] for row in done.rows)
    assert all(row["seconds"] > 0 and row["parameters"] > 0 and row["bytes"] > 0 for row in done.rows)
    (published,) = store.list_runs(workspace.runs)
    assert published["summary"] == done.best == about(done)["best"]
    assert published["head"] == {"head": done.rows[0]["head"], **done.rows[0]["settings"]}
    assert done.best["val_accuracy"] == done.rows[0]["val_accuracy"]
    assert visible(done.path) == ["leaderboard.csv", "leaderboard.png", "sweep.json", "trials"]
    assert not list(done.path.rglob("head.*")), "the run has it"
    with (done.path / "leaderboard.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in done.rows]


def test_a_trial_is_what_train_head_makes_of_its_settings(
    ranked: tuple[Workspace, Sweep], workspace: Workspace, photos: Path
) -> None:
    """Whatever was trained before it in the same process."""
    done = ranked[1]
    fill(workspace, listed(photos))
    for row in done.rows:
        spec = HeadSpec.make(row["head"], **row["settings"])
        request = TrainRequest(DatasetChoice(str(photos)), FeatureChoice(), spec, decoding.DEFAULT_MAX_PIXELS)
        alone = train_head(listed(photos), workspace, request)
        trial = json.loads((done.path / "trials" / spec.identity / "trial.json").read_text())
        assert json.loads((alone.path / "history.json").read_text()) == trial["history"]
        assert alone.summary["val_accuracy"] == row["val_accuracy"]


def test_the_test_split_has_no_say(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    dataset = listed(photos)
    fill(workspace, dataset)
    one = run(workspace, photos, BOTH_KINDS)
    sides = {row["image"]: row["split"] for row in predictions(workspace, one)}
    with closing(Cache(tmp_path / "other" / "cache")) as cache:
        other = Workspace(tmp_path / "other", cache)

        def spoilt(i: int, row: np.ndarray) -> np.ndarray:
            return row * 0 if sides.get(dataset.names[i]) == "test" else row

        fill(other, dataset, rewrite=spoilt)
        two = run(other, photos, BOTH_KINDS)
    scores = [[(row["trial"], row["val_accuracy"], row["val_loss"]) for row in done.rows] for done in (one, two)]
    assert scores[0] == scores[1]
    assert one.best["accuracy"] > two.best["accuracy"]


def predictions(workspace: Workspace, done: Sweep) -> list[dict[str, str]]:
    with (workspace.runs / done.best["run"] / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_setting_that_diverges_is_ranked_last_and_the_sweep_goes_on(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))
    wild = HeadSpec.make("gap", epochs=3, optimizer="sgd", learning_rate=1000.0, hidden=(64, 64), normalize=False)
    done = run(workspace, photos, (wild, GRID[3]))
    assert done.rows[-1]["trial"] == wild.identity
    if done.rows[-1]["error"] is not None:
        assert "lower --learning-rate" in done.rows[-1]["error"]
    assert done.best["accuracy"] > 0.8


def test_a_regression_that_does_not_fit_memory_is_ranked_last(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))
    request = SweepRequest(
        DatasetChoice(str(photos)), (FeatureChoice(),), GRID, decoding.DEFAULT_MAX_PIXELS, memory=2_000
    )
    done = sweep(listed(photos), workspace, replace(request, specs=GRID[1:2] + GRID[3:]))
    assert [row["head"] for row in done.rows] == ["gap", "logreg"]
    assert "logreg needs all rows in memory" in done.rows[1]["error"]


def test_a_sweep_none_of_whose_settings_could_be_trained_is_not_to_be_gone_on_with(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which would end in the same way."""
    fill(workspace, listed(photos))
    request = SweepRequest(
        DatasetChoice(str(photos)), (FeatureChoice(),), GRID[3:], decoding.DEFAULT_MAX_PIXELS, memory=2_000
    )
    with pytest.raises(RunError, match="none of 1 setting could be trained, the first: logreg needs all rows"):
        sweep(listed(photos), workspace, request)
    assert "--resume" not in caplog.text
    assert list(workspace.sweeps.iterdir()) == []


def test_what_was_killed_goes_on_and_tries_nothing_twice(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(workspace, listed(photos))
    specs = (LINEAR[0], GRID[1], *LINEAR[1:])  # the second is stopped and trained anew
    whole = run(workspace, photos, specs)
    real, tried = heads.fit, list[str]()

    def counted(spec: HeadSpec, *more: Any) -> Any:
        tried.append(spec.identity)
        if len(tried) in (2, 4):
            raise KeyboardInterrupt
        return real(spec, *more)

    monkeypatch.setattr(heads, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, photos, specs)
    (name,) = store.unfinished(workspace.sweeps)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, photos, specs, resume=name)
    done = run(workspace, photos, specs, resume=name)
    assert (done.name, done.reused) == (name, 2)
    interrupted = [tried[1], tried[3]]
    assert interrupted == [specs[1].identity, specs[2].identity]
    assert sorted(tried) == sorted([spec.identity for spec in specs] + interrupted)
    same = ("trial", "val_accuracy", "val_loss", "p_value")
    assert [[row[key] for key in same] for row in done.rows] == [[row[key] for key in same] for row in whole.rows]
    assert store.unfinished(workspace.sweeps) == []


def test_a_checkpoint_that_does_not_fit_does_not_end_a_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As when it was begun by another version."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int32) % 2
    rows = rng.random((40, 8), np.float32) + labels[:, None]
    spec, folder = HeadSpec.make("gap", epochs=2), tmp_path / "trial"
    folder.mkdir()
    Checkpoint(folder).save({"model": [np.zeros(3)], "optimizer": [], "best": []}, {"epoch": 1})
    run_trial(spec, heads.Data(rows, labels, rows, labels, 2), folder)
    assert json.loads((folder / "trial.json").read_text())["error"] is None
    assert not Checkpoint(folder).path.exists()
    assert "tried anew" in caplog.text


def test_killed_after_the_winner_was_published_there_is_no_second_one(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test split is touched once."""
    fill(workspace, listed(photos))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.sweep.sweep.write_leaderboard", killed)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, photos, LINEAR)
    (published,) = visible(workspace.runs)
    (name,) = store.unfinished(workspace.sweeps)
    done = run(workspace, photos, LINEAR, resume=name)
    assert done.best["run"] == published
    assert visible(workspace.runs) == [published]


def test_a_sweep_that_an_earlier_version_left_without_its_note_and_heads_is_finished(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it removed before the sweep was published; trying to go on, it noted a run that never came to be."""
    fill(workspace, listed(photos))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.sweep.sweep.draw_leaderboard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(workspace, photos, GRID[-1:])
    (name,), (published,) = store.unfinished(workspace.sweeps), visible(workspace.runs)
    for path in workspace.sweeps.rglob("head.*"):
        path.unlink()
    (note,) = workspace.sweeps.rglob("winner.json")
    note.write_text('{"run": "a-run-that-never-came-to-be"}')
    done = run(workspace, photos, GRID[-1:], resume=name)
    assert (done.best["run"], visible(workspace.runs)) == (published, [published])


def test_a_sweep_whose_images_changed_is_not_gone_on_with(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(workspace, listed(photos))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.sweep.sweep.leaderboard", lambda trials: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(workspace, photos, LINEAR)
    (name,) = store.unfinished(workspace.sweeps)
    (photos / "ant" / "000.png").rename(photos / "bee" / "moved.png")
    with pytest.raises(RunError, match="no longer those it began with"):
        run(workspace, photos, LINEAR, resume=name)


def test_only_the_best_head_is_kept_on_the_way(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(workspace, listed(photos))
    kept = list[int]()
    monkeypatch.setattr(
        "pipeline.training.sweep.sweep._report",
        lambda trial: kept.append(len(list(workspace.sweeps.rglob("head.json")))),
    )
    done = run(workspace, photos, (LINEAR[0], GRID[0], *LINEAR[1:]))
    assert kept == [1, 1, 1, 1]
    losses = [row["val_loss"] for row in done.rows]
    assert len(set(losses)) == 4, "each is better or worse than those before it"


# Several backbones


def blurred(_: int, row: np.ndarray) -> np.ndarray:
    """A row that tells less of the class."""
    return row + np.random.default_rng(int(row.sum() * 1e6)).normal(0, 6, (1, 1, 8)).astype(np.float32)


PAIR = ("inception_v3", "mobilenet_v2")
TWO = (GRID[1], GRID[3])


def fill_both(workspace: Workspace, photos: Path, **more: Any) -> None:
    """Rows of two backbones, the first one much the worse."""
    fill(workspace, listed(photos), rewrite=blurred)
    fill(workspace, listed(photos), spec=spec_of("mobilenet_v2"), **more)


def run_both(
    workspace: Workspace, photos: Path, specs: tuple[HeadSpec, ...] = TWO, names: tuple[str, ...] = PAIR, **more: Any
) -> Sweep:
    choices = tuple(FeatureChoice(backbone=name) for name in names)
    request = SweepRequest(DatasetChoice(str(photos)), choices, specs, decoding.DEFAULT_MAX_PIXELS)
    return sweep(listed(photos), workspace, request, **more)


def test_heads_on_several_backbones_are_ranked_together(workspace: Workspace, photos: Path) -> None:
    fill_both(workspace, photos)
    measured_rates.remember(workspace, spec_of("mobilenet_v2"), 250.0, 120)
    done = run_both(workspace, photos)
    assert [row["rank"] for row in done.rows] == [1, 2, 3, 4]
    assert {(row["backbone"], row["head"]) for row in done.rows} == {(n, h) for n in PAIR for h in ("gap", "logreg")}
    first, last = done.rows[0], done.rows[-1]
    assert (first["backbone"], last["backbone"]) == ("mobilenet_v2", "inception_v3")
    assert (first["images_per_second"], last["images_per_second"]) == (250.0, None), "measured here, and not"
    assert first["bytes_per_row"] > 0
    assert last["p_value"] < 0.05
    assert not last["within_noise"]
    assert len(list((done.path / "trials").iterdir())) == 4, "a folder each"
    (published,) = store.list_runs(workspace.runs)
    assert published["features"] == spec_of("mobilenet_v2").to_dict() == about(done)["features"]
    assert published["asked"]["features"]["backbone"] == published["summary"]["backbone"] == "mobilenet_v2"
    assert [each["backbone"] for each in about(done)["backbones"]] == list(PAIR)
    assert {"leaderboard.csv", "leaderboard.png", "cost.png", "sweep.json"} <= set(visible(done.path))
    with (done.path / "leaderboard.csv").open() as file:
        assert [row["backbone"] for row in csv.DictReader(file)] == [row["backbone"] for row in done.rows]


def test_a_backbone_among_several_is_judged_as_alone(workspace: Workspace, photos: Path) -> None:
    fill_both(workspace, photos)
    both, alone = run_both(workspace, photos), run_both(workspace, photos, names=PAIR[:1])
    kept = ("head", "settings", "val_accuracy", "val_loss", "parameters", "bytes", "space")
    of_both = [[row[key] for key in kept] for row in both.rows if row["backbone"] == PAIR[0]]
    assert of_both == [[row[key] for key in kept] for row in alone.rows]
    assert {row["trial"] for row in alone.rows} == {spec.identity for spec in TWO}, "as in sweeps of earlier versions"


def test_an_image_without_a_row_in_one_space_is_left_out_of_all(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that the same images are compared: it is undecodable by now."""
    dataset = listed(photos)
    keys = [hashing.image_key(dataset.read(i)) for i in range(len(dataset))]
    validated = np.flatnonzero(assign(dataset, keys).sides == "val").tolist()
    fill_both(workspace, photos, leave_out={validated[1]})
    bad = {keys[validated[1]]: "torn"}
    workspace.cache.index.remember_quarantined(bad, decoding.decoder_version(), decoding.DEFAULT_MAX_PIXELS)
    done = run_both(workspace, photos, LINEAR[:2])
    assert "1 image is left out: undecodable by now" in caplog.text
    assert [each.reason for each in done.quarantined] == ["torn"]
    trials = [json.loads(path.read_text()) for path in done.path.glob("trials/*/trial.json")]
    assert [trial["images"] for trial in trials] == [len(validated) - 1] * 4
    assert run_both(workspace, photos, LINEAR[:1], PAIR[:1]).quarantined == [], "alone, its row is as good as ever"


def test_what_makes_missing_rows_is_said_for_all_backbones_at_once(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))
    names = ("xception", *PAIR)
    with pytest.raises(MissingFeaturesError, match="2 of 3 backbones lack features of some images") as caught:
        run_both(workspace, photos, names=names)
    assert caught.value.lacking == (0, 2)
    assert not workspace.sweeps.exists()


def test_one_space_under_two_names_is_refused(workspace: Workspace, photos: Path) -> None:
    space = fill(workspace, listed(photos)).name
    choices = (FeatureChoice(space=space), FeatureChoice(backbone="inception_v3"))
    request = SweepRequest(DatasetChoice(str(photos)), choices, TWO, decoding.DEFAULT_MAX_PIXELS)
    with pytest.raises(UsageError, match=f"two of the backbones mean the same features, {space}"):
        sweep(listed(photos), workspace, request)


def test_a_stopped_sweep_of_several_goes_on_in_the_spaces_it_began_with(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_both(workspace, photos)
    whole, real, tried = run_both(workspace, photos, LINEAR[:2]), heads.fit, list[Any]()

    def counted(*arguments: Any) -> Any:
        tried.append(arguments)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(heads, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        run_both(workspace, photos, LINEAR[:2])
    (name,) = store.unfinished(workspace.sweeps)
    stored = store.read_request(workspace.sweeps, name)
    request = SweepRequest.of_request(stored)
    assert [each["backbone"] for each in stored["asked"]["features"]] == list(PAIR)
    assert [each.space for each in request.features] == [spec_of(each).directory for each in PAIR]
    done = sweep(listed(photos), workspace, request, resume=name)
    assert (done.reused, len(tried)) == (2, 5)
    same = ("trial", "backbone", "val_accuracy", "val_loss", "p_value")
    assert [[row[key] for key in same] for row in done.rows] == [[row[key] for key in same] for row in whole.rows]


def test_what_one_backbone_was_asked_for_is_stored_as_by_earlier_versions() -> None:
    choice = FeatureChoice(backbone="mobilenet_v2")
    one = SweepRequest(DatasetChoice("digits"), (choice,), TWO, 1_000)
    assert one.to_dict()["features"]["backbone"] == "mobilenet_v2"
    old = json.loads(json.dumps(one.to_dict()))
    for name in ("backbone", "input_size", "scaling"):
        del old["features"][name]
    assert SweepRequest.from_dict(old) == replace(one, features=(FeatureChoice(),))
    assert SweepRequest.of_request({"asked": old, "space": "a-space"}).features == (FeatureChoice(space="a-space"),)
    several = replace(one, features=(choice, FeatureChoice()))
    assert SweepRequest.from_dict(json.loads(json.dumps(several.to_dict()))) == several


def save_network(path: Path, width: int) -> Path:
    """A network of one's own for images of 32 pixels, untrained."""
    keras = import_keras()
    keras.utils.set_random_seed(width)
    inputs = keras.Input((32, 32, 3))
    output = keras.layers.Conv2D(width, 3, 4, activation="relu", name="last")(inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    keras.Model(inputs, output).save(path)
    return path


def test_the_command_says_what_is_missing_or_computes_it_first(tmp_path: Path) -> None:
    data, photos = tmp_path / "data", tmp_path / "photos"
    for i in range(30):
        write_picture(photos / ("light" if i % 2 else "dark") / f"{i}.png", seed=i)
    one, other = save_network(tmp_path / "one,small.keras", 4), save_network(tmp_path / "wide.keras", 8)
    begun = ("features", "--dataset", photos, "--backbone", other, "--scaling", "x/255", "--limit", "4")
    assert icebox(data, *begun).code == 0
    options = ("--dataset", photos, "--backbone", one, "--backbone", f"{other},inception_v3", "--head", "logreg")
    request = ("sweep", *options, "--weights", "untrained:3", "--fit", "crop")
    unknown = icebox(data, *request)
    assert unknown.code == 2
    assert "one,small.keras is not known from before: say by --scaling" in unknown.err
    pair = ("sweep", "--dataset", photos, "--backbone", other, "--backbone", one, "--head", "logreg")
    assert icebox(data, *begun[:4], one, *begun[5:]).code == 0
    missing = icebox(data, *pair, "--json")
    assert missing.code == 1
    assert "2 of 2 backbones lack features" in missing.json["error"]
    assert missing.err.splitlines()[-2:] == missing.json["commands"]
    assert [shlex.split(line)[-2:] for line in missing.json["commands"]] == [
        ["--backbone", str(other)],
        ["--backbone", str(one)],
    ]
    done = icebox(data, *pair, "--compute", "--json")
    assert done.code == 0, done.err
    assert done.json["features_computed"] == 52
    assert {row["backbone"] for row in done.json["runs"]} == {"one,small.keras", "wide.keras"}
    again = icebox(data, *pair, "--compute")
    assert again.code == 0, again.err
    assert "rank  backbone" in again.err
    assert "loading TensorFlow" not in again.err


def test_a_scaling_is_for_the_one_file_that_needs_it_said(tmp_path: Path) -> None:
    """That is not known yet, or known with several."""
    data, photos = tmp_path / "data", tmp_path / "photos"
    for i in range(30):
        write_picture(photos / ("light" if i % 2 else "dark") / f"{i}.png", seed=i)
    one, other = save_network(tmp_path / "one.keras", 4), save_network(tmp_path / "other.keras", 8)
    pair = ("sweep", "--dataset", photos, "--backbone", f"{one},{other}", "--head", "logreg", "--json")
    neither = icebox(data, *pair, "--scaling", "x/255")
    assert neither.code == 2
    assert f"found 2 that need it: {one}, {other}" in neither.err
    features = ("features", "--dataset", photos, "--scaling")
    assert icebox(data, *features, "127,128", "--backbone", one).code == 0
    lacking = icebox(data, *pair, "--scaling", "x/255").json["commands"]
    assert [shlex.split(line)[-4:] for line in lacking] == [["--backbone", str(other), "--scaling", "x/255"]]
    assert icebox(data, *features, "x/255", "--backbone", other).code == 0
    both_known = icebox(data, *pair, "--scaling", "x/255")
    assert both_known.code == 2
    assert "each of the 2 files among --backbone is known with one; leave it out" in both_known.err
    assert icebox(data, *features, "x/255", "--backbone", one, "--limit", "4").code == 0
    unsaid = icebox(data, *pair)
    assert unsaid.code == 1
    assert "one.keras is known with --scaling 127,128 and x/255; say which" in unsaid.err
    done = icebox(data, *pair, "--scaling", "127,128")
    assert done.code == 0, done.err
    assert len({row["space"] for row in done.json["runs"]}) == 2
    assert done.json["features_computed"] == 0
    with closing(Cache(data / "cache")) as cache:
        (spoilt,) = (each for each in cache.spaces() if each.totals().rows == 4)
    shutil.rmtree(spoilt.path)  # as docs/backbones.md says of a scaling that was a mistake
    assert icebox(data, *pair).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "mixed8"), "--layer names a layer of one backbone"),
        (("--space", "a"), "--space names features of one backbone"),
        (("--scaling", "x/255"), "found no file among --backbone"),
        (("--weights", "w.weights.h5"), "'w.weights.h5' are of one backbone"),
        (("--weights", "sha256:" + "0" * 64), "with several it takes auto, imagenet or untrained"),
        (("--backbone", "mobilnet_v2"), "mobilnet_v2"),
    ],
)
def test_what_cannot_be_meant_for_several_backbones_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = icebox(tmp_path, "sweep", "--backbone", "inception_v3,mobilenet_v2", *options)
    assert done.code == 2, done.err
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_a_list_of_no_backbones_is_refused(tmp_path: Path) -> None:
    """Rather than taken for the default."""
    done = icebox(tmp_path, "sweep", "--backbone", ",")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "--backbone takes names of the table or .keras files" in done.err


# On workers


def cluster_of(count: int, threads: int) -> Any:
    """A real Dask scheduler with `count` worker processes; by default its dashboard would listen to everybody."""
    return LocalCluster(n_workers=count, threads_per_worker=threads, processes=True, dashboard_address="127.0.0.1:0")


def test_workers_find_what_is_found_here(workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fill_both(workspace, photos)
    clusters = None, ClusterChoice(workers=2)
    here, there = (run_both(workspace, photos, BOTH_KINDS, cluster=cluster) for cluster in clusters)
    same = ("trial", "backbone", "val_accuracy", "val_loss", "p_value", "parameters", "bytes")
    assert [[row[key] for key in same] for row in here.rows] == [[row[key] for key in same] for row in there.rows]
    assert here.best["accuracy"] == there.best["accuracy"]
    assert len({heads.READS[spec.head] for spec in BOTH_KINDS}) == 2
    assert caplog.text.count("dashboard of the scheduler") == 1, "whatever rows they read, workers are started once"


def keep_rows(spec: HeadSpec, data: heads.Data, folder: Path) -> None:
    np.save(folder, np.asarray(data.train))


def test_workers_read_the_rows_of_each_sweep_anew(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    """Though it tries the same setting first, with rows at the same place in the memory of the program."""
    fill(workspace, listed(photos))
    labelled = join_features(listed(photos), workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS)
    cluster, spec = ClusterChoice(workers=1), HeadSpec.make("logreg")
    with (
        open_training_data(labelled, [spec], None, sides=("train", "val"), held=False) as training_data,
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as started,
        Client(started, set_as_default=False) as client,
    ):
        data, found = training_data.data(), list[np.ndarray]()
        for name in ("one", "two"):
            tasks = {"a setting": (spec, str(tmp_path / name))}
            assert list(on_dask.run_on_dask(client, cluster, keep_rows, tasks, data, None, 0)) == ["a setting"]
            found.append(np.load(tmp_path / f"{name}.npy"))
            object.__setattr__(data, "train", data.val)  # other rows in the same object
        assert np.array_equal(found[0], np.asarray(training_data.rows["train"][np.arange(len(found[0]))]))
        assert np.array_equal(found[1], np.asarray(training_data.rows["val"][np.arange(len(found[1]))]))
        assert len(found[0]) != len(found[1])


@pytest.mark.parametrize(("limit", "streamed"), [(0, False), ("1TB", False), ("1MB", True)])
def test_a_worker_keeps_of_the_rows_what_its_memory_limit_leaves_room_for(
    workspace: Workspace, photos: Path, limit: int | str, streamed: bool
) -> None:
    """Not what the machine would."""
    fill(workspace, listed(photos))
    labelled = join_features(listed(photos), workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS)
    with (
        open_training_data(
            labelled, [HeadSpec.make("logreg")], None, sides=("train", "val"), held=False
        ) as training_data,
        dask.config.set({"distributed.worker.memory.pause": False}),  # so that the least limit keeps it from nothing
        LocalCluster(n_workers=1, processes=False, memory_limit=limit, dashboard_address="127.0.0.1:0") as started,
        Client(started, set_as_default=False) as client,
    ):
        rows = client.submit(on_dask._read, training_data.data(), None, 0, 1).result().train
    assert isinstance(rows, StoredRows) == streamed


def end_first_worker(spec: HeadSpec, data: heads.Data, folder: Path) -> None:
    """Kill the worker that is the first to try anything; try it on any other."""
    killed = folder.parents[1] / "killed"
    if not killed.exists():
        killed.write_text(folder.name)
        end_worker()
    run_trial(spec, data, folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_costs_its_trial_a_second_try(
    workspace: Workspace, photos: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone one is started again and given the rows again."""
    fill(workspace, listed(photos))
    monkeypatch.setattr(pipeline.training.sweep.sweep, "run_trial", end_first_worker)
    with cluster_of(workers, 1) as started:
        done = run(workspace, photos, LINEAR, cluster=ClusterChoice(scheduler=started.scheduler_address))
    assert (done.path / "killed").read_text() in {row["trial"] for row in done.rows}
    assert [row["error"] for row in done.rows] == [None] * len(LINEAR)


def end_worker(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_started_here_that_are_killed_again_and_again_are_given_up(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(workspace, listed(photos))
    monkeypatch.setattr(pipeline.training.sweep.sweep, "run_trial", end_worker)
    with pytest.raises(IceboxError, match=r"was lost \d times before it had done anything|died again and again"):
        run(workspace, photos, GRID[-1:], cluster=ClusterChoice(workers=1))
    assert store.unfinished(workspace.sweeps) == []


def test_a_worker_whose_memory_limit_is_too_small_is_given_up_and_the_limit_named(
    workspace: Workspace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask pauses it; that a nanny ends it instead, extraction/workers/test_pool.py shows."""
    monkeypatch.setattr(pipeline.extraction.workers.health, "PAUSED_S", 2.0)
    fill(workspace, listed(photos))
    with by_hand(tmp_path / "cluster", workers=0) as cluster:
        cluster.start_worker(memory_limit="100MB", DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE="False")
        with Client(cluster.address, set_as_default=False, timeout=300) as client:
            wait_until(lambda: [each["status"] for each in client.scheduler_info()["workers"].values()] == ["paused"])
        with pytest.raises(IceboxError, match=r"its memory limit (of|is) 100 MB"):
            run(workspace, photos, GRID[-1:], cluster=ClusterChoice(scheduler=cluster.address))


def test_a_scheduler_that_is_not_there_is_told(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.workers.connect, "_TIMEOUT_S", 1)
    fill(workspace, listed(photos))
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        run(workspace, photos, cluster=ClusterChoice(scheduler="tcp://127.0.0.1:9"))
    assert store.unfinished(workspace.sweeps) == []


def test_an_address_that_is_none_is_told(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))
    with pytest.raises(UsageError, match="--scheduler takes an address such as"):
        run(workspace, photos, cluster=ClusterChoice(scheduler="foo"))


@pytest.mark.parametrize("is_noticed", [False, True])
def test_a_scheduler_lost_between_rows_of_two_kinds_is_told(
    workspace: Workspace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_noticed: bool
) -> None:
    fill(workspace, listed(photos))
    with by_hand(tmp_path / "cluster", workers=1) as cluster:
        cluster.wait_for_workers(1)
        prepared, kinds = pipeline.training.sweep.sweep.open_training_data, list[Any]()
        submitted, clients = pipeline.training.sweep.sweep.run_on_dask, list[Client]()

        def submitted_by(client: Client, *arguments: Any) -> Iterator[str]:
            clients.append(client)
            return submitted(client, *arguments)

        def prepared_without(*arguments: Any, **more: Any) -> Any:
            kinds.append(arguments)
            if len(kinds) == 2:
                cluster.stop()
                if is_noticed:
                    wait_until(lambda: clients[0].status != "running", 300)
            return prepared(*arguments, **more)

        monkeypatch.setattr(pipeline.training.sweep.sweep, "open_training_data", prepared_without)
        monkeypatch.setattr(pipeline.training.sweep.sweep, "run_on_dask", submitted_by)
        with pytest.raises(IceboxError, match=r"is gone; start it again$"):
            run(workspace, photos, BOTH_KINDS[::-1], cluster=ClusterChoice(scheduler=cluster.address))


def end_all_workers(spec: HeadSpec, data: heads.Data, folder: Path) -> None:
    """Kill the worker and its nanny, which would start another."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def test_if_all_workers_are_gone_others_are_waited_for_and_then_it_is_told(
    workspace: Workspace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(workspace, listed(photos))
    monkeypatch.setattr(pipeline.extraction.workers.scheduler_client, "PATIENCE_S", 2.0)
    monkeypatch.setattr(pipeline.training.sweep.sweep, "run_trial", end_all_workers)
    with by_hand(tmp_path / "cluster", workers=1) as cluster:
        cluster.wait_for_workers(1)
        with pytest.raises(IceboxError, match=r"has had no worker for 2 s; start some by `dask worker ADDRESS`$"):
            run(workspace, photos, LINEAR, cluster=ClusterChoice(scheduler=cluster.address))


# The command


def test_the_command_ends_in_a_leaderboard(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))
    done = icebox(workspace.root, "sweep", "--dataset", photos, *SMALL, "--json")
    assert done.code == 0, done.err
    assert [row["rank"] for row in done.json["runs"]] == [1, 2, 3]
    assert done.json["best"]["accuracy"] > 0.8
    assert done.json["features_computed"] == 0
    shown = icebox(workspace.root, "sweep", "--dataset", photos, *SMALL).err
    assert "rank  head" in shown
    assert "learning_rate=0.02" in shown
    assert "the best" in shown
    assert f"kept as the run {sorted(visible(workspace.runs))[-1]}" in shown


def test_a_killed_command_is_listed_and_resumed(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))
    options = ("--dataset", photos, "--head", "gap", "--set", "seed=0,1,2,3", "--set", "epochs=20")
    # Before the first file is removed: the checkpoint of a setting whose outcome is written.
    killed = signalled(1, workspace.root, "sweep", *options, among=["remove"], within=[workspace.sweeps])
    assert killed.code == -signal.SIGKILL
    assert len(list(workspace.sweeps.glob(".partial-*/trials/*/trial.json"))) == 1
    (name,) = icebox(workspace.root, "runs", "ls", "--json").json["unfinished_sweeps"]
    refused = icebox(workspace.root, "sweep", "--resume", name, "--set", "seed=1")
    assert refused.code == 2
    assert "leave out --set" in refused.err
    done = icebox(workspace.root, "sweep", "--resume", name, "--json")
    assert done.code == 0, done.err
    assert done.json["reused"] == 1
    assert len(done.json["runs"]) == 4
    again = icebox(workspace.root, "sweep", "--resume", name)
    assert again.code == 1
    assert f"{name} is finished" in again.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--head", "resnet"), "no head named 'resnet'"),
        (("--head", "logreg", "--set", "dropout=0.5"), "the logreg head has no dropout"),
        (("--head", "gap", "--set", "head=gap"), "the gap head has no head"),
        (("--head", "gap", "--set", "cls=1"), "the gap head has no cls"),
        (("--seed", "3"), "--seed is of the draw"),
        (("--random", "0"), "Invalid value"),
    ],
)
def test_wrong_use_is_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = icebox(tmp_path, "sweep", *options)
    assert done.code == 2
    assert message in done.err


def test_the_rows_these_tests_learn_from_tell_the_classes_apart() -> None:
    """The control: the channel of its number marks the class."""
    rows = np.stack([row_of(bytes([i] * 32), i % len(CLASSES)) for i in range(30)])
    assert (rows.mean(axis=(1, 2))[:, : len(CLASSES)].argmax(axis=1) == np.arange(30) % len(CLASSES)).all()
    assert SPEC.untrained is False
