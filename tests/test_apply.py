"""`evaluate RUN`: every kind of run, on any split or other images; what is not its own is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached import SPEC, fill, listed, write_images
from conftest import unseal
from sklearn.metrics import accuracy_score, log_loss

from pipeline import images, runs
from pipeline.apply import Evaluation, evaluate_run
from pipeline.asked import Asked, DatasetChoice
from pipeline.errors import DatasetError, MissingRowsError, RunError, SpecError
from pipeline.extract import FeatureChoice
from pipeline.spec import HeadSpec
from pipeline.train import train_head
from pipeline.trained import open_run
from pipeline.workspace import Workspace

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
def rows(workspace: Workspace, photos: Path) -> None:
    fill(workspace, listed(photos))


def trained(workspace: Workspace, photos: Path, kind: str = "logreg") -> str:
    asked = Asked(DatasetChoice(str(photos)), FeatureChoice(), KINDS[kind]["spec"], images.DEFAULT_MAX_PIXELS,
                  folds=KINDS[kind].get("folds", 0))  # fmt: skip
    return train_head(listed(photos), workspace, asked, "features").name


def evaluated(workspace: Workspace, name: str, photos: Path, **more: Any) -> Evaluation:
    run = open_run(workspace.runs, name)
    return evaluate_run(run, listed(photos), workspace, "features", max_pixels=images.DEFAULT_MAX_PIXELS, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_says_again_what_it_said(workspace: Workspace, photos: Path, kind: str) -> None:
    name = trained(workspace, photos, kind)
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
    with pytest.raises(MissingRowsError, match="is not in the cache; make it by `features` with --layer mixed10"):
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
    assert runs.find_run(workspace.runs, "latest").name == max(names)
    with pytest.raises(RunError, match="no run named 'nothing'"):
        open_run(workspace.runs, "nothing")
