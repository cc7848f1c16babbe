"""`features`: nothing computed twice, nothing stale served, in = cached + quarantined, safe to kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import cv2
import h5py
import hdf5plugin  # noqa: F401  registers the filter
import numpy as np
import pytest
import warm
from cached import counts, stored
from conftest import (
    ROOT,
    build_backbone,
    command_line,
    environment,
    finished,
    icebox,
    mark,
    picture,
    wait_until,
    write_picture,
)
from faults import signalled
from own_networks import own_choice, tiny, tiny_choice, tiny_options, write_network

import pipeline.extraction.extract
import pipeline.extraction.shard_task
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.backbone.keras_start import import_keras
from pipeline.cache import digests
from pipeline.cache.index import Index
from pipeline.cache.workspace import open_workspace
from pipeline.core import machine
from pipeline.core.errors import CacheError, DoNotFitError, SpecError, UsageError, WeightsError
from pipeline.core.spec import FeatureSpec
from pipeline.dataset import Dataset, limit, open_dataset
from pipeline.extraction.compute import ComputeOptions, batch_of
from pipeline.extraction.extract import Extraction, extract
from pipeline.extraction.feature_choice import FeatureChoice

UNTRAINED = FeatureChoice(weights="untrained", precision="float32")
OPTIONS = ComputeOptions(shard_rows=8, batch_size=4)
pytestmark = pytest.mark.usefixtures("one_backbone")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Extraction]:
    """Extract a folder's features into `tmp_path/data`."""

    def run(folder: Path | Dataset, choice: FeatureChoice | None = None, **options: Any) -> Extraction:
        dataset = folder if isinstance(folder, Dataset) else open_dataset(str(folder), downloads=tmp_path)
        with open_workspace(tmp_path / "data") as workspace:
            return extract(dataset, workspace, choice or tiny_choice(), OPTIONS, **options)

    return run


def test_a_second_run_computes_nothing(photos: Path, run: Callable[..., Extraction]) -> None:
    assert counts(run(photos)) == (12, 0, 0, 0)
    assert counts(run(photos)) == (0, 12, 0, 0)


def test_only_what_is_new_is_computed(photos: Path, run: Callable[..., Extraction]) -> None:
    run(photos)
    (photos / "cats" / "1.png").rename(photos / "cats" / "renamed.png")
    (photos / "cats" / "3.png").rename(photos / "dogs" / "relabelled.png")
    moved = photos.parent / "elsewhere"
    photos.rename(moved)
    assert counts(run(moved)) == (0, 12, 0, 0)
    write_picture(moved / "cats" / "new.png", seed=99)
    shutil.copy(moved / "cats" / "5.png", moved / "dogs" / "copy.png")
    assert counts(run(moved)) == (1, 12, 1, 0)
    write_picture(moved / "cats" / "5.png", seed=100)  # changed in place: its copy keeps the row, it gets a new one
    assert counts(run(moved)) == (1, 13, 0, 0)


def test_rows_lie_in_shards_of_the_asked_size_under_their_content_hash(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    import hashlib

    run(photos)
    paths = sorted((tmp_path / "data/cache").glob("*/shards/*.h5"))
    assert [path.stem for path in paths] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    with h5py.File(paths[0]) as file:
        assert file["features"].shape[1:] == (4, 4, 64)  # type: ignore[union-attr]
    assert sorted(len(np.asarray(h5py.File(path)["view"])) for path in paths) == [4, 8]
    keys = {hashlib.sha256(path.read_bytes()).digest() for path in photos.glob("*/*")}
    assert stored(tmp_path / "data").keys() == keys


def test_rows_equal_keras_on_the_same_pixels(tmp_path: Path, run: Callable[..., Extraction]) -> None:
    """The whole way, from files of several kinds to a plain HDF5 reader, against keras.applications."""
    import hashlib

    import keras

    from pipeline.backbone import untrained
    from pipeline.images import decoding

    folder = tmp_path / "kinds"
    for name, seed, channels in (("a/c.jpg", 1, 3), ("a/g.png", 2, 1), ("b/t.png", 3, 4), ("b/w.webp", 4, 3)):
        write_picture(folder / name, seed, channels=channels)
    write_picture(folder / "b/large.bmp", 5, height=500, width=700)
    assert counts(run(folder, UNTRAINED)) == (5, 0, 0, 0)
    rows = stored(tmp_path / "data")
    build: Any = keras.applications.InceptionV3
    reference = build(include_top=False, weights=None, input_shape=(299, 299, 3))
    untrained.initialise(reference, "glorot_centred_1", 0)
    for path in folder.glob("*/*"):
        data = path.read_bytes()
        pixels = decoding.decode(data).astype(np.float32)[None]
        expected = np.asarray(reference(keras.applications.inception_v3.preprocess_input(pixels)))[0]
        features, pooled = rows[hashlib.sha256(data).digest()]
        np.testing.assert_allclose(features, expected, rtol=2**-11, atol=2**-14)
        np.testing.assert_allclose(pooled, expected.mean(axis=(0, 1)), rtol=1e-4, atol=2**-16)


def test_what_cannot_be_decoded_is_named_and_remembered(photos: Path, run: Callable[..., Extraction]) -> None:
    (photos / "cats" / "empty.jpg").write_bytes(b"")
    (photos / "cats" / "text.png").write_text("not a picture")
    (photos / "dogs" / "twin.png").write_text("not a picture")
    (photos / "dogs" / "gone.png").symlink_to(photos / "nowhere.png")
    first = run(photos)
    assert counts(first) == (12, 0, 0, 4)
    reasons = {each.path: each.reason for each in first.quarantined}
    assert reasons.keys() == {"cats/empty.jpg", "cats/text.png", "dogs/gone.png", "dogs/twin.png"}
    assert "cannot be read" in reasons["dogs/gone.png"]
    assert reasons["cats/text.png"] == reasons["dogs/twin.png"]
    assert counts(run(photos)) == (0, 12, 0, 4)


def test_shards_too_large_for_memory_are_refused_before_a_row_is_computed(
    photos: Path, run: Callable[..., Extraction], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool = SimpleNamespace(row_shape=(8, 8, 2048), size=1, batch_size=4)  # asked for no row, it need not compute
    monkeypatch.setattr(pipeline.extraction.extract, "_crew", lambda *_, **__: nullcontext(pool))
    monkeypatch.setattr(machine, "available_memory", lambda: 1_200_000)  # a row takes 270,336 bytes
    with pytest.raises(DoNotFitError, match=r"shards of 8 rows take about .* at most --shard-rows 2 fit"):
        run(photos)
    assert list(tmp_path.rglob("*.h5")) == []


@pytest.mark.parametrize("begun", [False, True])
def test_an_index_that_cannot_be_written_is_told_before_anything_is_loaded(
    begun: bool, photos: Path, run: Callable[..., Extraction], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if begun:
        with open_workspace(tmp_path / "data") as workspace:
            workspace.cache.create(conftest.SPEC, {})

    def refused(index: Index) -> None:
        raise CacheError("cannot be written")

    monkeypatch.setattr(Index, "require_writable", refused)
    monkeypatch.setattr(pipeline.extraction.extract, "_crew", None)
    with pytest.raises(CacheError, match="cannot be written"):
        run(photos)


def test_a_remembered_failure_is_tried_again_only_when_asked(
    photos: Path, run: Callable[..., Extraction], dangerous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(photos / "cats" / "1.png", b"LUCK")
    assert counts(run(photos)) == (11, 0, 0, 1)
    monkeypatch.delenv("PYTHONPATH")
    assert counts(run(photos)) == (0, 11, 0, 1), "remembered, so not tried"
    assert counts(run(photos, retry_failed=True)) == (1, 11, 0, 0)


def test_a_file_changed_after_it_was_hashed_gets_the_key_of_what_was_decoded(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    original = (photos / "cats" / "1.png").read_bytes()
    (photos / "dogs" / "copy.png").write_bytes(original)
    build = pipeline.extraction.shard_task.FrozenBackbone

    def change_then_build(*arguments: object) -> FrozenBackbone:
        write_picture(photos / "cats" / "1.png", seed=77)
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", change_then_build)
    done = run(photos)
    assert done.rows == 13
    assert not done.quarantined
    now = {hashlib.sha256(path.read_bytes()).digest() for path in photos.glob("*/*")}
    assert stored(tmp_path / "data").keys() == now, "the copy of the former content has its row too"


def test_rows_that_are_added_are_computed_in_batches_of_the_size_the_space_was_begun_with(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos)
    write_picture(photos / "cats" / "more.png", seed=78)
    sizes = []

    def noted(*arguments: object) -> FrozenBackbone:
        sizes.append(arguments[2])
        return build_backbone(*arguments)

    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", noted)
    dataset = open_dataset(str(photos), downloads=tmp_path)
    with open_workspace(tmp_path / "data") as workspace:
        assert extract(dataset, workspace, FeatureChoice(backbone=str(tiny())), ComputeOptions()).computed == 1
    assert sizes == [4]


def test_a_space_says_which_batch_was_measured_to_be_best(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", FrozenBackbone)  # not one that others use too
    monkeypatch.setattr(FrozenBackbone, "choose_batch", lambda model, rows, most: model._take(rows // 4))
    dataset = open_dataset(str(photos), downloads=tmp_path)
    with open_workspace(tmp_path / "data") as workspace:
        space = extract(dataset, workspace, tiny_choice(), ComputeOptions(shard_rows=8)).space
        assert space
        assert space.provenance["batch_size"] == 3
    sizes = []
    for path in tmp_path.glob("data/cache/*/shards/*.h5"):
        with h5py.File(path) as file:
            sizes.append(len(file["key"]))  # type: ignore[arg-type]
    assert sorted(sizes) == [6, 6], "whole batches"


def test_a_processor_does_not_take_the_large_batches_of_a_gpu(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(photos).space
    assert made
    about = json.loads((made.path / "space.json").read_text())
    cases = ((512, 1, 0, 64), (512, 1, 1, 512), (128, 0, 0, 128), (8, 1, 0, 8), (0, 0, 0, None), ("32", 0, 0, None))
    for kept, began, gpus, expected in cases:
        about["made_by"] |= {"batch_size": kept, "gpus": began}
        (made.path / "space.json").write_text(json.dumps(about))
        monkeypatch.setattr(machine, "gpu_count", lambda gpus=gpus: gpus)
        with open_workspace(tmp_path / "data") as workspace:
            assert batch_of(workspace.cache.open(made.name)) == expected


def test_other_images_get_the_batch_size_of_the_space(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def noted(spec: FeatureSpec, weights: Path | None, batch_size: int, *more: Any) -> FrozenBackbone:
        sizes.append(batch_size)
        return build_backbone(spec, weights, batch_size, *more)

    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", noted)
    other = write_picture(tmp_path / "other" / "cats" / "a.png", seed=77).parent.parent
    with open_workspace(tmp_path / "data") as workspace:
        for folder, batch_size in ((photos, 6), (other, None)):
            dataset = open_dataset(str(folder), downloads=tmp_path)
            done = extract(dataset, workspace, tiny_choice(), ComputeOptions(shard_rows=8, batch_size=batch_size))
            assert done.computed == len(dataset)
        assert len(workspace.cache.names()) == 1
    assert sizes == [6, 6]


def test_thousands_of_new_files_are_hashed_while_tensorflow_is_loaded(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    monkeypatch.setattr(pipeline.extraction.extract, "import_keras", begun.set)
    monkeypatch.setattr(digests, "_BLOCK", 5)
    monkeypatch.setattr(digests, "_GRAIN_NS", -(10**18))  # files this fresh are else not remembered
    run(photos)
    assert begun.is_set()
    begun.clear()
    run(photos)
    assert not begun.is_set(), "their digests are remembered"
    photos.rename(photos.with_name("moved"))
    assert run(photos.with_name("moved")).computed == 0
    assert not begun.is_set(), "they are hashed anew, and known"


def test_a_program_that_ends_does_not_wait_for_tensorflow(photos: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, cli, pipeline.extraction.extract\n"
        "from pipeline.cache import digests\n"
        "digests._BLOCK, pipeline.extraction.extract.import_keras = 5, lambda: time.sleep(300)\n"
        "cli.run_and_exit()\n"
    )
    arguments = ["--data-dir", str(tmp_path / "data"), "features", "--dataset", str(photos), "--weights", "nothing.h5"]
    command = [sys.executable, "-c", script, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment())
    assert done.returncode == 1
    assert "no weights file nothing.h5" in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr


def test_weights_that_are_gone_are_missed_only_where_something_is_computed(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(spec: FeatureSpec, weights: Path | None, *others: Any, **named: Any) -> FrozenBackbone:
        return build_backbone(replace(spec, weights=conftest.SPEC.weights), None, *others, **named)

    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", untrained)  # the file below is only looked at
    file = tmp_path / "mine.weights.h5"
    file.write_bytes(b"mine")
    done = run(photos, FeatureChoice(weights=str(file), precision="float32"))
    assert done.space
    file.unlink()
    by_digest = FeatureChoice(weights=done.space.spec.weights)
    assert counts(run(photos, by_digest)) == (0, 12, 0, 0)
    write_picture(photos / "cats" / "new.png", seed=50)
    with pytest.raises(WeightsError, match="not on this machine any more; give the file"):
        run(photos, by_digest)


def test_auto_takes_the_space_on_disk_that_holds_most(photos: Path, run: Callable[..., Extraction]) -> None:
    first = run(photos, UNTRAINED)
    assert first.space
    auto = run(photos, FeatureChoice())
    assert auto.space
    assert (auto.space.name, auto.computed) == (first.space.name, 0)
    write_picture(photos / "cats" / "more.png", seed=55)
    grown = run(photos, FeatureChoice())  # and goes on computing there, in its precision and with its weights
    assert grown.space
    assert (grown.space.name, counts(grown)) == (first.space.name, (1, 12, 0, 0))


def test_a_stated_field_that_differs_is_another_space(photos: Path, run: Callable[..., Extraction]) -> None:
    first = run(photos)
    assert first.space
    other = run(photos, replace(tiny_choice(), fit="pad"))
    assert other.space
    assert other.computed == 12
    assert other.space.name != first.space.name
    with pytest.raises(SpecError, match="fit is squash"):
        run(photos, replace(tiny_choice(), fit="pad", space=first.space.name))
    assert counts(run(photos, FeatureChoice(space=first.space.name))) == (0, 12, 0, 0)


def test_auto_weights_that_cannot_be_had_name_the_ways_out(
    photos: Path, run: Callable[..., Extraction], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    own = photos.rename(tmp_path / "digits")  # whatever a folder is called
    with pytest.raises(WeightsError, match=r"--weights FILE.*--weights untrained"):
        run(own, FeatureChoice())
    assert not list((tmp_path / "data").glob("cache/*/space.json"))


def test_digits_by_default_come_without_network(tmp_path: Path, run: Callable[..., Extraction]) -> None:
    few = limit(open_dataset("digits", downloads=tmp_path), 8)
    done = run(few, FeatureChoice(precision="float32"))
    assert counts(done) == (8, 0, 0, 0)
    assert done.space
    assert done.space.provenance["weights"] == "untrained"
    assert counts(run(few, FeatureChoice())) == (0, 8, 0, 0)


def test_other_layers_have_spaces_of_their_own(photos: Path, run: Callable[..., Extraction], tmp_path: Path) -> None:
    done = run(photos, replace(tiny_choice(), layer="middle"))
    assert done.space
    assert re.match("own_[0-9a-f]{8}-middle-", done.space.name)
    assert next(iter(stored(tmp_path / "data").values()))[0].shape == (8, 8, 32)


def test_float32_storage_keeps_what_the_model_said(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    run(photos, replace(tiny_choice(), storage="float32"))
    for features, pooled in stored(tmp_path / "data").values():
        assert features.dtype == np.float32
        np.testing.assert_allclose(features.mean(axis=(0, 1)), pooled, rtol=1e-5, atol=1e-7)


# Real processes


def command(folder: Path, *network: str) -> tuple[str | Path, ...]:
    """Return the command that makes the rows of a folder, four in a shard."""
    return "features", "--dataset", folder, "--shard-rows", "4", "--batch-size", "4", *(network or tiny_options())


UNTRAINED_OPTIONS = ("--weights", "untrained", "--precision", "float32")


def many(folder: Path, n: int) -> Path:
    for i in range(n):
        write_picture(folder / ("cats" if i % 2 else "dogs") / f"{i}.png", seed=i)
    return folder


def test_killed_in_the_middle_nothing_but_the_shard_in_hand_is_lost(tmp_path: Path) -> None:
    folder, data, whole = many(tmp_path / "images", 40), tmp_path / "data", tmp_path / "whole"
    assert signalled(4, data, *command(folder), among=["rename"]).code == -signal.SIGKILL
    kept = stored(data)
    assert 4 <= len(kept) < 40
    resumed = icebox(data, *command(folder), "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["reused"] == len(kept)
    assert resumed.json["computed"] == 40 - len(kept)
    assert icebox(whole, *command(folder)).code == 0
    expected, found = stored(whole), stored(data)
    assert expected.keys() == found.keys()
    for key, (features, pooled) in expected.items():
        np.testing.assert_array_equal(found[key][0], features)
        np.testing.assert_array_equal(found[key][1], pooled)
    assert not list(data.glob("cache/*/shards/.partial-*"))


def test_ctrl_c_keeps_what_was_computed_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder, data = many(tmp_path / "images", 100), tmp_path / "data"
    stopped = signalled(4, data, *command(folder), number=signal.SIGINT, among=["rename"])
    assert stopped.code == 1
    assert "Traceback" not in stopped.err
    assert stopped.err.rstrip().endswith(
        "error: stopped; features computed so far are kept, and the same command computes the rest"
    )
    assert not list(data.glob("cache/*/shards/.partial-*"))
    resumed = icebox(data, *command(folder), "--json")
    assert 4 <= resumed.json["reused"] < 100
    assert resumed.json["rows"] == 100


def test_two_at_once_on_one_space_compute_each_row_once(tmp_path: Path) -> None:
    """Both plan everything, both wait for the lock that this test holds, then one finds the other's rows."""
    folder, data = many(tmp_path / "images", 12), tmp_path / "data"
    assert icebox(data, *command(folder), "--limit", "1").code == 0
    line = command_line(data, *command(folder), "--json")[2:]
    outs, errors = ([tmp_path / f"{i}.{end}" for i in range(2)] for end in ("out", "err"))
    waiting = f"waiting: process {os.getpid()} on"  # they say for whom
    with open_workspace(data) as workspace, ExitStack() as processes:
        (space,) = workspace.cache.spaces()
        with space.lock(lambda holder: None):
            both = [
                processes.enter_context(warm.Process(line, env=environment(), stdout=out, stderr=err))
                for out, err in zip(outs, errors, strict=True)
            ]
            wait_until(lambda: all(waiting in err.read_text() for err in errors))
        assert [process.wait(300) for process in both] == [0, 0]
        space.sync()
        assert space.totals().rows == 12
    results = [json.loads(out.read_text()) for out in outs]
    assert sorted(result["computed"] for result in results) == [0, 11]
    assert [result["rows"] for result in results] == [12, 12]


def test_a_second_run_starts_no_tensorflow(tmp_path: Path) -> None:
    folder, data = many(tmp_path / "images", 2), tmp_path / "data"
    assert icebox(data, *command(folder, *UNTRAINED_OPTIONS)).code == 0
    arguments = command_line(data, *command(folder, *UNTRAINED_OPTIONS), "--json")[2:]
    script = (
        "import sys, cli; code = cli.main(sys.argv[1:]);"
        "print([name for name in ('tensorflow', 'keras', 'dask', 'matplotlib') if name in sys.modules]);"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    result, modules = done.stdout.splitlines()
    assert json.loads(result)["computed"] == 0
    assert modules == "[]"


def test_a_pixel_bomb_costs_no_memory(tmp_path: Path) -> None:
    """A PNG of 20,000 x 20,000 in a few hundred KB is refused by its header; the peak stays what it was."""

    def peak(folder: Path) -> int:
        line = command_line(tmp_path / folder.name / "data", *command(folder), "--max-bad", "1")
        done = finished(line[2:], program="peak")
        assert done.code == 0, done.err
        return int(done.out)

    plain, bombed = many(tmp_path / "plain", 4), many(tmp_path / "bombed", 4)
    (bombed / "cats" / "bomb.png").write_bytes(black_png(20_000))
    # Decoded it takes at least 400 MB, as RGB 1.2 GB; TensorFlow's own peak wanders by up to 100 MB between runs.
    assert peak(bombed) < peak(plain) + 200_000


def black_png(side: int) -> bytes:
    """A one-bit black PNG, written row by row: its pixels never exist here either."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, packed = zlib.compressobj(9), b""
    for _ in range(side):
        packed += packer.compress(bytes(1 + side // 8))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", packed + packer.flush()), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_the_helpers_make_real_pictures() -> None:
    decoded: Any = cv2.imdecode(np.frombuffer(black_png(64), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert decoded.shape == (64, 64)
    assert not np.array_equal(picture(1), picture(2))


def test_without_any_image_that_can_be_decoded_there_is_no_row(tmp_path: Path, run: Callable[..., Extraction]) -> None:
    folder = tmp_path / "bad"
    for name in ("a/1.png", "b/2.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
    assert counts(run(folder)) == (0, 0, 0, 2)
    again = run(folder)
    assert counts(again) == (0, 0, 0, 2)


def test_a_workspace_closes_its_index(tmp_path: Path) -> None:
    import sqlite3

    with open_workspace(tmp_path) as workspace:
        index = workspace.cache.index
        assert index.shards("any") == {}
    with pytest.raises(sqlite3.ProgrammingError):
        index.shards("any")


def test_a_space_named_outright_needs_nothing_else_said(photos: Path, run: Callable[..., Extraction]) -> None:
    other = run(photos, replace(tiny_choice(), layer="middle", fit="pad"))
    assert other.space
    assert counts(run(photos, FeatureChoice(space=other.space.name))) == (0, 12, 0, 0)
    with pytest.raises(SpecError, match="layer is middle"):
        run(photos, FeatureChoice(space=other.space.name, layer="top"))


def test_a_keras_json_in_somebodys_home_changes_nothing(tmp_path: Path) -> None:
    folder, home = many(tmp_path / "images", 2), tmp_path / "keras"
    home.mkdir()
    (home / "keras.json").write_text('{"floatx": "float16", "image_data_format": "channels_first"}')
    assert icebox(tmp_path / "plain", *command(folder, "--backbone", "mobilenet", *UNTRAINED_OPTIONS)).code == 0
    done = icebox(
        tmp_path / "odd", *command(folder, "--backbone", "mobilenet", *UNTRAINED_OPTIONS), KERAS_HOME=str(home)
    )
    assert done.code == 0, done.err
    plain, odd = stored(tmp_path / "plain"), stored(tmp_path / "odd")
    for key, (features, pooled) in plain.items():
        np.testing.assert_array_equal(odd[key][0], features)
        np.testing.assert_array_equal(odd[key][1], pooled)


def test_no_memory_for_an_image_is_not_remembered_against_it(
    photos: Path, run: Callable[..., Extraction], dangerous: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(photos / "cats" / "1.png", b"ROOM")
    done = run(photos)
    assert counts(done) == (11, 0, 0, 1)
    assert "no memory for 40 x 50 pixels" in done.quarantined[0].reason
    monkeypatch.delenv("PYTHONPATH")
    assert counts(run(photos)) == (1, 11, 0, 0)


# Networks of one's own


def test_an_own_network_is_known_by_what_it_holds(photos: Path, run: Callable[..., Extraction], tmp_path: Path) -> None:
    """Moved, or saved anew, nothing is computed again and no scaling is asked for; with other weights it is another."""
    path = write_network(tmp_path / "own.keras", "depthwise")
    assert counts(run(photos, own_choice(path))) == (12, 0, 0, 0)
    assert counts(run(photos, FeatureChoice(backbone=str(path)))) == (0, 12, 0, 0)
    keras = import_keras()
    model: Any = keras.models.load_model(path)
    model.trainable = False
    model.compile("adam", "mse")
    model.save(tmp_path / "anew.keras")
    assert counts(run(photos, FeatureChoice(backbone=str(tmp_path / "anew.keras")))) == (0, 12, 0, 0)
    moved = path.rename(tmp_path / "moved.keras")
    assert counts(run(photos, FeatureChoice(backbone=str(moved)))) == (0, 12, 0, 0)
    other = write_network(tmp_path / "other.keras", "depthwise", seed=2)
    with pytest.raises(SpecError, match=r"other\.keras holds the weights sha256:.*, not sha256:00"):
        run(photos, replace(own_choice(other), weights=f"sha256:{0:064}"))
    with pytest.raises(UsageError, match="no backbone ''"):
        run(photos, FeatureChoice(backbone="").anchored())
    with pytest.raises(UsageError, match=r"other\.keras is not known from before: say by --scaling"):
        run(photos, FeatureChoice(backbone=str(other)))


def test_an_own_network_under_two_scalings_is_two_spaces(
    photos: Path, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    path = write_network(tmp_path / "own.keras", "plain", size=None)
    with pytest.raises(UsageError, match=r"--scaling takes none, .* found ''"):
        run(photos, replace(own_choice(path), scaling=""))
    sized = replace(own_choice(path), input_size=32)
    both = r"not known from before: say by --input-size how many pixels a side it is given, and by --scaling how its"
    with pytest.raises(UsageError, match=both):
        run(photos, FeatureChoice(backbone=str(path)))
    with pytest.raises(UsageError, match="is not known from before: say by --input-size how many pixels a side"):
        run(photos, own_choice(path))
    for scaling in ("127,128", "x/255"):
        assert counts(run(photos, replace(sized, scaling=scaling))) == (12, 0, 0, 0)
    with pytest.raises(SpecError, match=r"own\.keras is known with --scaling 127,128 and x/255; say which"):
        run(photos, FeatureChoice(backbone=str(path)))
    assert counts(run(photos, FeatureChoice(backbone=str(path), scaling="x/255"))) == (0, 12, 0, 0)
    known = run(photos, sized).space
    space = known and known.name
    assert counts(run(photos, FeatureChoice(space=space, scaling="127.0, 128"))) == (0, 12, 0, 0)
    with pytest.raises(UsageError, match=r"--scaling takes none, .* found 'half'"):
        run(photos, FeatureChoice(space=space, scaling="half"))
    assert counts(run(photos, replace(sized, input_size=40))) == (12, 0, 0, 0)
    with pytest.raises(SpecError, match=r"own\.keras is known with --input-size 32 and 40; say which"):
        run(photos, own_choice(path))
    both = r"own\.keras is known with --input-size 32 and 40, and with --scaling 127,128 and x/255; say which"
    with pytest.raises(SpecError, match=both):
        run(photos, FeatureChoice(backbone=str(path)))
    with pytest.raises(SpecError, match=r"Keras cannot build .*own\.keras for images of 2 pixels"):
        run(photos, replace(sized, input_size=2))


def test_layers_of_an_own_network(photos: Path, run: Callable[..., Extraction], tmp_path: Path) -> None:
    choice = own_choice(write_network(tmp_path / "own.keras", "norm_first"))
    assert counts(run(photos, replace(choice, layer="middle"))) == (12, 0, 0, 0)
    with pytest.raises(SpecError, match=r"other branches run beside it; the nearest layers that work: middle or add"):
        run(photos, replace(choice, layer="conv2d"))
    with pytest.raises(
        SpecError, match=r"has no layer 'mixed10' \(`summary --backbone B --all` lists them; the last to cut at: "
    ):
        run(photos, replace(choice, layer="mixed10"))
