"""Augmented views: decided by who the image is and by the recipe, cached beside the plain one, read to train on."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cached
import h5py
import made
import numpy as np
import pytest
from conftest import icebox, picture
from own_networks import SIZE, tiny, tiny_choice

from pipeline.backbone.frozen import FrozenBackbone
from pipeline.cache import shard
from pipeline.cache.gc import Retention, collect
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cache.workspace import Workspace, open_workspace
from pipeline.core.errors import MissingRowsError, ShardDamagedError, UsageError
from pipeline.core.hashing import image_key
from pipeline.core.spec import Augmentation, HeadSpec, Views
from pipeline.dataset import Dataset, limit, open_dataset
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.explain import explain
from pipeline.extraction.extract import Extraction, extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.extraction.recompute_check import recompute
from pipeline.images import augment, decoding
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.training.labelled_features import join_features
from pipeline.training.train_head import train_head
from pipeline.training.training_data import open_training_data

pytestmark = pytest.mark.usefixtures("no_plots")

STILL = Augmentation(0, 0, 0, 0, 0, horizontal_flip=False)
PIXELS = picture(3, 31, 41)
MIDDLE = np.full(augment.DRAWS, 0.5)  # draws that warp nothing, and flip nothing

# The recipe


def test_a_recipe_is_read_from_a_text_and_written_as_one() -> None:
    assert Augmentation.parse("") == Augmentation()
    recipe = Augmentation.parse("rotation=15, zoom=0,horizontal-flip=false,fill=reflect")
    assert recipe == Augmentation(rotation=15, zoom=0, horizontal_flip=False, fill="reflect")
    assert Augmentation.parse(str(recipe)) == recipe
    assert str(Augmentation()) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zoom=0.1,fill=wrap,zoom=0.2", r"--augment has zoom twice"),
        ("rotate=3", r"--augment has no 'rotate=3'; it takes NAME=VALUE,… of rotation, width_shift"),
        ("rotation", r"rotation must be a number in 0 … 180, found ''"),
        ("rotation=-1", r"rotation must be a number in 0 … 180, found '-1.0'"),
        ("zoom=nan", r"zoom must be a number in 0 … 0.9, found 'nan'"),
        ("zoom=1", r"zoom must be a number in 0 … 0.9"),
        ("vertical_flip=maybe", r"vertical_flip must be true or false, found 'maybe'"),
        ("fill=white", r"fill must be one of nearest, reflect, wrap, black, found 'white'"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augmentation.parse(text)


@pytest.mark.parametrize("count", [0, 101, True, 2.0])
def test_a_count_of_views_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(UsageError, match="--views must be a whole number in 1 … 100"):
        Views(count)


def test_a_view_has_a_number_that_recipe_and_index_decide() -> None:
    three = Views(3).numbers
    assert three[0] == 0
    assert len(set(three)) == 3
    assert Views(5).numbers[:3] == three, "more views are more of the same"
    assert Views(3, Augmentation(rotation=29)).numbers[1] not in three
    assert Views(3, Augmentation(rotation=30)) == Views(3)
    assert three[1] == 1703854315646420236, "cached rows are found by it: it must never change"
    assert Views.from_dict(json.loads(json.dumps(asdict(Views(3, STILL))))) == Views(3, STILL)


# The warp


def test_draws_are_the_same_everywhere() -> None:
    drawn = augment.draws(bytes(32), 1)
    assert drawn.shape == (augment.DRAWS,)
    assert drawn[:2] == pytest.approx([0.3400060928566906, 0.6325918671350831], abs=1e-15)
    many = np.stack([augment.draws(image_key(bytes([i])), 7) for i in range(256)])
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean(axis=0) == pytest.approx(np.full(8, 0.5), abs=0.08)


def test_each_view_of_an_image_is_drawn_anew() -> None:
    drawn = np.stack([augment.draws(bytes(32), number) for number in Views(5).numbers])
    assert (np.diff(np.sort(drawn, axis=0), axis=0) > 0).all(), "no number is drawn twice"


def warped(recipe: Augmentation, **at: float) -> np.ndarray:
    """Warp by draws that are in the middle but for those named."""
    names = ("rotation", "width_shift", "height_shift", "shear", "zoom_x", "zoom_y", "horizontal_flip", "vertical_flip")
    return augment.warp(PIXELS, recipe, np.array([at.get(name, 0.5) for name in names]))


def test_a_recipe_of_nothing_leaves_the_image_as_it_is() -> None:
    assert np.array_equal(augment.warp(PIXELS, STILL, np.full(8, 0.1)), PIXELS)
    assert np.array_equal(augment.warp(PIXELS, Augmentation(), MIDDLE), PIXELS)


def test_flips() -> None:
    both = replace(STILL, horizontal_flip=True, vertical_flip=True)
    assert np.array_equal(warped(both, horizontal_flip=0.2), PIXELS[:, ::-1])
    assert np.array_equal(warped(both, vertical_flip=0.2), PIXELS[::-1])


def test_shifts_go_as_far_as_the_recipe_says_and_the_edge_is_filled() -> None:
    recipe = replace(STILL, width_shift=10 / 41, height_shift=5 / 31)
    right = warped(recipe, width_shift=1.0)
    assert np.array_equal(right[:, 10:], PIXELS[:, :-10])
    assert (right[:, :10] == PIXELS[:, :1]).all(), "nearest"
    down = warped(replace(recipe, fill="black"), height_shift=1.0)
    assert np.array_equal(down[5:], PIXELS[:-5])
    assert not down[:5].any()


def test_a_quarter_turn_is_one() -> None:
    square = picture(5, 41, 41)
    turned = augment.warp(square, replace(STILL, rotation=90), np.array([1.0, *[0.5] * 7]))
    assert np.array_equal(turned, np.rot90(square, -1))


def test_zoom_and_shear_move_places_by_what_they_say() -> None:
    """Of a white dot 10 right of the centre and 10 below it: where is it then?"""
    dot = np.zeros((61, 61, 3), np.uint8)
    dot[40, 40] = 255
    zoomed = augment.warp(dot, replace(STILL, zoom=0.5), np.array([0.5] * 4 + [1.0, 0.5, 0.5, 0.5]))
    assert np.unravel_index(zoomed[..., 0].argmax(), (61, 61)) == (40, 45)
    sheared = augment.warp(dot, replace(STILL, shear=0.5), np.array([0.5] * 3 + [1.0] + [0.5] * 4))
    assert np.unravel_index(sheared[..., 0].argmax(), (61, 61)) == (40, 45)


# In the cache


@pytest.fixture
def digits(tmp_path: Path) -> Dataset:
    return limit(open_dataset("digits", downloads=tmp_path), 3)


def computed(tmp_path: Path, dataset: Dataset, views: Views) -> Extraction:
    with open_workspace(tmp_path / "data") as workspace:
        return extract(dataset, workspace, tiny_choice(), ComputeOptions(shard_rows=4, batch_size=4), views=views)


def test_views_are_computed_once_and_are_what_the_backbone_says_of_the_warped_image(
    tmp_path: Path, digits: Dataset
) -> None:
    three = Views(3)
    done = computed(tmp_path, digits, three)
    assert (done.rows, done.computed, done.reused, done.duplicates) == (9, 9, 0, 0)
    again = computed(tmp_path, digits, three)
    assert (again.rows, again.computed, again.reused) == (9, 0, 9)
    fewer = computed(tmp_path, digits, Views(1))
    assert (fewer.rows, fewer.computed, fewer.reused) == (3, 0, 3)
    more = computed(tmp_path, digits, Views(4))
    assert (more.rows, more.computed, more.reused) == (12, 3, 9)
    twice = computed(tmp_path, digits.take([0, 1, 1, 2]), three)
    assert (twice.rows, twice.computed, twice.reused, twice.duplicates) == (12, 0, 9, 3)

    with open_workspace(tmp_path / "data") as workspace:
        (space,) = workspace.cache.spaces()
        backbone = FrozenBackbone(space.spec, tiny(), 4, network=tiny())
        for i in range(3):
            key = image_key(digits.read(i))
            plain = decoding.decode(np.asarray(digits.read(i)), size=SIZE)
            drawn = [augment.draws(key, number) for number in three.numbers[1:]]
            seen = np.stack([plain, *(augment.warp(plain, three.recipe, each) for each in drawn)])
            stored = space.reader("features").read(space.locate([key] * 3, three.numbers))
            assert np.array_equal(stored, backbone(seen)[0])
    described = {}
    for path in (space.path / "shards").glob("*.h5"):
        with h5py.File(path) as file:
            text: Any = file.attrs["views"]
            described |= json.loads(text)
    assert described == {str(number): recipe for number, recipe in Views(4).recipes.items()}


def test_an_image_that_cannot_be_decoded_is_set_aside_in_all_views(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "b").mkdir()
    (tmp_path / "photos" / "a" / "bad.png").write_bytes(b"no image")
    cached.write_images(tmp_path / "photos", 1, ("ant",))
    dataset = open_dataset(str(tmp_path / "photos"), downloads=tmp_path)
    done = computed(tmp_path, dataset, Views(3))
    assert (done.images, done.rows, done.computed, len(done.quarantined)) == (2, 3, 3, 1)


def space_with(cache: Cache, views: Views, numbers: list[int]) -> FeatureSpace:
    """A space where each image has one shard with a row for every view, the last channel saying which."""
    space = cache.create(made.SPEC, {})
    for number in numbers:
        rows = made.made([number] * views.count)
        rows.features[..., -1] = np.arange(views.count).reshape(-1, 1, 1)
        part = shard.Rows(rows.features, rows.pooled, rows.keys, np.array(views.numbers), views.recipes)
        space.register(space.write(part))
    return space


def test_gc_merges_views_and_keeps_what_they_are(tmp_path: Path) -> None:
    views = Views(3, STILL)
    with closing(Cache(tmp_path / "cache")) as cache:
        space = space_with(cache, views, [1, 2])
        assert collect(cache, Retention()).shards_repacked == 2
        (name,) = space.shard_files()
        rows = shard.read_whole(space.shards / name, np.arange(6))
        assert rows.recipes == views.recipes
        located = space.locate([made.key(2)] * 3, views.numbers)
        assert space.reader("features").read(located)[:, 0, 0, -1].tolist() == [0, 1, 2]


def test_a_row_of_another_view_is_never_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    views = Views(2)
    with closing(Cache(tmp_path / "cache")) as cache:
        space = space_with(cache, views, [1])
        located = space.locate([made.key(1)])
        wrong = replace(located, positions=1 - located.positions)
        with pytest.raises(ShardDamagedError, match="holds other rows than the index says"):
            space.reader("features").read(wrong)
        assert not space.locate([made.key(1)], [5]).found.any()


def test_a_shard_that_does_not_say_what_its_views_are_is_refused(tmp_path: Path) -> None:
    with closing(Cache(tmp_path / "cache")) as cache:
        space = cache.create(made.SPEC, {})
        rows = made.made([1])
        info = space.write(shard.Rows(rows.features, rows.pooled, rows.keys, np.array([7]), {7: "odd"}))
        path = space.shard_path(info.name)
        with h5py.File(path, "r+") as file:
            file.attrs["views"] = np.bytes_(b'{"0": "plain"}')
        with pytest.raises(ShardDamagedError, match="does not say what its view 7 is"):
            shard.read_info(path, space.spec)


def test_explain_tells_of_views_that_are_missing(tmp_path: Path, workspace: Workspace, photos: Path) -> None:
    dataset = cached.listed(photos)
    cached.fill(workspace, dataset, views=Views(2))
    states = [explain(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS, Views(n)) for n in (1, 2, 4)]
    assert [each.counts for each in states] == [{"cached": 60}, {"cached": 60}, {"new": 60}]
    assert states[2].images[0].why == "2 of its augmented views have not been computed before"


# To train on


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    cached.write_images(tmp_path / "photos", 20)
    return tmp_path / "photos"


def request(photos: Path, spec: HeadSpec, views: Views, **more: Any) -> TrainRequest:
    choice = DatasetChoice(str(photos))
    return TrainRequest(choice, FeatureChoice(), spec, decoding.DEFAULT_MAX_PIXELS, views=views, **more)


@pytest.mark.parametrize("memory", [None, 4_000])
def test_only_training_rows_come_in_all_views(workspace: Workspace, photos: Path, memory: int | None) -> None:
    views = Views(3)
    dataset = cached.listed(photos)
    cached.fill(workspace, dataset, views=views)
    labelled = join_features(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS, views=views)
    with open_training_data(labelled, [HeadSpec.make("flatten")], memory) as training_data:
        data = training_data.data()
        n = len(training_data.members["train"])
        assert [len(data.train), len(data.val)] == [3 * n, len(training_data.members["val"])]
        assert len(data.train_labels) == 3 * n
        rows = data.train[np.arange(3 * n)]
        for number in range(3):  # the marker of a view, and of a class
            assert (rows[number * n : (number + 1) * n, 0, 0, -1] == number).all()
        said = rows.mean(axis=(1, 2))[:, : len(cached.CLASSES)].argmax(axis=1)
        assert (said == data.train_labels).all()
        assert (data.val[np.arange(len(data.val))][:, 0, 0, -1] == 0).all()
        assert (training_data.rows["test"][np.arange(4)][:, 0, 0, -1] == 0).all()
        assert data.groups is not None
        assert (data.groups[:n] == data.groups[n : 2 * n]).all(), "views of an image stay together"


@pytest.mark.parametrize("spec", [HeadSpec.make("gap", epochs=3), HeadSpec.make("logreg", C="0.1,1", select="cv")])
def test_heads_train_on_views(workspace: Workspace, photos: Path, spec: HeadSpec) -> None:
    dataset, views = cached.listed(photos), Views(3)
    cached.fill(workspace, dataset, views=views)
    plain = train_head(dataset, workspace, request(photos, spec, Views(1))).summary
    run = train_head(dataset, workspace, request(photos, spec, views)).summary
    assert (run["views"], run["train_rows"]) == (3, 3 * plain["train_rows"])
    assert (run["val_rows"], run["test_rows"]) == (plain["val_rows"], plain["test_rows"])
    folds = train_head(dataset, workspace, request(photos, spec, views, folds=3))
    assert folds.summary["val_rows"] == plain["train_rows"] + plain["val_rows"], "each image is answered once"
    assert folds.summary["val_accuracy"] > 0.5


def test_folds_hold_out_images_with_all_their_views(workspace: Workspace, photos: Path) -> None:
    dataset, views = cached.listed(photos), Views(2)
    cached.fill(workspace, dataset, views=views)
    labelled = join_features(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS, views=views)
    with open_training_data(labelled, [HeadSpec.make("gap")], None, folds=2) as training_data:
        n = len(training_data.members["train"])
        some, held = np.arange(0, n, 2), np.arange(1, n, 2)
        data = training_data.fold(some, held)
        train, val = (rows[np.arange(len(rows))] for rows in (data.train, data.val))
        assert (len(train), len(val)) == (2 * len(some), len(held))
        plain = training_data.rows["train"][np.arange(n)]
        assert np.array_equal(train[: len(some)], plain[some])
        assert np.array_equal(val, plain[held])
        assert not set(map(bytes, val)) & set(map(bytes, train))


def test_views_that_are_missing_are_named_with_their_command(workspace: Workspace, photos: Path) -> None:
    dataset = cached.listed(photos)
    cached.fill(workspace, dataset)
    with pytest.raises(MissingRowsError, match=r"60 of 60 images have no features in \S+, in 2 views"):
        train_head(dataset, workspace, request(photos, HeadSpec.make("gap"), Views(2)))
    done = icebox(
        workspace.root, "train-head", "--dataset", photos, "--head", "logreg", "--views", "2", "--augment", "zoom=0.1"
    )
    assert done.code == 1
    assert f"features --dataset {photos} --views 2 --augment zoom=0.1" in done.err


def test_a_recipe_without_views_is_wrong_use(tmp_path: Path) -> None:
    done = icebox(tmp_path, "features", "--augment", "zoom=0.1")
    assert done.code == 2
    assert "ask for some by --views 2 or more" in done.err


def test_the_space_is_taken_that_holds_the_views(workspace: Workspace, photos: Path) -> None:
    dataset = cached.listed(photos)
    one = cached.fill(workspace, dataset, spec=cached.SPEC)
    two = cached.fill(workspace, dataset, spec=replace(cached.SPEC, precision="bfloat16"), views=Views(3))
    for views, space in ((Views(1), min(one.name, two.name)), (Views(3), two.name)):
        labelled = join_features(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS, views=views)
        assert labelled.space.name == space
    found = explain(dataset, workspace, FeatureChoice(space=one.name), decoding.DEFAULT_MAX_PIXELS, Views(3))
    assert found.counts == {"other space": 60}
    assert {each.space: each.rows for each in found.spaces} == {one.name: 60, two.name: 180}


def test_explain_tells_of_views_in_a_bad_shard(workspace: Workspace, photos: Path) -> None:
    dataset = cached.listed(photos)
    space = cached.fill(workspace, dataset, views=Views(2))
    augmented = [name for name, view in space.index.views(space.name) if view]
    path = space.shard_path(augmented[0])
    path.write_bytes(path.read_bytes()[:-100])
    found = explain(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS, Views(2))
    assert set(found.counts) == {"cached", "bad shard"}
    assert explain(dataset, workspace, FeatureChoice(), decoding.DEFAULT_MAX_PIXELS).counts == {"cached": 60}


def test_the_canary_computes_views_afresh_too(tmp_path: Path, digits: Dataset) -> None:
    computed(tmp_path, digits, Views(3))
    with open_workspace(tmp_path / "data") as workspace:
        (space,) = workspace.cache.spaces()
        drift = recompute(space, 100, workspace, digits)
        assert drift is not None
        assert (drift.rows, drift.identical) == (9, 9)


@pytest.mark.parametrize(
    "recipe", ["odd", 3, None, [], {}, {"index": 1, "rotation": -1}, Views(2).recipes[Views(2).numbers[1]]]
)
def test_views_that_are_not_what_they_say_are_left_out_by_the_canary(tmp_path: Path, recipe: Any) -> None:
    with closing(Cache(tmp_path / "cache")) as cache:
        space = cache.create(made.SPEC, {})
        rows = made.made([1])
        space.register(space.write(shard.Rows(rows.features, rows.pooled, rows.keys, np.array([7]), {7: recipe})))
        assert space.recipes() == {0: None}
