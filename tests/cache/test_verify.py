"""`verify` finds whatever happened to a cache, names it, and mends it so that only the lost rows are missing."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import icebox, write_picture
from made import SPEC, add, chunk_places, flip, key, made, shard_file, spoil

import cli
from pipeline.cache.digests import file_stamp
from pipeline.cache.shard import ShardInfo, row_filters
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cache.verify import Verification, verify
from pipeline.core import files
from pipeline.core.errors import CacheError, IndexDamagedError, ShardDamagedError, SpecError

ROWS = 8  # in a shard


@pytest.fixture
def space(cache: Cache) -> FeatureSpace:
    return cache.create(SPEC, {"weights": "untrained"})


@pytest.fixture
def shards(space: FeatureSpace) -> list[ShardInfo]:
    """Four shards of eight rows."""
    return [add(space, list(range(start, start + ROWS))) for start in range(0, 4 * ROWS, ROWS)]


def found(done: Verification) -> dict[str, str]:
    return {problem.path.name: problem.problem for problem in done.problems}


def missing(cache: Cache, space: FeatureSpace) -> set[int]:
    """The numbers of the images that have no row, as the next command sees it."""
    numbers = range(4 * ROWS)
    located = cache.open(space.name).locate([key(n) for n in numbers])
    return {n for n, has_row in zip(numbers, located.found, strict=True) if not has_row}


def rows_of(shards: list[ShardInfo], *which: int) -> set[int]:
    return {n for i in which for n in range(i * ROWS, (i + 1) * ROWS)}


def test_a_sound_cache_is_counted_and_nothing_found(cache: Cache, shards: list[ShardInfo]) -> None:
    quick, thorough = verify(cache), verify(cache, sample=1.0)
    size = sum(info.bytes for info in shards)
    assert dataclasses.asdict(quick) == dataclasses.asdict(Verification(1, 4, 32, size, 0, []))
    assert dataclasses.asdict(thorough) == dataclasses.asdict(Verification(1, 4, 32, size, size, []))
    assert quick.sound


def test_an_empty_cache_is_sound(cache: Cache) -> None:
    assert dataclasses.asdict(verify(cache, sample=1.0)) == dataclasses.asdict(Verification())


def test_flipped_bits_are_all_found(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], request: pytest.FixtureRequest
) -> None:
    random = np.random.default_rng(0)
    for _ in range(1000 if request.config.getoption("all") else 150):
        info = shards[random.integers(len(shards))]
        path, offset, bit = shard_file(space, info), int(random.integers(info.bytes)), int(random.integers(8))
        flip(path, offset, bit)
        assert list(found(verify(cache, sample=1.0))) == [path.name], (offset, bit)
        flip(path, offset, bit)
    assert verify(cache, sample=1.0).sound


def test_cut_swapped_and_deleted_shards_are_found_without_reading_them(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    first, second, third, fourth = (shard_file(space, info) for info in shards)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    third.write_bytes(third.read_bytes()[:-1])
    fourth.unlink()
    done = verify(cache)
    assert found(done).keys() == {path.name for path in (first, second, third, fourth)}
    assert found(done)[fourth.name] == "is gone from the disk"
    assert [problem.rows for problem in done.problems] == [ROWS] * 4
    assert not done.sound


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.999])
def test_a_cut_shard_is_found_wherever_it_was_cut(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], kept: float
) -> None:
    path = shard_file(space, shards[1])
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    assert found(verify(cache)).keys() == {path.name}


def test_looking_changes_nothing(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    path = shard_file(space, shards[0])
    spoil(path)
    shard_file(space, shards[1]).unlink()
    before = sorted((each, each.read_bytes()) for each in cache.root.rglob("*") if each.is_file())
    first, second = found(verify(cache, sample=1.0)), found(verify(cache, sample=1.0))
    assert len(first) == 2
    assert first == second
    assert sorted((each, each.read_bytes()) for each in cache.root.rglob("*") if each.is_file()) == before


def test_repair_leaves_a_sound_cache_that_lacks_the_lost_rows_only(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    damaged, gone = shard_file(space, shards[0]), shard_file(space, shards[2])
    flip(damaged, chunk_places(damaged, "features")[3][0] + 5)
    content = damaged.read_bytes()
    gone.unlink()
    done = verify(cache, sample=1.0, repair=True)
    assert done.sound
    assert all(problem.repaired for problem in done.problems)
    assert (space.path / "aside" / damaged.name).read_bytes() == content
    assert not damaged.exists()
    assert verify(cache, sample=1.0).problems == []
    assert missing(cache, space) == rows_of(shards, 0, 2)
    add(space, sorted(rows_of(shards, 0)))  # the very bytes again, under the same name
    assert missing(cache, space) == rows_of(shards, 2)
    assert verify(cache, sample=1.0).problems == []


def test_a_bad_shard_moved_aside_twice_keeps_both(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    path = shard_file(space, shards[0])
    sound = path.read_bytes()
    for offset in (200, 300):
        path.write_bytes(sound)
        flip(path, len(sound) - offset)
        assert verify(cache, sample=1.0, repair=True).sound
    assert len(list((space.path / "aside").iterdir())) == 2


def test_a_sample_reads_its_share_and_sees_all_in_the_long_run(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    path = shard_file(space, shards[3])
    spoil(path)  # which a quick look cannot see
    assert verify(cache).sound
    runs = [verify(cache, sample=0.25) for _ in range(60)]
    assert {done.bytes_read for done in runs} <= {info.bytes for info in shards}
    assert {done.sound for done in runs} == {True, False}  # 60 draws of one in four miss with chance 3e-8


def test_files_that_are_no_shards_are_named_and_moved(cache: Cache, space: FeatureSpace) -> None:
    (space.shards / "copy of a shard.h5").write_bytes(b"x")
    (space.shards / ".partial-1-abc.h5").write_bytes(b"somebody is writing this")
    assert list(found(verify(cache))) == ["copy of a shard.h5"]
    assert verify(cache, repair=True).sound
    assert sorted(path.name for path in space.shards.iterdir()) == [".partial-1-abc.h5"]
    assert verify(cache).problems == []


def test_an_index_that_says_otherwise_is_put_right(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    with sqlite3.connect(cache.index.path) as db:
        db.execute("UPDATE rows SET key = ? WHERE position = 3 AND shard = 1", (key(99),))
        db.execute("UPDATE rows SET view = 5 WHERE position = 2 AND shard = 2")
        db.execute("DELETE FROM rows WHERE position = 7 AND shard = 3")
        db.execute("UPDATE shards SET rows = 9 WHERE id = 4")
    assert missing(cache, space) == {3, ROWS + 2, 2 * ROWS + 7}
    with pytest.raises(ShardDamagedError, match="other rows than the index says"):
        space.read([key(99)], "features")
    done = verify(cache)
    assert [problem.path for problem in done.problems] == [cache.index.path] * 4
    assert not done.sound
    assert verify(cache, repair=True).sound
    assert verify(cache).problems == []
    assert missing(cache, space) == set()
    assert not (space.path / "aside").exists()


def test_without_its_index_a_cache_is_as_sound_as_before(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    cache.close()
    cache.index.path.unlink()
    again = Cache(cache.root)
    assert verify(again, sample=1.0).problems == []
    assert missing(again, space) == set()
    assert verify(again).shards == 4
    again.close()


def test_damage_met_while_the_index_is_derived_again_is_passed_over_and_found(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], caplog: pytest.LogCaptureFixture
) -> None:
    path = shard_file(space, shards[1])
    spoil(path)  # layout, keys and views are whole
    cache.close()
    cache.index.path.unlink()
    again = Cache(cache.root)
    assert missing(again, space) == rows_of(shards, 1)
    assert f"shard {path} is damaged: its bytes are not those it is named by" in caplog.text
    assert list(found(verify(again, sample=1.0))) == [path.name]
    again.close()


def test_a_description_that_is_lost_is_written_again_from_the_shards(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    for text in (None, "{", json.dumps({"spec": SPEC.to_dict() | {"layer": "mixed9"}, "made_by": {}})):
        (space.path / "space.json").unlink() if text is None else (space.path / "space.json").write_text(text)
        done = verify(cache)
        assert list(found(done)) == ["space.json"]
        assert done.problems[0].rows == 4 * ROWS
        assert verify(cache, repair=True).sound
        assert verify(cache).problems == []
        assert cache.open(space.name).spec == SPEC
        assert missing(cache, space) == set()


def test_one_space_can_be_named(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    other = cache.create(dataclasses.replace(SPEC, layer="mixed8"), {})
    shutil.copy(shard_file(space, shards[0]), other.shards)
    assert verify(cache, space=space.name).sound
    assert list(found(verify(cache, space=other.name)).values()) == ["belongs to another feature space"]
    assert verify(cache).spaces == 2
    with pytest.raises(SpecError, match=r"no feature space named 'nothing'.*mixed10"):
        verify(cache, space="nothing")


def test_rows_read_back_are_those_written_after_all_that(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    path = shard_file(space, shards[0])
    spoil(path)
    verify(cache, sample=1.0, repair=True)
    add(space, sorted(rows_of(shards, 0)))
    keys = [key(n) for n in range(4 * ROWS)]
    rows = cache.open(space.name).read(keys, "features")
    assert rows.tobytes() == made(list(range(4 * ROWS))).features.tobytes()


def test_what_another_machine_repacked_is_no_problem_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a shared disk each machine has its own index; what `gc` did there is learned here, and no row is lost."""
    from pipeline.cache.gc import Retention, collect

    def opened(machine: str) -> Cache:
        monkeypatch.setenv("ICEBOX_INDEX", str(tmp_path / f"{machine}.db"))
        return Cache(tmp_path / "cache")

    with closing(opened("here")) as here, closing(opened("there")) as there:
        space = here.create(SPEC, {})
        for n in range(4):
            add(space, [n])
        assert collect(there, Retention()).shards_repacked == 4
        assert verify(here, sample=1.0).problems == []
        assert here.open(SPEC.directory).totals().rows == 4
        add(space, [4])
        collect(there, Retention())
        assert here.open(SPEC.directory).totals().rows == 5
        assert "is gone" not in caplog.text
        # What was really lost is still told.
        there_space = there.open(SPEC.directory)
        (name,) = there_space.shard_files()
        (there_space.shards / name).unlink()
        add(there_space, [1])
        (problem,) = verify(here).problems
        assert problem.problem == "is gone from the disk"
        assert here.open(SPEC.directory).totals().rows == 1


def test_rows_of_another_shape_are_no_rows_of_this_space(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], caplog: pytest.LogCaptureFixture
) -> None:
    """Soundly made, rightly named, by a version that cut the backbone elsewhere."""
    foreign = space.write(made([100, 101], SPEC, (3, 3, 8)))
    again = cache.open(space.name)
    assert not again.locate([key(100)]).found.any()
    assert "its rows are 3x3x8, those of others 2x3x8" in caplog.text
    assert list(found(verify(cache))) == [f"{foreign.name}.h5"]
    assert verify(cache, repair=True).sound
    assert missing(cache, space) == set()


def test_rows_claimed_but_not_there_are_no_zeros(cache: Cache, space: FeatureSpace, tmp_path: Path) -> None:
    info = space.write(made([1, 2, 3]))
    path = shard_file(space, info)
    with h5py.File(path, "r+") as file:
        filters = row_filters("features", (3, 2, 3, 8), np.dtype(np.float16))
        del file["features"]
        file.create_dataset("features", (3, 2, 3, 8), np.float16, **filters)
    path.rename(path.with_name(f"{hashlib.sha256(path.read_bytes()).hexdigest()}.h5"))
    (problem,) = verify(cache, sample=1.0).problems
    assert "its datasets disagree" in problem.problem


def test_the_folder_of_shards_is_made_again(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    shutil.rmtree(space.shards)
    assert set(found(verify(cache)).values()) == {"is gone from the disk"}
    assert verify(cache, repair=True).sound
    again = cache.open(space.name)
    with again.lock(lambda holder: None):
        add(again, [1])
    assert verify(cache, sample=1.0).problems == []


def test_a_folder_among_the_shards_is_named(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    (space.shards / "copies").mkdir()
    assert list(found(verify(cache))) == ["copies"]


def test_a_file_in_the_place_of_the_shards_is_told(cache: Cache, space: FeatureSpace) -> None:
    space.shards.rmdir()
    space.shards.write_text("in the way")
    with pytest.raises(CacheError, match=r"a file stands where the folder .*shards should be; move it away"):
        verify(cache)


def test_a_space_that_lost_its_description_is_not_passed_over_in_silence(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], caplog: pytest.LogCaptureFixture
) -> None:
    (space.path / "space.json").unlink()
    assert cache.spaces() == []
    assert f"{space.path} holds shards but no space.json" in caplog.text
    assert "cache verify --repair" in caplog.text


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET key = x'00' WHERE position = 0",
        "UPDATE shards SET bytes = 'many'",
        "UPDATE shards SET name = 7 WHERE id = 1",
        "UPDATE rows SET position = 'first' WHERE position = 0",
    ],
)
def test_an_index_with_what_cannot_be_is_derived_again(
    statement: str, cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    """SQLite finds no fault with it."""
    cache.close()
    with closing(sqlite3.connect(cache.index.path)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute(statement)
        db.commit()
    done = icebox(cache.root.parent, "cache", "verify", "--json")
    assert done.code == 0 or done.json["problems"], done.err
    assert "Traceback" not in done.err
    repaired = icebox(cache.root.parent, "cache", "verify", "--repair")
    assert repaired.code == 0, repaired.err
    with closing(Cache(cache.root)) as again:
        assert verify(again, sample=1.0).problems == []
        assert missing(again, again.open(space.name)) == set()


@pytest.mark.parametrize("described", [True, False])
def test_a_foreign_shard_does_not_outlaw_the_others(tmp_path: Path, described: bool) -> None:
    """Of whatever name, and met in whatever order: the index is derived again."""
    with closing(Cache(tmp_path / "cache")) as cache:
        space = cache.create(SPEC, {"row_shape": [2, 3, 8]} if described else {})
        good = [add(space, list(range(start, start + ROWS))) for start in range(0, 4 * ROWS, ROWS)]
        foreign = {space.write(made([n], SPEC, (3, 3, 8))).name for n in range(100, 103)}
        assert min(foreign) < max(info.name for info in good)
    (tmp_path / "cache" / "cache.db").unlink()
    with closing(Cache(tmp_path / "cache")) as cache:
        done = verify(cache)
        assert {problem.path.stem for problem in done.problems} == foreign
        assert missing(cache, space) == set()
        verify(cache, repair=True)
        assert {path.stem for path in space.shards.iterdir()} == {info.name for info in good}
        assert missing(cache, space) == set()


@pytest.mark.parametrize(("number", "moved"), [(errno.EACCES, False), (errno.EMFILE, False), (errno.EIO, True)])
def test_a_shard_that_merely_cannot_be_read_is_not_moved(
    cache: Cache,
    space: FeatureSpace,
    shards: list[ShardInfo],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    moved: bool,
) -> None:
    path = shard_file(space, shards[1])
    real: Any = h5py.File

    def refusing(name: Path, *more: object, **options: object) -> h5py.File:
        if name == path:
            raise OSError(number, "refused")
        return real(name, *more, **options)

    monkeypatch.setattr(h5py, "File", refusing)
    done = verify(cache, repair=True)
    assert found(done) == {path.name: f"cannot be read ({os.strerror(number)})"}
    assert done.sound == moved
    assert path.exists() != moved
    monkeypatch.undo()
    assert missing(cache, space) == (rows_of(shards, 1) if moved else set())


def test_a_description_that_may_not_be_read_is_not_written_anew(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = files.read_small, (space.path / "space.json").read_bytes()

    def refusing(path: Path, most: int) -> bytes:
        if path.name == "space.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, most)

    monkeypatch.setattr(files, "read_small", refusing)
    assert not verify(cache, repair=True).sound
    monkeypatch.undo()
    assert (space.path / "space.json").read_bytes() == before


def test_links_that_lead_nowhere_are_moved_aside(cache: Cache, space: FeatureSpace, shards: list[ShardInfo]) -> None:
    (space.shards / "loop.h5").symlink_to("loop.h5")
    (space.shards / f"{'d' * 64}.h5").symlink_to("nothing")
    (cache.root / "loop").symlink_to("loop")
    assert found(verify(cache)).keys() == {"loop.h5", f"{'d' * 64}.h5"}
    assert verify(cache, repair=True).sound
    assert verify(cache, sample=1.0).problems == []
    assert missing(cache, space) == set()


DAMAGE = {
    "a view that is text": "UPDATE rows SET view = 'x' WHERE shard = 1 AND position = 0",
    "a position that is text": "UPDATE rows SET position = 'x' WHERE shard = 1 AND position = 0",
    "a position beyond all bounds": "UPDATE rows SET position = 9e999 WHERE shard = 1 AND position = 0",
    "a key that is text": "UPDATE rows SET key = 'x' WHERE shard = 1 AND position = 0",
    "a name that is no text": "UPDATE shards SET name = CAST(x'ff' AS TEXT) WHERE id = 1",
    "a space that is no text": "UPDATE shards SET space = CAST(x'ff' AS TEXT) WHERE id = 1",
    "a digest that is text": "UPDATE files SET digest = 'x'",
    "a digest of one byte": "UPDATE files SET digest = x'00'",
    "a path that is a number": "UPDATE files SET path = 3",
    "a reason that is a number": "UPDATE quarantine SET reason = x'00'",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "command", [("ls",), ("verify",), ("gc", "--yes"), ("explain",), ("quarantine",)], ids=" ".join
)
def test_an_index_that_holds_what_it_cannot_is_derived_again(
    tmp_path: Path, damage: str, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos" / "a"
    write_picture(photos / "0.png", 0)
    os.utime(photos / "0.png", (1, 1))
    with closing(Cache(tmp_path / "data" / "cache")) as cache:
        space = cache.create(SPEC, {})
        add(space, [1, 2, 3])
        path = photos / "0.png"
        cache.index.remember_digests({path: (file_stamp(path), key(1))})
        cache.index.remember_quarantined({key(7): "odd"}, "a decoder", 10)
    with closing(sqlite3.connect(tmp_path / "data" / "cache" / "cache.db")) as db:
        db.execute(DAMAGE[damage])
        db.commit()
    options = ("--dataset", str(tmp_path / "photos")) if command == ("explain",) else ()
    main = functools.partial(call, str(tmp_path / "data"))
    code = main(*command, *options)
    said = capsys.readouterr().err
    assert code == 0 or (command == ("verify",) and "says otherwise of shard" in said), said
    main("verify", "--repair")
    capsys.readouterr()
    assert main("verify", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


def call(data: str, *arguments: str) -> int:
    return cli.main(["--data-dir", data, "cache", *arguments])


def test_an_index_that_cannot_be_written_is_read(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.index._db.close()
    cache.index._db = sqlite3.connect(f"file:{cache.index.path}?mode=ro", uri=True)
    path = write_picture(tmp_path / "new.png", 1)
    cache.index.remember_digests({path: (file_stamp(path), key(1))})
    cache.index.remember_quarantined({key(9): "odd"}, "a decoder", 10)
    assert "cannot be written: digests and failures are not remembered" in caplog.text
    assert missing(cache, space) == set()


def test_an_index_removed_while_it_is_in_use_is_derived_again(
    cache: Cache, space: FeatureSpace, shards: list[ShardInfo]
) -> None:
    cache.index.path.unlink()
    with pytest.raises(IndexDamagedError, match="was removed while it was in use"):
        add(space, [100])
    with closing(Cache(cache.root)) as again:
        assert missing(again, space) == set()
        assert again.open(space.name).locate([key(100)]).found.all()
