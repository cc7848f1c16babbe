"""16-bit pictures that hold fewer bits: noticed, and right in a space of their own, wherever they are decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import picture
from own_networks import own_choice, tiny

from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import SpecError
from pipeline.core.spec import HeadSpec
from pipeline.dataset import Dataset, of_files, open_dataset
from pipeline.deployment.predict import predict
from pipeline.deployment.reproduce import options_like, reproduction_commands
from pipeline.deployment.serve import service
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import Extraction, extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.report.doctor.checks import check_dataset, summarize
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.training.labelled_features import join_features, join_images
from pipeline.training.open_features import open_features
from pipeline.training.open_run import TrainedRun, open_run
from pipeline.training.train_head import train_head

MOST = decoding.DEFAULT_MAX_PIXELS
FULL = own_choice(tiny())
TWELVE = replace(FULL, depth=12)


@dataclass(frozen=True)
class Place:
    """The same pictures with 12 bits in 16 and with 8 bits, a workspace, and what was made in it of the former."""

    workspace: Workspace
    deep: Dataset
    shallow: Dataset
    first: Extraction
    twelve: Extraction


def pictures(folder: Path, deep: bool) -> Dataset:
    for i in range(24):
        pixels = cv2.normalize(picture(i), None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]
        values = np.round(pixels.astype(float) * 4095 / 255).astype(np.uint16) if deep else pixels
        path = folder / ("train", "train", "val", "test")[i // 2 % 4] / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), values)
    return open_dataset(str(folder), downloads=folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("depth")
    deep, shallow = pictures(root / "deep", True), pictures(root / "shallow", False)
    with closing(Cache(root / "data" / "cache")) as cache:
        workspace = Workspace(root / "data", cache)
        first, twelve = (extract(deep, workspace, choice, ComputeOptions()) for choice in (FULL, TWELVE))
        extract(shallow, workspace, FULL, ComputeOptions())
        yield Place(workspace, deep, shallow, first, twelve)


@pytest.fixture(scope="module")
def run(place: Place) -> TrainedRun:
    chosen = DatasetChoice(str(place.workspace.root.parent / "deep"))
    request = TrainRequest(chosen, TWELVE, HeadSpec.make("logreg", C="0.01"), MOST)
    done = train_head(place.deep, place.workspace, request)
    return open_run(place.workspace.runs, done.name)


def pooled(dataset: Dataset, place: Place, choice: FeatureChoice) -> np.ndarray:
    labelled = join_features(dataset, place.workspace, choice, MOST)
    with labelled.space.reading():
        return labelled.space.reader("pooled").read(labelled.space.locate(labelled.keys))


def test_another_depth_is_another_space_and_its_rows_are_those_of_the_whole_range(place: Place) -> None:
    assert place.first.space and place.twelve.space
    assert place.first.space.spec.decode == decoding.DECODE_POLICY
    assert place.twelve.space.spec.decode == f"{decoding.DECODE_POLICY}-depth_12"
    assert (place.first.stats.peak, place.twelve.stats.peak, place.twelve.computed) == (4095, 4095, 24)
    right = pooled(place.shallow, place, FULL)
    assert np.allclose(pooled(place.deep, place, TWELVE), right, atol=1e-4)
    assert not np.allclose(pooled(place.deep, place, FULL), right, atol=0.01)


def test_dark_pictures_are_told_of_and_those_of_the_right_depth_are_not(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notice = "no value is above 4,095 of 65,535, so that they come out dark"
    join_images(place.deep, place.workspace, MOST, "squash")
    assert notice in caplog.text and "take --depth 12" in caplog.text
    caplog.clear()
    join_images(place.deep, place.workspace, MOST, "squash", 12)
    join_images(place.shallow, place.workspace, MOST, "squash")
    assert caplog.text == ""
    found = check_dataset(place.deep, place.workspace, FULL, MOST)
    assert (found.depth, summarize(found)["largest_16_bit_value"]) == (16, 4095)
    assert check_dataset(place.deep, place.workspace, TWELVE, MOST).depth == 12
    assert summarize(check_dataset(place.shallow, place.workspace, FULL, MOST))["largest_16_bit_value"] is None


def test_a_space_is_chosen_by_the_depth_and_a_named_one_brings_its_own(place: Place) -> None:
    assert place.first.space and place.twelve.space

    def space(choice: FeatureChoice) -> str:
        return join_features(place.deep, place.workspace, choice, MOST).space.name

    own = FeatureChoice(backbone=FULL.backbone)
    assert space(own) == place.first.space.name
    assert space(replace(own, depth=16)) == place.first.space.name
    assert space(replace(own, depth=12)) == place.twelve.space.name
    assert space(FeatureChoice(space=place.twelve.space.name)) == place.twelve.space.name
    root = place.workspace.root
    deep = root.parent / "deep"
    with open_features(deep, data_dir=root, what="pooled", depth=12, backbone=FULL.backbone) as features:
        assert features.space == place.twelve.space.name
    with pytest.raises(SpecError, match="decode is rgb8"):
        space(FeatureChoice(space=place.twelve.space.name, depth=14))


def test_a_run_decodes_new_images_as_those_it_was_trained_on(place: Place, run: TrainedRun, tmp_path: Path) -> None:
    deep = cv2.imread(str(place.deep.path(0)), cv2.IMREAD_UNCHANGED)
    assert deep is not None
    files = [tmp_path / "deep.tif", tmp_path / "shallow.tif"]  # other bytes than those that have rows
    cv2.imwrite(str(files[0]), deep)
    cv2.imwrite(str(files[1]), np.round(deep / 4095 * 255).astype(np.uint8))
    known, new = place.deep.take(np.array([0])), of_files("new", files)
    (row,) = predict([run], known, place.workspace, max_pixels=MOST)
    answers = [*predict([run], new, place.workspace, max_pixels=MOST)]
    assert row.cached and not answers[0].cached
    for answer in answers:
        assert np.allclose(answer.probabilities, row.probabilities, atol=1e-3)  # type: ignore[arg-type]
    with service([run], place.workspace, max_pixels=MOST) as answer:
        assert np.allclose(answer(files[0].read_bytes()).result(), row.probabilities, atol=1e-3)  # type: ignore[arg-type]


def test_a_run_tells_the_depth_to_whoever_repeats_it(run: TrainedRun) -> None:
    assert run.request is not None and run.request.features.depth == 12
    features, train = reproduction_commands(run, ["python", "cli.py"], 0)
    assert "--depth 12" in features and "--depth" not in train  # which names the space
    assert options_like(run, "train-head")["depth"] == 12
