"""`export`: every format says what the full model says, in its own runtime, and carries the class names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import icebox, unseal
from deployed import MOST, Deployed
from own_networks import SIZE, own_choice, tiny, write_network, write_sides

from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError, RunError, UsageError
from pipeline.core.locks import new_folder_held
from pipeline.core.spec import HeadSpec
from pipeline.dataset import Dataset, open_dataset
from pipeline.deployment import export
from pipeline.deployment.ensemble import group_runs
from pipeline.deployment.export import ExportedModel, deployable, export_run
from pipeline.deployment.export_formats import FORMATS
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.images.loader import Loader
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.training.open_run import TrainedRun, open_run
from pipeline.training.train_head import train_head

CLASSES = ["cats", "dogs"]


def pixels_of(place: Deployed, count: int, size: int = SIZE) -> np.ndarray:
    with Loader(place.dataset, size, "squash", MOST) as load:
        loaded = [load(i).pixels for i in range(count)]
    return np.stack([pixels for pixels in loaded if pixels is not None])


def exported(place: Deployed, kind: str, form: str, out: Path) -> ExportedModel:
    with place.workspace() as workspace:
        return export_run(place.run(kind), form, place.dataset, workspace, max_pixels=MOST, out=out)


# At full size by --all only; small models are written in each format in tests/deployment/test_export_formats.py, and
# runs on small networks below.
@pytest.mark.long
def test_what_is_exported_is_the_full_model(deployed_inception: Deployed, tmp_path: Path) -> None:
    """And it is that with InceptionV3, where there is no Icebox."""
    out = tmp_path / "mine"
    done = exported(deployed_inception, "gap", "keras", out)
    assert done.path == out / "model.keras"
    assert done.about["max_difference"] <= 1e-4
    assert done.about["difference_to_run"] <= 2e-3  # that is float32 too, but for its rows
    assert json.loads((out / "export.json").read_text()) == done.about
    assert json.loads((out / "classes.json").read_text()) == CLASSES
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size == pytest.approx(done.about["bytes"], abs=2000)
    pixels = pixels_of(deployed_inception, 3, 299)
    expected = np.asarray(network_of(deployed_inception, "gap").on_pixels().predict_on_batch(pixels))
    assert np.abs(FORMATS["keras"].load(done.path)(pixels) - expected).max() < 1e-4
    check_alone(done.path, 299)


def check_alone(path: Path, size: int) -> None:
    """Load a Keras model where there is no Icebox."""
    program = (
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        f"said = model.predict(np.zeros((2, {size}, {size}, 3), 'uint8'), verbose=0)\n"
        "assert said.shape == (2, 2) and abs(said.sum() - 2) < 1e-5\n"
        "assert not any(name.startswith('pipeline') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(path)], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def network_of(place: Deployed, kind: str) -> Any:
    with place.workspace() as workspace:
        (group,) = group_runs([place.run(kind)], workspace)
        return group.network("float32")


@pytest.mark.parametrize("kind", ["logreg", "flatten", "folds", "finetune"])
def test_standard_layers_say_what_ours_do(deployed: Deployed, kind: str) -> None:
    network, pixels = network_of(deployed, kind), pixels_of(deployed, 2)
    expected = np.asarray(network.on_pixels().predict_on_batch(pixels))
    model = deployable(network, named=False)
    assert np.abs(np.asarray(model.predict_on_batch(pixels)) - expected).max() < 1e-5
    inside = [layer for part in model.layers for layer in getattr(part, "layers", [part])]
    assert not any(type(layer).__name__ == "Normalization" for layer in inside)


def test_what_says_something_else_is_not_published(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(network: Any, *, named: bool) -> Any:
        made = deployable(network, named=named)
        for weight in network.whole.weights:
            if weight.name == "kernel":
                weight.assign(-weight)
        return made

    monkeypatch.setattr(export, "deployable", spoilt)
    with pytest.raises(
        RunError, match=r"as savedmodel says something else than the full model, by .* of a probability; nothing was"
    ):
        exported(deployed, "gap", "savedmodel", tmp_path / "out" / "mine")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_earlier_export_is_replaced_and_nothing_else(deployed: Deployed, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    exported(deployed, "gap", "keras", out)  # an empty folder will do
    with pytest.raises(KeyError), export._published(out) as folder:
        (folder / "half").touch()
        raise KeyError
    export._require_free(out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with export._published(out) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_one_that_cannot_be_published_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "earlier").touch()

    def fail(partial: Path, final: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.files, "publish", fail)
    with (
        pytest.raises(RunError, match=r"nothing can be exported to .*: No space left"),
        export._published(tmp_path / "mine"),
    ):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "earlier"]


@pytest.mark.parametrize("content", ['{"my": "settings"}', "no JSON", '{"format": "icebox-export"}'])
def test_somebodys_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """Also one with an export's description, if there is more in it."""
    (tmp_path / "export.json").write_text(content)
    (tmp_path / "thesis.txt").write_text("years of work")
    (link := tmp_path.with_name(tmp_path.name + "-link")).symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "export.json", link.resolve()):
        with pytest.raises(
            UsageError, match="exists and holds more than an earlier export; name another folder by --out"
        ):
            export._require_free(out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the folder you stand in"):
        export._require_free(Path("..").resolve() / tmp_path.name)


def test_what_killed_exports_left_is_removed_by_the_next(tmp_path: Path) -> None:
    names = (".partial-dead-export", ".partial-living-export", ".partial-of-a-run", "run-keras")
    dead, living, other, done = (tmp_path / name for name in names)
    for folder in (dead, other, done):
        folder.mkdir()
    with new_folder_held(living):
        export._remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == [living, other, done]
    export._remove_leftovers(tmp_path / "nothing yet")


def test_without_an_image_to_compare_on_nothing_is_exported(deployed: Deployed, tmp_path: Path) -> None:
    bad = deployed.dataset.take([0, 1])
    with (
        deployed.workspace() as workspace,
        pytest.raises(DatasetError, match="none of the first 2 images of photos can"),
    ):
        export_run(deployed.run("gap"), "keras", bad, workspace, max_pixels=1, out=tmp_path / "mine")


def test_the_command_names_what_it_lacks(deployed: Deployed, tmp_path: Path) -> None:
    """The run's own images are gone: others are asked for, and taken."""
    data = tmp_path / "data"
    shutil.copytree(deployed.data / "runs" / deployed.name("gap"), data / "runs" / "gap")
    moved = tmp_path / "moved"
    shutil.copytree(deployed.photos / "test", moved)
    unseal(data / "runs" / "gap")
    about = json.loads((data / "runs" / "gap" / "run.json").read_text())
    about["asked"]["images"]["dataset"] = str(tmp_path / "gone")
    (data / "runs" / "gap" / "run.json").write_text(json.dumps(about))
    done = icebox(data, "export", "gap")
    assert (done.code, "are not to be had" in done.err, "name some by --images" in done.err) == (1, True, True)
    done = icebox(data, "export", "gap", "--images", moved)
    assert (done.code, "which is not on this machine; give the file by `--backbone" in done.err) == (1, True), done.err
    done = icebox(data, "export", "gap", "--images", moved, "--backbone", tiny(), "--json")
    assert done.code == 0, done.err
    assert done.json["path"] == str(data / "exports" / "gap-keras" / "model.keras")
    assert done.json["compared_images"] == 6
    assert done.json["max_difference"] <= 1e-4


def check_refused(
    run: TrainedRun, dataset: Dataset, workspace: Workspace, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter or a runtime that cannot take a model raises errors of its own kind; nothing is exported then."""

    class InvalidGraph(Exception):
        pass

    def fail(*_: Any) -> Any:
        raise InvalidGraph("line 1\nline 2")

    for form in (replace(FORMATS["keras"], write=fail), replace(FORMATS["savedmodel"], load=fail)):
        with monkeypatch.context() as patched, pytest.raises(RunError) as raised:
            patched.setitem(FORMATS, form.name, form)
            export_run(run, form.name, dataset, workspace, max_pixels=MOST, out=out / "mine")
        other = "keras" if form.name == "savedmodel" else "savedmodel"
        assert str(raised.value) == (
            f"{run.name} cannot be exported as {form.name} (line 1 line 2); nothing was exported; take another format, "
            f"as --format {other}"
        )
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("kind", "head", "forms"), [
    ("vector", "flatten", ["keras", "onnx", "litert"]),
    ("bare", "logreg", ["keras", "openvino"]),
    ("nested", "logreg", ["savedmodel", "onnx"]),
])  # fmt: skip
def test_heads_on_own_networks_are_exported(
    workspace: Workspace, tmp_path: Path, kind: str, head: str, forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norms that are folded, vectors for rows, bare operations, models in models."""
    photos = write_sides(tmp_path / "photos")
    path, dataset = write_network(tmp_path / f"{kind}.keras", kind), open_dataset(str(photos), downloads=tmp_path)
    extract(dataset, workspace, own_choice(path), ComputeOptions())
    spec = HeadSpec.make(head, **({} if head == "logreg" else {"epochs": 2}))
    request = TrainRequest(DatasetChoice(str(photos)), own_choice(path), spec, MOST)
    run = open_run(workspace.runs, train_head(dataset, workspace, request).name)
    if kind == "vector":
        check_refused(run, dataset, workspace, tmp_path / "refused", monkeypatch)
    for form in forms:
        done = export_run(run, form, dataset, workspace, max_pixels=MOST, out=tmp_path / form)
        assert done.about["max_difference"] <= 1e-4
        assert done.about["difference_to_run"] <= 1e-4
        if form == "keras":
            check_alone(done.path, SIZE)
