"""Images named one by one, by the folder or by a manifest, without their classes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import write_picture

from pipeline.core.errors import DatasetError, UsageError
from pipeline.dataset import open_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b/two.png", "a/one.JPG", "zero.png", ".hidden/x.png"):
        write_picture(tmp_path / "some" / name, seed=1)
    (tmp_path / "some" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "some"


def test_a_folder_stands_for_the_images_below_it(folder: Path) -> None:
    found = open_images(["some"])
    assert list(found.names) == ["some/a/one.JPG", "some/b/two.png", "some/zero.png"]
    assert found.ignored == {".txt": 1, ".hidden/": 1}
    assert [found.path(i) for i in range(3)] == [folder / "a/one.JPG", folder / "b/two.png", folder / "zero.png"]
    assert all(found.read(i) for i in range(3))


def test_names_stay_as_they_were_written_in_the_order_they_were(folder: Path) -> None:
    (folder / "odd.name").write_bytes((folder / "zero.png").read_bytes())
    found = open_images(["some/zero.png", str(folder / "a/one.JPG"), "some/odd.name", "./some/zero.png"])
    assert list(found.names) == ["some/zero.png", str(folder / "a/one.JPG"), "some/odd.name", "./some/zero.png"]
    os.chdir("/")  # a relative name means what it meant
    assert all(found.read(i) for i in range(4))


@pytest.mark.parametrize("header", ["path", "path,label", "when,path,split"])
def test_a_manifest_needs_paths_only(folder: Path, header: str) -> None:
    at = header.split(",").index("path")
    lines = [",".join("zero.png" if i == at else "nonsense" for i in range(header.count(",") + 1))]
    (folder / "list.csv").write_text("\n".join([header, *lines]))
    found = open_images(["some/list.csv", "some/a"])
    assert list(found.names) == ["zero.png", "some/a/one.JPG"]
    assert found.path(0) == folder / "zero.png"


def test_what_follows_a_link_is_where_the_system_finds_it(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "c" / "link").symlink_to(folder / "a")
    write_picture(folder / "c" / "zero.png", seed=2)
    found = open_images(["some/c/link/../zero.png", "some/c/link/.."])
    assert found.read(0) == (folder / "zero.png").read_bytes()
    assert found.read(len(found) - 1) == (folder / "zero.png").read_bytes()


def test_a_manifest_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo("list.csv")
    with pytest.raises(DatasetError, match=r"expected a manifest at 'list\.csv', found no regular file"):
        open_images(["list.csv"])


def test_a_parquet_manifest_with_a_root(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"path": ["one.JPG"]}), "list.parquet")
    assert open_images(["list.parquet"], folder / "a").path(0) == folder / "a/one.JPG"
    pq.write_table(pa.table({"path": ["../zero.png"]}), "list.parquet")
    with pytest.raises(DatasetError, match="expected a path inside"):
        open_images(["list.parquet"], folder / "a")


@pytest.mark.parametrize("path", ["", "some/three.png", "nowhere/", "some/zero.png/x", "x" * 300])
def test_what_is_not_there_is_said_before_anything_is_done(folder: Path, path: str) -> None:
    with pytest.raises(DatasetError, match=r"no image, folder or manifest at|cannot look at"):
        open_images(["some/zero.png", path])


def test_a_folder_without_images_is_told(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"some/empty: expected images .* found none \(passed over: nothing\)"):
        open_images(["some/empty"])
    for name in ("1.HEIC", "._2.jpg"):
        (folder / "empty" / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"passed over: \.heic 1 \(HEIC; convert to JPEG or PNG\); hidden 1\)"):
        open_images(["some", "some/empty"])


def test_what_other_programs_leave_is_passed_over(folder: Path) -> None:
    for name in ("@eaDir/1.png", "a/@eaDir/one.JPG/thumb.jpg", "b/$RECYCLE.BIN/2.png", "a/._one.JPG"):
        write_picture(folder / f"{name}.png", seed=1)
    found = open_images(["some/a", "some/b", "some/zero.png"])
    assert list(found.names) == ["some/a/one.JPG", "some/b/two.png", "some/zero.png"]
    assert found.ignored == {"@eaDir/": 1, "$RECYCLE.BIN/": 1, "hidden": 1}


def test_a_manifest_without_paths_or_rows_is_told(folder: Path) -> None:
    (folder / "list.csv").write_text("file\nzero.png\n")
    with pytest.raises(DatasetError, match=r"expected one column 'path' \(of path\), found 0 in 'file'"):
        open_images(["some/list.csv"])
    (folder / "list.csv").write_text("path\n")
    with pytest.raises(DatasetError, match="found no rows below the header"):
        open_images(["some/list.csv"])


def test_a_root_without_a_manifest_is_wrong_use(folder: Path) -> None:
    with pytest.raises(UsageError, match="--image-root goes with a manifest only"):
        open_images(["some"], folder)
