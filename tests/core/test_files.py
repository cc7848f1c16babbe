"""A file has its final name only when it is whole and on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from made import SPEC, made

from pipeline.cache.shard import write_shard
from pipeline.core import files


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is flushed and what is renamed, in order: the step, the name, and the bytes of the file at that moment."""
    found: list[tuple[str, str, int]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def noted_fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        found.append(("fsync", path.name, path.stat().st_size if path.is_file() else 0))
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        found.append(("rename", target.name, path.stat().st_size))
        return replace(path, target)

    def noted_rename(path: Path, target: Path) -> Path:
        found.append(("rename", target.name, path.stat().st_size))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return found


def write_new_file(folder: Path) -> Path:
    with files.new_file(folder / "file") as file:
        file.write(b"some bytes")
    return folder / "file"


def write_whole_file(folder: Path) -> Path:
    files.write_whole(folder / "file", b"some bytes")
    return folder / "file"


def write_one_shard(folder: Path) -> Path:
    return folder / f"{write_shard(folder, made([1, 2]), SPEC).name}.h5"


@pytest.mark.parametrize("write", [write_new_file, write_whole_file, write_one_shard])
def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    write: Callable[[Path], Path], tmp_path: Path, steps: list[tuple[str, str, int]]
) -> None:
    path = write(tmp_path)
    size = path.stat().st_size
    (first, partial, flushed), *others = steps
    assert (first, flushed) == ("fsync", size), "all of it is on the disk"
    assert files.is_partial(partial)
    assert others == [("rename", path.name, size), ("fsync", tmp_path.name, 0)]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_file_that_moves_has_its_new_name_on_the_disk(tmp_path: Path, steps: list[tuple[str, str, int]]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "aside").mkdir()
    files.move(tmp_path / "file", tmp_path / "aside" / "file")
    assert steps == [("rename", "file", 0), ("fsync", "aside", 0)], "in this order"
