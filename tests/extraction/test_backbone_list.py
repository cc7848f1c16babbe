"""`backbones`: the networks there are, and what is known of them on this machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cached import SPEC, fill, listed, write_images
from conftest import icebox
from own_networks import SIZE, own_choice, write_network

from pipeline.backbone import frozen, own
from pipeline.backbone.keras_start import import_keras
from pipeline.backbone.table import BACKBONES
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import UsageError
from pipeline.extraction import measure_backbone, measured_rates
from pipeline.extraction.backbone_list import BackboneInfo, list_backbones
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.extraction.measure_backbone import measure

OWN = replace(SPEC, backbone="own:" + "1" * 64, layer="last", input_size=32, scaling="none")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "models"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A network of one's own that gives a vector."""
    layers = (keras := import_keras()).layers
    parts = [keras.Input((32, 32, 3)), layers.Conv2D(4, 3, strides=2), layers.GlobalAveragePooling2D()]
    keras.Sequential(parts).save(tmp_path / "small.keras")
    return tmp_path / "small.keras"


def of(name: str, found: list[BackboneInfo]) -> BackboneInfo:
    (one,) = (each for each in found if each.name == name)
    return one


def test_all_are_listed_the_cheapest_first_without_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorflow'] = sys.modules['keras'] = None\n")
    options: dict[str, Any] = {"PYTHONPATH": str(tmp_path), "KERAS_HOME": str(tmp_path)}
    done = icebox(tmp_path / "data", "backbones", "--json", **options)
    assert done.code == 0, done.err
    listed = done.json["backbones"]
    assert {each["name"] for each in listed} == BACKBONES.keys()
    assert listed == sorted(listed, key=lambda each: each["multiplications"])
    assert {(each["weights"], each["bytes_per_row"], each["images_per_second"]) for each in listed} == {
        ("no", None, None)
    }
    vgg16 = next(each for each in listed if each["name"] == "vgg16")
    assert (vgg16["row"], vgg16["uncompressed"]) == ([7, 7, 512], 2 * 7 * 7 * 512 + 4 * 512)
    told = icebox(tmp_path / "data", "backbones", "vgg16", "mobilenet_v2").err.splitlines()
    assert [line.split()[0] for line in told[1:3]] == ["mobilenet_v2", "vgg16"]
    assert max(map(len, told)) <= 100
    assert icebox(tmp_path / "data", "backbones", "vgg61").code == 2


def with_rows(workspace: Workspace, tmp_path: Path, **change: Any) -> FeatureSpace:
    spec = replace(SPEC, **change)
    folder = tmp_path / spec.directory
    write_images(folder, 4)
    return fill(workspace, listed(folder), spec=spec)


def test_what_is_known_of_a_network_stands_beside_it(workspace: Workspace, tmp_path: Path, no_weights: Path) -> None:
    space = with_rows(workspace, tmp_path)
    with_rows(workspace, tmp_path, layer="mixed8")
    no_weights.mkdir(parents=True)
    (no_weights / BACKBONES["xception"].weights_file).write_bytes(b"not looked at")
    measured_rates.remember(workspace, space.spec, 12.5, 300)
    measured_rates.remember(workspace, replace(space.spec, precision="bfloat16"), 50.0, 300)
    measured_rates.remember(workspace, replace(space.spec, precision="bfloat16", layer="mixed8"), 60.0, 300)
    found = list_backbones([], workspace, "bfloat16")
    inception = of("inception_v3", found)
    assert inception.bytes_per_row == round(space.totals().bytes / 12)
    assert (inception.images_per_second, inception.rates) == (50.0, {"float32": 12.5, "bfloat16": 50.0})
    assert (inception.weights, of("xception", found).weights) == ("no", "yes")
    assert of("inception_v3", list_backbones(["inception_v3"], workspace, "float16")).images_per_second is None


def test_own_networks_are_listed_by_the_names_of_their_files(workspace: Workspace, tmp_path: Path) -> None:
    write_images(tmp_path / "few", 1)
    about = {"row_shape": [2, 2, 8], "network": {"file": "mine.keras", "sha256": "2" * 64, "parameters": 1234}}
    workspace.cache.create(OWN, about)
    fill(workspace, listed(tmp_path / "few"), spec=OWN)
    workspace.cache.create(replace(OWN, weights="sha256:" + "3" * 64), {**about, "network": {"file": "other.keras"}})
    found = list_backbones([], workspace, "float32")
    assert [each.name for each in found[-2:]] == ["mine.keras", "other.keras"]
    mine, other = found[-2:]
    assert (mine.own, mine.row, mine.parameters, mine.input_size) == (True, (2, 2, 8), 1234, 32)
    assert (mine.uncompressed, mine.weights, other.bytes_per_row) == (2 * 32 + 4 * 8, "no", None)
    assert mine.bytes_per_row and mine.bytes_per_row > 0


class Model:
    """Stands in for a network."""

    batch_size = 16

    def __init__(self, spec: Any, *options: object) -> None:
        self.spec = spec

    def bound_batch(self, most: int) -> None: ...

    def rate(self) -> float:
        if self.spec.backbone == "vgg16":
            raise KeyboardInterrupt
        return 100.0


def test_each_rate_is_kept_as_soon_as_it_is_there(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure_backbone, "FrozenBackbone", Model)
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * 10**9)
    with pytest.raises(KeyboardInterrupt):
        measure(["mobilenet_v2", "convnext_xlarge", "vgg16", "resnet50"], workspace, "float32")
    assert "convnext_xlarge is left out: it takes about" in caplog.text
    found = list_backbones([], workspace, "float32")
    assert {each.name: each.images_per_second for each in found if each.images_per_second} == {"mobilenet_v2": 100.0}


def test_a_network_of_ones_own_is_measured(
    workspace: Workspace, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "_MEASURED_SECONDS", 1e-6)
    monkeypatch.setattr(measure_backbone, "SHARD_BYTES", 3 * 16 + 1)  # of rows (1, 1, 4) in float32
    measure([str(network)], workspace, "float32")
    (found,) = list_backbones([str(network)], workspace, "float32")
    assert found.images_per_second and math.isfinite(found.images_per_second)
    assert (found.name, found.input_size, found.parameters) == ("small.keras", 32, 4 * 28)
    assert (found.weights, found.weights_file) == ("file", str(network))
    assert own.count_parameters(network) == 4 * 28
    assert [each["images"] for each in measured_rates.known(workspace)] == [3], "a batch of large rows has fewer images"


def test_one_that_takes_any_size_is_measured_at_that_of_its_features(workspace: Workspace, tmp_path: Path) -> None:
    path = write_network(tmp_path / "any.keras", "plain", size=None)
    with pytest.raises(UsageError, match=r"any.keras takes images of any size; make features of one first: `features"):
        measure([str(path)], workspace, "float32")
    write_images(tmp_path / "images", 2)
    choice = replace(own_choice(path), input_size=40)
    extract(listed(tmp_path / "images"), workspace, choice, ComputeOptions())
    measure([str(path)], workspace, "float32")
    (found,) = list_backbones([str(path)], workspace, "float32")
    assert found.input_size == 40
    assert found.images_per_second


def test_an_own_network_is_listed_by_its_default_layer_and_size(workspace: Workspace, tmp_path: Path) -> None:
    """As one of the table is; where its file is gone, by the space with most rows."""
    path = write_network(tmp_path / "own.keras", "plain")
    for name, count in (("few", 1), ("many", 2)):
        write_images(tmp_path / name, count)
    choice, few, many = own_choice(path), listed(tmp_path / "few"), listed(tmp_path / "many")
    extract(few, workspace, choice, ComputeOptions())
    extract(many, workspace, replace(choice, layer="middle"), ComputeOptions())
    extract(many, workspace, replace(choice, input_size=40), ComputeOptions())
    default = own.read_network(path).default_layer
    for names in ([], [str(path)]):
        found = list_backbones(names, workspace, "float32")[-1]
        (space,) = (s for s in workspace.cache.spaces() if (s.spec.layer, s.spec.input_size) == (default, SIZE))
        assert (found.layer, found.input_size) == (default, SIZE)
        assert found.bytes_per_row == space.totals().bytes_per_row
        assert found.row == tuple(space.provenance["row_shape"])
    path.unlink()
    gone = list_backbones([], workspace, "float32")[-1]
    assert (gone.layer, gone.input_size) != (default, SIZE)
    assert gone.weights == "no"


def test_own_networks_of_one_name_are_told_apart(workspace: Workspace, tmp_path: Path) -> None:
    write_images(tmp_path / "few", 1)
    paths = [tmp_path / folder / "net.keras" for folder in "ab"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        extract(listed(tmp_path / "few"), workspace, own_choice(write_network(path, "plain", seed)), ComputeOptions())
    told = icebox(workspace.root, "backbones").err.splitlines()
    lines = [line for line in told if line.startswith("net.keras")]
    assert len(set(lines)) == 2
    for path in paths:
        network = own.read_network(path)
        assert any(f"net.keras ({network.name[:12]}, {network.weights[:15]})" in line for line in lines)
    assert [each.name for each in list_backbones([str(paths[0])], workspace, "float32")] == ["net.keras"]
