"""Whatever people do, in any order, and wherever it is cut off: the laws of the cache hold. Found out by Hypothesis.

The examples are the same every time; `pytest tests/test_laws.py --hypothesis-profile=explore` looks for new ones. What
it once found stands below as an `@example`.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import SPEC, picture
from faults import Watcher, watched
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from made import key, made
from own_networks import StandIn

import pipeline.extraction.extract
import pipeline.extraction.shard_task
import pipeline.images.loader
from pipeline.cache.gc import Retention, collect
from pipeline.cache.shard import ShardDamagedError, read_info, read_rows, write_shard
from pipeline.cache.verify import verify
from pipeline.cache.workspace import open_workspace
from pipeline.core.errors import CacheError, DecodeError
from pipeline.core.hashing import image_key
from pipeline.core.spec import Augmentation, Views
from pipeline.dataset import of_files
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import Extraction, extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import augment, decoding
from pipeline.images.loader import Loader

EXAMPLES = settings().max_examples  # of conftest.py's profile; fewer where each is a whole life


class SameProcess:
    """Decodes here: starting a process for every step would be most of the time."""

    def __init__(self, size: int, fit: decoding.Fit, max_pixels: int, depth: int) -> None:
        self.options: tuple[Any, ...] = (size, fit, max_pixels, depth)

    def decode(self, data: bytes) -> tuple[np.ndarray, int]:
        return decoding.decode_with_peak(data, *self.options)

    def stop(self) -> None:
        pass


class Death(BaseException):
    """The process is gone: nobody may catch this, and no call of the cache happens after it."""


def die(call: str, path: Path) -> None:
    raise Death


CONTENTS = st.integers(0, 9)  # of which those from 8 on are no images
NAMES = st.sampled_from([f"{letter}.png" for letter in "abcdefgh"])


def content(number: int) -> bytes:
    if number >= 8:
        return f"no image {number}".encode()
    return cv2.imencode(".png", picture(number, 12, 10))[1].tobytes()


@functools.cache
def expected(number: int, view: int) -> np.ndarray:
    """What the network says of an image in one of `Views(3)`."""
    pixels = decoding.decode(content(number))
    if view:
        pixels = augment.warp(pixels, Augmentation(), augment.draws(image_key(content(number)), view))
    return StandIn.features_of(pixels[None])[0]


class Life(RuleBasedStateMachine):
    """A folder of images and the cache of it, with all that can happen to both."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="icebox-laws-"))
        self.images = self.folder / "images"
        self.images.mkdir()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", StandIn)
        self.patch.setattr(pipeline.images.loader, "_Decoder", SameProcess)
        self.choice = FeatureChoice(weights="untrained", precision="float32")

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
            shutil.rmtree(self.folder)

    def present(self) -> list[Path]:
        return sorted(self.images.iterdir())

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("data/cache/*/shards/[!.]*.h5"))

    # What people do

    @rule(name=NAMES, number=CONTENTS)
    def add_or_replace(self, name: str, number: int) -> None:
        (self.images / name).write_bytes(content(number))

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        (self.images / name).unlink(missing_ok=True)

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        if (self.images / old).exists():
            (self.images / old).rename(self.images / new)

    @precondition(lambda self: self.present())
    @rule(retry=st.booleans(), views=st.integers(1, 3))
    def features(self, retry: bool, views: int) -> None:
        lacking = self.lacking(views)
        before = StandIn.computed
        done = self.extract(views, retry_failed=retry)
        assert done.rows == views * (done.images - len(done.quarantined))
        assert done.computed == StandIn.computed - before == lacking, "no more and no less than was missing"
        bad = {path.name for path in self.present() if not path.read_bytes().startswith(b"\x89PNG")}
        assert {Path(each.path).name for each in done.quarantined} == bad
        assert self.lacking(views) == 0

    def extract(self, views: int = 1, **more: Any) -> Extraction:
        with open_workspace(self.folder / "data") as workspace:
            some, options = of_files("some", self.present()), ComputeOptions(shard_rows=3, batch_size=2)
            return extract(some, workspace, self.choice, options, views=Views(views), **more)

    @rule(keep=st.none() | st.sets(CONTENTS))
    def gc(self, keep: set[int] | None) -> None:
        with open_workspace(self.folder / "data") as workspace:
            collect(
                workspace.cache, Retention(None if keep is None else {image_key(content(number)) for number in keep})
            )

    @rule()
    def repair(self) -> None:
        with open_workspace(self.folder / "data") as workspace:
            verify(workspace.cache, sample=1.0, repair=True)
            assert verify(workspace.cache, sample=1.0).problems == []

    # What happens to them

    @precondition(lambda self: self.present())
    @rule(at=st.integers(1, 80), what=st.sampled_from(["features", "gc", "repair"]), views=st.integers(1, 3))
    def killed(self, at: int, what: str, views: int) -> None:
        with watched(Watcher(at, die, for_good=True)), suppress(Death):
            self.extract(views) if what == "features" else getattr(self, what)(*([None] if what == "gc" else []))

    @precondition(lambda self: self.shards())
    @rule(data=st.data())
    def flip_a_byte(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.shards()))
        damaged = bytearray(path.read_bytes())
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(damaged)

    @precondition(lambda self: self.shards())
    @rule(data=st.data())
    def cut_a_shard(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.shards()))
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size))])

    @precondition(lambda self: self.shards())
    @rule(data=st.data())
    def lose_a_shard(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.shards())).unlink()

    @precondition(lambda self: len(self.shards()) > 1)
    @rule(data=st.data())
    def exchange_shards(self, data: st.DataObject) -> None:
        first, second = data.draw(st.permutations(self.shards()))[:2]
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])

    @rule()
    def lose_the_index(self) -> None:
        (self.folder / "data" / "cache" / "cache.db").unlink(missing_ok=True)

    @rule(data=st.binary(min_size=1, max_size=200), at=st.integers(0, 30_000))
    def damage_the_index(self, data: bytes, at: int) -> None:
        path = self.folder / "data" / "cache" / "cache.db"
        if path.exists():
            with path.open("r+b") as file:
                file.seek(min(at, path.stat().st_size))
                file.write(data)

    @precondition(lambda self: any(self.folder.glob("data/cache/*/space.json")))
    @rule()
    def lose_the_description(self) -> None:
        for path in self.folder.glob("data/cache/*/space.json"):
            path.unlink()
        self.features_again()

    def features_again(self) -> None:
        """A description that is gone is written again with the space, and the shards beside it are met again."""
        if self.present():
            self.extract()

    # What always holds

    @invariant()
    def no_wrong_row_is_ever_read(self) -> None:
        with self.readable() as workspace:
            for space in workspace.cache.spaces():
                for number in range(8):
                    image = image_key(content(number))
                    located = space.locate([image] * 3, Views(3).numbers)
                    for at in np.flatnonzero(located.found):
                        try:
                            (row,) = space.reader("features").read(located.take(np.array([at])))
                        except CacheError:
                            continue
                        assert np.array_equal(row, expected(number, Views(3).numbers[at]))

    @contextmanager
    def readable(self) -> Iterator[Any]:
        """Open the workspace; an index that turns out to be damaged on the way is derived again, as `cli.py` does."""
        from pipeline.cache.index_file import set_aside
        from pipeline.core.errors import IndexDamagedError

        try:
            with open_workspace(self.folder / "data") as workspace:
                workspace.cache.index.check()
                yield workspace
        except IndexDamagedError as damage:
            set_aside(damage)
            with open_workspace(self.folder / "data") as workspace:
                yield workspace

    def lacking(self, views: int) -> int:
        """Return how many rows of different images, in so many views, cannot be read."""
        contents = {path.read_bytes() for path in self.present()}
        wanted = [image_key(each) for each in contents if each.startswith(b"\x89PNG")]
        with self.readable() as workspace:
            spaces = workspace.cache.spaces()
            rows = [(space, view) for space in spaces for view in Views(views).numbers]
            stored = sum(int(space.locate(wanted, [view] * len(wanted)).found.sum()) for space, view in rows)
        return views * len(wanted) - stored


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=EXAMPLES // 5, stateful_step_count=25)


# Decoding


def samples() -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (24, 20, 3), np.uint8)
    endings = (".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif")
    return {ending: cv2.imencode(ending, noise)[1].tobytes() for ending in endings}


SAMPLES = samples()
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 64), st.binary(max_size=64)),  # where, how much goes, what comes
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, new in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + gone :]
    return data


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def loader(scratch: Path) -> Iterator[Loader]:
    with Loader(of_files("one", [scratch / "image"]), 32, "squash", 10**6) as loader:
        yield loader


@settings(max_examples=6 * EXAMPLES)
@given(st.sampled_from(sorted(SAMPLES)), EDITS)
@example(".png", [(0.0, 0, b"")])
@example(".jpg", [(0.5, 64, b"")])
@example(".gif", [(0.15, 4, b"\xff\xff\xff\xff")])  # a screen of 65,535 by 65,535
def test_any_bytes_give_pixels_or_a_reason(
    loader: Loader, scratch: Path, kind: str, edits: list[tuple[float, int, bytes]]
) -> None:
    data = edited(SAMPLES[kind], edits)
    (scratch / "image").write_bytes(data)
    loaded = loader(0)
    assert loaded.key == image_key(data)
    if loaded.pixels is None:
        assert loaded.reason
        assert "\n" not in loaded.reason
        return
    assert (loaded.pixels.shape, loaded.pixels.dtype) == ((32, 32, 3), np.uint8)


@settings(max_examples=2 * EXAMPLES)
@given(st.binary(max_size=300))
def test_noise_is_no_image(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decoding.decode(data)


# Shards


@pytest.fixture(scope="module")
def shard(scratch: Path) -> bytes:
    info = write_shard(scratch, made([1, 2, 3], SPEC), SPEC)
    return (scratch / f"{info.name}.h5").read_bytes()


@settings(max_examples=6 * EXAMPLES)
@given(EDITS)
@example([(0.0, 8, b"")])
@example([(0.99, 64, b"")])
def test_a_damaged_shard_is_refused_or_reads_as_it_was(
    shard: bytes, scratch: Path, edits: list[tuple[float, int, bytes]]
) -> None:
    path = scratch / f"{'0' * 64}.h5"
    path.write_bytes(edited(shard, edits))
    rows = made([1, 2, 3], SPEC)
    out = np.zeros_like(rows.features)
    keys = np.stack([np.frombuffer(key(n), np.uint8) for n in (1, 2, 3)])
    try:
        read_info(path, SPEC)
        read_rows(path, "features", np.arange(3), keys, np.zeros(3, np.int64), out, np.arange(3))
    except ShardDamagedError as error:
        assert "\n" not in str(error)
        return
    assert np.array_equal(out, rows.features)
