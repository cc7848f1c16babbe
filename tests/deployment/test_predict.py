"""`predict`: every kind of run, from images as from cached rows; ensembles; bad images are told, not guessed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import SPEC, Finished, command_line, environment, icebox, unseal, write_picture
from deployed import KINDS, MOST, Deployed, know_tiny
from own_networks import SIZE, own_choice, write_network, write_sides
from served import Page, served

from pipeline.backbone.build import build as build_backbone
from pipeline.backbone.untrained import initialise, recipe_of
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import DatasetError, IndexDamagedError, RunError, SpecError, WeightsError
from pipeline.core.hashing import image_key
from pipeline.core.spec import HeadSpec
from pipeline.dataset import open_dataset, open_images
from pipeline.deployment import predict
from pipeline.deployment.predict import ImagePrediction, top_classes
from pipeline.deployment.serve import service
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.runs import store
from pipeline.runs.checksums import CHECKSUMS
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.training import heads
from pipeline.training.open_run import TrainedRun, open_run
from pipeline.training.train_head import train_head

GONE = "cannot be read: No such file or directory"
NO_IMAGE = "not an image in a supported format (JPEG, PNG, WebP, BMP, TIFF, GIF)"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Workspace]:
    """A data directory without a single row."""
    with closing(Cache(tmp_path / "elsewhere" / "cache")) as cache:
        know_tiny(cache)
        yield Workspace(tmp_path / "elsewhere", cache)


def said(
    found: list[TrainedRun], paths: Sequence[Path | str], workspace: Workspace, **more: Any
) -> list[ImagePrediction]:
    images = open_images([str(path) for path in paths])
    return list(predict.predict(found, images, workspace, max_pixels=MOST, **more))


def probabilities(answers: list[ImagePrediction]) -> np.ndarray:
    return np.stack([answer.probabilities for answer in answers if answer.probabilities is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_answered_as_its_cached_row_is(deployed: Deployed, elsewhere: Workspace, kind: str) -> None:
    check_answered_as_its_row_is(deployed, elsewhere, kind, within=1e-5)


def test_with_inception_an_image_is_answered_as_its_cached_row_is(
    deployed_inception: Deployed, elsewhere: Workspace
) -> None:
    check_answered_as_its_row_is(deployed_inception, elsewhere, "gap", within=2e-3)  # its rows are float16


def check_answered_as_its_row_is(place: Deployed, elsewhere: Workspace, kind: str, within: float) -> None:
    run = place.run(kind)
    computed = said([run], place.files, elsewhere)
    assert [answer.name for answer in computed] == [str(path) for path in place.files]
    assert not any(answer.cached for answer in computed)
    shares = probabilities(computed)
    assert shares.shape == (32, 2)
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-5)
    with place.workspace() as workspace:
        read = said([run], place.files, workspace)
    assert all(answer.cached for answer in read) == (kind != "finetune")  # whose backbone no rows are of
    assert np.abs(shares - probabilities(read)).max() <= within


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_split_is_answered_as_it_was_measured(deployed: Deployed, kind: str) -> None:
    run = deployed.run(kind)
    lines = list(csv.DictReader((run.path / "predictions.csv").open()))
    measured = {line["image"]: float(line["p:cats"]) for line in lines if line["split"] == "test"}
    with deployed.workspace() as workspace:
        answers = said([run], [deployed.photos / name for name in measured], workspace)
    assert len(measured) == 6
    assert np.ptp(list(measured.values())) > 0.02, "another image's would do"
    assert probabilities(answers)[:, 0] == pytest.approx(list(measured.values()), abs=1e-5)


def test_cached_rows_are_what_the_head_reads(deployed: Deployed) -> None:
    run = deployed.run("gap")
    with deployed.workspace() as workspace:
        space = workspace.cache.open(run.spec.directory)
        keys = [image_key(path.read_bytes()) for path in deployed.files]
        expected = heads.load(run.path).predict(space.read(keys, "pooled"))
        assert np.array_equal(probabilities(said([run], deployed.files, workspace)), expected)


def test_several_runs_are_averaged_whatever_they_read(deployed: Deployed, elsewhere: Workspace) -> None:
    kinds = ("logreg", "flatten", "finetune")
    found, some = [deployed.run(kind) for kind in kinds], deployed.files[:5]
    alone = [probabilities(said([run], some, elsewhere)) for run in found]
    together = probabilities(said(found, some, elsewhere))
    assert np.abs(together - np.mean(alone, axis=0)).max() < 1e-5
    assert np.abs(together - alone[0]).max() > 1e-3
    with deployed.workspace() as workspace:  # some from rows, one from images
        mixed = said(found, some, workspace)
    assert np.abs(probabilities(mixed) - together).max() < 1e-5
    assert not any(answer.cached for answer in mixed)


def test_folds_count_as_one_run_each(deployed: Deployed) -> None:
    run, other = deployed.run("folds"), deployed.run("gap")
    with deployed.workspace() as workspace:
        space = workspace.cache.open(run.spec.directory)
        rows = space.read([image_key(path.read_bytes()) for path in deployed.files], "pooled")
        members = [heads.load(run.path / f"fold-{number}").predict(rows) for number in (1, 2)]
        assert np.allclose(probabilities(said([run], deployed.files, workspace)), np.mean(members, axis=0), atol=1e-6)
        both = probabilities(said([run, other], deployed.files, workspace))
    expected = (np.mean(members, axis=0) + heads.load(other.path).predict(rows)) / 2
    assert np.allclose(both, expected, atol=1e-6)


def test_windows_make_no_difference(deployed: Deployed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that are there, images that are not, copies of both and bad ones, in windows of five."""
    fresh = [write_picture(tmp_path / f"{i}.png", seed=900 + i) for i in range(4)]
    (bad := tmp_path / "bad.png").write_text("no image")
    copy = shutil.copy(deployed.files[3], tmp_path / "copy.png")
    paths = [deployed.files[3], *fresh, bad, *deployed.files[:4], Path(copy), fresh[0], bad, tmp_path / "0.png"]
    with deployed.workspace() as workspace:
        whole = said([deployed.run("gap")], paths, workspace)
        monkeypatch.setattr(predict, "WINDOW", 5)
        parts = said([deployed.run("gap")], paths, workspace)
    assert [(a.name, a.reason, a.cached) for a in whole] == [(a.name, a.reason, a.cached) for a in parts]
    assert [answer.name for answer in whole] == [str(path) for path in paths]
    assert np.abs(probabilities(whole) - probabilities(parts)).max() < 1e-5
    assert [answer.probabilities is None for answer in whole] == [path == bad for path in paths]
    assert np.array_equal(probabilities(whole)[0], probabilities(whole)[9])


def test_a_file_that_changes_meanwhile_is_answered_as_it_is_now(
    deployed: Deployed, elsewhere: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its former copies as they are, whichever of them was to answer for all."""
    paths = [tmp_path / f"{name}.png" for name in ("changed", "copy", "spoilt", "twin", "gone", "other")]
    for i, path in enumerate(paths):
        shutil.copy(deployed.files[i // 2], path)
    identify = predict.identify

    def before(*arguments: Any, **options: Any) -> Any:
        found = identify(*arguments, **options)
        shutil.copy(deployed.files[9], paths[0])
        paths[2].write_text("no image")
        paths[4].unlink()
        return found

    expected = probabilities(said([deployed.run("gap")], [deployed.files[i] for i in (9, 0, 1, 2)], elsewhere))
    monkeypatch.setattr(predict, "identify", before)
    answers = said([deployed.run("gap")], paths, elsewhere)
    assert np.abs(probabilities(answers) - expected).max() < 1e-5, "but for rounding: they come in another batch"
    assert [answer.reason for answer in answers] == ["", "", NO_IMAGE, "", GONE, ""]


def test_what_is_behind_addresses_is_fetched_once_and_answered_alike(
    deployed: Deployed, elsewhere: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    files = deployed.files[:4]
    expected = probabilities(said([deployed.run("gap")], files, elsewhere))
    with served() as site:
        site.pages = {f"/{i}": Page(path.read_bytes()) for i, path in enumerate(files)}
        urls = [f"{site.address}/{i}" for i in (0, 1, 2, 3, 9)]
        answers = said([deployed.run("gap")], urls, elsewhere)
        assert site.gets() == {f"/{i}": 1 for i in (0, 1, 2, 3, 9)}
    assert [answer.reason for answer in answers] == ["", "", "", "", "cannot be read: HTTP 404 Not Found"]
    assert np.abs(probabilities(answers[:4]) - expected).max() < 1e-6


def test_progress_ends_at_the_number_of_images(deployed: Deployed, elsewhere: Workspace, tmp_path: Path) -> None:
    (bad := tmp_path / "bad.png").write_text("no image")
    steps = list[float]()
    paths = [*deployed.files[:3], bad, deployed.files[0]]
    said([deployed.run("gap"), deployed.run("freeze")], paths, elsewhere, advance=steps.append)
    assert sum(steps) == pytest.approx(5)


def test_a_file_that_cannot_be_read_is_told(deployed: Deployed, tmp_path: Path) -> None:
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with deployed.workspace() as workspace:
        gone, pipe, good = said([deployed.run("logreg")], [link, tmp_path / "pipe.png", deployed.files[0]], workspace)
    assert (gone.probabilities, gone.reason) == (None, GONE)
    assert (pipe.probabilities, pipe.reason) == (None, "cannot be read: not a regular file")
    assert good.cached


def test_runs_of_other_classes_are_not_averaged(deployed: Deployed, elsewhere: Workspace) -> None:
    run = deployed.run("logreg")
    with pytest.raises(DatasetError, match=r"the classes are not those of the run .*: it has no cows and the run does"):
        said([run, replace(run, classes=["cats", "cows"])], deployed.files, elsewhere)


def test_a_run_of_another_preprocessing_is_refused(deployed: Deployed, elsewhere: Workspace) -> None:
    run = deployed.run("logreg")
    older = replace(run, spec=replace(run.spec, decode="rgb8-1", resize="area-0"))
    with pytest.raises(SpecError, match=r"by another version of Icebox: decode rgb8-1, not .*, resize area-0, not "):
        said([older], deployed.files, elsewhere)


@pytest.mark.parametrize("kind", ["gap", "freeze"])
def test_a_head_of_other_classes_than_its_run_is_refused(deployed: Deployed, elsewhere: Workspace, kind: str) -> None:
    run = replace(deployed.run(kind), classes=["cats", "cows", "dogs"])
    with deployed.workspace() as full:
        for workspace in (full, elsewhere):
            with pytest.raises(RunError, match=r"is of another run: it does not tell 3 classes apart by rows of "):
                said([run], deployed.files, workspace)


def test_weights_that_are_gone_are_asked_for(deployed_inception: Deployed, elsewhere: Workspace) -> None:
    run = deployed_inception.run("gap")
    lost = replace(run, spec=replace(run.spec, weights="sha256:" + "0" * 64), weights="mine.weights.h5")
    with pytest.raises(WeightsError, match=r"was computed with mine\.weights\.h5 .* give the file by `--weights FILE`"):
        said([lost], deployed_inception.files, elsewhere)


def test_weights_given_by_name_are_taken(deployed_inception: Deployed, elsewhere: Workspace, tmp_path: Path) -> None:
    """Features of a file that the index has never seen."""
    run, path, some = deployed_inception.run("gap"), tmp_path / "mine.weights.h5", deployed_inception.files[:2]
    network = build_backbone("inception_v3")
    initialise(network, recipe_of("inception_v3"), 0)
    network.save_weights(path)
    renamed = replace(run, spec=replace(run.spec, weights="sha256:" + files.sha256_file(path)))
    answers = said([renamed], some, elsewhere, weights=str(path))
    given = said([run], some, elsewhere, weights="untrained:0")
    assert np.allclose(probabilities(answers), probabilities(given), atol=1e-5)


def test_weights_of_something_else_are_refused(
    deployed_inception: Deployed, deployed: Deployed, elsewhere: Workspace
) -> None:
    head = deployed_inception.run("gap")
    for run, message in (
        (head, r"were computed with untrained.* \(untrained:.*\), not with untrained:7; leave it out"),
        (deployed.run("finetune"), "a full model has its own weights; leave out untrained:7"),
    ):
        with pytest.raises(SpecError, match=message):
            said([run], deployed.files, elsewhere, weights="untrained:7")
    assert said([head], deployed.files[:1], elsewhere, weights="untrained:0")[0].probabilities is not None


def test_the_likeliest_are_in_order() -> None:
    shares = np.array([0.1, 0.4, 0.1, 0.4], np.float32)
    assert [label for label, _ in top_classes(shares, ["a", "b", "c", "d"], 3)] == ["b", "d", "a"]
    assert len(top_classes(shares, ["a", "b", "c", "d"], 9)) == 4
    assert top_classes(None, ["a"], 1) == []
    assert top_classes(np.array([1.0000001], np.float32), ["a"], 1) == [("a", 1.0)]


# The command. A regression on cached rows starts no TensorFlow, so these are quick.


def command(place: Deployed, *arguments: str | Path, kind: str = "logreg") -> Finished:
    return icebox(place.data, "predict", place.name(kind), *arguments)


def test_as_json(deployed: Deployed, tmp_path: Path) -> None:
    (bad := tmp_path / "bad.png").write_text("no image")
    done = command(deployed, deployed.photos / "test", bad, "--json", "--top", "1")
    assert done.code == 3, done.err
    found = done.json
    assert [each["path"] for each in found["predictions"]] == [str(p) for p in deployed.files if "/test/" in str(p)]
    for each in found["predictions"]:
        assert each["top"] == [{"label": each["label"], "probability": each["probability"]}]
        assert each["label"] in found["classes"] == ["cats", "dogs"]
        assert 0.5 <= each["probability"] <= 1
        assert each["from_cache"]
    assert (found["images"], found["from_cache"], found["quarantined"]) == (7, 6, 1)
    (told,) = found["quarantined_images"]
    assert told == {"path": str(bad), "reason": NO_IMAGE, "since": None}
    assert found["runs"] == [deployed.name("logreg")]
    assert command(deployed, deployed.photos / "test", bad, "--max-bad", "0.2").code == 0


def test_as_csv(deployed: Deployed, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a "b", \xff\n.png')
    shutil.copy(deployed.files[0], odd)
    (bad := tmp_path / "bad.png").write_text("no image")
    arguments = ("predict", deployed.name("logreg"), odd, bad, "--csv")
    done = subprocess.run(command_line(deployed.data, *arguments), capture_output=True, env=environment(), timeout=900)
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode("utf-8", "surrogateescape"), newline="")))
    assert [row["path"] for row in rows] == [str(odd), str(bad)]
    assert list(rows[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert {rows[0]["label"], rows[0]["label_2"]} == {"cats", "dogs"}
    assert float(rows[0]["probability"]) + float(rows[0]["probability_2"]) == pytest.approx(1, abs=1e-5)
    assert (rows[0]["error"], rows[1]["label"], rows[1]["probability_2"]) == ("", "", "")
    assert rows[1]["error"].startswith("not an image")


def test_as_a_table(deployed: Deployed) -> None:
    name = deployed.files[0]
    done = command(deployed, name, "--also", deployed.name("logreg"))
    assert (done.code, done.out) == (0, "")
    line = next(line for line in done.err.splitlines() if line.startswith(str(name)))
    assert line.split()[2] in ("cats", "dogs")
    assert re.search(r"^from cache +1 *$", done.err, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 2, "Missing argument 'PATHS"),
        (("nowhere.png",), 1, "error: no image, folder or manifest at 'nowhere.png'"),
        (("x.png", "--csv", "--json"), 2, "--csv and --json both want stdout"),
        (("x.png", "--top", "0"), 2, "Invalid value for '--top'"),
    ],
)
def test_wrong_use(deployed: Deployed, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = command(deployed, *arguments)
    assert (done.code, text in done.err) == (code, True), done.err
    assert len(done.err.strip().splitlines()) == 1


# A run that is not what was published


@pytest.fixture
def copied(deployed: Deployed, tmp_path: Path) -> Deployed:
    """The runs, and no rows, where they may be changed."""
    with closing(Cache(tmp_path / "copy" / "cache")) as cache:
        know_tiny(cache)
    shutil.copytree(deployed.data / "runs", tmp_path / "copy" / "runs")
    shutil.copy(deployed.data / "names.json", tmp_path / "copy")
    return Deployed(tmp_path / "copy", deployed.photos)


def pickled(path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other_classes(path: Path) -> None:
    about = json.loads(path.read_text())
    files.write_json(path, {**about, "classes": about["classes"][::-1]})


def with_lambda(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = '{"layers": [{"class_name": "Lambda"}]}'


@pytest.mark.parametrize(
    ("kind", "file", "spoil", "text"),
    [
        ("gap", "head.json", piped, "head.json cannot be read"),
        ("gap", "head.weights.h5", piped, "no head can be loaded"),
        ("gap", "run.json", other_classes, "run.json is not the file that was published"),
        ("gap", "head.weights.h5", pickled, "head.weights.h5 is not the file that was saved"),
        ("logreg", "head.skops", pickled, "head.skops is not the file that was saved"),
        ("gap", "head.weights.h5", with_lambda, "head.weights.h5 is not the file that was saved"),
        ("finetune", "backbone.weights.h5", with_lambda, "backbone.weights.h5 is not the file that was saved"),
        ("folds", "fold-2/head.json", Path.unlink, "no head can be loaded"),
    ],
)
def test_a_file_that_was_changed_is_noticed(copied: Deployed, kind: str, file: str, spoil: Any, text: str) -> None:
    spoil(copied.data / "runs" / copied.name(kind) / file)
    done = command(copied, copied.files[0], kind=kind)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert text in line
    assert "Traceback" not in done.err


def test_a_full_model_made_up_around_a_lambda_layer_runs_no_code(copied: Deployed) -> None:
    """By somebody who knows how a run is laid out: with digests to match, and as one of the first version."""
    run = copied.data / "runs" / copied.name("finetune")
    with_lambda(run / "backbone.weights.h5")
    unseal(run)
    about = json.loads((run / "network.json").read_text())
    about["sha256"] = hashlib.sha256((run / "backbone.weights.h5").read_bytes()).hexdigest()
    files.write_json(run / "network.json", about)
    done = command(copied, copied.files[0], kind="finetune")
    assert done.code == 1
    assert "holds a model with Lambda layers, which are code" in done.err


def test_a_class_stands_once(copied: Deployed) -> None:
    run = copied.data / "runs" / copied.name("logreg")
    unseal(run)
    about = json.loads((run / "run.json").read_text())
    files.write_json(run / "run.json", {**about, "classes": ["cats", "cats"]})
    with pytest.raises(RunError, match=r"is not that of a trained head .*a class stands twice"):
        copied.run("logreg")


def test_a_run_may_be_named_from_within(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(deployed.data / "runs" / deployed.name("logreg"))
    assert open_run(deployed.data / "elsewhere", ".").name == deployed.name("logreg")


def test_the_head_of_another_run_is_noticed(copied: Deployed) -> None:
    """Of one that reads the same rows and knows as many classes: all that tells it apart is its digest."""
    ours, theirs = (copied.data / "runs" / copied.name(kind) for kind in ("gap", "folds"))
    for name in ("head.json", "head.weights.h5"):
        shutil.copy(theirs / "fold-1" / name, ours / name)
    done = command(copied, copied.files[0], kind="gap")
    assert done.code == 1
    assert "head.json is not the file that was published, as SHA256SUMS has another digest" in done.err


def test_checksums_that_are_gone_are_missed(copied: Deployed) -> None:
    run = copied.data / "runs" / copied.name("gap")
    (run / CHECKSUMS).unlink()
    done = command(copied, copied.files[0], kind="gap")
    assert (done.code, "nobody knows whether the run is whole" in done.err) == (1, True)


def test_a_run_of_the_first_version_has_none_and_is_taken(copied: Deployed) -> None:
    unseal(run := copied.data / "runs" / copied.name("logreg"))
    assert store.read_run(run)["classes"] == ["cats", "dogs"]


def test_the_checksums_are_those_of_coreutils(deployed: Deployed) -> None:
    run = deployed.data / "runs" / deployed.name("folds")
    done = subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run.json: OK" in done.stdout


@pytest.mark.parametrize("damaged_at", [1, 2])
def test_a_damaged_index_has_nothing_printed_twice(
    damaged_at: int, photos: Path, elsewhere: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window in hand is answered again, with a new index, and not those before it."""

    class Speaker:
        share = 1.0

        def __init__(self, *_: Any) -> None:
            self.request = 0

        def answers(self, window: Any, advance: Any) -> Any:
            self.request += 1
            if self.request == damaged_at:
                elsewhere.cache.index.path.write_bytes(b"garbage" * 1000)
                raise IndexDamagedError(elsewhere.cache.index.path, "file is not a database")
            count = len(window.images)
            return predict._Said(np.full((count, 2), window.start, np.float32), np.zeros(count, bool), {})

    monkeypatch.setattr(predict, "WINDOW", 5)
    monkeypatch.setattr(predict, "_Speaker", Speaker)
    group: Any = SimpleNamespace(spec=SPEC, share=1.0)
    monkeypatch.setattr(predict, "group_runs", lambda *_: [group])
    answers = said([], sorted(photos.rglob("*.png")), elsewhere)
    assert [answer.name for answer in answers] == [str(path) for path in sorted(photos.rglob("*.png"))]
    assert [int(answer.probabilities[0]) for answer in answers if answer.probabilities is not None] == (
        [0] * 5 + [5] * 5 + [10] * 2
    )
    assert len(list(elsewhere.cache.root.glob("cache.db.damaged-*"))) == 1


# Networks of one's own


@dataclass(frozen=True)
class Owns:
    """Heads on three networks of one's own, by kind: the network's file, and the run; and the images they learnt."""

    workspace: Workspace
    runs: dict[str, tuple[Path, TrainedRun]]
    images: list[Path]


@pytest.fixture(scope="module")
def owns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owns]:
    """One of the networks is for vectors, one for small images; nobody may change them."""
    root = tmp_path_factory.mktemp("owns")
    found, photos = dict[str, tuple[Path, TrainedRun]](), write_sides(root / "photos")
    with closing(Cache(root / "data" / "cache")) as cache:
        workspace = Workspace(root / "data", cache)
        for kind, head, size in (("vector", "gap", SIZE), ("nested", "logreg", 24), ("depthwise", "logreg", SIZE)):
            path = write_network(root / f"{kind}.keras", kind, size=size)
            dataset = open_dataset(str(photos), downloads=root)
            extract(dataset, workspace, own_choice(path), ComputeOptions())
            spec = HeadSpec.make(head, **({"epochs": 2} if head == "gap" else {}))
            request = TrainRequest(DatasetChoice(str(photos)), own_choice(path), spec, MOST)
            made = train_head(dataset, workspace, request)
            found[kind] = path, open_run(workspace.runs, made.name)
        yield Owns(workspace, found, sorted(photos.rglob("*.png")))


def test_elsewhere_a_head_asks_for_its_own_network(owns: Owns, elsewhere: Workspace, tmp_path: Path) -> None:
    images, (path, run), (other, _) = owns.images[:4], owns.runs["vector"], owns.runs["depthwise"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asking = re.escape(f"vector.keras (sha256 {digest}), which is not on this machine; give the file by `--backbone")
    with pytest.raises(WeightsError, match=asking):
        said([run], images, elsewhere)
    others = write_network(tmp_path / "others.keras", "vector", seed=2)
    for wrong in (other, others):
        named = re.escape(f"computed with vector.keras (sha256 {digest}), not with {wrong}; ")
        with pytest.raises(SpecError, match=f"{named}give that file by --backbone FILE"):
            said([run], images, elsewhere, weights=str(wrong))
        with pytest.raises(SpecError, match=f"{named}leave it out"):
            said([run], images, owns.workspace, weights=str(wrong))
    moved = shutil.copy(path, tmp_path / "moved.keras")
    computed = said([run], images, elsewhere, weights=str(moved))
    assert not any(answer.cached for answer in computed)
    assert np.abs(probabilities(computed) - probabilities(said([run], images, owns.workspace))).max() < 1e-5
    assert np.array_equal(probabilities(said([run], images, elsewhere)), probabilities(computed)), "it is known by now"


def test_runs_of_several_backbones_are_averaged(owns: Owns, elsewhere: Workspace) -> None:
    images, files = owns.images[:4], [str(path) for path, _ in owns.runs.values()]
    found, workspace = [run for _, run in owns.runs.values()], owns.workspace
    with pytest.raises(WeightsError, match=r"vector\.keras .* is not on this machine"):
        said(found, images, elsewhere, weights=files[-1])  # which is that of the last run alone
    alone = [
        probabilities(said([run], images, elsewhere, weights=file)) for run, file in zip(found, files, strict=True)
    ]
    for place, given in ((workspace, None), (elsewhere, None), (elsewhere, files[-1])):
        together = said(found, images, place, weights=given)
        assert all(answer.cached == (place is workspace) for answer in together)
        assert np.abs(probabilities(together) - np.mean(alone, axis=0)).max() < 1e-5
    with service(found, workspace, max_pixels=MOST) as answer:
        served = [answer(path.read_bytes()).result() for path in images]
    assert np.abs(np.stack(served) - np.mean(alone, axis=0)).max() < 1e-5
