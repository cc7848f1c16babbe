"""What a run has seen is known of the run it began with too, of older ones as long as their dataset is unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cached import fill, listed, write_images
from conftest import unseal

from pipeline.cache.workspace import Workspace
from pipeline.core.spec import HeadSpec
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.runs.request import DatasetChoice, FinetuneRequest, TrainRequest
from pipeline.runs.run_images import FILE, RunImages
from pipeline.training.finetune import with_initial
from pipeline.training.initial_model import InitialModel, open_initial_run
from pipeline.training.labelled_features import LabelledFeatures, join_features
from pipeline.training.open_run import open_run
from pipeline.training.seen_images import seen_images
from pipeline.training.train_head import train_head


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", 20)
    return tmp_path / "photos"


@pytest.fixture
def run(workspace: Workspace, photos: Path) -> Path:
    fill(workspace, listed(photos))
    return trained(workspace, photos)


def trained(workspace: Workspace, photos: Path) -> Path:
    logreg = HeadSpec.make("logreg", C="0.1")
    request = TrainRequest(DatasetChoice(str(photos)), FeatureChoice(), logreg, decoding.DEFAULT_MAX_PIXELS)
    return train_head(listed(photos), workspace, request).path


def begun_with(run: Path, workspace: Workspace, photos: Path) -> LabelledFeatures:
    """The images of a model that begins with the run."""
    gap, most = HeadSpec.make("gap"), decoding.DEFAULT_MAX_PIXELS
    request = FinetuneRequest("finetune", DatasetChoice(str(photos)), FeatureChoice(), gap, most, init=str(run))
    return with_initial(join_features(listed(photos), workspace, FeatureChoice(), most), request, workspace)


@pytest.mark.parametrize("record", ["kept", "derived"])
def test_what_a_model_begins_with_was_trained_on(run: Path, workspace: Workspace, photos: Path, record: str) -> None:
    kept = RunImages.read(run)
    assert kept is not None
    if record == "derived":
        unseal(run)
        (run / FILE).unlink()
    found = begun_with(run, workspace, photos).run_images()
    assert found.complete
    assert found.among("initial").tolist() == kept.among("train", "val")[_order(kept)].tolist()


def _order(kept: RunImages) -> list[int]:
    keys = kept.among("train", "val").tolist()
    return sorted(range(len(keys)), key=lambda i: keys[i])


def test_images_that_the_run_was_made_without_are_known_by_their_names(workspace: Workspace, photos: Path) -> None:
    """The index may no longer know what could not be decoded, as after another version of the decoder."""
    (photos / "bee" / "bad.png").write_bytes(b"no image")
    fill(workspace, listed(photos), leave_out={listed(photos).names.index("bee/bad.png")})
    run = trained(workspace, photos)
    kept = RunImages.read(run)
    assert kept is not None and json.loads((run / "quarantined.json").read_text())[0]["path"] == "bee/bad.png"
    unseal(run)
    (run / FILE).unlink()
    found = seen_images(open_run(workspace.runs, run.name), workspace)
    assert found is not None
    assert found.digests.tolist() == kept.digests.tolist()


def test_that_nobody_knows_it_is_said_and_kept(
    run: Path, workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unseal(run)
    (run / FILE).unlink()
    (photos / "ant" / "000.png").unlink()
    assert not begun_with(run, workspace, photos).run_images().complete
    assert f"nobody knows which images {run} was trained on" in caplog.text


def test_a_model_takes_over_the_order_of_the_classes_it_begins_with(run: Path, photos: Path) -> None:
    dataset = listed(photos)
    other = replace(dataset, classes=dataset.classes[::-1], labels=2 - dataset.labels)
    begun = open_initial_run(run, other)
    origin = InitialModel(begun.base, None, "", None, "", -1, begun)  # pyright: ignore[reportArgumentType]
    assert origin.matched(other).classes == dataset.classes
    assert origin.matched(other).labels.tolist() == dataset.labels.tolist()
