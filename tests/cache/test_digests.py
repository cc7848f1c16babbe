"""Who an image is: the hash of its bytes, remembered only as long as nobody can have touched the file."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import finished
from identified import files, keys_of

import pipeline.cache.digests
from pipeline.cache.digests import Identities, file_stamp, identify, remembered_digest
from pipeline.cache.index import Index
from pipeline.cache.keys import Keys
from pipeline.core.errors import CacheError
from pipeline.core.hashing import image_key
from pipeline.dataset import Dataset
from pipeline.dataset.base import ArraySource

NAMES = ["a.png", "b.png", "c.png"]
GRAIN_S = 2.0
Fault = Callable[[Path], None]
# Each test that needs files older than the grain has a folder of its own among these, so that one wait serves all.
FOLDERS = (
    "unchanged",
    "touched",
    "rewritten",
    "same look",
    "replaced",
    "vanished",
    "one file",
    "new index",
    "grown",
    "future",
)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def arrays(pixels: np.ndarray) -> Dataset:
    names = [str(i) for i in range(len(pixels))]
    return Dataset("made", ("a",), names, np.zeros(len(pixels), np.int32), None, None, ArraySource(pixels))


def content(name: str) -> bytes:
    return f"content of {name}".encode() * 10


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "index.db")
    yield index
    index.close()


@pytest.fixture(scope="module")
def settled_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settled")
    for folder in FOLDERS:
        (root / folder).mkdir()
        for name in NAMES:
            (root / folder / name).write_bytes(content(name))
    later = time.time() + 3600
    os.utime(root / "future" / "a.png", (later, later))
    time.sleep(GRAIN_S + 0.2)
    return root


@pytest.fixture
def settled(settled_folders: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of three files, older than the clock's grain, that the test is parametrised with."""
    return settled_folders / request.param


def folder(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("settled", [name], indirect=True)


@dataclass(frozen=True)
class Identified:
    keys: list[bytes | None]
    unread: dict[int, str]
    opened: list[str]  # the names of the image files that were opened, sorted


def identified(root: Path, index: Index, names: list[str] = NAMES) -> Identified:
    """Identify the files in another process that counts which of them Python opens."""
    done = finished([str(root), str(index.path), json.dumps(names)], program="identified")
    assert done.code == 0, done.err
    keys, unread, opened = json.loads(done.out)
    return Identified([key and bytes.fromhex(key) for key in keys], {int(i): why for i, why in unread.items()}, opened)


# What the key of an image is


def test_the_key_of_encoded_bytes_is_their_sha256() -> None:
    assert image_key(b"some bytes") == sha256(b"some bytes")


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (1, 1)])
def test_the_key_of_pixels_is_the_sha256_of_the_raw_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert image_key(pixels) == sha256(pixels.tobytes())


def test_the_key_of_pixels_does_not_depend_on_how_they_lie_in_memory() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    wide = np.zeros((6, 16, 3), np.uint8)
    wide[:, ::2] = pixels
    for same in (np.asfortranarray(pixels), wide[:, ::2], pixels[::-1].copy()[::-1]):
        assert not same.flags.c_contiguous
        assert image_key(same) == sha256(pixels.tobytes())


def test_one_pixel_makes_another_image() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    other = pixels.copy()
    other[7, 7] = 1
    assert image_key(pixels) != image_key(other)


# Whole datasets


def test_files_get_the_keys_of_their_bytes(tmp_path: Path, index: Index) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(content(name))
    found = keys_of(files(tmp_path, [*NAMES, "a.png"]), index)
    assert found.keys == [sha256(content(name)) for name in [*NAMES, "a.png"]]
    assert found.unread == {}


def test_a_renamed_file_keeps_its_key(tmp_path: Path, index: Index) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    before = keys_of(files(tmp_path, ["a.png"]), index).keys
    (tmp_path / "a.png").rename(tmp_path / "z.png")
    assert keys_of(files(tmp_path, ["z.png"]), index).keys == before


def test_an_empty_file_is_an_image_like_any_other(tmp_path: Path, index: Index) -> None:
    (tmp_path / "a.png").touch()
    assert keys_of(files(tmp_path, ["a.png"]), index).keys == [sha256(b"")]


def test_arrays_get_the_keys_of_their_pixels_and_nothing_is_remembered(index: Index) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    found = keys_of(arrays(pixels), index)
    assert found.keys == [sha256(each.tobytes()) for each in pixels]
    assert index.files_with_digest(sha256(pixels[0].tobytes())) == []


def test_progress_adds_up_over_many_images(index: Index) -> None:
    pixels = np.arange(5_000, dtype=np.uint16).view(np.uint8).reshape(5_000, 1, 2)
    advanced: list[int] = []
    found = identify(arrays(pixels), index, advanced.append)
    assert sum(advanced) == 5_000
    assert len(advanced) > 1
    assert found.keys == [sha256(each.tobytes()) for each in pixels]


def test_many_files_are_identified_in_their_order(tmp_path: Path, index: Index) -> None:
    names = [f"{i:04}.png" for i in range(4_200)]  # more than are looked up at a time
    for name in names[::700]:
        (tmp_path / name).write_bytes(name.encode())
    found = keys_of(files(tmp_path, names), index)
    assert [i for i, key in enumerate(found.keys) if key is not None] == list(range(0, 4_200, 700))
    assert found.keys[700] == sha256(b"0700.png")
    assert found.keys[4_200 - 700] == sha256(b"3500.png")
    assert len(found.unread) == 4_200 - 6


def test_files_are_read_together(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    met, read_one = threading.Barrier(len(NAMES), timeout=300), pipeline.cache.digests._identify_file

    def slow(path: Path, known: Any) -> Any:
        met.wait()  # raises unless all are being read at once
        return read_one(path, known)

    for name in NAMES:
        (tmp_path / name).write_bytes(content(name))
    monkeypatch.setattr(pipeline.cache.digests, "_identify_file", slow)
    assert keys_of(files(tmp_path, NAMES), index).keys == [sha256(content(name)) for name in NAMES]


def test_an_empty_dataset_has_no_keys(tmp_path: Path, index: Index) -> None:
    assert keys_of(files(tmp_path, []), index) == Identities(Keys.of([]), {})


@pytest.mark.parametrize("name", [b"\xff\xfe.png", "日本.png".encode(), b"a\\xff.png", b"new\nline.png"])
def test_a_file_name_may_be_any_bytes(tmp_path: Path, index: Index, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"x")
    for _ in range(2):
        assert keys_of(files(tmp_path, [path.name]), index).keys == [sha256(b"x")]


# What is remembered, and for how long


@folder("unchanged")
def test_an_unchanged_file_is_not_read_again(settled: Path, index: Index) -> None:
    first, second = identified(settled, index), identified(settled, index)
    assert first.opened == NAMES
    assert second.opened == []
    assert first.keys == second.keys == [sha256(content(name)) for name in NAMES]


@folder("new index")
def test_a_new_index_reads_them_again(settled: Path, index: Index, tmp_path: Path) -> None:
    assert identified(settled, index).opened == NAMES
    other = Index(tmp_path / "other.db")
    assert identified(settled, other).opened == NAMES
    other.close()


@folder("grown")
def test_only_the_new_files_of_a_grown_folder_are_read(settled: Path, index: Index) -> None:
    identified(settled, index, NAMES[:2])
    assert identified(settled, index).opened == NAMES[2:]


@folder("touched")
def test_a_touched_file_is_read_again(settled: Path, index: Index) -> None:
    before = identified(settled, index)
    (settled / "b.png").touch()
    after = identified(settled, index)
    assert after.opened == ["b.png"]
    assert after.keys == before.keys


@folder("rewritten")
def test_a_changed_file_gets_its_new_key(settled: Path, index: Index) -> None:
    identified(settled, index)
    (settled / "b.png").write_bytes(b"new")
    after = identified(settled, index)
    assert after.opened == ["b.png"]
    assert after.keys[1] == sha256(b"new")


@folder("same look")
def test_a_change_that_keeps_size_and_mtime_is_noticed(settled: Path, index: Index) -> None:
    identified(settled, index)
    path = settled / "b.png"
    before = path.stat()
    new = content("b.png")[::-1]
    with path.open("r+b") as file:
        file.write(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    found = identified(settled, index)
    assert found.opened == ["b.png"]
    assert found.keys[1] == sha256(new)


@folder("replaced")
def test_another_file_moved_into_its_place_is_noticed(settled: Path, index: Index) -> None:
    identified(settled, index)
    (settled / "c.png").replace(settled / "b.png")
    found = identified(settled, index)
    assert found.keys[:2] == [sha256(content("a.png")), sha256(content("c.png"))]
    assert list(found.unread) == [2]
    assert found.opened == ["b.png"]


def test_a_fresh_file_is_not_remembered(tmp_path: Path, index: Index) -> None:
    path, dataset = tmp_path / "a.png", files(tmp_path, ["a.png"])
    path.write_bytes(b"x")
    before = path.stat()
    assert keys_of(dataset, index).keys == [sha256(b"x")]
    assert index.file_digests([path]) == [None]
    path.write_bytes(b"y")  # within the grain a file may change and look the same
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert keys_of(dataset, index).keys == [sha256(b"y")]


@folder("future")
def test_a_file_dated_in_the_future_is_remembered(settled: Path, index: Index) -> None:
    """Whoever changes it gives it a ctime of that moment, so that its mtime, an hour ahead, says nothing."""
    assert identified(settled, index).opened == NAMES
    assert identified(settled, index).opened == []
    path = settled / "a.png"
    stamp = path.stat()
    path.write_bytes(content("A.png"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    found = identified(settled, index)
    assert (found.keys[0], found.opened) == (sha256(content("A.png")), ["a.png"])


def test_a_fresh_file_dated_in_the_future_is_not_remembered(tmp_path: Path, index: Index) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    later = time.time() + 3600
    os.utime(path, (later, later))
    assert keys_of(files(tmp_path, ["a.png"]), index).keys == [sha256(b"x")]
    assert index.file_digests([path]) == [None]


@dataclass
class SlowClock:
    """A clock an hour behind that of the file system; what happens while one waits is `meanwhile`."""

    meanwhile: Callable[[], object] = lambda: None
    waited: float = 0.0

    def time_ns(self) -> int:
        return time.time_ns() - 3600 * 10**9

    def sleep(self, seconds: float) -> None:
        self.waited += seconds
        self.meanwhile()


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> SlowClock:
    clock = SlowClock()
    monkeypatch.setattr(pipeline.cache.digests, "time", clock)
    return clock


def test_files_of_a_clock_ahead_are_remembered_once_they_have_lain_still(
    tmp_path: Path, index: Index, slow_clock: SlowClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(content(name))
    expected = [sha256(content(name)) for name in NAMES]
    assert keys_of(files(tmp_path, NAMES), index).keys == expected
    assert slow_clock.waited == GRAIN_S, "once for all"
    monkeypatch.setattr(hashlib, "file_digest", None)  # nothing is hashed any more
    assert keys_of(files(tmp_path, NAMES), index).keys == expected
    assert slow_clock.waited == GRAIN_S


def test_what_does_not_lie_still_is_not_remembered(tmp_path: Path, index: Index, slow_clock: SlowClock) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(content(name))

    def meanwhile() -> None:
        (tmp_path / "a.png").write_bytes(b"new")
        (tmp_path / "b.png").unlink()

    slow_clock.meanwhile = meanwhile
    found = keys_of(files(tmp_path, NAMES), index)
    assert found.keys == [sha256(b"new"), None, sha256(content("c.png"))]
    assert found.unread == {1: "cannot be read: No such file or directory"}
    assert [each is None for each in index.file_digests([tmp_path / name for name in NAMES])] == [True, True, False]


def test_one_file_of_a_clock_ahead_is_remembered(tmp_path: Path, index: Index, slow_clock: SlowClock) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"x")
    for _ in range(2):
        assert remembered_digest(path, index) == sha256(b"x")
    assert slow_clock.waited == GRAIN_S
    assert index.file_digests([path]) == [(file_stamp(path), sha256(b"x"))]


# What cannot be read


def missing(path: Path) -> None:
    pass


def a_directory(path: Path) -> None:
    path.mkdir()


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def looping_link(path: Path) -> None:
    path.symlink_to(path.name)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("fault", [missing, a_directory, broken_link, looping_link, a_pipe, a_device])
def test_what_cannot_be_read_is_listed_with_its_reason_and_never_remembered(
    tmp_path: Path, index: Index, fault
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    fault(tmp_path / "b.png")
    found = identified(tmp_path, index, ["a.png", "b.png"])  # its time limit ends a read that never ends
    assert found.keys == [sha256(b"x"), None]
    assert list(found.unread) == [1]
    assert found.unread[1].startswith("cannot be read: ")
    assert index.file_digests([tmp_path / "b.png"]) == [None]


def test_a_name_too_long_is_listed(tmp_path: Path, index: Index) -> None:
    found = keys_of(files(tmp_path, ["x" * 300]), index)
    assert "name too long" in found.unread[0]


def test_what_becomes_readable_is_read(tmp_path: Path, index: Index) -> None:
    dataset = files(tmp_path, ["a.png"])
    assert list(keys_of(dataset, index).unread) == [0]
    (tmp_path / "a.png").write_bytes(b"x")
    assert keys_of(dataset, index) == Identities(Keys.of([sha256(b"x")]), {})


@folder("vanished")
def test_a_remembered_file_that_vanished_is_listed(settled: Path, index: Index) -> None:
    identified(settled, index)
    (settled / "b.png").unlink()
    found = keys_of(files(settled, NAMES), index)
    assert found.keys == [sha256(content("a.png")), None, sha256(content("c.png"))]
    assert found.unread == {1: "cannot be read: No such file or directory"}


# One file, such as weights


@folder("one file")
def test_one_file_is_remembered_by_its_stamp(settled: Path, index: Index) -> None:
    path = settled / "a.png"
    assert remembered_digest(path, index) == sha256(content("a.png"))
    assert index.file_digests([path]) == [(file_stamp(path), sha256(content("a.png")))]
    index.remember_digests({path: (file_stamp(path), b"\x07" * 32)})
    assert remembered_digest(path, index) == b"\x07" * 32  # trusted, so not hashed again
    path.touch()
    assert remembered_digest(path, index) == sha256(content("a.png"))


def test_a_fresh_file_can_be_found_by_its_digest_but_is_hashed_again(tmp_path: Path, index: Index) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"x")
    assert remembered_digest(path, index) == sha256(b"x")
    assert index.files_with_digest(sha256(b"x")) == [path]
    stamp = path.stat()
    path.write_bytes(b"y")  # within the grain a file may change and look the same
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert remembered_digest(path, index) == sha256(b"y")
    known = index.file_digests([path])[0]
    assert known is not None
    assert known[0] != file_stamp(path)


def test_a_relative_path_and_its_absolute_one_are_the_same_file(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.h5").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    remembered_digest(Path("a.h5"), index)
    assert index.files_with_digest(sha256(b"x")) == [tmp_path / "a.h5"]


def test_one_file_that_cannot_be_read_is_an_error(tmp_path: Path, index: Index) -> None:
    with pytest.raises(CacheError, match=r"gone.h5 cannot be read: No such file"):
        remembered_digest(tmp_path / "gone.h5", index)
