"""Which images a run has seen is kept by content, told apart from files that were changed, and read without pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made import key

from pipeline.core.errors import RunError
from pipeline.runs.checksums import write_checksums
from pipeline.runs.run_images import FILE, SEEN, RunImages

KEYS = {"train": [key(1), key(2), key(2)], "val": [key(3)], "test": [key(4), key(1)]}


def kept(folder: Path, images: RunImages) -> RunImages | None:
    images.write(folder)
    write_checksums(folder, ())
    return RunImages.read(folder)


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    found = kept(tmp_path, RunImages.of(KEYS))
    assert found is not None and found.complete
    every = [key(n) for n in range(1, 6)]
    assert found.contains(every, *SEEN).tolist() == [True, True, True, False, False]
    assert found.contains(every, "test").tolist() == [True, False, False, True, False]
    assert len(found.digests) == 5, "copies stand there once a split"


def test_the_format_is_plain_arrays(tmp_path: Path) -> None:
    RunImages.of(KEYS).write(tmp_path)
    with np.load(tmp_path / FILE, allow_pickle=False) as stored:
        assert {name: (stored[name].dtype.str, stored[name].shape) for name in ("key", "split")} == {
            "key": ("|u1", (5, 32)),
            "split": ("|u1", (5,)),
        }
        at = stored["split"] == stored["splits"].tolist().index("val")
        assert stored["key"][at].tobytes() == key(3)


def test_what_the_initial_model_has_seen_counts(tmp_path: Path) -> None:
    first = RunImages.of({"train": [key(7)], "val": [key(8)], "test": [key(9)]})
    second = RunImages.of(KEYS, RunImages.of({"train": [key(6)]}, first))
    assert second.contains([key(n) for n in (6, 7, 8, 9)], *SEEN).tolist() == [True, True, True, False]
    unknown = kept(tmp_path, RunImages.of(KEYS, RunImages.unknown()))
    assert unknown is not None and not unknown.complete


def test_keys_that_begin_alike_are_told_apart() -> None:
    alike = [bytes(8) + key(n)[8:] for n in range(4)]
    images = RunImages.of({"train": alike[:3]})
    assert images.contains([*alike, key(0)], *SEEN).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nothing", b"\x80\x04N."], ids=["empty", "no zip", "a pickle"])
def test_a_file_that_was_changed_is_refused(tmp_path: Path, content: bytes) -> None:
    kept(tmp_path, RunImages.of(KEYS))
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunError, match=r"^\S*images\.npz is not the file that was published"):
        RunImages.read(tmp_path)
    write_checksums(tmp_path, ())
    with pytest.raises(RunError, match=r"images\.npz cannot be read"):
        RunImages.read(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(RunError, match=r"images\.npz cannot be read"):
        RunImages.read(tmp_path)


def test_arrays_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    names = np.array(["train", "val", "test", "initial"])
    np.savez(tmp_path / FILE, key=np.zeros((2, 31), np.uint8), split=np.zeros(2, np.uint8), splits=names, complete=True)
    write_checksums(tmp_path, ())
    with pytest.raises(RunError, match="not the keys of images and their splits"):
        RunImages.read(tmp_path)


def test_a_file_that_would_unpack_to_more_is_refused(tmp_path: Path) -> None:
    names = np.array(["train", "val", "test", "initial"])
    keys, splits = np.zeros((10_000, 32), np.uint8), np.zeros(10_000, np.uint8)
    np.savez_compressed(tmp_path / FILE, key=keys, split=splits, splits=names, complete=True)
    write_checksums(tmp_path, ())
    with pytest.raises(RunError, match=r"it would unpack to 33\d,\d+ bytes"):
        RunImages.read(tmp_path)


def test_a_run_of_before_has_none(tmp_path: Path) -> None:
    assert RunImages.read(tmp_path) is None
    write_checksums(tmp_path, ())
    assert RunImages.read(tmp_path) is None


def test_a_folder_that_has_grown_shares_most_of_its_images_and_another_does_not() -> None:
    small, grown = (RunImages.of({"train": [key(n) for n in range(count)]}) for count in (10, 40))
    other = RunImages.of({"train": [key(n) for n in range(5, 15)]})
    assert small.shares_most(grown) and grown.shares_most(small)
    assert not small.shares_most(other), "half is not most"
    assert not small.shares_most(RunImages.unknown())
