"""The full model from images and from the cache: the same training, the same model, killed and gone on with."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached import fill
from conftest import SPEC, icebox, unseal, write_picture
from faults import signalled
from own_networks import SIZE, own_choice, tiny, write_network, write_sides

from pipeline.backbone.graph import cut_layers, layer_names
from pipeline.backbone.keras_start import import_keras
from pipeline.cache.keys import split
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import DatasetError, RunError, SpecError, UsageError, WeightsError
from pipeline.core.hashing import image_key
from pipeline.core.spec import Augmentation, HeadSpec, Views
from pipeline.dataset import Dataset, open_dataset
from pipeline.deployment.evaluate_run import evaluate_run
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.extraction.feature_choice import FeatureChoice, resolve_choice, weights_of
from pipeline.images import decoding
from pipeline.runs import store
from pipeline.runs.request import DatasetChoice, FinetuneRequest, TrainRequest, command_of
from pipeline.runs.run_images import RunImages
from pipeline.training import full_model, heads
from pipeline.training.finetune import FinetuneResult, _warn_of_collapse, finetune
from pipeline.training.full_model import FullModel
from pipeline.training.image_batches import ImageRows
from pipeline.training.initial_model import open_initial_model
from pipeline.training.labelled_features import join_images
from pipeline.training.open_run import open_run
from pipeline.training.train_head import train_head
from pipeline.training.training_data import open_image_data

pytestmark = pytest.mark.usefixtures("no_plots")

TINY = own_choice(tiny())
INCEPTION = FeatureChoice(weights="untrained", precision="float32", storage="float32")
SETTINGS = {"epochs": 3, "batch_size": 8, "optimizer": "adagrad", "learning_rate": 0.01}
TWO_BY_TWO = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-4}  # two steps in each of two epochs


@dataclass(frozen=True)
class Place:
    """A workspace and a folder of images, which a network is trained on that is frozen up to a layer."""

    workspace: Workspace
    photos: Path
    features: FeatureChoice = TINY
    until: str = "middle"

    @property
    def dataset(self) -> Dataset:
        return open_dataset(str(self.photos), downloads=self.photos)

    def request(self, stage: str = "finetune", head: str = "gap", **more: Any) -> FinetuneRequest:
        most = decoding.DEFAULT_MAX_PIXELS
        given = {"features": self.features, "max_pixels": most, "freeze_until": self.until, **more}
        settings = {**SETTINGS, **given.pop("settings", {})}
        return FinetuneRequest(
            stage=stage, images=DatasetChoice(str(self.photos)), head=HeadSpec.make(head, **settings), **given
        )

    def train(self, stage: str = "finetune", *, resume: str | None = None, **more: Any) -> FinetuneResult:
        return finetune(self.dataset, self.workspace, self.request(stage, **more), resume=resume)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Images for the tiny network: 20 to train on, 6 to validate, 6 to test."""
    root = tmp_path_factory.mktemp("finetune")
    with closing(Cache(root / "data" / "cache")) as cache:
        yield Place(Workspace(root / "data", cache), write_sides(root / "photos", (20, 6, 6)))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Images for InceptionV3: 8 to train on, 2 to validate, 2 to test."""
    root = tmp_path_factory.mktemp("inception")
    with closing(Cache(root / "data" / "cache")) as cache:
        yield Place(Workspace(root / "data", cache), write_sides(root / "photos", (8, 2, 2)), INCEPTION, "mixed9")


@pytest.fixture(scope="module")
def from_images(place: Place) -> FinetuneResult:
    return place.train()


@pytest.fixture(scope="module")
def from_cache(place: Place) -> FinetuneResult:
    return place.train(from_cache=True)


@pytest.fixture(scope="module")
def inception_from_cache(inception: Place) -> FinetuneResult:
    return inception.train(from_cache=True, settings=TWO_BY_TWO)


def regression_on(place: Place) -> Path:
    """Train a regression on the rows that the workspace has; return the folder of its run."""
    chosen = DatasetChoice(str(place.photos))
    request = TrainRequest(chosen, place.features, HeadSpec.make("logreg"), decoding.DEFAULT_MAX_PIXELS)
    return train_head(place.dataset, place.workspace, request).path


@pytest.fixture(scope="module")
def logreg(place: Place) -> str:
    """The folder of a regression on rows of the tiny network."""
    extract(place.dataset, place.workspace, TINY, ComputeOptions())
    return str(regression_on(place))


@pytest.fixture(scope="module")
def made_up(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The images with rows (2, 2, 8) that pass for InceptionV3's, for what is refused before anything is computed."""
    root = tmp_path_factory.mktemp("made-up")
    with closing(Cache(root / "cache")) as cache:
        there = Place(Workspace(root, cache), place.photos, FeatureChoice(), "mixed9")
        fill(there.workspace, there.dataset, spec=SPEC)
        yield there


@pytest.fixture(scope="module")
def made_up_logreg(made_up: Place) -> str:
    return str(regression_on(made_up))


def history(run: FinetuneResult) -> list[dict[str, float]]:
    return json.loads((run.path / "history.json").read_text())


def predictions(run: FinetuneResult) -> np.ndarray:
    lines = (run.path / "predictions.csv").read_text().splitlines()[1:]
    return np.array([[float(p) for p in line.split(",")[5:]] for line in lines])


# From images and from the cache


def check_alike(from_images: FinetuneResult, from_cache: FinetuneResult) -> None:
    for ours, theirs in zip(history(from_images), history(from_cache), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)
    assert history(from_images)[0]["loss"] != pytest.approx(history(from_images)[-1]["loss"], rel=1e-3)
    assert np.allclose(predictions(from_images), predictions(from_cache), atol=1e-3)


def test_both_ways_train_alike(from_images: FinetuneResult, from_cache: FinetuneResult) -> None:
    check_alike(from_images, from_cache)


def test_inception_trains_what_comes_after_the_layer(inception_from_cache: FinetuneResult) -> None:
    check_inception(inception_from_cache)


@pytest.mark.long  # what is built of InceptionV3 is the same both ways: see `test_it_is_evaluated_from_images`
def test_inception_trains_alike_both_ways(inception: Place, inception_from_cache: FinetuneResult) -> None:
    from_images = inception.train(settings=TWO_BY_TWO)
    check_alike(from_images, inception_from_cache)
    check_inception(from_images)


def check_inception(run: FinetuneResult) -> None:
    said = run.summary
    assert (said["trains"][0], said["trains"][-2:]) == ("conv2d_89", ["hidden", "probabilities"])
    assert (said["frozen_until"], said["weights"]) == ("mixed9", "untrained")
    assert said["first_loss"] != pytest.approx(said["last_loss"], rel=1e-3)


def test_both_ways_leave_the_same_files_and_the_same_model(
    from_images: FinetuneResult, from_cache: FinetuneResult
) -> None:
    names = [sorted(path.name for path in run.path.iterdir()) for run in (from_images, from_cache)]
    assert names[0] == names[1]
    models = [FullModel.load(run.path, open_run(run.path.parent, run.name).spec) for run in (from_images, from_cache)]
    for one, other in zip(*(each.model.get_weights() for each in models), strict=True):
        assert np.allclose(one, other, atol=1e-3)


def convolution_after_middle() -> str:
    """Return the name of the tiny network's last convolution."""
    names = tiny_layers()[0]
    return names[names.index("middle") + 1]


def tiny_layers() -> tuple[list[str], list[str]]:
    """Return the names of the tiny network's layers, and of those where it can be cut."""
    whole = own_backbone()
    return layer_names(whole), cut_layers(whole)


def own_backbone() -> Any:
    """Return the tiny network with its weights."""
    return import_keras().models.load_model(tiny(), compile=False)


def test_the_summary_says_what_trained(from_images: FinetuneResult, from_cache: FinetuneResult) -> None:
    for run in (from_images, from_cache):
        said = run.summary
        assert said["trains"] == [convolution_after_middle(), "hidden", "probabilities"]
        assert (said["stage"], said["head"], said["frozen_until"]) == ("finetune", "gap", "middle")
        assert said["first_loss"] == history(run)[0]["loss"]
        assert said["last_loss"] == history(run)[-1]["loss"]
        assert said["max_difference"] <= 1e-3
        assert (said["train_rows"], said["val_rows"], said["test_rows"]) == (20, 6, 6)
        assert json.dumps(said, allow_nan=False)
    assert (from_images.summary["features_computed"], from_cache.summary["features_computed"]) == (0, 32)


def test_only_what_comes_after_the_layer_has_changed(from_cache: FinetuneResult) -> None:
    before = own_backbone()
    after = FullModel.load(from_cache.path, open_run(from_cache.path.parent, from_cache.name).spec).whole
    assert len(before.layers) == len(after.layers)
    changed = [
        layer.name
        for layer, other in ((layer, after.get_layer(layer.name)) for layer in before.layers)
        if any(not np.array_equal(a, b) for a, b in zip(layer.get_weights(), other.get_weights(), strict=True))
    ]
    assert changed == from_cache.summary["trains"][:-2]


def test_the_second_time_nothing_is_computed(place: Place, from_cache: FinetuneResult) -> None:
    again = place.train(from_cache=True, settings={"epochs": 1})
    assert again.summary["features_computed"] == 0
    assert history(again) == history(from_cache)[:1]


def test_it_is_evaluated_from_images(
    inception: Place, inception_from_cache: FinetuneResult, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(inception.workspace.runs, inception_from_cache.name)
    options: Any = {"max_pixels": decoding.DEFAULT_MAX_PIXELS}
    done = evaluate_run(run, inception.dataset, inception.workspace, **options)
    assert "UNTRAINED" in caplog.text, "said of a backbone whose weights are a file by now"
    assert done.metrics["accuracy"] == inception_from_cache.summary["accuracy"]
    assert done.metrics["log_loss"] == pytest.approx(
        json.loads((run.path / "metrics.json").read_text())["test"]["log_loss"], rel=1e-3
    )
    for name, value in (("space", "any"), ("memory", 1000)):
        with pytest.raises(UsageError, match=f"is a full model, which reads images; leave out --{name}"):
            evaluate_run(run, inception.dataset, inception.workspace, **{name: value}, **options)


def test_its_backbone_makes_features_of_its_own(inception: Place, inception_from_cache: FinetuneResult) -> None:
    """And the head in the run says of those rows what the full model says of the images."""
    weights, dataset = inception_from_cache.path / full_model.WEIGHTS_FILE, inception.dataset
    done = extract(dataset, inception.workspace, replace(INCEPTION, weights=str(weights)), ComputeOptions())
    assert done.computed == 12
    assert done.space is not None
    assert done.space.spec == open_run(inception.workspace.runs, inception_from_cache.name).spec
    lines = (inception_from_cache.path / "predictions.csv").read_text().splitlines()[1:]
    keys = [image_key(dataset.read(dataset.names.index(line.split(",")[0]))) for line in lines]
    rows = done.space.reader("features").read(done.space.locate(keys))
    said = heads.load(inception_from_cache.path).predict(rows)
    assert np.allclose(said, predictions(inception_from_cache), atol=1e-3)


# Views and augmentation


def test_views_train_and_validation_stays_plain(place: Place, from_cache: FinetuneResult) -> None:
    run = place.train(from_cache=True, views=Views(2), settings={"epochs": 1})
    assert (run.summary["train_rows"], run.summary["views"], run.summary["features_computed"]) == (40, 2, 32)
    assert run.summary["val_rows"] == 6


def test_freeze_trains_the_head_alone_on_images_that_are_warped_afresh(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[np.ndarray]()
    augmented = ImageRows.augmented

    def noted(self: ImageRows, recipe: Augmentation, seed: int, epoch: int) -> ImageRows:
        found = augmented(self, recipe, seed, epoch)
        seen.append(found[np.arange(len(found))])
        return found

    monkeypatch.setattr(ImageRows, "augmented", noted)
    run = place.train("freeze", augment=Augmentation(), settings={"epochs": 2, "learning_rate": 0.02})
    assert [len(some) for some in seen] == [20, 20], "the training images, once an epoch"
    assert (seen[0] != seen[1]).reshape(20, -1).any(axis=1).all()
    assert run.summary["trainable_parameters"] == 64 * 64 + 64 + 64 * 2 + 2
    assert run.summary["trains"] == ["hidden", "probabilities"]
    about = store.read_run(run.path)
    assert about["features"] == about["base"]["features"], "its backbone is still the one it began with"
    assert about["base"]["unchanged_until"] == "top"


# Begun with a run


def test_a_regression_goes_on_from_what_it_knows(place: Place, logreg: str) -> None:
    before = store.read_run(Path(logreg))["summary"]
    still = {"epochs": 1, "learning_rate": 1e-12}
    run = place.train(from_cache=True, init=logreg, features=FeatureChoice(), settings=still)
    assert run.summary["accuracy"] == before["accuracy"]
    assert run.summary["init"] == Path(logreg).name
    first, second = (RunImages.read(path) for path in (Path(logreg), run.path))
    assert first is not None and second is not None and second.complete
    initial, seen = second.among("initial"), first.among("train", "val")
    assert set(split(initial)) == set(split(seen))
    assert run.summary["trains"][-1] == "probabilities"
    expected = (Path(logreg) / "predictions.csv").read_text().splitlines()[1:]
    assert np.allclose(predictions(run), [[float(p) for p in line.split(",")[5:]] for line in expected], atol=1e-3)


def test_a_fine_tuned_run_goes_on_in_the_rows_its_backbone_still_gives(
    place: Place, from_cache: FinetuneResult
) -> None:
    """Up to the middle nothing changed, so those rows serve; deeper they are another space's."""
    request = place.request(from_cache=True, init=str(from_cache.path), features=FeatureChoice())
    origin = open_initial_model(request, place.dataset, place.workspace)
    assert (origin.cut, origin.resolved.choice.weights) == ("middle", "auto"), "those of the file"
    deeper = open_initial_model(replace(request, freeze_until="top"), place.dataset, place.workspace)
    assert (deeper.cut, deeper.resolved.choice.weights) == ("top", str(from_cache.path / full_model.WEIGHTS_FILE))
    names, cuts = tiny_layers()
    assert origin.unchanged_until(names, cuts) == "middle"
    assert origin.unchanged_until(names, cuts[: cuts.index("early") + 1]) == "early"
    still = replace(request, head=HeadSpec.make("gap", **{**SETTINGS, "epochs": 1, "learning_rate": 1e-12}))
    run = finetune(place.dataset, place.workspace, still)
    assert run.summary["features_computed"] == 0
    losses = [epoch["val_loss"] for epoch in history(from_cache)]
    assert history(run)[0]["val_loss"] == pytest.approx(min(losses), rel=1e-4), "it begins where the other one ended"
    assert min(losses) < 0.99 * losses[0]


def test_rows_of_inceptions_unchanged_part_serve_a_fine_tuned_run(
    inception: Place, inception_from_cache: FinetuneResult
) -> None:
    """Up to mixed9 they are those of the weights it began with, deeper those of its own."""
    request = inception.request(from_cache=True, init=str(inception_from_cache.path), features=FeatureChoice())
    own = str(inception_from_cache.path / full_model.WEIGHTS_FILE)
    for until, weights in (("mixed8", "untrained:0"), ("mixed9", "untrained:0"), ("mixed10", own)):
        origin = open_initial_model(replace(request, freeze_until=until), inception.dataset, inception.workspace)
        assert (origin.cut, origin.resolved.choice.weights) == (until, weights)


def test_other_classes_and_contradictions_are_refused(made_up: Place, made_up_logreg: str, tmp_path: Path) -> None:
    begun = made_up.request(from_cache=True, init=made_up_logreg, features=FeatureChoice())
    for i in range(6):
        write_picture(tmp_path / "others" / ("ants" if i % 2 else "bees") / f"{i}.png", seed=i)
    others = open_dataset(str(tmp_path / "others"), downloads=tmp_path)
    with pytest.raises(DatasetError, match="knows other classes than others: cats, dogs"):
        open_initial_model(begun, others, made_up.workspace)
    for choice, message in (
        (FeatureChoice(weights="untrained:7"), "began with other weights than untrained:7"),
        (FeatureChoice(fit="crop"), "trained on images made square by squash, not crop"),
        (FeatureChoice(layer="mixed8"), "stands on mixed10, not on mixed8"),
    ):
        with pytest.raises(SpecError, match=message):
            open_initial_model(replace(begun, features=choice), made_up.dataset, made_up.workspace)
    with pytest.raises(SpecError, match=r"no head can stand on 'conv2d_80'; take one of .*mixed10"):
        open_initial_model(
            made_up.request(features=replace(INCEPTION, layer="conv2d_80")), made_up.dataset, made_up.workspace
        )


def test_weights_that_are_gone_are_asked_for(made_up: Place, made_up_logreg: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    for path in Path(made_up_logreg).iterdir():
        if path.is_file():
            (elsewhere / path.name).write_bytes(path.read_bytes())
    unseal(elsewhere)
    about = store.read_run(elsewhere)
    about["features"]["weights"] = "sha256:" + "0" * 64
    files.write_json(elsewhere / "run.json", about)
    with pytest.raises(WeightsError, match="which are not on this machine; give the file by `--weights FILE`"):
        open_initial_model(
            made_up.request(init=str(elsewhere), features=FeatureChoice()), made_up.dataset, made_up.workspace
        )


def test_a_backbone_that_is_not_the_one_that_was_saved_is_not_begun_with(
    place: Place, from_cache: FinetuneResult, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "head.json", "head.weights.h5", full_model.JSON_FILE):
        (run / name).write_bytes((from_cache.path / name).read_bytes())
    unseal(run)
    (run / full_model.WEIGHTS_FILE).write_bytes(b"something else")
    request = place.request(init=str(run), features=FeatureChoice())

    def begin() -> None:
        open_initial_model(request, place.dataset, place.workspace)

    with pytest.raises(RunError, match="is not the file that was saved"):
        begin()
    (run / full_model.JSON_FILE).unlink()
    with pytest.raises(RunError, match="cannot be read"):
        begin()
    about = store.read_run(run)
    about["base"]["unchanged_until"] = "zzz"
    files.write_json(run / "run.json", about)
    with pytest.raises(RunError, match=r"is not that of a trained model \('zzz'\)"):
        begin()


def test_a_head_of_another_run_is_not_begun_with(made_up: Place, made_up_logreg: str) -> None:
    origin = open_initial_model(
        made_up.request(init=made_up_logreg, features=FeatureChoice()), made_up.dataset, made_up.workspace
    )
    with pytest.raises(RunError, match="is of another run: it does not tell 2 classes apart by rows of 8x8x16"):
        origin.head(HeadSpec.make("gap"), (8, 8, 16), 2)
    with pytest.raises(RunError, match="it does not tell 5 classes apart"):
        origin.head(HeadSpec.make("gap"), (2, 2, 8), 5)


def test_an_ensemble_is_refused_before_anything_is_computed(made_up: Place, made_up_logreg: str) -> None:
    gap = HeadSpec.make("gap", epochs=1, hidden="none")
    chosen = TrainRequest(
        DatasetChoice(str(made_up.photos)), made_up.features, gap, decoding.DEFAULT_MAX_PIXELS, folds=2
    )
    run = train_head(made_up.dataset, made_up.workspace, chosen)
    with pytest.raises(SpecError, match="is an ensemble of heads; take a run that was trained without --folds"):
        open_initial_model(
            made_up.request(init=str(run.path), features=FeatureChoice()), made_up.dataset, made_up.workspace
        )


# Stopped, and gone on with


def test_begun_with_a_run_it_is_gone_on_with(
    place: Place, from_cache: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeper than the run had frozen, so that the rows are of its own backbone."""
    options: Any = {
        "from_cache": True,
        "init": str(from_cache.path),
        "features": FeatureChoice(),
        "freeze_until": "top",
    }
    whole = place.train(**options)
    save = FullModel.save

    def stopped(self: FullModel, directory: Path) -> str:
        save(self, directory)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FullModel, "save", stopped)
        place.train(**options)
    (name,) = store.unfinished(place.workspace.runs)
    request = FinetuneRequest.from_dict(store.read_request(place.workspace.runs, name)["asked"])
    done = finetune(place.dataset, place.workspace, request, resume=name)
    assert history(done) == history(whole)
    assert whole.summary["trains"] == ["hidden", "probabilities"]
    assert store.read_run(done.path)["base"]["unchanged_until"] == "middle"


def test_killed_in_an_epoch_it_goes_on_as_if_it_never_was(place: Place, from_cache: FinetuneResult) -> None:
    options = ["--dataset", place.photos, "--from-cache", "--freeze-until", "middle", "--backbone", tiny()]
    options += ["--precision", "float32", "--storage", "float32", "--batch-size", "1", "--epochs", "30"]
    data = place.workspace.root
    uninterrupted = icebox(data, "finetune", *options, "--json")
    whole = uninterrupted.json
    assert "30 epochs of 20 images take about" in uninterrupted.err
    # Before the third file gets its name: those before are the request and the checkpoint of the first epoch.
    killed = signalled(3, data, "finetune", *options, among=["rename"], within=[place.workspace.runs])
    assert killed.code == -signal.SIGKILL
    (name,) = store.unfinished(place.workspace.runs)
    assert (place.workspace.runs / f".partial-{name}" / "checkpoint.npz").exists()
    assert command_of(store.read_request(place.workspace.runs, name)) == "finetune"
    assert f"finetune --resume {name}" in icebox(data, "runs", "ls").err
    for number, content in enumerate((b"[]", b"{")):
        broken = place.workspace.runs / f".partial-broken{number}"
        broken.mkdir()
        (broken / store.REQUEST).write_bytes(content)
        (broken / "checkpoint.npz").write_bytes(b"")
    listed = icebox(data, "runs", "ls")
    assert (listed.code, listed.err.count("cannot be read")) == (0, 2)
    assert f"finetune --resume {name}" in listed.err
    for number in (0, 1):
        shutil.rmtree(place.workspace.runs / f".partial-broken{number}")
    assert (
        f"was begun by finetune; go on by: python cli.py --data-dir {data} finetune --resume"
        in icebox(data, "train-head", "--resume", name).err
    )
    done = icebox(data, "finetune", "--resume", name, "--json").json
    histories = [(place.workspace.runs / run["run"] / "history.json").read_text() for run in (whole, done)]
    assert len(json.loads(histories[0])) == 30
    assert histories[0] == histories[1]
    assert done["accuracy"] == whole["accuracy"]


# What people are told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--views", "3"],
            "--views is of cached rows; it goes with --from-cache; for new warps each epoch, take --aug",
        ),
        (["--memory", "1GB"], "--memory is of cached rows; it goes with --from-cache"),
        (["--storage", "float32"], "--storage is of cached rows"),
        (
            ["--from-cache", "--augment", "default"],
            "--augment says what cached views are like; ask for some by --views",
        ),
        (["--init", "latest", "--hidden", "3"], "--hidden is of a new head, and --init brings one"),
        (["--init", "latest", "--head", "gap"], "--head is of a new head, and --init brings one"),
        (["--augment", "rotate=3"], "--augment has no 'rotate=3'"),
        (["--epochs", "0"], "--epochs must be a whole number in 1"),
        (["--resume", "x", "--epochs", "3"], "leave out --epochs"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = icebox(tmp_path, "finetune", *options)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = icebox(tmp_path, "finetune", "--init", "nothing")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "no run named 'nothing'" in done.err


def test_a_collapse_is_called_out(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    request = place.request()
    _warn_of_collapse(0.85, 0.94, request)
    assert not caplog.records
    _warn_of_collapse(0.4, 0.94, replace(request, batch_norm="trainable"))
    assert "it has collapsed; take --batch-norm frozen" in caplog.text


def test_what_was_asked_for_is_kept_and_read_again(place: Place) -> None:
    request = place.request(augment=Augmentation(rotation=3), views=Views(2, Augmentation(zoom=0)), init="/runs/x")
    assert FinetuneRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    for change in (
        {"stage": "melt"},
        {"batch_norm": 3},
        {"from_cache": "yes"},
        {"augment": {"rotation": -1}},
        {"x": 1},
    ):
        with pytest.raises(RunError, match="what the run was asked for cannot be read"):
            FinetuneRequest.from_dict({**request.to_dict(), **change})
    assert asdict(request)["init"] == "/runs/x"


def test_an_image_that_cannot_be_decoded_is_quarantined_before_the_training(place: Place, tmp_path: Path) -> None:
    for path in place.photos.rglob("*.png"):
        copy = tmp_path / "photos" / path.relative_to(place.photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    bad = tmp_path / "photos" / "train" / "cats" / "bad.png"
    bad.write_bytes(b"no image")
    dataset = open_dataset(str(tmp_path / "photos"), downloads=tmp_path)
    found = join_images(dataset, place.workspace, decoding.DEFAULT_MAX_PIXELS, "squash")
    assert [each.path for each in found.quarantined] == ["train/cats/bad.png"]
    assert len(found.keys) == len(dataset) - 1 == 32
    with open_image_data(found, 299, "squash", decoding.DEFAULT_MAX_PIXELS) as training_data:
        assert [len(training_data.rows[side]) for side in ("train", "val", "test")] == [20, 6, 6]
        pixels = training_data.rows["train"][np.arange(20)]
    with pytest.raises(DatasetError, match="none of 32 can be decoded"):  # though they have rows
        join_images(place.dataset, place.workspace, 100, "squash")
    names = found.names(found.members("train"))
    decoded = [decoding.decode((tmp_path / "photos" / name).read_bytes()) for name in names]
    assert np.array_equal(pixels, np.stack(decoded)), "labels and pixels are of the same image"
    assert [dataset.classes[label] for label in training_data.labels["train"]] == [name.split("/")[1] for name in names]


# Networks of one's own


DEFAULTS = {
    "depthwise": "dropout",
    "norm_first": "re_lu",  # within a branch: no cut leaves less than half
    "plain": "middle",
    "vector": "dropout",
    "bare": "middle",
    "nested": "middle",
}


LONG = ("plain", "bare", "nested")  # training them is left out, but for --all; `test_full_model.py` trains their like


@pytest.mark.parametrize("kind", LONG)
def test_where_an_own_network_is_cut_unless_told(place: Place, tmp_path: Path, kind: str) -> None:
    path = write_network(tmp_path / "own.keras", kind)
    origin = open_initial_model(
        place.request(features=own_choice(path), freeze_until=None), place.dataset, place.workspace
    )
    names = layer_names(import_keras().models.load_model(path, compile=False))
    assert names[origin.until] == DEFAULTS[kind]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind in LONG)) for kind in DEFAULTS])
def test_an_own_network_trains_alike_both_ways(place: Place, tmp_path: Path, kind: str) -> None:
    path = write_network(tmp_path / f"{kind}.keras", kind)
    request: dict[str, Any] = {"features": own_choice(path), "freeze_until": None, "settings": {"learning_rate": 0.01}}
    both = [place.train(from_cache=way, **request) for way in (False, True)]
    ours, theirs = ([epoch["loss"] for epoch in history(run)] for run in both)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(set(ours)) == 3, "it trains"
    assert np.allclose(*map(predictions, both), atol=1e-3)
    assert [run.summary["frozen_until"] for run in both] == [DEFAULTS[kind]] * 2
    path.unlink()  # a run of it needs it no more
    for run in both:
        loaded = open_run(run.path.parent, run.name).network()
        assert loaded.layers[-1] == loaded.spec.layer


def test_what_trains_of_an_own_network(place: Place, tmp_path: Path) -> None:
    path, head, last = write_network(tmp_path / "own.keras", "depthwise"), 12 * 64 + 64 + 64 * 2 + 2, 8 * 12 * 9
    request: dict[str, Any] = {"features": own_choice(path), "freeze_until": "middle", "settings": {"epochs": 1}}
    frozen = place.train("freeze", **{**request, "freeze_until": None}, augment=Augmentation())
    assert (frozen.summary["trainable_parameters"], frozen.summary["trains"]) == (head, ["hidden", "probabilities"])
    tuned = place.train(**request)
    assert tuned.summary["trainable_parameters"] == last + head
    trained = place.train(**request, batch_norm="trainable")
    assert trained.summary["trainable_parameters"] == last + 2 * 12 + head
    with pytest.raises(SpecError, match="no head can stand on 're_lu_9'"):
        place.train(**{**request, "features": replace(own_choice(path), layer="re_lu_9")})


def test_a_published_run_makes_its_own_network_known(place: Place, tmp_path: Path) -> None:
    """Its size and scaling, though nothing of it is in the cache."""
    path = write_network(tmp_path / "own.keras", "plain", seed=9, size=None)
    request: dict[str, Any] = {"freeze_until": None, "settings": {"epochs": 1}}
    unsaid = FeatureChoice(backbone=str(path), precision="float32", storage="float32")
    with pytest.raises(UsageError, match=r"say by --input-size .*, and by --scaling"):
        place.train("freeze", features=unsaid, **request)
    first = place.train("freeze", features=replace(own_choice(path), input_size=SIZE), **request)
    again = place.train("freeze", features=unsaid, **request)
    assert predictions(first) == pytest.approx(predictions(again))
    (place.workspace.runs / "broken").mkdir()
    (place.workspace.runs / "broken" / "run.json").write_text('{"features": 1}')
    resolved = resolve_choice(place.workspace, unsaid).source
    assert (resolved.input_size, resolved.scaling) == (SIZE, "127,128")
    shutil.rmtree(place.workspace.runs / "broken")


def test_another_network_in_the_place_of_an_own_one_is_not_gone_on_with(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it has the same weights; nor does it count what sizes the network is known with by now."""
    path = write_network(tmp_path / "own.keras", "plain", size=None)
    choice = replace(own_choice(path), input_size=SIZE)
    extract(place.dataset, place.workspace, choice, ComputeOptions())
    before = set(store.unfinished(place.workspace.runs))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.finetune._measured", interrupt)
        with pytest.raises(KeyboardInterrupt):
            place.train(features=own_choice(path), freeze_until="middle")
    (name,) = set(store.unfinished(place.workspace.runs)) - before
    extract(place.dataset, place.workspace, replace(choice, input_size=40), ComputeOptions())
    request = FinetuneRequest.from_dict(store.read_request(place.workspace.runs, name)["asked"])
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    original = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content.replace(b'"relu"', b'"relu6"'))
    with pytest.raises(RunError, match="are no longer those it began with; begin anew"):
        finetune(place.dataset, place.workspace, request, resume=name)
    path.write_bytes(original)
    assert finetune(place.dataset, place.workspace, request, resume=name).name == name


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_the_backbone_of_a_run_of_an_own_network_makes_features_of_its_own(place: Place, tmp_path: Path) -> None:
    path = write_network(tmp_path / "own.keras", "plain")
    trained = place.train(features=own_choice(path), from_cache=True, freeze_until="middle", settings={"epochs": 1})
    weights = trained.path / full_model.WEIGHTS_FILE
    choice = FeatureChoice(backbone=str(path), weights=str(weights), precision="float32")  # the scaling is known
    done = extract(place.dataset, place.workspace, choice, ComputeOptions())
    assert done.computed == 32
    assert done.space is not None
    assert done.space.spec == replace(open_run(place.workspace.runs, trained.name).spec, storage="float16")
    found = weights_of(done.space, place.workspace)
    assert (found.path, found.network) == (weights, path)


def test_a_stopped_run_finds_its_own_network_by_content_or_is_given_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = write_network(tmp_path / "own.keras", "plain"), place.workspace.root
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    before = set(store.unfinished(place.workspace.runs))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.training.finetune._measured", interrupt)
            with pytest.raises(KeyboardInterrupt):
                place.train(features=own_choice(path), freeze_until="middle", settings={"epochs": 1})
    first, second = sorted(set(store.unfinished(place.workspace.runs)) - before)
    moved = path.rename(tmp_path / "moved.keras")
    wanted = f"the run began with the network own.keras (sha256 {digest})"
    gone = icebox(data, "finetune", "--resume", first)
    assert gone.code == 1
    assert f"{wanted}, and {path} is no longer there; give its file beside --resume: --backbone FILE" in gone.err
    other = write_network(path, "plain", seed=2)
    replaced = icebox(data, "finetune", "--resume", first)
    assert replaced.code == 1
    assert f"{wanted}, and {path} is another one by now" in replaced.err
    refused = icebox(data, "finetune", "--resume", first, "--backbone", other)
    assert refused.code == 1
    assert f"{wanted}, and {other} is another one; give that file" in refused.err
    given = icebox(data, "finetune", "--resume", first, "--backbone", moved, "--json")
    assert given.code == 0, given.err
    assert given.json["run"] == first
    known = icebox(data, "finetune", "--resume", second, "--json")
    assert known.code == 0, known.err
    assert known.json["run"] == second


def test_a_run_of_an_own_network_is_begun_with(place: Place, tmp_path: Path) -> None:
    """Also where its file is gone: then the cached part is computed with the network in the run."""
    path = write_network(tmp_path / "own.keras", "vector")
    request: dict[str, Any] = {"features": own_choice(path), "freeze_until": "middle", "settings": {"epochs": 1}}
    first = place.train(from_cache=True, **request)
    request = {**request, "features": FeatureChoice(), "init": str(first.path)}
    again = place.train(from_cache=True, **request)
    assert (again.summary["features_computed"], again.summary["space"]) == (0, first.summary["space"])
    path.unlink()
    alone = place.train(from_cache=True, **request)
    assert history(alone)[0]["loss"] == pytest.approx(history(again)[0]["loss"], rel=1e-3)
    other = write_network(tmp_path / "other.keras", "depthwise")
    with pytest.raises(SpecError, match="was trained with the backbone own:"):
        place.train(from_cache=True, **{**request, "features": own_choice(other)})
