"""`doctor DATASET`: what is told of a dataset before anything is computed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from cached import fill, listed, write_images
from conftest import icebox, picture, write_picture
from own_networks import tiny, tiny_options
from PIL import Image

from pipeline.cache.workspace import Workspace

UNTRAINED = ("--weights", "untrained", "--precision", "float32")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in three splits, with one of everything that is to be told."""
    root = tmp_path_factory.mktemp("odd") / "odd"
    for number, (side, count) in enumerate((("train", 30), ("val", 4), ("test", 4))):
        for i in range(count):
            write_picture(root / side / ("cats" if i % 10 else "dogs") / f"{i}.png", seed=100 * number + i)
    shutil.copy(root / "train/cats/1.png", root / "test/cats/copy.png")  # across splits
    shutil.copy(root / "train/cats/2.png", root / "train/dogs/cat?.png")  # under two labels
    near = cv2.convertScaleAbs(picture(3, 80, 100), alpha=0.9, beta=12)
    cv2.imwrite(str(root / "test/cats/near.jpg"), near, [cv2.IMWRITE_JPEG_QUALITY, 80])
    (root / "train/cats/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "train/cats/notes.txt").write_text("no image")
    cv2.imwrite(str(root / "train/cats/deep.png"), np.full((90, 90), 40_000, np.uint16))
    cv2.imwrite(str(root / "train/cats/clear.png"), picture(50, channels=4))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(51, 120, 300)).save(root / "train/cats/turned.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def told(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = icebox(tmp_path_factory.mktemp("told") / "data", "doctor", odd, *UNTRAINED, "--json")
    assert done.code == 0, done.err
    return done.json


def test_counts_formats_and_sizes(told: dict[str, Any]) -> None:
    assert told["images"] == 45
    assert told["classes"]["dogs"] == {"train": 4, "val": 1, "test": 1}
    assert told["formats"] == {"PNG": 42, "JPEG": 2}
    assert told["sizes"]["median"] == [50, 40]
    assert told["sizes"]["largest"] == [300, 120]
    assert (told["turned_by_exif"], told["deeper_than_8_bits"], told["with_alpha"]) == (1, 1, 1)
    assert told["ignored"] == {".txt": 1}
    assert (told["folders_without_images"], told["classes_alike"]) == ([], [])


def test_copies_and_what_is_wrong(told: dict[str, Any]) -> None:
    assert told["copies"] == {"images": 4, "groups": 2, "crossing": 1}
    assert [each["path"] for each in told["copies_listed"][0]] == ["test/cats/copy.png", "train/cats/1.png"]
    assert [each["label"] for each in told["conflicting"][0]] == ["cats", "dogs"]
    assert [[each["path"] for each in group] for group in told["near_copies_listed"]] == [
        ["test/cats/near.jpg", "train/cats/3.png"]
    ]
    assert told["near_copies"]["crossing"] == 1
    (bad,) = told["quarantined_images"]
    assert bad["path"] == "train/cats/broken.png"


def test_what_it_will_take_is_measured(told: dict[str, Any]) -> None:
    assert told["rows"] == {"cached": 0, "duplicates": 2, "missing": 42}
    estimate = told["estimate"]
    assert estimate["weights"] == "untrained"
    assert estimate["seconds"] == pytest.approx(42 / estimate["images_per_second"])
    assert 20_000 < estimate["bytes_per_row"] < 8 * 8 * 2048 * 2
    assert estimate["memory"] > 10**8


def test_the_advice_is_about_all_of_it(told: dict[str, Any]) -> None:
    words = "\n".join(told["advice"])
    for part in (
        "1 image (2.2%) cannot be read",
        "--max-bad 0.03",
        "under several labels",
        "1 group of exact copies lies on",
        "1 group of nearly equal images lies on several sides",
        "fewer than 20 images to train on: 1 (dogs)",
        "smaller than 75 pixels",
        "16 bits",
        "transparency",
    ):
        assert part in words, part


def test_on_the_terminal_and_once_it_is_cached(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    before = icebox(data, "doctor", photos, *tiny_options())
    assert f"features --dataset {photos} --backbone {tiny()}" in before.err
    assert "0 of 12 rows" in before.err
    assert icebox(data, "features", "--dataset", photos, *tiny_options()).code == 0
    done = icebox(data, "doctor", photos, *tiny_options())
    assert done.code == 0, done.err
    assert "12 of 12 rows in own_" in done.err
    assert "near copies" in done.err
    told = icebox(data, "doctor", photos, *tiny_options(), "--json").json
    assert (told["estimate"], told["rows"]["missing"]) == (None, 0)


def test_what_is_left_out_of_a_list_is_counted(photos: Path, workspace: Workspace) -> None:
    fill(workspace, listed(photos))
    for i in range(14):
        (photos / "cats" / f"broken {i}.png").write_bytes(f"{i}".encode())
    (photos / "Cats").mkdir()
    shutil.copy(photos / "cats" / "1.png", photos / "Cats")
    (photos / "emus").mkdir()
    (photos / "emus" / "1.heic").write_bytes(b"x")
    said = icebox(workspace.root, "doctor", photos).err
    assert said.count("bad: cats/broken") == 10 and "and 4 more bad images; --json lists them all" in said
    assert "notice: passed over: .heic 1 (HEIC; convert to JPEG or PNG)" in said
    assert "notice: 1 folder holds no images: emus" in said
    assert "notice: classes that look alike are kept apart: 'Cats' and 'cats'" in said
    told = icebox(workspace.root, "doctor", photos, "--json").json
    assert len(told["quarantined_images"]) == 14
    assert (told["folders_without_images"], told["classes_alike"]) == (["emus"], [["Cats", "cats"]])


def test_groups_that_leave_no_image_to_test_on_are_named(photos: Path, workspace: Workspace) -> None:
    fill(workspace, listed(photos))
    lines = [f"{path.relative_to(photos)},{path.parent.name},one" for path in sorted(photos.glob("*/*"))]
    (photos / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    advice = "\n".join(icebox(workspace.root, "doctor", photos / "list.csv", "--json").json["advice"])
    assert "2 of 2; 12 of 12 images belong to 1 group, each of which stays on one side" in advice


def test_the_command_it_ends_with_does_what_it_says(photos: Path, tmp_path: Path) -> None:
    (photos / "cats" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data = tmp_path / "da 'ta"
    said = icebox(data, "doctor", photos, *tiny_options()).err.splitlines()[-1]
    _, _, command = said.partition("to compute them: ")
    words = shlex.split(command)
    assert words[:4] == ["python", "cli.py", "--data-dir", str(data)]
    assert icebox(data, *words[4:]).code == 0, "what cannot be read is allowed for"
    assert icebox(data, "doctor", photos, *tiny_options(), "--json").json["rows"]["cached"] == 12


def test_without_a_dataset_it_is_about_the_machine(tmp_path: Path) -> None:
    done = icebox(tmp_path, "doctor", "--limit", "3")
    assert (done.code, done.out) == (2, "")
    assert "DATASET" in done.err


def test_an_unknown_dataset_is_refused(tmp_path: Path) -> None:
    done = icebox(tmp_path, "doctor", tmp_path / "nothing", "--json")
    assert done.code == 1
    assert "nothing" in done.json["error"]


def test_digits_are_no_files(tmp_path: Path) -> None:
    told = icebox(tmp_path, "doctor", "digits", "--limit", "40", *tiny_options(), "--json").json
    assert told["formats"] == {"pixels": 40}
    assert told["quarantined"] == 0


def test_json_lists_every_group_whole(workspace: Workspace, tmp_path: Path) -> None:
    """And people are told how many more there are than they see."""
    root = tmp_path / "photos"
    write_images(root, 60, ("ant",))
    write_images(root, 1, ("bee",))
    for i in range(60):
        shutil.copy(root / f"ant/{i:03}.png", root / f"ant/copy {i}.png")
    fill(workspace, listed(root))
    done = icebox(workspace.root, "doctor", root, "--json")
    assert done.code == 0, done.err
    assert done.json["space"].startswith("inception_v3-mixed10-"), "whatever weights it was made with"
    assert done.json["rows"] == {"cached": 61, "duplicates": 60, "missing": 0}
    assert done.json["copies"]["groups"] == len(done.json["copies_listed"]) == 60
    assert [len(group) for group in done.json["near_copies_listed"]] == [61], "all show the same"
    told = icebox(workspace.root, "doctor", root)
    assert told.err.count("nearly alike: ") == 1
    assert "and 51 more" in told.err
