"""`cache export`: the rows of a dataset in one file, with all that is needed to train from it elsewhere."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the filter
import numpy as np
import pytest
from conftest import ROOT, SPEC, icebox, write_picture
from made import flip, key, made, spoil

from pipeline.cache import storage
from pipeline.cache.digests import digest
from pipeline.cache.shard import Rows
from pipeline.cache.space import Cache

N = 24
SPACE = ("--space", SPEC.directory)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images in two classes and three splits, their made-up rows in shards of five."""
    keys, rows = [], made(list(range(N)))
    for i in range(N):
        split = ("train", "train", "val", "test")[i % 4]
        path = write_picture(tmp_path / "photos" / split / ("cats" if i % 3 else "dogs") / f"ü{i}.png", i)
        keys.append(np.frombuffer(digest(path.read_bytes()), np.uint8))
    with closing(Cache(tmp_path / "data" / "cache")) as cache:
        space = cache.create(SPEC, {})
        order = np.random.default_rng(0).permutation(N)  # rows lie in another order than the images
        whole = Rows(rows.features, rows.pooled, np.stack(keys), rows.views).take(order)
        for at in range(0, N, 5):
            space.register(space.write(whole.take(slice(at, at + 5))))
    return tmp_path / "data"


def export(data: Path, *options: str, out: str = "out.h5") -> Any:
    folder = data.parent / "photos"
    return icebox(data, "cache", "export", data.parent / out, "--dataset", folder, *SPACE, *options, "--json")


def shards(data: Path) -> list[Path]:
    return sorted(data.glob("cache/*/shards/*.h5"))


def column(file: h5py.File, name: str) -> Any:
    values: Any = file[name]
    return values.asstr()[:] if h5py.check_string_dtype(values.dtype) else values[:]


@pytest.mark.parametrize("what", ["features", "pooled"])
@pytest.mark.parametrize("virtual", [False, True])
def test_every_row_stands_beside_its_image(what: str, virtual: bool, data: Path) -> None:
    done = export(data, "--what", what, *(["--virtual"] if virtual else []))
    assert (done.code, done.json["rows"], done.json["missing"]) == (0, N, 0), done.err
    expected = getattr(made(list(range(N))), what)
    with h5py.File(data.parent / "out.h5") as file:
        names, classes = list(column(file, "path")), list(column(file, "class_names"))
        assert classes == ["cats", "dogs"]
        numbers = [int(Path(name).stem[1:]) for name in names]
        assert sorted(numbers) == list(range(N))
        assert np.array_equal(column(file, what), expected[numbers])
        assert column(file, what).dtype == expected.dtype
        assert [classes[label] for label in column(file, "label")] == [Path(name).parent.name for name in names]
        assert list(column(file, "split")) == [Path(name).parts[0] for name in names]
        paths = [data.parent / "photos" / name for name in names]
        assert [key.tobytes() for key in column(file, "key")] == [digest(path.read_bytes()) for path in paths]
        assert column(file, "present").all()
        spec: Any = file.attrs["spec"]
        assert json.loads(spec) == SPEC.to_dict()


def test_a_self_contained_file_needs_no_icebox(data: Path) -> None:
    export(data)
    program = (
        "import h5py, hdf5plugin, sys; f = h5py.File(sys.argv[1]); print(f['features'].shape, f['features'][3].sum())"
    )
    for path in shards(data):
        path.unlink()
    command = [sys.executable, "-c", program, str(data.parent / "out.h5")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.startswith("(24, 2, 3, 8) ")


def test_what_is_missing_refuses_a_self_contained_file_and_is_nan_in_a_virtual_one(data: Path) -> None:
    write_picture(data.parent / "photos" / "train" / "cats" / "new.png", 99)
    refused = export(data)
    assert refused.code == 1
    assert "1 of 25 images has no features" in refused.err
    assert not (data.parent / "out.h5").exists()
    done = export(data, "--virtual")
    assert (done.code, done.json["rows"], done.json["missing"]) == (0, 25, 1)
    with h5py.File(data.parent / "out.h5") as file:
        missing = [name.endswith("new.png") for name in column(file, "path")]
        assert list(~column(file, "present")) == missing
        assert np.array_equal(np.isnan(column(file, "features")).all(axis=(1, 2, 3)), missing)


def test_a_shard_that_goes_later_reads_as_nan(data: Path) -> None:
    export(data, "--virtual")
    shards(data)[0].unlink()
    with h5py.File(data.parent / "out.h5") as file:
        gone = np.isnan(column(file, "features")).all(axis=(1, 2, 3))
    assert 4 <= gone.sum() <= 5


def test_a_damaged_shard_is_named_and_nothing_is_written(data: Path) -> None:
    spoil(shards(data)[1])
    done = export(data)
    assert done.code == 1
    assert str(shards(data)[1]) in done.err
    assert "cache verify --read-data --repair" in done.err
    assert list(data.parent.glob("*.h5")) == list(data.parent.glob(".partial-*")) == []


def test_a_file_that_is_there_is_replaced_only_when_asked(data: Path) -> None:
    out = data.parent / "out.h5"
    out.write_text("somebody's")
    done = export(data)
    assert (done.code, out.read_text()) == (2, "somebody's")
    assert "is there already; --force replaces it" in done.err
    assert export(data, "--force").code == 0
    assert h5py.is_hdf5(out)


def test_what_is_no_file_is_never_replaced(data: Path) -> None:
    pipe = data.parent / "pipe.h5"
    os.mkfifo(pipe)
    done = export(data, "--force", out="pipe.h5")
    assert done.code == 2
    assert "is no regular file" in done.err
    assert pipe.is_fifo()


def test_a_folder_that_is_not_there_is_told(data: Path) -> None:
    done = export(data, out="no/such/out.h5")
    assert done.code == 2
    assert "there is no folder" in done.err


def test_images_that_cannot_be_decoded_are_left_out_and_listed(data: Path) -> None:
    (data.parent / "photos" / "train" / "cats" / "bad.png").write_text("no image")
    done = export(data)
    assert (done.code, done.json["rows"], done.json["quarantined"]) == (3, N, 1)
    assert done.json["quarantined_images"][0]["path"] == "train/cats/bad.png"


def test_a_disk_too_small_is_told_before_anything_is_written(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cli

    monkeypatch.setattr(storage, "free_bytes", lambda path: 10)
    arguments = ["cache", "export", str(data.parent / "out.h5"), "--dataset", str(data.parent / "photos"), *SPACE]
    assert cli.main(["--data-dir", str(data), *arguments]) == 1
    assert list(data.parent.glob("*.h5")) == []


def test_a_disk_that_fills_meanwhile_leaves_nothing(data: Path) -> None:
    """HDF5 crashes at the end of a process one of whose writes failed; so it must not notice."""
    script = (
        "import resource, sys, cli\n"
        "from pipeline.cache import export\n"
        "export._MARGIN = 0.0\n"
        "written = export._written\n"
        "def limited(path):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    return written(path)\n"
        "export._written = limited\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["cache", "export", str(data.parent / "out.h5"), "--dataset", str(data.parent / "photos"), *SPACE]
    command = [sys.executable, "-c", script, "--data-dir", str(data), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: cannot write" in done.stderr
    assert [path for path in data.parent.iterdir() if "h5" in path.name] == []


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.2, 0.5, 0.95])
def test_wherever_the_disk_is_full_the_process_ends_in_order(share: float, virtual: bool, data: Path) -> None:
    """HDF5 reads back what it wrote; what could not be written it must find all the same."""
    options = ["--virtual"] if virtual else []
    whole = export(data, *options).json
    out = Path(whole["path"])
    room = math.ceil(share * out.stat().st_size)
    out.unlink()
    script = (
        "import resource, sys, cli\n"
        "from pipeline.cache import export\n"
        "export._MARGIN = 0.0\n"
        "written = export._written\n"
        "def limited(path):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "    return written(path)\n"
        "export._written = limited\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["cache", "export", str(data.parent / "out.h5"), "--dataset", str(data.parent / "photos"), *SPACE]
    command = [sys.executable, "-c", script, "--data-dir", str(data), *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: cannot write" in done.stderr
    assert [path for path in data.parent.iterdir() if "h5" in path.name] == []


@pytest.mark.parametrize("virtual", [False, True])
def test_a_shard_with_other_rows_than_the_index_says_is_refused(virtual: bool, data: Path) -> None:
    # Exchanged for one of the same size, as the quick look before each command cannot notice.
    target = shards(data)[0]
    with h5py.File(target) as file:
        features, pooled, views = (column(file, name) for name in ("features", "pooled", "view"))
    with closing(Cache(data / "cache")) as cache:
        others = np.stack([np.frombuffer(key(100 + i), np.uint8) for i in range(len(views))])
        info = cache.open(SPEC.directory).write(Rows(features, pooled, others, views))
    assert target.stat().st_size == info.bytes
    (target.parent / f"{info.name}.h5").replace(target)
    done = export(data, *(["--virtual"] if virtual else []))
    assert done.code == 1
    assert f"shard {target}" in done.err
    assert list(data.parent.glob("*.h5")) == []


def test_an_export_that_was_killed_leaves_what_the_next_one_replaces(data: Path) -> None:
    (data.parent / ".partial-out.h5").write_bytes(bytes(10**6))
    assert export(data).code == 0
    assert list(data.parent.glob(".partial-*")) == []
    with h5py.File(data.parent / "out.h5") as file:
        assert column(file, "present").all()


def test_two_exports_to_one_file_do_not_mix(data: Path) -> None:
    with (data.parent / ".partial-out.h5").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = export(data)
    assert done.code == 1
    assert "another process is writing" in done.err
    assert (data.parent / ".partial-out.h5").exists(), "it is not ours"


def test_an_export_into_the_cache_is_refused(data: Path) -> None:
    done = export(data, out=f"data/cache/{SPEC.directory}/shards/out.h5")
    assert done.code == 2
    assert "lies in the cache itself" in done.err


def test_a_virtual_export_says_that_gc_ends_it(data: Path) -> None:
    out, photos = data.parent / "out.h5", data.parent / "photos"
    done = icebox(data, "cache", "export", out, "--dataset", photos, *SPACE, "--virtual")
    assert "after `cache gc`, export it again" in done.err


def test_a_link_in_the_place_of_what_is_being_written_is_not_followed(data: Path) -> None:
    precious = data.parent / "thesis.txt"
    precious.write_text("years of work")
    (data.parent / ".partial-out.h5").symlink_to(precious)
    done = export(data)
    assert done.code == 1
    assert "cannot write" in done.json["error"]
    assert precious.read_text() == "years of work"
    assert not (data.parent / "out.h5").exists()


@pytest.mark.parametrize("name", ["key", "view"])
def test_a_virtual_export_names_the_damaged_shard(data: Path, name: str) -> None:
    path = shards(data)[0]
    with h5py.File(path) as file:
        stored: Any = file[name]
        place = stored.id.get_chunk_info(0).byte_offset
    flip(path, place)
    done = export(data, "--virtual")
    if name == "view":  # nothing is read of it here; whoever reads the rows is told
        assert done.code in (0, 1)
    else:
        assert done.code == 1
        assert f"shard {path} cannot be read" in done.json["error"]
        assert "cache verify --read-data --repair" in done.json["error"]
