"""`evaluate RUN`: every kind of run, on any split or other images; what is not its own is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached import SPEC, fill, listed, write_images
from conftest import unseal
from sklearn.metrics import accuracy_score, log_loss

from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError, MissingRowsError, RunError, SpecError, UsageError
from pipeline.core.hashing import image_key
from pipeline.core.spec import HeadSpec
from pipeline.dataset import limit
from pipeline.deployment.evaluate_run import Evaluation, evaluate_run
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.runs import plots, store
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.runs.run_images import FILE, RunImages
from pipeline.training.open_run import open_run
from pipeline.training.train_head import train_head

RENDERED = plots._rendered
KINDS: dict[str, dict[str, Any]] = {
    "flatten": {"spec": HeadSpec.make("flatten", epochs=3, learning_rate=0.01, batch_size=16, hidden=16)},
    "gap": {"spec": HeadSpec.make("gap", epochs=4, learning_rate=0.02, batch_size=16)},
    "logreg": {"spec": HeadSpec.make("logreg", C="0.01,0.1")},
    "folds": {"spec": HeadSpec.make("gap", epochs=3, learning_rate=0.02, batch_size=16), "folds": 3},
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", 40)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def rows(workspace: Workspace, photos: Path, no_plots: None) -> None:
    fill(workspace, listed(photos))


def trained(workspace: Workspace, photos: Path, kind: str = "logreg") -> str:
    spec, folds = KINDS[kind]["spec"], KINDS[kind].get("folds", 0)
    request = TrainRequest(DatasetChoice(str(photos)), FeatureChoice(), spec, decoding.DEFAULT_MAX_PIXELS, folds=folds)
    return train_head(listed(photos), workspace, request).name


def evaluated(workspace: Workspace, name: str, photos: Path, **more: Any) -> Evaluation:
    run = open_run(workspace.runs, name)
    return evaluate_run(run, listed(photos), workspace, max_pixels=decoding.DEFAULT_MAX_PIXELS, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_says_again_what_it_said(
    workspace: Workspace, photos: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = trained(workspace, photos, kind)
    monkeypatch.setattr(plots, "_rendered", RENDERED)
    before = json.loads((workspace.runs / name / "metrics.json").read_text())["test"]
    done = evaluated(workspace, name, photos)
    assert done.split == "test"
    for key in ("images", "accuracy", "confusion"):
        assert done.metrics[key] == before[key]
    assert done.metrics["log_loss"] == pytest.approx(before["log_loss"], rel=1e-4)
    assert sorted(path.name for path in done.path.iterdir()) == [
        "calibration.png", "confusion.png", "metrics.json", "predictions.csv",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in done.path.glob("*.png"))
    every = evaluated(workspace, name, photos, split="all").metrics
    assert every["images"] == 120
    streamed = evaluated(workspace, name, photos, split="all", memory=4_000).metrics
    assert streamed["log_loss"] == pytest.approx(every["log_loss"], rel=1e-5)


def test_the_numbers_are_those_of_the_probabilities_it_keeps(workspace: Workspace, photos: Path) -> None:
    done = evaluated(workspace, trained(workspace, photos), photos)
    rows = [line.split(",") for line in (done.path / "predictions.csv").read_text().splitlines()]
    classes = [name.removeprefix("p:") for name in rows[0][5:]]
    labels = [row[2] for row in rows[1:]]
    assert done.metrics["accuracy"] == accuracy_score(labels, [row[3] for row in rows[1:]])
    said = np.array([[float(p) for p in row[5:]] for row in rows[1:]])
    expected = log_loss(labels, said / said.sum(axis=1, keepdims=True), labels=classes)
    assert done.metrics["log_loss"] == pytest.approx(expected, rel=1e-4)


def test_other_images_with_the_same_classes(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    """Each kept by itself, though their folders be called alike, or have no letter in their names."""
    name = trained(workspace, photos)
    own = evaluated(workspace, name, photos)
    paths = {own.path}
    for folder in ("one/日本", "two/日本"):
        write_images(tmp_path / folder, 5 if folder.startswith("one") else 6)
        fill(workspace, listed(tmp_path / folder))
        done = evaluated(workspace, name, tmp_path / folder, own=False)
        assert (done.split, done.metrics["accuracy"] > 0.8) == ("all", True)
        paths.add(done.path)
    assert len(paths) == 3
    assert json.loads((own.path / "metrics.json").read_text())["images"] == own.metrics["images"]


def test_other_classes_are_refused_and_named(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    name = trained(workspace, photos)
    write_images(tmp_path / "others", 5, ("ant", "bee", "dodo"))
    fill(workspace, listed(tmp_path / "others"))
    with pytest.raises(DatasetError, match="it has no cow and the run does not know dodo"):
        evaluated(workspace, name, tmp_path / "others", own=False)


def test_another_space_is_refused_and_the_difference_named(workspace: Workspace, photos: Path) -> None:
    name = trained(workspace, photos)
    other = fill(workspace, listed(photos), spec=replace(SPEC, precision="bfloat16"))
    with pytest.raises(SpecError, match="precision float32, not bfloat16"):
        evaluated(workspace, name, photos, space=other.name)


def test_a_space_that_is_gone_is_named_with_the_way_to_make_it(workspace: Workspace, photos: Path) -> None:
    name = trained(workspace, photos)
    (workspace.root / "cache" / SPEC.directory).rename(workspace.root / "elsewhere")
    with pytest.raises(MissingRowsError, match="make it by `features` with --backbone inception_v3 --input-size 299 "):
        evaluated(workspace, name, photos)


def test_a_split_it_was_trained_on_is_said(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated(workspace, trained(workspace, photos), photos, split="train")
    assert "97 of these 97 images were trained on: new ones will be harder" in caplog.text


def tampered(workspace: Workspace, name: str, *keys: str, to: Any) -> None:
    unseal(workspace.runs / name)
    path = workspace.runs / name / "run.json"
    about = json.loads(path.read_text())
    place = about
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("asked", "images", "limit"), "x"),
        (("asked", "images", "dataset"), 3),
        (("asked", "folds"), "x"),
        (("asked", "views"), []),
        (("classes",), ["ant", "bee"]),
        (("head", "head"), "flatten"),
        (("head", "head"), []),
        (("features", "layer"), 3),
    ],
)
def test_a_tampered_run_is_refused_in_one_line(
    workspace: Workspace, photos: Path, keys: tuple[str, ...], value: Any
) -> None:
    name = trained(workspace, photos)
    tampered(workspace, name, *keys, to=value)
    with pytest.raises((RunError, DatasetError)) as caught:
        evaluated(workspace, name, photos)
    assert "\n" not in str(caught.value)


def test_the_weights_of_another_head_are_refused(workspace: Workspace, photos: Path) -> None:
    one, other = (trained(workspace, photos, kind) for kind in ("gap", "flatten"))
    unseal(workspace.runs / one)
    for file in ("head.json", "head.weights.h5"):
        (workspace.runs / one / file).write_bytes((workspace.runs / other / file).read_bytes())
    with pytest.raises(RunError, match=r"holds a flatten head, and its run.json says gap"):
        evaluated(workspace, one, photos)


def test_the_latest_run_is_the_last_by_name(workspace: Workspace, photos: Path) -> None:
    names = [trained(workspace, photos) for _ in range(2)]
    assert store.find_run(workspace.runs, "latest").name == max(names)
    with pytest.raises(RunError, match="no run named 'nothing'"):
        open_run(workspace.runs, "nothing")


# What it was trained on


def copied(photos: Path, to: Path, only: Callable[[str], bool] = lambda name: True) -> Path:
    """The images of a folder under other names."""
    for label in sorted(path.name for path in photos.iterdir()):
        (to / label).mkdir(parents=True)
        for path in sorted((photos / label).iterdir()):
            if only(f"{label}/{path.name}"):
                (to / label / f"copy of {path.name}").write_bytes(path.read_bytes())
    return to


def metrics_of(workspace: Workspace, name: str) -> dict[str, Any]:
    return json.loads((workspace.runs / name / "metrics.json").read_text())["test"]


def before_images_were_kept(workspace: Workspace, name: str) -> None:
    unseal(workspace.runs / name)
    (workspace.runs / name / FILE).unlink()


@pytest.mark.parametrize("spelling", ["dots", "link", "copy"])
@pytest.mark.parametrize("record", ["kept", "derived"])
def test_its_own_images_by_another_name_are_left_out_as_far_as_it_was_trained_on_them(
    workspace: Workspace, photos: Path, tmp_path: Path, spelling: str, record: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = trained(workspace, photos)
    if record == "derived":
        before_images_were_kept(workspace, name)
    (tmp_path / "link").symlink_to("photos")
    folder = {"dots": tmp_path / "photos" / ".." / "photos", "link": tmp_path / "link", "copy": tmp_path / "copy"}
    copied(photos, tmp_path / "copy")
    done = evaluated(workspace, name, folder[spelling])
    before = metrics_of(workspace, name)
    assert done.split == "test"
    assert (done.metrics["images"], done.metrics["accuracy"]) == (before["images"], before["accuracy"])
    assert done.trained_on == done.left_out == 120 - before["images"]
    assert f"{done.left_out} of these 120 images were trained on and are left out" in caplog.text


def test_a_part_of_its_own_images_is_measured_where_it_is_new(workspace: Workspace, photos: Path) -> None:
    name = trained(workspace, photos)
    run = open_run(workspace.runs, name)
    some = limit(listed(photos), 60)
    done = evaluate_run(run, some, workspace, max_pixels=decoding.DEFAULT_MAX_PIXELS)
    known = RunImages.read(run.path)
    assert known is not None
    new = known.contains([image_key(some.read(i)) for i in range(60)], "test").sum()
    assert (done.metrics["images"], done.left_out) == (new, 60 - new)


def test_images_it_was_trained_on_are_measured_where_they_are_asked_for(
    workspace: Workspace, photos: Path, tmp_path: Path
) -> None:
    name = trained(workspace, photos)
    copied(photos, tmp_path / "copy")
    for more in ({"include_trained": True}, {"split": "all"}):
        done = evaluated(workspace, name, tmp_path / "copy", **more)
        assert (done.metrics["images"], done.left_out) == (120, 0)
        assert done.trained_on == 120 - metrics_of(workspace, name)["images"]


def test_new_images_beside_old_ones_are_measured(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    name = trained(workspace, photos)
    write_images(tmp_path / "new", 5)
    both = copied(photos, tmp_path / "both")
    for label in ("ant", "bee", "cow"):
        for path in (tmp_path / "new" / label).iterdir():
            (both / label / path.name).write_bytes(path.read_bytes())
    fill(workspace, listed(tmp_path / "new"))
    done = evaluated(workspace, name, both)
    assert (done.split, done.metrics["images"]) == ("all", 15 + metrics_of(workspace, name)["images"])


def test_nothing_but_what_it_was_trained_on_is_no_measure(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    name = trained(workspace, photos)
    known = RunImages.read(workspace.runs / name)
    assert known is not None

    def seen(image: str) -> bool:
        return bool(known.contains([image_key((photos / image).read_bytes())], "train")[0])

    copied(photos, tmp_path / "copy", seen)
    with pytest.raises(DatasetError, match=r"(\d+) of these \1 images were trained on .*: none is left"):
        evaluated(workspace, name, tmp_path / "copy")
    assert evaluated(workspace, name, tmp_path / "copy", include_trained=True).left_out == 0


def test_the_validation_split_is_measured_when_named_unless_it_was_trained_on(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, folds = (trained(workspace, photos, kind) for kind in ("logreg", "folds"))
    done = evaluated(workspace, alone, photos, split="val")
    assert (done.left_out, done.trained_on) == (0, 0)
    assert "decided which model was kept" in caplog.text
    with pytest.raises(DatasetError, match="none is left; --include-trained"):
        evaluated(workspace, folds, photos, split="val")


def test_of_an_older_run_whose_images_changed_it_is_said_that_nobody_knows(
    workspace: Workspace, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = trained(workspace, photos)
    before_images_were_kept(workspace, name)
    copied(photos, tmp_path / "copy", lambda image: image != "ant/001.png")
    (photos / "ant" / "000.png").unlink()
    done = evaluated(workspace, name, tmp_path / "copy")
    assert (done.trained_on, done.left_out, done.metrics["images"]) == (None, 0, 119)
    assert f"nobody knows which images the run {name} was trained on" in caplog.text


# Classes


def test_some_of_its_classes_are_measured_and_the_others_named(
    workspace: Workspace, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = trained(workspace, photos)
    write_images(tmp_path / "some", 6, ("ant", "cow"))
    of_three = replace(listed(tmp_path / "some"), labels=listed(tmp_path / "some").labels * 2)
    fill(workspace, of_three)
    done = evaluated(workspace, name, tmp_path / "some")
    assert done.metrics["accuracy"] > 0.8
    assert [each["support"] for each in done.metrics["per_class"]] == [6, 0, 6]
    assert "has no image of 1 of the 3 classes of the run" in caplog.text


def test_a_run_keeps_its_classes_whatever_their_order_and_unicode_form_by_now(
    workspace: Workspace, photos: Path
) -> None:
    name = trained(workspace, photos)
    path = workspace.runs / name / "run.json"
    run = open_run(workspace.runs, name)
    again = replace(listed(photos), classes=("cow", "bee", "ant"), labels=2 - listed(photos).labels)
    done = evaluate_run(run, again, workspace, max_pixels=decoding.DEFAULT_MAX_PIXELS)
    assert (done.metrics["accuracy"], done.left_out) == (
        metrics_of(workspace, name)["accuracy"],
        120 - done.metrics["images"],
    )
    unseal(path.parent)
    path.write_text(path.read_text().replace('"cow"', '"co\\u0308w"'))
    run = open_run(workspace.runs, name)
    modern = replace(listed(photos), classes=("ant", "bee", "c\N{LATIN SMALL LETTER O WITH DIAERESIS}w"))
    assert run.classes[2] == "co\N{COMBINING DIAERESIS}w"
    done = evaluate_run(run, modern, workspace, max_pixels=decoding.DEFAULT_MAX_PIXELS)
    assert done.metrics["accuracy"] == metrics_of(workspace, name)["accuracy"]
    twice = replace(run, classes=[*run.classes, modern.classes[2]])
    with pytest.raises(DatasetError, match="tells 2 classes apart that are called"):
        twice.matched(modern)


# Where it is kept


def test_an_evaluation_is_kept_where_it_is_asked_for(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    name, out = trained(workspace, photos), tmp_path / "somewhere" / "else"
    for _ in range(2):
        assert evaluated(workspace, name, photos, out=out).path == out
    assert json.loads((out / "metrics.json").read_text())["images"] == metrics_of(workspace, name)["images"]
    assert not (workspace.runs / name / "evaluations").exists()
    (out / "notes.txt").write_text("of somebody")
    for folder in (out, photos, Path.cwd()):
        with pytest.raises(UsageError, match="is no earlier evaluation; name another folder by --out"):
            evaluated(workspace, name, photos, out=folder)


def test_a_run_that_cannot_be_written_to_is_said_before_anything_is_measured(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = trained(workspace, photos)
    folder = workspace.runs / name
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    with pytest.raises(RunError, match=r"is read-only; name a folder by --out"):
        evaluated(workspace, name, photos)
