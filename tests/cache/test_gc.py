"""`cache gc`: what nobody named goes, what was spread is brought together, no living row is ever lost."""

from __future__ import annotations

import os
import pty
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import command_line, finished, icebox, write_picture
from faults import Watcher, disk_full, watched
from made import SPEC, add, key, made, shard_file, spoil

from pipeline.cache import gc
from pipeline.cache.gc import GcResult, Retention, collect
from pipeline.cache.index import FileStamp
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cache.verify import verify
from pipeline.core.errors import CacheError
from pipeline.runs import store


@pytest.fixture
def space(cache: Cache) -> FeatureSpace:
    return cache.create(SPEC, {})


def names(space: FeatureSpace) -> set[str]:
    return {path.stem for path in space.shards.glob("[!.]*.h5")}


def check_rows(space: FeatureSpace, numbers: list[int]) -> None:
    """Exactly these rows are there, on disk and in the index, with the values they were made with."""
    with closing(Cache(space.path.parent)) as again:
        space = again.open(space.name)
        expected = made(numbers, space.spec)
        assert np.array_equal(space.read([key(n) for n in numbers], "features"), expected.features)
        assert np.array_equal(space.read([key(n) for n in numbers], "pooled"), expected.pooled)
        assert space.totals().rows == len(numbers)
        assert verify(again, sample=1.0).problems == []


def test_small_shards_are_merged(cache: Cache, space: FeatureSpace) -> None:
    before = {add(space, [n, n + 1]).name for n in range(0, 20, 2)}
    done = collect(cache, Retention())
    assert (done.rows_removed, done.shards_removed, done.shards_repacked, done.shards_written) == (0, 0, 10, 1)
    assert done.bytes_freed > 0
    assert len(names(space)) == 1
    assert not names(space) & before
    check_rows(space, list(range(20)))
    assert collect(cache, Retention()) == GcResult(), "there is no more to do"


def test_of_large_rows_a_full_shard_has_few(cache: Cache, space: FeatureSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as `features` writes into one: neither larger ones are made, nor the same ones again and again."""
    row = made([0]).features.nbytes
    monkeypatch.setattr(gc, "SHARD_BYTES", 8 * row)
    full = add(space, list(range(100, 105)))
    for n in range(0, 12, 2):
        add(space, [n, n + 1])
    assert collect(cache, Retention(), dry_run=True).shards_written == 2
    done = collect(cache, Retention())
    assert (done.shards_repacked, done.shards_written) == (6, 2)
    assert full.name in names(space)
    assert sorted(each.rows for each in space.index.shards(space.name).values()) == [4, 5, 8]
    check_rows(space, [*range(12), *range(100, 105)])
    assert collect(cache, Retention()) == GcResult(), "there is no more to do"


def test_shards_of_full_size_are_left_alone(cache: Cache, space: FeatureSpace) -> None:
    large = add(space, list(range(gc.SMALL_ROWS)))
    small = add(space, [1000])
    assert collect(cache, Retention()) == GcResult(), "one small shard alone is as good as it gets"
    assert names(space) == {large.name, small.name}


def test_rows_that_nobody_named_go(cache: Cache, space: FeatureSpace) -> None:
    all_dead = add(space, list(range(100, 170)))
    mostly_dead = add(space, list(range(70)))
    alive = add(space, list(range(200, 300)))
    kept = [*range(30), *range(200, 300)]
    done = collect(cache, Retention({key(n) for n in kept}))
    assert (done.rows_removed, done.shards_removed, done.shards_repacked) == (110, 1, 1)
    assert not names(space) & {all_dead.name, mostly_dead.name}
    assert alive.name in names(space)
    check_rows(space, kept)


def test_a_shard_that_is_mostly_alive_keeps_its_dead_rows(cache: Cache, space: FeatureSpace) -> None:
    """Writing 260 MB anew to save 2 is not worth it; the rows count as removed only once they are gone."""
    add(space, list(range(100)))
    done = collect(cache, Retention({key(n) for n in range(90)}))
    assert done.shards_repacked == 0
    check_rows(space, list(range(100)))
    assert done.rows_removed == 0


def test_a_space_that_is_named_stays_whole_and_others_lose_all(cache: Cache, space: FeatureSpace) -> None:
    other = cache.create(replace(SPEC, layer="mixed8"), {})
    add(space, list(range(70)))
    add(other, list(range(70)))
    done = collect(cache, Retention(None, [space.name]))
    assert (done.rows_removed, done.shards_removed) == (70, 1)
    check_rows(space, list(range(70)))
    assert names(other) == set()


def test_a_row_in_two_shards_stays_once(cache: Cache, space: FeatureSpace) -> None:
    add(space, [1, 2, 3])
    add(space, [3, 4])
    done = collect(cache, Retention())
    assert done.rows_removed == 1
    check_rows(space, [1, 2, 3, 4])


def test_a_dry_run_changes_nothing_and_foretells(cache: Cache, space: FeatureSpace) -> None:
    for n in range(5):
        add(space, [n])
    (space.shards / ".partial-1-abc.h5").write_bytes(bytes(1000))
    before = {path: path.read_bytes() for path in space.path.rglob("*") if path.is_file()}
    told = collect(cache, Retention({key(0), key(1)}), dry_run=True)
    assert {path: path.read_bytes() for path in space.path.rglob("*") if path.is_file()} == before
    done = collect(cache, Retention({key(0), key(1)}))
    sure = ("rows_removed", "shards_removed", "shards_repacked", "shards_written", "leftovers")
    assert [getattr(told, name) for name in sure] == [getattr(done, name) for name in sure] == [3, 3, 2, 1, 1]
    assert told.bytes_freed == pytest.approx(done.bytes_freed, rel=0.5)


def test_leftovers_of_killed_runs_go(cache: Cache, space: FeatureSpace) -> None:
    add(space, [1])
    leftovers = [space.shards / ".partial-1-a.h5", space.path / ".partial-2-b", cache.index.path.with_name("x")]
    damaged = cache.index.path.with_name(f"{cache.index.path.name}.damaged-20260101-000000")
    for path in (*leftovers, damaged):
        path.write_bytes(bytes(100))
    done = collect(cache, Retention())
    assert (done.leftovers, done.bytes_freed) == (3, 300)
    assert [path.exists() for path in (*leftovers, damaged)] == [False, False, True, False]
    check_rows(space, [1])


def test_what_verify_moved_aside_goes_when_asked(cache: Cache, space: FeatureSpace) -> None:
    spoil(shard_file(space, add(space, [1, 2])))
    verify(cache, sample=1.0, repair=True)
    assert collect(cache, Retention()).leftovers == 0
    assert collect(cache, Retention(), damaged=True).leftovers == 1
    assert list((space.path / "aside").iterdir()) == []


def test_a_damaged_shard_is_left_to_verify(cache: Cache, space: FeatureSpace) -> None:
    """Its rows cannot be taken along, and it may be all that is left of them."""
    good, bad = add(space, [1]), add(space, [2])
    spoil(shard_file(space, bad))
    cache.index.forget_shards(space.name, [bad.name])
    collect(cache, Retention())
    assert names(space) == {good.name, bad.name}


def test_digests_of_files_that_are_gone_are_forgotten(cache: Cache, space: FeatureSpace, tmp_path: Path) -> None:
    from pipeline.cache.digests import remembered_digest

    paths = [tmp_path / "there", tmp_path / "gone"]
    for path in paths:
        path.write_text(path.name)
        remembered_digest(path, cache.index)
    paths[1].unlink()
    collect(cache, Retention())
    assert set(cache.index.files()) == {paths[0]}


def test_a_space_whose_folder_is_gone_is_forgotten(cache: Cache, space: FeatureSpace) -> None:
    import shutil

    add(space, [1])
    shutil.rmtree(space.path)
    collect(cache, Retention())
    assert cache.index.spaces() == []


# The command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder whose cache has the rows of two folders of images."""
    with closing(Cache(tmp_path / "data" / "cache")) as cache:
        space = cache.create(SPEC, {})
        for n, name in enumerate(("kept", "gone")):
            paths = [write_picture(tmp_path / name / "class" / f"{i}.png", 10 * n + i) for i in range(3)]
            rows = made(list(range(3)))
            from pipeline.cache.shard import Rows
            from pipeline.core.hashing import image_key

            keys = np.stack([np.frombuffer(image_key(path.read_bytes()), np.uint8) for path in paths])
            space.register(space.write(Rows(rows.features, rows.pooled, keys, rows.views)))
    return tmp_path / "data"


def test_the_command_keeps_what_it_is_told_to(data: Path) -> None:
    kept = data.parent / "kept"
    told = icebox(data, "cache", "gc", "--dataset", kept, "--dry-run", "--json").json
    assert (told["rows_removed"], told["dry_run"]) == (3, True)
    assert len(told["removed"]) == 1
    done = icebox(data, "cache", "gc", "--dataset", kept, "--yes", "--json")
    assert (done.code, done.json["rows_removed"], done.json["shards_removed"]) == (0, 3, 1)
    assert done.json["bytes_freed"] == told["bytes_freed"]
    assert icebox(data, "cache", "ls", "--json").json["rows"] == 3
    assert icebox(data, "cache", "explain", "--dataset", kept, "--space", SPEC.directory, "--json").code in (0, 1)


@pytest.mark.parametrize("named", ["--dataset", "--space"])
def test_without_a_terminal_no_row_is_removed_unasked(named: str, data: Path) -> None:
    kept = str(data.parent / "kept") if named == "--dataset" else SPEC.directory
    with closing(Cache(data / "cache")) as cache:
        add(cache.create(replace(SPEC, layer="mixed8"), {}), [100])
    removed, stay = (4, 3) if named == "--dataset" else (1, 6)
    done = icebox(data, "cache", "gc", named, kept, "--json")
    assert done.code == 2
    assert f"{removed} row{'s' * (removed > 1)} of features would be removed" in done.json["error"]
    assert "--yes removes them" in done.json["error"]
    assert icebox(data, "cache", "ls", "--json").json["rows"] == 7
    assert icebox(data, "cache", "gc", named, kept, "--yes", "--json").json["rows_removed"] == removed
    again = icebox(data, "cache", "gc", named, kept, "--json")
    assert (again.code, again.json["rows_removed"]) == (0, 0), "where none is left to remove it does the rest"
    assert icebox(data, "cache", "ls", "--json").json["rows"] == stay


def test_second_copies_of_rows_go_unasked(data: Path) -> None:
    """What a killed `gc` leaves: a row in two shards. Nothing is lost with one of them."""
    with closing(Cache(data / "cache")) as cache:
        space = cache.open(SPEC.directory)
        add(space, [1, 2, 3])
        add(space, [3, 4])
    done = icebox(data, "cache", "gc", "--json")
    assert (done.code, done.json["rows_removed"]) == (0, 1)
    assert icebox(data, "cache", "ls", "--json").json["rows"] == 10


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 6), ("y", 0, 3)])
def test_at_a_terminal_it_asks(answer: str, code: int, left: int, data: Path) -> None:
    ours, its = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    command = command_line(data, "cache", "gc", "--dataset", data.parent / "kept")
    done = finished(command[2:], stdin=its)
    assert done.code == code
    assert "3 rows of features will be removed; go on?" in done.err
    os.close(ours)
    os.close(its)
    assert icebox(data, "cache", "ls", "--json").json["rows"] == left


def test_a_mistyped_name_removes_nothing(data: Path) -> None:
    before = icebox(data, "cache", "ls", "--json").json["rows"]
    for options in (("--space", "inception"), ("--dataset", "keptt")):
        done = icebox(data, "cache", "gc", *options)
        assert done.code == 1
        assert "no feature space named" in done.err or "no dataset" in done.err
    assert icebox(data, "cache", "ls", "--json").json["rows"] == before


def test_a_dataset_that_cannot_be_read_removes_nothing(data: Path) -> None:
    listed = data.parent / "kept" / "list.csv"
    listed.write_text("path,label\nclass/0.png,a\nclass/missing.png,a\n")
    done = icebox(data, "cache", "gc", "--dataset", listed)
    assert done.code == 1
    assert "1 image of" in done.err
    assert "class/missing.png" in done.err
    assert "nothing was removed" in done.err
    assert icebox(data, "cache", "ls", "--json").json["rows"] == 6


def test_folders_of_killed_runs_go_and_those_at_work_stay(data: Path) -> None:
    root = data / "runs"
    dead = root / f"{store.files.PARTIAL_PREFIX}20260101-000000-dead"
    dead.mkdir(parents=True)
    (dead / "head.weights.h5").write_bytes(bytes(5000))
    with store.new_run(root, "alive") as (_, partial):
        done = icebox(data, "cache", "gc", "--json").json
        assert (done["leftovers"], str(dead) in done["removed"]) == (1, True)
        assert partial.exists()
        assert not dead.exists()


# Beside damage


@pytest.mark.parametrize("harm", ["flip", "swap", "cut", "delete"])
def test_gc_beside_a_damaged_shard_loses_no_row_that_could_be_read(
    harm: str, cache: Cache, space: FeatureSpace, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither repacked nor relied upon: a row that stands in a sound shard too stays there."""
    damaged, *others = add(space, [1, 2, 3]), add(space, [3, 4]), add(space, [5, 6]), add(space, [7, 8, 9])
    path = shard_file(space, damaged)
    if harm == "flip":
        spoil(path)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif harm == "swap":
        path.write_bytes(shard_file(space, others[-1]).read_bytes())
    else:
        path.unlink()
    collect(cache, Retention())
    assert f"shard {path}" in caplog.text
    assert path.exists() == (harm != "delete"), "what is left of it is for `verify` to judge"
    with closing(Cache(cache.root)) as again:
        kept = [3, 4, 5, 6, 7, 8, 9]
        rows = again.open(space.name).read([key(n) for n in kept], "features")
        assert np.array_equal(rows, made(kept).features)


def test_a_dry_run_beside_a_damaged_shard_changes_nothing(cache: Cache, space: FeatureSpace) -> None:
    damaged, _ = add(space, [1, 2]), add(space, [3, 4])
    spoil(shard_file(space, damaged))
    collect(cache, Retention(), dry_run=True)
    assert space.index.shards(space.name)[damaged.name].state == "good"


def test_options_of_a_dataset_need_a_dataset(data: Path) -> None:
    done = icebox(data, "cache", "gc", "--image-root", data)
    assert done.code == 2
    assert "--archive and --image-root go with --dataset only" in done.err


def test_a_shard_of_which_the_index_lost_the_rows_is_not_dead(cache: Cache, space: FeatureSpace) -> None:
    """The shards are the truth: what the index merely says is not enough to remove one."""
    large = add(space, list(range(gc.SMALL_ROWS)))
    with closing(sqlite3.connect(cache.index.path)) as db:
        db.execute("DELETE FROM rows")
        db.commit()
    done = collect(cache, Retention())
    assert (done.rows_removed, done.shards_removed) == (0, 0)
    assert names(space) == {large.name}
    check_rows(space, list(range(gc.SMALL_ROWS)))


def test_nor_is_one_whose_rows_the_index_gives_to_others(cache: Cache, space: FeatureSpace) -> None:
    add(space, list(range(gc.SMALL_ROWS)))
    with closing(sqlite3.connect(cache.index.path)) as db:
        db.execute("UPDATE rows SET key = zeroblob(32)")
        db.commit()
    assert collect(cache, Retention({key(1)})).rows_removed == 0
    check_rows(space, list(range(gc.SMALL_ROWS)))


def test_on_a_full_disk_what_is_dead_goes_first(cache: Cache, space: FeatureSpace) -> None:
    dead, mixed = add(space, list(range(100))), [add(space, [n, n + 1000]) for n in range(100, 140)]
    with watched(Watcher(1, disk_full, for_good=True, among=frozenset({"write"}))), pytest.raises(CacheError):
        collect(cache, Retention({key(n) for n in range(100, 140)}))
    assert dead.name not in names(space), "so there is room now"
    assert names(space) == {info.name for info in mixed}
    collect(cache, Retention({key(n) for n in range(100, 140)}))
    check_rows(space, list(range(100, 140)))


def test_files_that_may_not_be_looked_at_are_remembered(
    cache: Cache, space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, locked, gone = (write_picture(tmp_path / name, 1) for name in ("here.png", "locked.png", "gone.png"))
    stamp = FileStamp(1, 2, 3, 4)
    cache.index.remember_digests({path: (stamp, key(1)) for path in (here, locked, gone)})
    gone.unlink()
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    collect(cache, Retention())
    assert set(cache.index.files()) == {here, locked}
