"""From cached rows to a published run: labels joined by identity, splits that leak nothing, all or nothing."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cached import CLASSES, SPEC, fill, listed, row_of, spec_of, write_images
from conftest import ROOT
from PIL import Image

from pipeline.cache import shard
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import CacheError, DatasetError, MissingRowsError, RunError, SpecError, UsageError
from pipeline.core.hashing import image_key
from pipeline.core.spec import FeatureSpec, HeadSpec
from pipeline.dataset import Dataset, open_dataset
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.runs.run_images import RunImages
from pipeline.training import heads
from pipeline.training.labelled_features import join_features
from pipeline.training.train_head import HeadResult, train_head
from pipeline.training.training_data import split_members

pytestmark = pytest.mark.usefixtures("no_plots")

LOGREG = HeadSpec.make("logreg")
GAP = HeadSpec.make("gap", epochs=5, learning_rate=0.02, batch_size=16)
FLATTEN = HeadSpec.make("flatten", epochs=6, learning_rate=0.01, batch_size=16, hidden=32)
SPECS = {"flatten": FLATTEN, "gap": GAP, "logreg": LOGREG}

# The workspace of images and rows


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", 40)
    return tmp_path / "photos"


@pytest.fixture
def sided(tmp_path: Path) -> Path:
    """The same with sides: 60 images to train on, 15 to validate, 15 to test."""
    for side, count in (("train", 20), ("val", 5), ("test", 5)):
        write_images(tmp_path / "photos" / side, count)
    return tmp_path / "photos"


def train(
    workspace: Workspace,
    dataset: Dataset,
    spec: HeadSpec = LOGREG,
    choice: FeatureChoice | None = None,
    *,
    resume: str | None = None,
    **more: Any,
) -> HeadResult:
    request = TrainRequest(
        DatasetChoice(dataset.name), choice or FeatureChoice(), spec, decoding.DEFAULT_MAX_PIXELS, **more
    )
    return train_head(dataset, workspace, request, resume=resume)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def predictions(run: HeadResult) -> list[dict[str, str]]:
    with (run.path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def learned(run: HeadResult) -> dict[str, np.ndarray]:
    """Every number of the saved head."""
    if not (run.path / "head.weights.h5").exists():
        head: Any = heads.load(run.path)
        scaler, regression = head.pipeline
        return {"mean": scaler.mean_, "scale": scaler.scale_, "w": regression.coef_, "b": regression.intercept_}
    found: dict[str, np.ndarray] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(run.path / "head.weights.h5") as file:
        file.visititems(note)
    return found


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], atol=1e-6) for name in a)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


@pytest.fixture(scope="module", params=SPECS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HeadResult, Dataset]:
    """A run of each head, made once."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "photos", 40)
    dataset = listed(root / "photos")
    with closing(Cache(root / "data" / "cache")) as cache:
        workspace = Workspace(root / "data", cache)
        fill(workspace, dataset)
        return train(workspace, dataset, SPECS[request.param]), dataset


# Labels belong to images, not to positions


def test_labels_are_joined_by_identity(made: tuple[HeadResult, Dataset]) -> None:
    assert made[0].summary["accuracy"] >= 0.9


def test_rows_joined_by_position_would_not_be_learned(photos: Path, workspace: Workspace) -> None:
    """The control of the test above: what a program that zips stored rows with listed labels would find."""
    dataset = listed(photos)
    space = fill(workspace, dataset)
    stored = []
    for path in sorted((space.path / "shards").glob("*.h5")):
        with h5py.File(path) as file:
            stored.append(np.asarray(file["pooled"]))
    zipped, at = np.concatenate(stored), np.random.default_rng(0).permutation(len(dataset))
    labels = dataset.labels
    data = heads.Data(zipped[at[:90]], labels[at[:90]], zipped[at[90:]], labels[at[90:]], 3)
    assert heads.fit(LOGREG, data, heads.TrainingContext()).history[-1]["val_accuracy"] < 0.7


def test_the_order_in_which_images_are_listed_does_not_matter(photos: Path, workspace: Workspace) -> None:
    dataset = listed(photos)
    fill(workspace, dataset)
    shuffled = dataset.take(np.random.default_rng(3).permutation(len(dataset)))
    one, other = (
        {row["image"]: row["predicted"] for row in predictions(train(workspace, each))} for each in (dataset, shuffled)
    )
    assert one == other


def test_an_image_under_two_labels_keeps_both_and_is_reported(
    photos: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        (photos / "bee" / f"copy{i}.png").write_bytes((photos / "ant" / f"{i:03}.png").read_bytes())
    dataset = listed(photos)
    space = fill(workspace, dataset)
    assert space.totals().rows == len(dataset) - 3
    run = train(workspace, dataset)
    assert "6 images have an identical copy under another label" in caplog.text
    counts = run.summary["train_rows"] + run.summary["val_rows"] + run.summary["test_rows"]
    assert counts == len(dataset) == 123
    assert run.summary["accuracy"] >= 0.8


def test_a_relabelled_image_needs_no_new_row(photos: Path, workspace: Workspace) -> None:
    fill(workspace, listed(photos))
    (photos / "ant" / "000.png").rename(photos / "bee" / "moved.png")
    run = train(workspace, listed(photos))
    assert run.summary["features_computed"] == 0
    assert sum(run.summary[f"{side}_rows"] for side in ("train", "val", "test")) == 120


# What a run holds


def test_a_run_holds_everything(made: tuple[HeadResult, Dataset]) -> None:
    run, _ = made
    model = "head.skops" if run.summary["head"] == "logreg" else "head.weights.h5"
    files = {
        "run.json",
        "metrics.json",
        "history.json",
        "history.csv",
        "predictions.csv",
        "curves.png",
        "quarantined.json",
        "images.npz",
        "SHA256SUMS",
    }
    assert set(visible(run.path)) == files | {"head.json", model}
    assert visible(run.path.parent) == [run.name]
    assert list(run.path.parent.iterdir()) == [run.path]


def test_the_summary_has_what_the_command_line_promises(made: tuple[HeadResult, Dataset]) -> None:
    run, dataset = made
    promised = {"run", "head", "stage", "accuracy", "val_accuracy", "train_rows", "test_rows", "classes", "seconds"}
    assert promised | {"features_computed"} <= run.summary.keys()
    assert run.summary["features_computed"] == 0
    assert run.summary["stage"] == "head"
    assert run.summary["classes"] == 3
    assert run.summary["quarantined"] == 0
    assert run.summary["weights"] == "a test's"
    assert sum(run.summary[f"{side}_rows"] for side in ("train", "val", "test")) == len(dataset)


def test_run_json_says_what_was_asked_and_of_which_features(made: tuple[HeadResult, Dataset]) -> None:
    run, dataset = made
    about = read(run.path / "run.json")
    assert (about["format"], about["version"]) == ("icebox-run", 1)
    assert FeatureSpec.from_dict(about["features"]) == SPEC
    assert about["head"] == SPECS[run.summary["head"]].to_dict()
    assert about["classes"] == list(CLASSES)
    assert len(about["dataset"].pop("content")) == 64
    assert about["dataset"] == {
        "name": "photos",
        "path": str(Path("photos").resolve()),
        "images": len(dataset),
        "split": "80/10/10 by content hash",
    }
    assert about["summary"]["accuracy"] == run.summary["accuracy"]


def test_accuracy_is_what_the_predictions_say(made: tuple[HeadResult, Dataset]) -> None:
    run, dataset = made
    table = predictions(run)
    truth = dict(zip(dataset.names, dataset.labels, strict=True))
    for side, name in (("test", "accuracy"), ("val", "val_accuracy")):
        some = [row for row in table if row["split"] == side]
        assert len(some) == run.summary[f"{side}_rows"]
        assert [row["label"] for row in some] == [CLASSES[truth[row["image"]]] for row in some]
        hits = sum(row["label"] == row["predicted"] for row in some)
        assert run.summary[name] == hits / len(some)
        assert read(run.path / "metrics.json")[side]["accuracy"] == run.summary[name]
    assert {row["split"] for row in table} == {"val", "test"}


def test_probabilities_in_the_predictions_belong_to_the_classes_named(made: tuple[HeadResult, Dataset]) -> None:
    for row in predictions(made[0]):
        shares = {name: float(row[f"p:{name}"]) for name in CLASSES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == max(shares, key=lambda name: shares[name])
        assert float(row["probability"]) == max(shares.values())


def test_the_history_is_kept_and_drawn(made: tuple[HeadResult, Dataset]) -> None:
    run, _ = made
    history = read(run.path / "history.json")
    assert len(history) == (7 if run.summary["head"] == "logreg" else run.summary["epochs"])
    best = min(history, key=lambda entry: entry["val_loss"])
    assert best["val_accuracy"] == pytest.approx(run.summary["val_accuracy"])
    with (run.path / "history.csv").open(newline="") as file:
        assert [{k: float(v) for k, v in line.items() if k != "converged"} for line in csv.DictReader(file)] == [
            {k: v for k, v in entry.items() if k != "converged"} for entry in history
        ]
    with Image.open(run.path / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 400 < picture.height < picture.width < 2000


def test_the_saved_head_gives_the_predictions_of_the_run(made: tuple[HeadResult, Dataset]) -> None:
    run, dataset = made
    head = heads.load(run.path)
    labels = dict(zip(dataset.names, range(len(dataset)), strict=True))
    some = [row for row in predictions(run) if row["split"] == "test"]
    stored = []
    for row in some:
        i = labels[row["image"]]
        exact = row_of(image_key(dataset.read(i)), dataset.labels[i])
        reads_tensors = heads.READS[run.summary["head"]] == "features"
        stored.append(exact.astype(np.float16) if reads_tensors else exact.mean(axis=(0, 1)))
    expected = [[float(row[f"p:{name}"]) for name in CLASSES] for row in some]
    assert np.allclose(head.predict(np.stack(stored)), expected, atol=1e-5)


# Splits


@pytest.mark.parametrize("head", SPECS)
def test_test_rows_have_no_say_in_the_head(sided: Path, tmp_path: Path, head: str) -> None:
    """Test rows replaced by nonsense give the same head and validation, and another accuracy."""
    dataset = listed(sided)
    splits = dataset.splits
    assert splits is not None

    def spoil(i: int, row: np.ndarray) -> np.ndarray:
        return np.roll(row, 1, axis=-1) * 9 if splits[i] == "test" else row

    runs = []
    for name, rewrite in (("plain", lambda _, row: row), ("spoilt", spoil)):
        with closing(Cache(tmp_path / name / "cache")) as cache:
            workspace = Workspace(tmp_path / name, cache)
            fill(workspace, dataset, rewrite=rewrite)
            runs.append(train(workspace, dataset, SPECS[head]))
    plain, spoilt = runs
    assert same(learned(plain), learned(spoilt))
    histories = [[list(entry.values()) for entry in read(run.path / "history.json")] for run in runs]
    assert np.allclose(histories[0], histories[1])  # which early stopping looks at
    assert spoilt.summary["val_accuracy"] == plain.summary["val_accuracy"] >= 0.8
    assert spoilt.summary["accuracy"] < 0.5 < plain.summary["accuracy"]


@pytest.mark.parametrize(("side", "changes"), [("train", True), ("val", False)])
def test_only_training_rows_have_a_say_in_the_head(sided: Path, tmp_path: Path, side: str, changes: bool) -> None:
    dataset = listed(sided)
    at = dataset.names.index(f"{side}/bee/003.png")
    found = []
    for factor in (1, 3):
        with closing(Cache(tmp_path / f"by {factor}" / "cache")) as cache:
            workspace = Workspace(tmp_path / f"by {factor}", cache)
            fill(workspace, dataset, rewrite=lambda i, row, by=factor: row * by if i == at else row)
            found.append(learned(train(workspace, dataset, HeadSpec.make("logreg", C=1, calibrate=False))))
    assert same(*found) is not changes


def test_brought_sides_are_kept(sided: Path, workspace: Workspace) -> None:
    dataset = listed(sided)
    fill(workspace, dataset)
    run = train(workspace, dataset)
    assert [run.summary[f"{side}_rows"] for side in ("train", "val", "test")] == [60, 15, 15]
    assert all(row["image"].startswith(f"{row['split']}/") for row in predictions(run))


def test_a_missing_val_is_lent_from_train(tmp_path: Path, workspace: Workspace) -> None:
    for side, count in (("train", 40), ("test", 5)):
        write_images(tmp_path / "photos" / side, count)
    dataset = listed(tmp_path / "photos")
    fill(workspace, dataset)
    run = train(workspace, dataset)
    assert run.summary["test_rows"] == 15
    assert 0 < run.summary["val_rows"] < 40
    assert run.summary["train_rows"] + run.summary["val_rows"] == 120
    assert read(run.path / "run.json")["dataset"]["split"] == "brought; val lent from train"
    sides = {row["image"].split("/")[0] for row in predictions(run) if row["split"] == "val"}
    assert sides == {"train"}


def test_a_copy_across_sides_is_reported(sided: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    (sided / "test" / "ant" / "copy.png").write_bytes((sided / "train" / "ant" / "000.png").read_bytes())
    dataset = listed(sided)
    fill(workspace, dataset)
    train(workspace, dataset)
    assert "2 images have an identical copy on another side of the split" in caplog.text


def test_a_test_image_that_was_trained_on_is_left_out_of_the_accuracy(
    sided: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    (sided / "test" / "ant" / "copy.png").write_bytes((sided / "train" / "ant" / "000.png").read_bytes())
    dataset = listed(sided)
    fill(workspace, dataset)
    run = train(workspace, dataset)
    assert (run.summary["test_rows"], run.summary["test_rows_left_out"]) == (15, 1)
    assert run.summary["test_rows_trained_on"] == 0
    assert "1 of these 16 test images were trained on; they are left out of its accuracy" in caplog.text
    assert "test/ant/copy.png" not in {row["image"] for row in predictions(run)}


def test_where_every_test_image_was_trained_on_that_is_said_and_kept(
    sided: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    for label in CLASSES:
        for path in (sided / "test" / label).iterdir():
            path.write_bytes((sided / "train" / label / path.name).read_bytes())
    dataset = listed(sided)
    fill(workspace, dataset)
    summary = train(workspace, dataset).summary
    assert [summary[f"test_rows{end}"] for end in ("", "_left_out", "_trained_on")] == [15, 0, 15]
    assert "15 of these 15 test images were trained on; they are measured on all the same" in caplog.text


def test_what_the_initial_model_was_trained_on_is_no_test(sided: Path, workspace: Workspace) -> None:
    dataset = listed(sided)
    fill(workspace, dataset)
    images_of_it = join_features(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS)
    tested = images_of_it.members("test")
    before = RunImages.of({"train": [images_of_it.keys[i] for i in tested[:4].tolist()]})
    members, labels = split_members(replace(images_of_it, initial=before))
    assert members["test"].tolist() == tested[4:].tolist()
    assert len(labels["test"]) == len(tested) - 4


def test_an_empty_side_is_an_error_that_counts(tmp_path: Path, workspace: Workspace) -> None:
    write_images(tmp_path / "photos", 2)
    dataset = listed(tmp_path / "photos")
    fill(workspace, dataset)
    with pytest.raises(DatasetError, match=r"no images to .*\(train \d+, val \d+, test \d+\)"):
        train(workspace, dataset)
    assert not workspace.runs.exists()


def test_groups_are_named_where_they_leave_a_side_empty(tmp_path: Path, workspace: Workspace) -> None:
    write_images(tmp_path / "photos", 20)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "photos").glob("*/*"))
    lines = [f"{name},{name.split('/')[1]},{'one' if i % 4 else 'two'}" for i, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    dataset = listed(tmp_path / "list.csv")
    fill(workspace, dataset)
    with pytest.raises(DatasetError, match=r"no images to .*; 60 of 60 images belong to 2 groups, each of which stays"):
        train(workspace, dataset)


def test_one_class_only_is_an_error_that_names_it(tmp_path: Path, workspace: Workspace) -> None:
    write_images(tmp_path / "photos", 60, ("ant",))
    dataset = listed(tmp_path / "photos")
    fill(workspace, dataset)
    with pytest.raises(DatasetError, match=r"one class only \(ant\)"):
        train(workspace, dataset)
    assert not workspace.runs.exists()


def test_a_class_with_one_image_is_said(photos: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    write_images(photos, 1, ("dodo",))
    dataset = listed(photos)
    fill(workspace, dataset)
    assert train(workspace, dataset).summary["classes"] == 4
    assert "1 class has one image only, to learn from or to measure by: dodo" in caplog.text


@pytest.mark.parametrize("head", ["gap", "logreg"])
def test_a_class_without_training_images_is_said(
    sided: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture, head: str
) -> None:
    for path in (sided / "train" / "bee").iterdir():
        path.unlink()
    dataset = listed(sided)
    fill(workspace, dataset)
    run = train(workspace, dataset, SPECS[head])
    assert "1 class has no training image and cannot be learned: bee" in caplog.text
    assert run.summary["classes"] == 3
    test = read(run.path / "metrics.json")["test"]
    assert test["confusion"][1][1] == 0
    assert sum(test["confusion"][1]) == 5


# Missing rows, and images that have none


def test_missing_rows_are_counted_and_the_remedy_is_named(photos: Path, workspace: Workspace) -> None:
    dataset = listed(photos)
    space = fill(workspace, dataset, leave_out={3, 50, 119})
    with pytest.raises(MissingRowsError) as caught:
        train(workspace, dataset)
    assert "3 of 120 images have no features" in str(caught.value)
    assert space.name in str(caught.value)
    assert "compute them by Icebox.features()" in str(caught.value)
    assert not workspace.runs.exists()


def test_missing_rows_count_images_copies_included(photos: Path, workspace: Workspace) -> None:
    (photos / "ant" / "copy.png").write_bytes((photos / "ant" / "000.png").read_bytes())
    dataset = listed(photos)
    fill(workspace, dataset, leave_out={dataset.names.index(f"ant/{name}.png") for name in ("000", "copy", "001")})
    with pytest.raises(MissingRowsError, match="3 of 121 images have no features"):
        train(workspace, dataset)


def test_without_any_features_all_rows_are_missing(photos: Path, workspace: Workspace) -> None:
    with pytest.raises(MissingRowsError, match=r"120 of 120 images .* compute them by Icebox.features"):
        train(workspace, listed(photos))


def test_other_backbones_that_have_the_features_are_named(photos: Path, workspace: Workspace) -> None:
    dataset = listed(photos)
    fill(workspace, dataset, spec=spec_of("xception"), leave_out={3})
    with pytest.raises(MissingRowsError, match=r"asked for; compute them by Icebox.features"):
        train(workspace, dataset)
    for name in ("vgg16", "mobilenet_v2"):
        fill(workspace, dataset, spec=spec_of(name))
    with pytest.raises(MissingRowsError, match="; there are features of mobilenet_v2, vgg16, which --backbone names; "):
        train(workspace, dataset)
    fill(workspace, dataset)
    with pytest.raises(MissingRowsError, match=r"asked for; compute them by Icebox.features"):
        train(workspace, dataset, choice=FeatureChoice(precision="bfloat16"))


def test_features_of_another_kind_than_asked_for_do_not_serve(photos: Path, workspace: Workspace) -> None:
    dataset = listed(photos)
    space = fill(workspace, dataset)
    with pytest.raises(MissingRowsError, match="120 of 120"):
        train(workspace, dataset, choice=FeatureChoice(precision="bfloat16"))
    with pytest.raises(SpecError, match="precision is float32"):
        train(workspace, dataset, choice=FeatureChoice(precision="bfloat16", space=space.name))
    assert train(workspace, dataset, choice=FeatureChoice(precision="float32")).summary["precision"] == "float32"


def quarantine(workspace: Workspace, dataset: Dataset, bad: list[int]) -> None:
    reasons = {image_key(dataset.read(i)): "not an image" for i in bad}
    workspace.cache.index.remember_quarantined(reasons, decoding.decoder_version(), decoding.DEFAULT_MAX_PIXELS)


def test_quarantined_images_are_left_out_and_reported(photos: Path, workspace: Workspace) -> None:
    (photos / "cow" / "gone.png").symlink_to(photos / "nowhere.png")
    dataset = listed(photos).take(np.random.default_rng(4).permutation(121))  # neighbours differ in their labels
    bad, gone = [5, 77], dataset.names.index("cow/gone.png")
    fill(workspace, dataset, leave_out={*bad, gone})
    quarantine(workspace, dataset, bad)
    run = train(workspace, dataset)
    listed_bad = read(run.path / "quarantined.json")
    assert listed_bad == [asdict(bad) for bad in run.quarantined]
    reasons = {bad["path"]: bad["reason"] for bad in listed_bad}
    assert set(reasons) == {dataset.names[5], dataset.names[77], "cow/gone.png"}
    assert reasons[dataset.names[5]] == "not an image"
    assert "cannot be read" in reasons["cow/gone.png"]
    assert run.summary["quarantined"] == 3
    assert sum(run.summary[f"{side}_rows"] for side in ("train", "val", "test")) == 118
    assert run.summary["accuracy"] >= 0.9  # the images after a bad one keep their own rows
    assert not {row["image"] for row in predictions(run)} & set(reasons)


@pytest.mark.parametrize("filled", [False, True], ids=["no features at all", "features of others"])
def test_a_dataset_of_bad_images_only_is_not_sent_to_make_features(
    photos: Path, tmp_path: Path, workspace: Workspace, filled: bool
) -> None:
    dataset = listed(photos)
    quarantine(workspace, dataset, list(range(len(dataset))))
    choice = FeatureChoice()
    if filled:
        write_images(tmp_path / "others", 2)
        choice = FeatureChoice(space=fill(workspace, listed(tmp_path / "others")).name)
    with pytest.raises(DatasetError, match="no images to train on"):
        train(workspace, dataset, choice=choice)


def test_oddly_named_images_and_classes_get_through(tmp_path: Path, workspace: Workspace) -> None:
    odd = ("a,b", os.fsdecode(b"\xff class"), "new\nline $x_$")
    write_images(tmp_path / "photos", 40, odd)
    bad = tmp_path / "photos" / odd[1] / os.fsdecode(b"bad \xfe.png")
    bad.write_bytes(b"never an image")
    dataset = listed(tmp_path / "photos")
    at = dataset.names.index(str(bad.relative_to(tmp_path / "photos")))
    fill(workspace, dataset, leave_out={at})
    quarantine(workspace, dataset, [at])
    run = train(workspace, dataset)
    assert run.summary["accuracy"] >= 0.9
    assert [bad["path"] for bad in read(run.path / "quarantined.json")] == [dataset.names[at]]
    assert read(run.path / "run.json")["classes"] == sorted(odd)
    assert len(predictions(run)) == run.summary["val_rows"] + run.summary["test_rows"]


# Failure


def test_a_damaged_shard_stops_training_and_leaves_no_run(photos: Path, workspace: Workspace) -> None:
    dataset = listed(photos)
    space = fill(workspace, dataset)
    for path in (space.path / "shards").glob("*.h5"):
        data = bytearray(path.read_bytes())
        with h5py.File(path) as file:
            stored: Any = file["features"]
            at = stored.id.get_chunk_info(0).byte_offset
        data[at + 20] ^= 255
        path.write_bytes(bytes(data))
    with pytest.raises(CacheError, match="shard"):
        train(workspace, dataset, FLATTEN, memory=4_000)
    assert not workspace.runs.exists() or list(workspace.runs.iterdir()) == []


def test_a_regression_that_does_not_fit_memory_is_refused_and_says_what_does_the_same(
    photos: Path, workspace: Workspace
) -> None:
    dataset = listed(photos)
    fill(workspace, dataset)
    with pytest.raises(UsageError, match=r"needs all rows in memory, and \d+ of the training split .*--head gap"):
        train(workspace, dataset, memory=2_000)
    linear = HeadSpec.make("gap", hidden="none", epochs=5, learning_rate=0.05, batch_size=16)
    assert train(workspace, dataset, linear, memory=2_000).summary["accuracy"] > 0.8


def test_where_no_run_can_be_written_nothing_is(photos: Path, workspace: Workspace) -> None:
    dataset = listed(photos)
    fill(workspace, dataset)
    workspace.runs.write_text("a file stands where the folder should")
    with pytest.raises(RunError, match="no run can be written"):
        train(workspace, dataset)
    assert workspace.runs.read_text() == "a file stands where the folder should"


def python(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ICEBOX_")}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300, check=False)


_IN_PROCESS = """
import os, resource, sys
from pathlib import Path
from pipeline.images import decoding
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.dataset import open_dataset
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.core.spec import HeadSpec
from pipeline.training.train_head import train_head
from pipeline.cache.workspace import open_workspace
def run(photos, data, head, **settings):
    dataset = open_dataset(photos, downloads=Path(data))
    with open_workspace(Path(data)) as workspace:
        spec = HeadSpec.make(head, **settings)
        request = TrainRequest(DatasetChoice(photos), FeatureChoice(), spec, decoding.DEFAULT_MAX_PIXELS)
        return train_head(dataset, workspace, request)
"""


def test_a_head_that_cannot_be_written_whole_is_not_published(photos: Path, workspace: Workspace) -> None:
    """A limit on the size of files stands for a full disk: the weights, about 1 MB, break off in the middle."""
    fill(workspace, listed(photos))
    script = _IN_PROCESS + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "try:\n"
        "    run(sys.argv[1], sys.argv[2], 'gap', epochs=1, hidden=20_000)\n"
        "except OSError as error:\n"
        "    print('refused'); sys.stdout.flush()\n"
        "    os._exit(0)\n"
        "print('published')\n"
    )
    done = python(script, photos, workspace.root)
    assert done.stdout.strip() == "refused", done.stderr
    assert (workspace.runs).is_dir()
    assert visible(workspace.runs) == []


def test_logistic_regression_does_not_load_tensorflow(photos: Path, workspace: Workspace) -> None:
    fill(workspace, listed(photos))
    script = _IN_PROCESS + (
        "done = run(sys.argv[1], sys.argv[2], 'logreg')\n"
        "assert done.summary['accuracy'] > 0.9\n"
        "print([name for name in ('tensorflow', 'keras') if name in sys.modules])\n"
    )
    done = python(script, photos, workspace.root)
    assert done.stdout.strip() == "[]", done.stderr


# More


def test_untrained_features_are_said_and_recorded(
    photos: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = listed(photos)
    fill(workspace, dataset, spec=FeatureSpec(**{**SPEC.to_dict(), "weights": "untrained:recipe:0"}))
    with caplog.at_level(logging.WARNING):
        run = train(workspace, dataset)
    assert caplog.text.count("UNTRAINED") == 1
    assert read(run.path / "run.json")["features"]["weights"] == "untrained:recipe:0"


def test_digits_are_trained_from_pixels_without_files(workspace: Workspace, tmp_path: Path) -> None:
    dataset = open_dataset("digits", downloads=tmp_path).take(np.arange(300))
    space = workspace.cache.create(SPEC, {})
    keys = np.frombuffer(b"".join(image_key(dataset.read(i)) for i in range(300)), np.uint8).reshape(-1, 32)
    pixels = np.stack([np.asarray(dataset.read(i), np.float32) / 255 for i in range(300)])  # (300, 8, 8)
    tensors = pixels.reshape(300, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(300, 2, 2, 16)
    back = np.arange(300)[::-1]
    made = shard.Rows(
        tensors[back].astype(np.float16), pixels.reshape(300, 64)[back][:, :16], keys[back], np.zeros(300, np.int64)
    )
    space.register(space.write(made))
    run = train(workspace, dataset, HeadSpec.make("flatten", epochs=12, learning_rate=0.003, hidden=64, batch_size=16))
    assert run.summary["classes"] == 10
    assert run.summary["accuracy"] > 0.6
    assert run.name.endswith("-digits-flatten")


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_rows_of_a_vector_are_learned_from_like_others(spec: HeadSpec, workspace: Workspace, photos: Path) -> None:
    """As of a network that gives a vector (c,): its rows are (1, 1, c), and their mean is the row."""
    dataset = listed(photos)
    fill(workspace, dataset, rewrite=lambda _, row: row.mean(axis=(0, 1), keepdims=True))
    run = train(workspace, dataset, spec)
    assert run.summary["accuracy"] > 0.8
