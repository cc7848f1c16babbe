"""`cache export`: the rows of a dataset in one file, with all that is needed to train from it elsewhere."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import resource
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from conftest import ROOT, SPEC, icebox, write_picture
from made import flip, key, made, spoil

from pipeline.cache import export as shard_export
from pipeline.cache import shard
from pipeline.cache.shard import Rows
from pipeline.cache.space import Cache
from pipeline.core import files
from pipeline.core.hashing import image_key

N = 24
SPACE = ("--space", SPEC.directory)
LONG = pytest.mark.long  # a process from its start each; those at the beginning, in the middle and at the end are run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images in two classes and three splits, their made-up rows in shards of five."""
    keys, rows = [], made(list(range(N)))
    for i in range(N):
        split = ("train", "train", "val", "test")[i % 4]
        path = write_picture(tmp_path / "photos" / split / ("cats" if i % 3 else "dogs") / f"ü{i}.png", i)
        keys.append(np.frombuffer(image_key(path.read_bytes()), np.uint8))
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


def export_here(data: Path, *options: str) -> int:
    """The same in this process, so that what lies below can be made to fail; the answer is the exit code."""
    import cli

    arguments = ["cache", "export", str(data.parent / "out.h5"), "--dataset", str(data.parent / "photos"), *SPACE]
    return cli.main(["--data-dir", str(data), *arguments, *options])


def packed_by_blosc2(data: Path, path: Path) -> None:
    """Write a shard anew with the filter of early versions."""
    earlier = dict(hdf5plugin.Blosc2(cname="zstd", clevel=1, filters=hdf5plugin.Blosc2.NOFILTER))
    with closing(Cache(data / "cache")) as cache, pytest.MonkeyPatch.context() as patch:
        space = cache.open(SPEC.directory)
        filters = shard.row_filters
        patch.setattr(shard, "row_filters", lambda *row: filters(*row) | earlier)
        space.register(space.write(shard.read_whole(path, np.arange(len(shard.read_info(path, SPEC).keys)))))
        space.index.forget_shards(space.name, [path.stem])
    path.unlink()


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
        assert [key.tobytes() for key in column(file, "key")] == [image_key(path.read_bytes()) for path in paths]
        assert column(file, "present").all()
        spec: Any = file.attrs["spec"]
        assert json.loads(spec) == SPEC.to_dict()


@pytest.mark.parametrize("what", ["features", "pooled"])
@pytest.mark.parametrize("earlier", [slice(1), slice(2, None), slice(None)])
def test_rows_packed_by_an_earlier_filter_are_exported_with_the_present_one(
    what: str, earlier: slice, data: Path
) -> None:
    for path in shards(data)[earlier]:
        packed_by_blosc2(data, path)
    assert export_here(data, "--what", what) == 0
    expected = getattr(made(list(range(N))), what)
    with h5py.File(data.parent / "out.h5") as file:
        numbers = [int(Path(name).stem[1:]) for name in column(file, "path")]
        assert np.array_equal(column(file, what), expected[numbers])
        stored: Any = file[what]
        assert "32015" in stored._filters


@pytest.mark.parametrize("name", ["50%", "a%b", "100%%", "%d"])
def test_a_virtual_export_finds_shards_in_a_folder_with_a_percent_sign(name: str, data: Path) -> None:
    moved = data.rename(data.with_name(name))
    assert export_here(moved, "--virtual") == 0
    with h5py.File(data.parent / "out.h5") as file:
        assert not np.isnan(column(file, "features")).any()


def test_a_virtual_export_of_more_shards_than_files_may_be_open_is_refused(
    data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """HDF5 keeps each one open, and reads NaN of those that it cannot open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_export, "_OTHER_FILES", soft - 4)  # room for four, and there are five
        assert export_here(data, "--virtual") == 1
        told = capfd.readouterr().err
        assert "would refer to 5 shards" in told
        assert "leave out --virtual, or raise the limit (`ulimit -n" in told
        assert list(data.parent.glob("*.h5")) == list(data.parent.glob(".partial-*")) == []
        patch.setattr(shard_export, "_OTHER_FILES", soft - 5)
        assert export_here(data, "--virtual") == 0
        assert "To read all of it 5 files must be open" in capfd.readouterr().err


def test_more_shards_than_files_may_be_open_are_never_exported_as_nan(data: Path) -> None:
    """Where the limit was not foreseen, what reads back as NaN is noticed."""
    script = (
        "import os, resource, sys, cli; from pipeline.cache import export; "
        "export._Export.check_open_files = lambda *_: None; written = export._Export._written_rows\n"
        "def limited(self, path, places):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 2,) * 2)\n"
        "    return written(self, path, places)\n"
        "export._Export._written_rows = limited\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["cache", "export", str(data.parent / "out.h5"), "--dataset", str(data.parent / "photos"), *SPACE]
    command = [sys.executable, "-c", script, "--data-dir", str(data), *arguments, "--virtual"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr
    assert "does not read back as the rows in the shards" in done.stderr
    assert list(data.parent.glob("*.h5")) == []


@pytest.mark.parametrize("virtual", [False, True])
def test_an_export_that_reads_back_otherwise_is_not_published(
    virtual: bool, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As that of chunks under another pipeline was: whatever goes wrong while it is written, it is noticed."""
    options = ["--virtual"] if virtual else []
    assert export_here(data, *options) == 0
    out = data.parent / "out.h5"
    before = out.read_bytes()
    job = shard_export._Export
    if virtual:
        monkeypatch.setattr(job, "_name", staticmethod(lambda path: "elsewhere.h5"))
    else:
        monkeypatch.setattr(shard_export, "_packed_alike", lambda *_: True)
        for path in shards(data)[:2]:
            packed_by_blosc2(data, path)
    assert export_here(data, "--force", *options) == 1
    assert "read back" in capfd.readouterr().err
    assert out.read_bytes() == before
    assert list(data.parent.glob(".partial-*")) == []


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

    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    arguments = ["cache", "export", str(data.parent / "out.h5"), "--dataset", str(data.parent / "photos"), *SPACE]
    assert cli.main(["--data-dir", str(data), *arguments]) == 1
    assert list(data.parent.glob("*.h5")) == []


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("share", [0.0, pytest.param(0.0001, marks=LONG), 0.2, pytest.param(0.5, marks=LONG), 0.95])
def test_wherever_the_disk_is_full_the_process_ends_in_order(share: float, virtual: bool, data: Path) -> None:
    """HDF5 reads back what it wrote; what could not be written it must find all the same.

    And it crashes at the end of a process one of whose writes failed; so it must not notice.
    """
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
        "def limited(*file):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "    return written(*file)\n"
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


@pytest.mark.parametrize("virtual", [False, True])
def test_an_export_where_there_are_no_locks(
    virtual: bool, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--virtual"] if virtual else []

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(shard_export.FeatureSpace, "reading", lambda space: contextlib.nullcontext())
    assert export_here(data, *options) == 1
    assert "cannot be locked (its server's lock service does not answer" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("ICEBOX_LOCKS", "off")
    (data.parent / ".partial-out.h5").write_text("another export's, who has no lock on it either")
    assert export_here(data, *options) == 0
    with h5py.File(data.parent / "out.h5") as file:
        assert np.isfinite(column(file, "features")).all()
    assert [path.name for path in data.parent.glob(".partial-*")] == [".partial-out.h5"]


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
