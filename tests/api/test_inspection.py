"""`Icebox.doctor`, `backbones`, `weights`, `summary` and `cache` from Python: typed results, and the commands' JSON."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import ROOT, environment, icebox
from deployed import Deployed
from own_networks import SCALING, tiny

from pipeline.api.cache_results import CacheListResult, CacheQuarantineResult
from pipeline.api.icebox import Icebox
from pipeline.api.inspection_results import DatasetCheckResult, MachineResult, WeightSourcesResult, WeightsResult
from pipeline.api.options import CachedOptions
from pipeline.core.errors import MissingRowsError, UsageError

NETWORK: CachedOptions = {"backbone": tiny(), "scaling": SCALING, "precision": "float32", "storage": "float32"}
SAME = ("--backbone", str(tiny()), "--scaling", SCALING, "--precision", "float32", "--storage", "float32")


@pytest.fixture
def box(deployed: Deployed) -> Icebox:
    return Icebox(deployed.data, quiet=True)


def printed(deployed: Deployed, *words: str | Path) -> dict[str, Any]:
    """Return the JSON of a command on the same data directory."""
    done = icebox(deployed.data, *words, "--json")
    assert done.code == 0, done.err
    return done.json


def without(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}


def test_the_api_alone_loads_nothing_heavy() -> None:
    script = (
        "import sys; import pipeline.api.icebox, pipeline.api.cache_results, pipeline.api.inspection_results\n"
        "print([n for n in ('numpy', 'cv2', 'h5py', 'rich', 'typer', 'dask', 'tensorflow') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    assert done.stdout.strip() == "[]"


# doctor


def test_a_machine_is_checked(deployed: Deployed, box: Icebox) -> None:
    found = box.doctor()
    assert isinstance(found, MachineResult)
    assert found.packages["keras"] and found.cache_spaces >= 1
    told = printed(deployed, "doctor")
    assert list(found.to_dict()) == list(told)
    moving = ("available_memory", "data_dir_free")
    assert without(found.to_dict(), *moving) == without(told, *moving)
    assert found.lines()["opencv-python"] == found.packages["opencv-python"]
    assert "<th>cache rows</th>" in found._repr_html_()


def test_a_dataset_is_checked(deployed: Deployed, box: Icebox) -> None:
    found = box.doctor(deployed.photos, **NETWORK)
    assert isinstance(found, DatasetCheckResult)
    assert (found.images, found.rows, found.estimate) == (32, {"cached": 32, "duplicates": 0, "missing": 0}, None)
    told = printed(deployed, "doctor", deployed.photos, *SAME)
    assert list(found.to_dict()) == list(told)
    moving = ("available_memory", "free_bytes")
    assert without(found.to_dict(), *moving) == without(told, *moving)
    assert found.lines()["images"] == "32"
    assert "<li>classes with fewer than 20 images" in found._repr_html_()


def test_options_of_doctor_go_with_a_dataset(box: Icebox) -> None:
    with pytest.raises(UsageError, match=r"^--limit, --max-pixels: say of which DATASET$"):
        box.doctor(None, limit=3, max_pixels=10)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'; there are archive"):
        box.doctor("digits", epochs=3)  # type: ignore[call-arg]


# networks


def test_networks_are_listed(deployed: Deployed, box: Icebox) -> None:
    found = box.backbones(["mobilenet_v2", tiny()], precision="float32")
    assert [each.name for each in found.backbones] == ["mobilenet_v2", "tiny.keras"]
    assert found.to_dict() == printed(deployed, "backbones", "mobilenet_v2", tiny(), "--precision", "float32")
    assert box.backbones("mobilenet_v2", precision="float32").backbones == found.backbones[:1]
    assert "<th>backbone</th>" in found._repr_html_() and "<td>tiny.keras</td>" in found._repr_html_()


def test_weights_are_made_ready_or_their_sources_named(deployed: Deployed, box: Icebox) -> None:
    ready = box.weights(weights="untrained:3")
    assert isinstance(ready, WeightsResult) and ready.identity.endswith(":3") and ready.path is None
    assert ready.to_dict() == printed(deployed, "weights", "--weights", "untrained:3")
    sources = box.weights(backbone="mobilenet_v2")
    assert isinstance(sources, WeightSourcesResult)
    assert sources.to_dict() == printed(deployed, "weights", "--backbone", "mobilenet_v2")
    own = box.weights(backbone=tiny())
    assert isinstance(own, WeightsResult) and own.path == str(tiny())
    told = printed(deployed, "weights", "--backbone", tiny())
    assert (own.to_dict(), list(own.to_dict())) == (told, list(told))


def test_a_network_is_summarized(deployed: Deployed, box: Icebox) -> None:
    found = box.summary(backbone=tiny(), classes=5)
    told = printed(deployed, "summary", "--backbone", tiny(), "--classes", "5")
    assert (found.to_dict(), list(found.to_dict())) == (told, list(told))
    _, every = found.table(every_layer=True)
    _, where_to_cut = found.table()
    assert len(every) == len(found.layers) > len(where_to_cut) > 0


# cache


def test_the_cache_is_listed(deployed: Deployed, box: Icebox) -> None:
    found = box.cache.ls()
    assert found.to_dict() == printed(deployed, "cache", "ls")
    assert found.rows == sum(space.rows for space in found.spaces) >= 32
    assert f"<td>{found.spaces[0].space}</td>" in found._repr_html_()
    assert box.cache.quarantine().to_dict() == printed(deployed, "cache", "quarantine")
    assert repr(box.cache) == f"Icebox({str(deployed.data)!r}).cache"


def test_an_empty_cache_is_empty_and_stays_so(tmp_path: Path) -> None:
    box = Icebox(tmp_path, quiet=True)
    assert box.cache.ls() == CacheListResult([], 0, 0, 0, 0)
    assert box.cache.quarantine() == CacheQuarantineResult(0, [])
    assert list(tmp_path.iterdir()) == []


def test_images_are_explained(deployed: Deployed, box: Icebox) -> None:
    found = box.cache.explain(deployed.photos, **NETWORK)
    assert found.counts == {"cached": 32}
    assert found.to_dict() == printed(deployed, "cache", "explain", "--dataset", deployed.photos, *SAME)
    (one,) = box.cache.explain(deployed.photos, [deployed.files[0]], **NETWORK).images
    assert (one.path, one.state) == (str(deployed.files[0].relative_to(deployed.photos)), "cached")
    assert box.cache.explain(deployed.photos, str(deployed.files[0]), **NETWORK).images == [one]
    with pytest.raises(UsageError, match="--augment says how"):
        box.cache.explain(deployed.photos, augment="zoom=0.1", **NETWORK)


def test_the_cache_is_verified(deployed: Deployed, box: Icebox) -> None:
    found = box.cache.verify(read_data=True)
    assert (found.error, found.problems) == (None, [])
    assert found.bytes_read == found.bytes > 0
    told = printed(deployed, "cache", "verify", "--read-data")
    assert without(found.to_dict(), "seconds") == without(told, "seconds")
    assert "nothing is wrong" in found._repr_html_()
    with pytest.raises(UsageError, match="give one of the two"):
        box.cache.verify(read_data=True, sample=0.5)


def copied(deployed: Deployed, folder: Path) -> Icebox:
    """Return a data directory of one's own with the same features."""
    shutil.copytree(deployed.data / "cache", folder / "cache")
    return Icebox(folder, quiet=True)


def test_what_is_wrong_with_the_cache_is_a_result(deployed: Deployed, tmp_path: Path) -> None:
    box = copied(deployed, tmp_path)
    shard = next(tmp_path.glob("cache/*/shards/*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found = box.cache.verify()
    assert found.error is not None and found.error.startswith(f"1 problem: {shard}")
    assert found.to_dict()["error"] == found.error
    assert found.problems[0].path == shard
    assert box.cache.verify(repair=True).error is None


def test_rows_of_nobody_are_removed(deployed: Deployed, tmp_path: Path) -> None:
    box, few = copied(deployed, tmp_path), deployed.photos / "test"
    before = box.cache.ls()
    left = 6 * len(before.spaces)
    assert box.cache.gc(dataset=[deployed.photos], dry_run=True).rows_removed == 0
    assert box.cache.gc(dataset=few, dry_run=True).rows_removed == before.rows - left
    assert box.cache.ls() == before
    with pytest.raises(UsageError, match="go with --dataset only"):
        box.cache.gc(image_root=few)
    done = box.cache.gc(dataset=str(few))
    assert (done.dry_run, done.rows_removed) == (False, before.rows - left)
    assert box.cache.ls().rows == left


def test_features_are_exported(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    out = tmp_path / "rows.h5"
    done = box.cache.export(out, deployed.photos, what="pooled", **NETWORK)
    assert (done.path, done.rows, done.images, done.missing) == (out, 32, 32, 0)
    with h5py.File(out) as file:
        pooled: Any = file["pooled"]
        assert pooled.shape == (32, 64)
    told = printed(deployed, "cache", "export", out, "--dataset", deployed.photos, "--what", "pooled", "--force", *SAME)
    assert without(done.to_dict(), "seconds") == without(told, "seconds")
    with pytest.raises(UsageError, match="is there already"):
        box.cache.export(out, deployed.photos, **NETWORK)
    with pytest.raises(MissingRowsError, match="compute them by"):
        Icebox(tmp_path / "other", quiet=True).cache.export(tmp_path / "none.h5", deployed.photos, **NETWORK)
