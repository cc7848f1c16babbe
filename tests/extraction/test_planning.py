"""Which rows are missing: what a plain program with dictionaries says, for whatever there is."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import conftest
import numpy as np
import pytest

import pipeline.cache.index
import pipeline.cache.keys
import pipeline.extraction.planning
from pipeline.cache.digests import Identities
from pipeline.cache.index import Quarantine
from pipeline.cache.keys import Keys
from pipeline.cache.shard import ShardInfo
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.core.errors import IndexDamagedError
from pipeline.core.spec import FeatureRequest, Views
from pipeline.dataset.base import of_files
from pipeline.extraction.planning import Planning
from pipeline.images import decoding

DECODER, LIMIT = decoding.decoder_version(), 1_000
SPEC = replace(conftest.SPEC, weights="sha256:" + "0" * 64)
OTHER = replace(SPEC, layer="mixed8")
REQUEST = FeatureRequest(
    SPEC.backbone, None, SPEC.fit, SPEC.decode, SPEC.resize, SPEC.input_size, SPEC.scaling, SPEC.engine
)
ODD = [bytes(32), b"\xff" * 32, bytes(31) + b"\1", b"\1" + bytes(31), b"\xff" * 31 + b"\xfe"]


@pytest.fixture
def space(cache: Cache) -> FeatureSpace:
    return cache.create(SPEC, {"weights": "a test's"})


def pool_of_keys(draw: random.Random, count: int) -> list[bytes]:
    """Keys, many of which begin alike, as somebody may make them."""
    begins = [draw.randbytes(8) for _ in range(3)]
    made = [draw.randbytes(32) for _ in range(count)]
    alike = [draw.choice(begins) + draw.randbytes(24) for _ in range(count)]
    nearly = [alike[0][:31] + bytes([last]) for last in range(4)]
    return draw.sample([*made, *alike, *nearly, *ODD], count)


@dataclass
class Made:
    """What is in an index, and in a dictionary beside it."""

    keys: list[bytes | None]
    unread: dict[int, str]
    unseen: set[int]
    rows: set[tuple[bytes, int]]  # that are in good shards of the space
    refused: dict[bytes, str]

    @property
    def identities(self) -> Identities:
        return Identities(Keys.of(self.keys), self.unread, self.unseen)


def made(draw: random.Random, space: FeatureSpace, views: Views) -> Made:
    index, pool = space.index, pool_of_keys(draw, 30)
    keys: list[bytes | None] = [draw.choice(pool[5:]) for _ in range(draw.randrange(60))]
    unread, unseen = {}, set()
    for i in range(len(keys)):
        if draw.random() < 0.2:
            keys[i] = None
            if draw.random() < 0.5:
                unread[i] = f"cannot be read: {i}"
            else:
                unseen.add(i)
    wanted = [(key, view) for key in pool for view in views.numbers]
    rows, share = set[tuple[bytes, int]](), draw.choice([0, 0.5, 0.9, 1])
    for number in range(6):  # the last is damaged, the one before of another space; some rows are in several
        some = draw.sample(wanted, round(len(wanted) * share * draw.random()))
        raw = np.frombuffer(b"".join(key for key, _ in some), np.uint8).reshape(-1, 32)
        numbers = np.array([view for _, view in some], np.int64)
        where = OTHER.directory if number == 4 else space.name
        index.add_shard(where, ShardInfo(f"{number}", 1, raw, numbers, (2, 2, 8)))
        if number < 4:
            rows |= set(some)
    index.mark_shard(space.name, "5", 1, "bad", "is damaged")
    refused = {key: f"refused {key.hex()}" for key in draw.sample(pool, draw.choice([0, 10]))}
    index.remember_quarantined(refused, DECODER, LIMIT)
    index.remember_quarantined(dict.fromkeys(pool, "another limit"), DECODER, LIMIT + 1)
    return Made(keys, unread, unseen, rows, refused)


def plainly(there: Made, views: Views, *, empty: bool) -> tuple[list[tuple[int, int]], int, int, dict[int, str]]:
    """Todo, rows reused, rows of duplicates, and why which image is quarantined."""
    todo, reused, duplicates, quarantined = [], 0, 0, dict(there.unread)
    first: dict[bytes, int] = {}
    for i, key in enumerate(there.keys):
        lacking = sorted(view for view in views.numbers if empty or key is None or (key, view) not in there.rows)
        if i in there.unseen:
            todo += [(i, view) for view in lacking]
        elif key is not None and lacking and key in there.refused:
            quarantined[i] = there.refused[key]
        elif key is not None and first.setdefault(key, i) != i:
            duplicates += views.count
        elif key is not None:
            todo += [(i, view) for view in lacking]
            reused += views.count - len(lacking)
    return todo, reused, duplicates, quarantined


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_is_what_a_plain_program_says(space: FeatureSpace, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(pipeline.cache.index, "_LOOK_UP", draw.choice([1, 7, 4096]))
    monkeypatch.setattr(pipeline.cache.index, "_SCAN", draw.choice([2, 9]))
    monkeypatch.setattr(pipeline.cache.index, "_SCAN_BELOW", draw.choice([0, 3, 1_000]))
    monkeypatch.setattr(pipeline.cache.keys, "_BLOCK", 3)
    monkeypatch.setattr(pipeline.extraction.planning, "_BLOCK", 3)
    views = Views(draw.choice([1, 3]))
    there = made(draw, space, views)
    planning = Planning(of_files("made", []), there.identities, space.index, LIMIT, views)
    for where in (space, None):
        plan = planning.plan(where)
        todo, reused, duplicates, quarantined = plainly(there, views, empty=where is None)
        assert list(zip(plan.todo.images.tolist(), plan.todo.views.tolist(), strict=True)) == todo
        assert (plan.reused, plan.duplicates, plan.missing) == (reused, duplicates, len(todo))
        assert {i: reason for i, (reason, _) in plan.quarantined.items()} == quarantined
        assert all((since is None) == (i in there.unread) for i, (_, since) in plan.quarantined.items())
        assert plan.todo.images.dtype == plan.todo.views.dtype == np.int64
        for i in plan.todo.distinct.tolist():
            assert plan.todo.views_of(i) == [view for image, view in todo if image == i]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_located_wherever_they_are(space: FeatureSpace, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(pipeline.cache.index, "_LOOK_UP", draw.choice([1, 7]))
    monkeypatch.setattr(pipeline.cache.index, "_SCAN", draw.choice([2, 9]))
    monkeypatch.setattr(pipeline.cache.index, "_SCAN_BELOW", draw.choice([0, 1_000]))
    views = Views(3)
    there = made(draw, space, views)
    wanted = [(key, draw.choice([*views.numbers, 7])) for key in there.keys if key is not None] * 2
    located = space.locate([key for key, _ in wanted], [view for _, view in wanted])
    assert located.found.tolist() == [each in there.rows for each in wanted]
    rows = {record.id: space.index.rows(record.id) for record in space.index.shards(space.name).values()}
    for (key, view), shard, at in zip(wanted, located.shards.tolist(), located.positions.tolist(), strict=True):
        if shard >= 0:
            assert (rows[shard][0][at].tobytes(), rows[shard][1][at]) == (key, view)


def test_the_space_with_most_rows_is_chosen_and_a_lone_one_for_a_single_row(cache: Cache, space: FeatureSpace) -> None:
    pool = [bytes([n]) * 32 for n in range(1, 9)]

    def rows(name: str, keys: list[bytes]) -> ShardInfo:
        raw = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
        return ShardInfo(name, 1, raw, np.zeros(len(keys), np.int64), (2, 2, 8))

    wanted = Keys.of([*pool, None, pool[0]])
    assert cache.choose(REQUEST, wanted) is None
    cache.index.add_shard(space.name, rows("0" * 64, pool[6:]))
    (space.path / "shards" / ("0" * 64 + ".h5")).write_bytes(b"x")
    assert chosen(cache, wanted) == SPEC.directory
    assert cache.choose(REQUEST, Keys.of(pool[:6])) is None
    other = cache.create(OTHER, {"weights": "a test's"})
    cache.index.add_shard(other.name, rows("1" * 64, pool[:3]))
    (other.path / "shards" / ("1" * 64 + ".h5")).write_bytes(b"x")
    assert chosen(cache, wanted) == OTHER.directory
    assert chosen(cache, Keys.of(pool[3:])) == SPEC.directory


def chosen(cache: Cache, keys: Keys) -> str | None:
    space = cache.choose(REQUEST, keys)
    return space.name if space else None


# The keys themselves


def test_keys_are_a_list_that_can_be_set() -> None:
    keys = Keys.unknown(3)
    assert keys == [None, None, None]
    keys[1] = b"x" * 32
    keys[2] = bytes(32)
    assert keys == [None, b"x" * 32, bytes(32)] == list(keys)
    assert (len(keys), keys[1], keys[-1], keys[0]) == (3, b"x" * 32, bytes(32), None)
    keys[2] = None
    assert keys[1:] == Keys.of([b"x" * 32, None]) != Keys.of([b"x" * 32, bytes(32)])
    with pytest.raises(ValueError):
        keys[0] = b"short"
    with pytest.raises(IndexError):
        keys[3]


@pytest.mark.parametrize("seed", range(10))
def test_keys_are_grouped_by_all_of_their_bytes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.cache.keys, "_BLOCK", 4)
    draw = random.Random(seed)
    pool = pool_of_keys(draw, 20)
    keys = [draw.choice([*pool, None]) for _ in range(100)]
    grouped = Keys.of(keys).grouped(but=[3, 50])
    left = [(key, i) for i, key in enumerate(keys) if key is not None and i not in (3, 50)]
    assert grouped.images.tolist() == [i for _, i in sorted(left)]
    members = grouped.members(np.arange(len(grouped.first)))
    assert members == [[i for other, i in left if other == key] for key in sorted({key for key, _ in left})]
    assert grouped.first.tolist() == [some[0] for some in members]


def test_what_is_refused_says_since_when(space: FeatureSpace) -> None:
    space.index.remember_quarantined({ODD[0]: "text"}, DECODER, LIMIT)
    known: Quarantine = space.index.refused(DECODER, LIMIT)[ODD[0]]
    plan = Planning(of_files("made", []), Identities(Keys.of([ODD[0]]), {}), space.index, LIMIT).plan(space)
    assert plan.quarantined == {0: ("text", known.since)}
    assert known.since is not None
    assert space.index.refused(DECODER, LIMIT + 1) == {}
    space.index.remember_quarantined({b"short": "text"}, DECODER, LIMIT)
    with pytest.raises(IndexDamagedError, match="keys of another length"):
        space.index.refused(DECODER, LIMIT)
