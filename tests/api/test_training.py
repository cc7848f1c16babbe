"""`Icebox.features`, `train_head`, `freeze`, `finetune` and `sweep` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import icebox, write_picture
from own_networks import SCALING, tiny, tiny_options

import pipeline
from pipeline.api.options import declared
from pipeline.api.training_options import (
    FeaturesOptions,
    FinetuneOptions,
    FreezeOptions,
    SweepOptions,
    TrainHeadOptions,
)
from pipeline.core.errors import MissingFeaturesError, UsageError
from pipeline.core.spec import HEAD_DEFAULTS

pytestmark = pytest.mark.usefixtures("no_plots")
NETWORK: Any = {"backbone": tiny(), "scaling": SCALING, "precision": "float32"}
SWEPT: Any = {**NETWORK, "backbone": [tiny()]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "photos"
    for i in range(40):
        write_picture(root / ("cats" if i % 2 else "dogs") / f"{i}.png", seed=i)
    return root


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> pipeline.Icebox:
    box = pipeline.Icebox(tmp_path_factory.mktemp("box"), quiet=True)
    assert box.features(photos, **NETWORK).computed == 40
    return box


def test_features_are_computed_once(box: pipeline.Icebox, photos: Path) -> None:
    again = box.features(photos, **NETWORK)
    assert (again.rows, again.computed, again.reused) == (40, 0, 40)
    printed = icebox(box.data_dir, "features", "--dataset", photos, *tiny_options(), "--json").json
    assert {**again.to_dict(), "seconds": None} == {**printed, "seconds": None}
    assert "<th>reused</th><td>40</td>" in again._repr_html_()


def test_a_head_is_a_run_that_predicts(box: pipeline.Icebox, photos: Path) -> None:
    run = box.train_head(photos, "logreg", C=0.1, **NETWORK)
    assert run.to_dict()["features_computed"] == 0
    assert run.images == 40
    assert run.accuracy == box.run("latest").accuracy
    (said,) = run.predict(photos / "cats" / "1.png").to_dict()["predictions"]
    assert said["label"] in run.classes


def test_a_full_model_is_trained_both_ways(box: pipeline.Icebox, photos: Path) -> None:
    frozen = box.freeze(photos, epochs=1, batch_size=16, **NETWORK)
    assert frozen.summary["stage"] == "freeze"
    tuned = box.finetune(photos, init=frozen, from_cache=True, storage="float32", epochs=1, batch_size=16, **NETWORK)
    assert (tuned.summary["stage"], tuned.summary["init"]) == ("finetune", frozen.name)


def test_a_sweep_keeps_the_best(box: pipeline.Icebox, photos: Path) -> None:
    done = box.sweep(photos, head=["logreg"], settings=["C=0.01,1"], **SWEPT)
    assert len(done.runs) == 2
    assert done.best["run"] == box.run("latest").name


def test_what_is_missing_says_which_features_to_compute(box: pipeline.Icebox, photos: Path) -> None:
    with pytest.raises(MissingFeaturesError) as caught:
        box.train_head(photos, views=3, augment="rotation=5", **NETWORK)
    assert f"compute them by Icebox.features(dataset={str(photos)!r}, " in str(caught.value)
    (options,) = caught.value.options
    assert (options["views"], options["augment"]) == (3, "rotation=5.0")
    assert box.features(**options).computed == 80
    assert box.train_head(photos, "logreg", C=0.1, views=3, augment="rotation=5", **NETWORK).summary["views"] == 3


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda box: box.train_head(head="tree"), "no head named 'tree'"),
        (lambda box: box.train_head(head="logreg", epochs=3), "the logreg head has no epochs"),
        (lambda box: box.features(fit="stretch"), "fit must be one of squash, crop, pad, found 'stretch'"),
        (lambda box: box.features(views=0), "views must be in 1 … 100, found 0"),
        (lambda box: box.finetune(views=3), "--views is of cached rows"),
        (lambda box: box.finetune(init="latest", hidden="3"), "--hidden is of a new head, and --init brings one"),
        (lambda box: box.sweep(resume="latest", memory="2GB"), "--resume continues with what was requested before"),
        (lambda box: box.train_head(memory="much"), "--memory must be a size such as 2GB"),
    ],
)
def test_wrong_usage_is_told(box: pipeline.Icebox, call: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        call(box)


def test_an_option_that_there_is_not_is_refused(box: pipeline.Icebox) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'; there are archive, "):
        box.freeze(epoch=3)  # type: ignore[call-arg]


def test_settings_of_heads_are_those_of_the_library() -> None:
    known = {name for settings in HEAD_DEFAULTS.values() for name in settings}
    assert known <= declared(TrainHeadOptions).keys()
    for group in (FeaturesOptions, TrainHeadOptions, FreezeOptions, FinetuneOptions, SweepOptions):
        assert all(option.help.endswith((".", "]")) for _, option in declared(group).values())
