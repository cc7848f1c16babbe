"""Listing datasets: what is found, what is refused, and what each refusal says."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
import pickle
import random
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.dataset.folder
from pipeline.core.errors import DatasetError, UsageError
from pipeline.dataset import Dataset, identical_images, limit, notices, open_dataset, open_images
from pipeline.dataset.base import SPLIT_NAMES
from pipeline.dataset.cifar import CIFAR10, CIFAR100, Published, open_cifar
from pipeline.dataset.folder import images_below


def write(root: Path, *names: str) -> Path:
    """Make files whose content is their name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(path: Path) -> Dataset:
    return open_dataset(str(path), downloads=path / "downloads")


def rows(dataset: Dataset) -> list[tuple[str, str]]:
    return [(name, dataset.classes[label]) for name, label in zip(dataset.names, dataset.labels, strict=True)]


# ---- names


@pytest.mark.parametrize("name", ["digit", "Digits", "cifar-10", "cifar1000"])
def test_a_near_miss_is_suggested(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"known are digits, cifar10, cifar100.*did you mean (digits|cifar10)"):
        open_dataset(name, downloads=tmp_path)


@pytest.mark.parametrize("name", ["", "no/such/folder", "x" * 5000, "a\0b"])
def test_what_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^(no dataset|cannot look at)"):
        open_dataset(name, downloads=tmp_path)


def test_a_missing_path_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file or folder"):
        listed(tmp_path / "photos")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected .*\.parquet.*found the file"):
        listed(write(tmp_path, "a.zip") / "a.zip")


def test_an_archive_goes_with_cifar_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cifar10 and cifar100"):
        open_dataset("digits", downloads=tmp_path, archive=tmp_path / "a.tar.gz")


# ---- digits


def test_digits_are_grey_levels_with_their_labels(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    digits = open_dataset("digits", downloads=tmp_path)
    assert len(digits) == 1797 and digits.name == "digits" and digits.names[17] == "digits/17"
    assert digits.classes == tuple("0123456789") and digits.splits is None and digits.path(0) is None
    assert digits.labels.dtype == np.int32
    np.testing.assert_array_equal(digits.labels, bunch.target)
    image = digits.read(17)
    assert isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (8, 8)
    np.testing.assert_allclose(image, bunch.images[17] * 255 / 16, atol=0.5)
    assert max(np.max(digits.read(i)) for i in range(100)) == 255


def test_a_folder_called_like_a_known_dataset_is_not_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "digits", "cat/1.png")
    monkeypatch.chdir(tmp_path)
    for name in ("./digits", str(tmp_path / "digits")):
        own = open_dataset(name, downloads=tmp_path)
        assert (own.name, own.classes, own.embedded) == ("digits", ("cat",), False)
    assert not caplog.messages
    known = open_dataset("digits", downloads=tmp_path)
    assert len(known) == 1797 and known.embedded and limit(known, 3).embedded
    assert caplog.messages == ["digits is the published dataset; the folder of that name here is ./digits"]


# ---- take, limit, pickling


def test_take_keeps_every_column_in_step(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("path,label,split,group\na,x,train,g\nb,y,test,h\nc,x,val,\n")
    write(tmp_path, "a", "b", "c")
    part = listed(table).take([2, 1])
    assert part.names == ["c", "b"] and part.classes == ("x", "y") and part.labels.tolist() == [0, 1]
    assert part.splits == ["val", "test"] and part.groups == ["", "h"]
    assert part.read(0) == b"c" and part.path(1) == tmp_path / "b"
    assert part.take([1]).read(0) == b"b"
    assert part.take(np.array([False, True])).names == ["b"]
    assert len(part.take([])) == 0
    with pytest.raises(IndexError):
        part.take([2])


def test_a_part_of_an_array_dataset_pickles_small(tmp_path: Path) -> None:
    digits = open_dataset("digits", downloads=tmp_path)
    blob = pickle.dumps(digits.take([5, 7]))
    assert len(blob) < 2000
    np.testing.assert_array_equal(pickle.loads(blob).read(1), digits.read(7))


def test_a_folder_dataset_survives_pickling_and_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "pets", "cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    blob = pickle.dumps(open_dataset("pets", downloads=tmp_path))
    monkeypatch.chdir("/")
    assert pickle.loads(blob).read(0) == b"cat/1.jpg"


def test_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    digits = open_dataset("digits", downloads=tmp_path)
    with pytest.raises(DatasetError, match="expected 1797 splits, found 1"):
        dataclasses.replace(digits, splits=["train"])


def test_limit_is_balanced_and_a_beginning_of_any_larger_one(tmp_path: Path) -> None:
    digits = open_dataset("digits", downloads=tmp_path)
    small, large = limit(digits, 25), limit(digits, 300)
    assert sorted(np.bincount(small.labels)) == [2] * 5 + [3] * 5
    assert np.bincount(large.labels).tolist() == [30] * 10
    assert list(large.names)[:25] == small.names
    assert limit(large, 25).names == small.names


def test_limit_follows_the_hash_of_the_names_not_their_order(tmp_path: Path) -> None:
    cats = [f"cat/{i}.png" for i in range(9)]
    dataset = listed(write(tmp_path, *cats, "dog/1.png"))
    by_hash = sorted(cats, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert limit(dataset, 4).names == [by_hash[0], "dog/1.png", *by_hash[1:3]]  # no dog is left after one
    assert limit(dataset.take(range(9, -1, -1)), 4).names == limit(dataset, 4).names


def test_limit_of_all_is_the_dataset_and_of_none_is_refused(tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, "cat/1.png", "dog/1.png"))
    assert limit(dataset, 2) is dataset and limit(dataset, 3) is dataset
    with pytest.raises(UsageError, match="at least 1, found 0"):
        limit(dataset, 0)


# ---- folders


def test_class_folders_are_listed_in_order_at_any_depth(tmp_path: Path) -> None:
    dataset = listed(write(tmp_path / "pets", "dog/b.JPG", "dog/a/z.png", "cat/2.webp", "cat/10.gif"))
    assert dataset.name == "pets" and dataset.classes == ("cat", "dog") and dataset.labels.dtype == np.int32
    assert rows(dataset) == [
        ("cat/10.gif", "cat"),
        ("cat/2.webp", "cat"),
        ("dog/a/z.png", "dog"),
        ("dog/b.JPG", "dog"),
    ]
    assert dataset.splits is None and dataset.groups is None and dataset.ignored == {}
    assert dataset.read(2) == b"dog/a/z.png" and dataset.path(0) == tmp_path / "pets/cat/10.gif"


def test_what_is_no_image_is_counted_not_listed(tmp_path: Path) -> None:
    write(tmp_path, "cat/a.jpg", "cat/b.txt", "cat/c.TXT", "notes", ".DS_Store", "cat/._a.jpg", ".git/x.png")
    dataset = listed(tmp_path)
    assert rows(dataset) == [("cat/a.jpg", "cat")]
    assert dataset.ignored == {".txt": 2, "": 1, "hidden": 2, ".git/": 1}


FOREIGN = ["@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".Trash", "System Volume Information", "lost+found"]


@pytest.mark.parametrize("name", FOREIGN)
def test_folders_of_other_programs_are_passed_over_and_counted(name: str, tmp_path: Path) -> None:
    inside = (f"{name}/dog/1.png", f"{name}/2.png", f"cat/{name}/1.png/small.jpg", f"dog/{name}/3.png")
    dataset = listed(write(tmp_path, "cat/1.png", "dog/1.png", *inside))
    assert rows(dataset) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert dataset.ignored == {f"{name}/": 3} and not dataset.without_images


def test_a_folder_of_other_programs_can_be_asked_for(tmp_path: Path) -> None:
    assert listed(write(tmp_path, "#recycle/cat/1.png") / "#recycle").classes == ("cat",)


def test_folders_without_images_are_told(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.heic", "fox/notes.txt", "emu/.1.png", ".git/x", "ox/@eaDir/1.png")
    (tmp_path / "ant").mkdir()
    dataset = listed(tmp_path)
    assert dataset.classes == ("cat",) and dataset.without_images == ("ant", "dog", "emu", "fox", "ox")
    assert "5 folders hold no images: ant, dog, emu, fox, ox" in list(notices(dataset))


def test_folders_without_images_are_told_of_splits_and_of_classes_in_them(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.svg", "notes/a.txt")
    (tmp_path / "val").mkdir()
    dataset = listed(tmp_path)
    assert dataset.without_images == ("notes", "val", "test/dog") and dataset.classes == ("cat", "dog")


def test_what_was_passed_over_is_named_with_what_helps(tmp_path: Path) -> None:
    others = ("1.heic", "2.AVIF", "3.jxl", "4.svg", "5.CR2", "6.nef", "7.mov", "8.zip", "9.txt", "README", "._1.jpg")
    dataset = listed(write(tmp_path, "cat/1.png", "__MACOSX/1.png", ".x/1.png", *(f"cat/{name}" for name in others)))
    (told,) = notices(dataset)
    assert told == (
        "passed over: no ending 1, .txt 1 (no image endings); .avif 1 (AVIF; convert to JPEG or PNG); "
        ".cr2 1, .nef 1 (camera raw; develop to JPEG or TIFF); .heic 1 (HEIC; convert to JPEG or PNG); "
        ".jxl 1 (JPEG XL; convert to JPEG or PNG); .mov 1 (videos; extract frames); "
        ".svg 1 (vector drawings; render to PNG); .x/ 1, hidden 1; .zip 1 (archives; unpack); "
        "__MACOSX/ 1 (of other programs)"
    )


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "eval", "DEV"])
def test_split_folders_are_splits(val: str, tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, "train/cat/1.png", "train/dog/1.png", f"{val}/dog/2.png", "test/cat/a/1.png"))
    assert dataset.classes == ("cat", "dog")
    found = {name: (split, label) for (name, label), split in zip(rows(dataset), dataset.splits or (), strict=True)}
    assert found == {
        "train/cat/1.png": ("train", "cat"),
        "train/dog/1.png": ("train", "dog"),
        f"{val}/dog/2.png": ("val", "dog"),
        "test/cat/a/1.png": ("test", "cat"),
    }


def test_a_class_of_one_split_only_is_a_class(tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, "train/cat/1.png", "test/ant/1.png", "test/cat/note.txt"))
    assert dataset.classes == ("ant", "cat") and dataset.ignored == {".txt": 1}


SPLIT = ("{train}/cat/1.png", "{train}/dog/1.png", "{test}/cat/2.png", "{test}/dog/2.png")


def split_folders(train: str = "train", test: str = "test") -> list[str]:
    """Two classes of an image each, in two splits."""
    return [name.format(train=train, test=test) for name in SPLIT]


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "Testing"), ("TRAIN", "testing")])
def test_splits_are_known_in_their_usual_spellings(train: str, test: str, tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, *split_folders(train, test)))
    assert dataset.classes == ("cat", "dog")
    assert dict(zip(dataset.names, dataset.splits or (), strict=True)) == {
        name: "train" if name.startswith(f"{train}/") else "test" for name in split_folders(train, test)
    }


@pytest.mark.parametrize(
    "beside", ["__MACOSX/train/cat/._1.png", "notes/a.txt", "more/.1.png", ".old/cat/1.png", "raw/1.heic"]
)
def test_folders_without_images_do_not_count_beside_splits(beside: str, tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, *split_folders(), beside))
    assert dataset.classes == ("cat", "dog") and dataset.splits == ["test", "test", "train", "train"]


@pytest.mark.parametrize("name", ["train", "Testing", "valid", "eval", "dev"])
def test_a_class_may_be_called_as_a_split(name: str, tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, f"{name}/1.png", "bus/1.png", "cat/more/1.png"))
    assert dataset.classes == tuple(sorted([name, "bus", "cat"])) and dataset.splits is None


def test_several_classes_that_are_called_as_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert listed(write(tmp_path, "train/1.png", "bus/1.png")).classes == ("bus", "train")
    assert not caplog.messages
    assert listed(write(tmp_path, "Test/1.png")).classes == ("Test", "bus", "train")
    assert caplog.messages == [f"{tmp_path}: Test and train hold images directly, so that they are classes, not splits"]


@pytest.mark.parametrize(
    "other", ["car/1.png", "trains/1.png", "extra/cat/1.png", "test1/1.png", "train_more/cat/1.png"]
)
@pytest.mark.parametrize("names", [split_folders(), ["train/a/1.png", "test/1.png"], ["dev/a/1.png", "dev/2.png"]])
def test_splits_beside_other_folders_with_images_are_refused(names: list[str], other: str, tmp_path: Path) -> None:
    splits = ", ".join(sorted({f"{name.split('/')[0]}/" for name in names if name.count("/") == 2}))
    found = rf"found both: {splits} with class folders, beside .*{other.split('/')[0]}/.* with images; .* manifest"
    with pytest.raises(DatasetError, match=f"expected splits or classes, {found}"):
        listed(write(tmp_path, *names, other))


@pytest.mark.parametrize("same", [("train", "Training"), ("val", "valid"), ("dev", "eval"), ("test", "testing")])
def test_two_folders_for_one_split_are_refused(same: tuple[str, str], tmp_path: Path) -> None:
    names = [f"{name}/cat/1.png" for name in (*same, "train", "test")]
    with pytest.raises(DatasetError, match=rf"one folder for the split {SPLIT_NAMES[same[0]]}, found .*{same[1]}/"):
        listed(write(tmp_path, *names))


@pytest.mark.parametrize("above", ["dataset", "data/images"])
@pytest.mark.parametrize("names", [split_folders(), split_folders("Training"), ["val/cat/1.png", "val/dog/1.png"]])
def test_splits_one_folder_deeper_are_refused_naming_the_folder_to_give(
    names: list[str], above: str, tmp_path: Path
) -> None:
    write(tmp_path / above, *names)
    with pytest.raises(DatasetError, match=f"found {above}/.*; give {tmp_path / above}$"):
        listed(tmp_path)
    assert listed(tmp_path / above).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["cat/train/1.png", "cat/test/2.png", "dog/train/1.png"], "found cat/test/, cat/train/; put splits above"),
        (["cat/train/1.png", "cat/val/2.png", "cat/3.png", "dog/1.png"], "found cat/train/, cat/val/; put splits"),
        (["set/train/cat/1.png", "more/cat/2.png"], "found set/train/; put splits above classes"),
        (
            [f"train/{name}" for name in split_folders()],
            "expected classes below train/, found train/test/, train/train/",
        ),
        ([*split_folders(), "val/val/1.png"], "expected classes below val/, found val/val/"),
        (split_folders("training_set", "test_set"), "found test_set/, training_set/; if these are splits, call them"),
        ([*split_folders("trainset", "Test-2"), "one/1.png"], "found Test-2/, trainset/; if these are splits"),
        (["train_images/1.png", "test_images/1.png"], "found test_images/, train_images/; if these are splits"),
    ],
)
def test_splits_where_none_are_expected_are_refused(names: list[str], found: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=found):
        listed(write(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["test tube/a/1.png", "train station/b/1.png", "cup/1.png"], ("cup", "test tube", "train station")),
        (["train station/1.png", "train track/1.png"], ("train station", "train track")),
        (["vehicles/train/1.png", "vehicles/bus/1.png", "cats/1.png"], ("cats", "vehicles")),
        (["train/train/1.png", "train/bus/1.png", "test/bus/1.png", "test/train/1.png"], ("bus", "train")),
        (["cat/train/1.png", "dog/train/1.png"], ("cat", "dog")),
    ],
)
def test_what_only_sounds_like_splits_is_classes(names: list[str], classes: tuple[str, ...], tmp_path: Path) -> None:
    assert listed(write(tmp_path, *names)).classes == classes


@pytest.mark.parametrize("name", ["test", "val", "Testing", "dev"])
def test_one_split_alone_is_that_split(name: str, tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, f"{name}/cat/1.png", f"{name}/dog/1.png"))
    assert dataset.classes == ("cat", "dog") and dataset.splits == [SPLIT_NAMES[name.lower()]] * 2


@pytest.mark.parametrize("name", ["train", "Train", "training"])
def test_a_train_folder_alone_brings_no_split(name: str, tmp_path: Path) -> None:
    write(tmp_path, f"{name}/cat/1.png", ".cache/x")
    dataset = listed(tmp_path)
    assert dataset.splits is None and rows(dataset) == [(f"{name}/cat/1.png", "cat")]


def test_classes_one_folder_deeper_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert listed(write(tmp_path, "photos/cat/1.png", "photos/dog/1.png")).classes == ("photos",)
    assert "has one class, 'photos', with images in 2 folders, as 'cat'" in caplog.text
    caplog.clear()
    assert listed(write(tmp_path, "birds/1.png", "birds/more/2.png")).classes == ("birds", "photos")
    assert not caplog.text


def test_folders_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    dataset = listed(write(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "bar/3.png"))
    assert dataset.classes == ("bar", "caf\u00e9") and sorted(dataset.labels.tolist()) == [0, 1, 1]
    assert dataset.labels[list(dataset.names).index("cafe\u0301/2.png")] == 1
    assert not list(notices(dataset))


def test_classes_that_look_alike_are_told(tmp_path: Path) -> None:
    classes = ["Cat", "cat", "cat ", "hot dog", "hot  dog", "k\u200bite", "kite", "owl"]
    dataset = listed(write(tmp_path, *(f"{name}/1.png" for name in classes)))
    assert sorted(dataset.classes) == sorted(classes)
    groups = [["Cat", "cat", "cat "], ["hot  dog", "hot dog"], ["kite", "k\u200bite"]]
    assert [sorted(group) for group in identical_images(dataset.classes)] == groups
    (told,) = notices(dataset)
    assert "are kept apart: 'Cat' and 'cat' and 'cat ', " in told and r"'k\u200bite'" in told


@pytest.mark.parametrize("names", [["1.png"], ["cat/1.png", "2.png"], ["train/cat/1.png", "test/2.png"]])
def test_images_outside_a_class_folder_are_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"expected <class>/<image>.*found 1 .*{names[-1]}"):
        listed(write(tmp_path, *names))


def test_a_folder_without_images_is_refused_naming_what_was_passed_over(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"found no images \(passed over: \.npy 2 \(no image endings\)\)"):
        listed(write(tmp_path, "cat/1.npy", "dog/1.npy"))


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    write(tmp_path / "other", "a.png")
    write(tmp_path / "pets", "cat/1.png")
    pets = tmp_path / "pets"
    (pets / "dog").symlink_to(tmp_path / "other")
    (pets / "cat/again").symlink_to(pets)
    (pets / "cat/2.png").symlink_to(tmp_path / "other/a.png")
    (pets / "itself").symlink_to(pets / "itself")
    dataset = listed(pets)
    assert [name for name in dataset.names if "again" not in name] == ["cat/1.png", "cat/2.png", "dog/a.png"]
    assert dataset.read(1) == b"a.png" and dataset.ignored == {"(link loop)": 1, "": 1}


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_of_folders_is_listed_as_one_after_the_other(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folders = [tmp_path / "tree"]
    folders[0].mkdir()
    for number in range(25):
        folder = draw.choice(folders)
        name = draw.choice(["", "", "", "."]) + f"{number}"
        if draw.random() < 0.2:
            (folder / name).symlink_to(draw.choice(folders))
            continue
        (folder / name).mkdir()
        folders.append(folder / name)
        write(folder / name, *draw.sample(["a.png", "b.JPG", ".c.png", "d.txt", "e", ".f"], 3))
    expected, passed = one_after_the_other(folders[0])
    ignored: Counter[str] = Counter()
    assert sorted(images_below(folders[0], ignored)) == sorted(expected)
    assert ignored == passed


def one_after_the_other(folder: Path, prefix: str = "", above: tuple[Path, ...] = ()) -> tuple[list[str], Counter[str]]:
    """What `images_below` finds, by the plainest means."""
    if folder.resolve() in above:
        return [], Counter({"(link loop)": 1})
    names, passed = list[str](), Counter[str]()
    for path in folder.iterdir():
        ending = path.name[path.name.rfind(".") :].lower() if "." in path.name else ""
        if path.is_dir() and path.name[0] == ".":
            passed[ending + "/"] += 1
        elif path.is_dir():
            below, others = one_after_the_other(path, f"{prefix}{path.name}/", (*above, folder.resolve()))
            names += below
            passed += others
        elif path.name[0] == ".":
            passed["hidden"] += 1
        elif ending in (".png", ".jpg"):
            names.append(prefix + path.name)
        else:
            passed[ending] += 1
    return names, passed


def test_folders_are_listed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = [f"class{n}" for n in range(8)]
    write(tmp_path, *(f"{name}/1.png" for name in classes))
    met, list_one = threading.Barrier(len(classes), timeout=120), pipeline.dataset.folder._entries

    def slow(folder: Path) -> list[os.DirEntry[str]]:
        if folder != tmp_path:
            met.wait()  # raises unless all are being listed at once
        return list_one(folder)

    monkeypatch.setattr(pipeline.dataset.folder, "_entries", slow)
    assert sorted(images_below(tmp_path, Counter())) == [f"{name}/1.png" for name in classes]


def test_a_folder_that_cannot_be_listed_ends_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *(f"{n}/1.png" for n in range(100)))
    seen, list_one, ended = list[Path](), pipeline.dataset.folder._entries, threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait=wait)

    def broken(folder: Path) -> list[os.DirEntry[str]]:
        seen.append(folder)
        if folder.name.isdigit():
            if len(seen) > 2:
                ended.wait(120)  # until the first failure is met
            raise DatasetError(f"cannot list the folder {folder}: gone")
        return list_one(folder)

    monkeypatch.setattr(pipeline.dataset.folder, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(pipeline.dataset.folder, "_entries", broken)
    monkeypatch.setattr(pipeline.dataset.folder, "_LISTED_AT_ONCE", 1)
    with pytest.raises(DatasetError, match=r"cannot list the folder .*: gone"):
        list(images_below(tmp_path, Counter()))
    assert len(seen) <= 3  # those that were waiting are let be


def test_a_broken_link_is_listed_and_fails_when_read(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png")
    (tmp_path / "cat/2.png").symlink_to(tmp_path / "gone.png")
    dataset = listed(tmp_path)
    assert dataset.names == ["cat/1.png", "cat/2.png"]
    with pytest.raises(FileNotFoundError):
        dataset.read(1)


def test_a_pipe_is_listed_and_fails_when_read_instead_of_blocking(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png")
    os.mkfifo(tmp_path / "cat/2.png")
    (tmp_path / "cat/3.png").symlink_to(tmp_path / "cat/2.png")
    dataset = listed(tmp_path)
    assert dataset.names == ["cat/1.png", "cat/2.png", "cat/3.png"]
    for at in (1, 2):
        with pytest.raises(OSError, match="not a regular file"):
            dataset.read(at)


def test_a_name_that_is_no_text_can_be_listed_limited_and_read(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/2.png", os.fsdecode(b"cat/\xff.png").encode("utf-8", "replace").decode())
    (tmp_path / os.fsdecode(b"cat/\xfe.png")).write_bytes(b"odd")
    dataset = listed(tmp_path)
    assert len(limit(dataset, 3)) == 3
    assert dataset.read(list(dataset.names).index(os.fsdecode(b"cat/\xfe.png"))) == b"odd"


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    real = os.scandir

    def scandir(folder: Path) -> Any:
        if folder.name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DatasetError, match=r"cannot list the folder .*dog: Permission denied"):
        listed(tmp_path)


# ---- manifests


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t"), ("CSV", ", ")])
def test_a_text_manifest_is_listed_in_its_order(start: bytes, ending: str, between: str, tmp_path: Path) -> None:
    write(tmp_path, "b.png", "sub/a.png")
    lines = [["Path", "label", "extra"], ["sub/a.png", "dög", "1"], [str(tmp_path / "b.png"), "7", ""]]
    table = tmp_path / f"pets.{ending}"
    table.write_bytes(start + "\r\n".join(between.join(line) for line in lines).encode() + b"\r\n\r\n")
    dataset = listed(table)
    assert dataset.name == table.name and rows(dataset) == [
        ("sub/a.png", "dög"),
        (str(tmp_path / "b.png"), "7"),
    ]
    assert dataset.splits is None and dataset.groups is None
    assert dataset.read(0) == b"sub/a.png" and dataset.read(1) == b"b.png"


def test_a_manifest_brings_splits_and_groups(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('group,split,label,path\ng,Train,x,"a,b.png"\n,dev,y,b.png\n,TESTING,x,b.png\n')
    dataset = listed(table)
    assert dataset.splits == ["train", "val", "test"] and dataset.groups == ["g", "", ""]
    assert rows(dataset) == [("a,b.png", "x"), ("b.png", "y"), ("b.png", "x")]


def test_a_space_after_a_comma_belongs_to_no_value(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('label, path\ncat , a b.png\ndog, "a,b.png"\n')
    assert rows(listed(tmp_path / "a.csv")) == [("a b.png", "cat"), ("a,b.png", "dog")]


@pytest.mark.parametrize("split", ["", "train"])
def test_a_split_column_that_sets_nothing_apart_is_none(split: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"path,label,split,group\na,x,{split},\nb,x,{split},\n")
    dataset = listed(tmp_path / "a.csv")
    assert dataset.splits is None and dataset.groups is None


MALFORMED = {
    "": "line 1: expected one column 'path'",
    "path;label\na;b\n": "line 1: expected one column 'path'.*found 0 in 'path;label'",
    "path,name\na,b\n": "line 1: expected one column 'label'",
    "path,label,Path\na,b,c\n": "line 1: expected one column 'path'.*found 2",
    "path,label\n": "no rows below the header",
    "path,label\na,b\n ,c\n": "line 3: expected the path",
    "path,label\na,b\n\nc, \n": "line 4: expected a label for 'c'",
    "path,label\na,b\nc\n": "line 3: expected 2 values, found 1",
    "path,label\na,b,c\n": "line 2: expected 2 values, found 3",
    'path,label\n"a,b\nc,d\n': "after line 1: unexpected end of data",
    "path,label,split\na,b,train\nc,d,other\n": "line 3: expected the split to be train,.*, found 'other'",
    "path,label,split\na,b,train\nc,d,\n": "line 3: expected a split, as the rows above",
    "path,label,split\na,b,\nc,d,test\n": "line 3: expected no split, as above, found 'test'",
    "path,label\nfile:///a/b.png,x\n": "line 2: expected the path of a file, or an address by one of .*, found 'file:///a/b",
    "path,label\nMemory://a/b.png,x\n": "line 2: expected the path of a file, or an address by one of http, https, s3,",
    "path,label\na\0b,x\n": "line 2: .*null character",
}


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_manifest_is_refused_naming_the_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DatasetError, match=MALFORMED[text]):
        listed(tmp_path / "a.csv")


MANIFEST = "path,label\na,cat\nb,d\u00f6g\n"
FOREIGN_MANIFESTS = {
    "latin1": (MANIFEST.encode("latin1"), "line 3: expected UTF-8 text, found another encoding, likely Windows-1252"),
    "utf-16": (MANIFEST.encode("utf-16"), r"expected UTF-8 text in columns, found UTF-16 text; save it as UTF-8"),
    "utf-16 without a mark": (MANIFEST.encode("utf-16-be"), "found UTF-16 text; save it as UTF-8"),
    "utf-16 of another alphabet": (f"path,label\n{100 * '日本'},x\n".encode("utf-16-le"), "found UTF-16 text"),
    "utf-32 without a mark": (MANIFEST.encode("utf-32-le"), "found UTF-32 text; save it as UTF-8"),
    "utf-32": (MANIFEST.encode("utf-32"), "found UTF-32 text; save it as UTF-8"),
    "workbook": (b"PK\x03\x04" + bytes(40), "found a spreadsheet or ZIP file; save it as CSV UTF-8"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer; .*`git lfs pull`"),
    "semicolons": (b"path;label\na;b\n", "found 0 in 'path;label'; columns are separated by ',', found ';'"),
}


@pytest.mark.parametrize("case", FOREIGN_MANIFESTS)
def test_a_manifest_in_another_format_is_refused_naming_it(case: str, tmp_path: Path) -> None:
    content, text = FOREIGN_MANIFESTS[case]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=text):
        listed(tmp_path / "a.csv")


def test_a_pointer_in_place_of_a_parquet_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(FOREIGN_MANIFESTS["pointer"][0])
    with pytest.raises(DatasetError, match="expected a Parquet file, found a Git LFS pointer"):
        listed(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("written", "file", "cause"),
    [
        (r"cats\1.jpg", "cats/1.jpg", "the path has backslashes in place of /"),
        ("cats/1.jpg ", "cats/1.jpg", "there are blanks around the path"),
        (r" cats\1.jpg", "cats/1.jpg", "the path has backslashes in place of /, and blanks around it"),
        ("caf\u00e9/1.jpg", "cafe\u0301/1.jpg", "the file's name has Unicode form NFD"),
        ("cafe\u0301/1.jpg", "caf\u00e9/1.jpg", "the file's name has Unicode form NFC"),
        (r"C:\photos\cats\1.jpg", "cats/1.jpg", "the path starts from a drive of Windows"),
        ("cats/1", "cats/1.jpg", "the path lacks its ending"),
        ("sub/cats/1.jpg", "cats/1.jpg", "paths start from {above}: give --image-root"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_path_written_otherwise_than_its_file_is_told_once(
    written: str, file: str, cause: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "sub", file, "cats/2.jpg")
    paths, table = ["cats/2.jpg", written, written.replace("1", "3")], tmp_path / "sub" / f"a.{form}"
    if form == "csv":
        table.write_text("path,label\n" + "".join(f'"{path}",x\n' for path in paths))
    else:
        parquet(table, path=paths, label=["x"] * 3)
    for listing in (listed, lambda path: open_images([str(path)])):
        caplog.clear()
        assert listing(table).names == paths
        (told,) = caplog.messages
        assert f"no file '{written}', but '" in told and told.endswith(cause.format(above=tmp_path))


def test_few_paths_of_a_manifest_are_looked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "d\u00f6g 150.jpg", "150.jpg")
    lines = "".join(f"d\u00f6g {i}.jpg,x\n" for i in range(150)) + "do\u0308g 150.jpg,x\n"
    (tmp_path / "a.csv").write_text(f"path,label\n{lines}")
    assert len(listed(tmp_path / "a.csv")) == 151
    assert not caplog.messages


def test_whole_numbers_of_a_parquet_manifest_are_sorted_as_numbers(tmp_path: Path) -> None:
    numbers = [10, 9, -1, 100, 0, 9]
    names = [f"{i}.png" for i in range(len(numbers))]
    for label in (numbers, pa.array(numbers).dictionary_encode(), pa.array(numbers, pa.int8())):
        dataset = listed(parquet(tmp_path / "a.parquet", path=names, Label=label))
        assert dataset.classes == ("-1", "0", "9", "10", "100") and dataset.labels.tolist() == [3, 2, 0, 4, 1, 2]
    dataset = listed(parquet(tmp_path / "a.parquet", path=names, label=[str(number) for number in numbers]))
    assert dataset.classes == ("-1", "0", "10", "100", "9")


def parquet(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("ending", ["parquet", "pq"])
def test_a_parquet_manifest_is_listed(ending: str, tmp_path: Path) -> None:
    table = parquet(
        tmp_path / f"a.{ending}",
        image=[b"1", b"2", b"3"],
        label=[10, 9, 10],
        path=pa.array(["a.png", "b.png", "a.png"]).dictionary_encode(),
        group=["g", None, "h"],
    )
    dataset = listed(table)
    assert dataset.classes == ("9", "10") and dataset.splits is None and dataset.groups == ["g", "", "h"]
    assert rows(dataset) == [("a.png", "10"), ("b.png", "9"), ("a.png", "10")]


def test_a_long_parquet_manifest_is_read_to_its_end(tmp_path: Path) -> None:
    count = 40_000
    table = parquet(tmp_path / "a.pq", path=[f"{i}" for i in range(count)], label=[i % 3 for i in range(count)])
    dataset = listed(table)
    assert dataset.names == [f"{i}" for i in range(count)]
    np.testing.assert_array_equal(dataset.labels, np.arange(count) % 3)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"path": ["a"]}, "expected one column 'label'"),
        ({"path": ["a", "b"], "label": ["x", None]}, "row 2: expected a label"),
        ({"path": ["a", None], "label": ["x", "y"]}, "row 2: expected the path"),
        ({"path": [b"a"], "label": ["x"]}, "expected text in the column 'path', found binary"),
        ({"path": [1], "label": ["x"]}, "expected text in the column 'path', found int64"),
        ({"path": ["a"], "label": [0.5]}, "expected text in the column 'label', found double"),
    ],
)
def test_a_malformed_parquet_manifest_is_refused(columns: dict[str, list], text: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=text):
        listed(parquet(tmp_path / "a.parquet", **columns))


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected a Parquet file"):
        listed(write(tmp_path, "a.parquet") / "a.parquet")


# ---- CIFAR


_PurePickler: Any = vars(pickle)["_Pickler"]  # the one in Python, whose opcodes can be replaced


class Python2Pickler(_PurePickler):
    """Pickles as Python 2 did: text and bytes alike become its one kind of string."""

    dispatch: ClassVar[dict[type, Any]] = dict(_PurePickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def python3_pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


def pack(path: Path, published: Published, members: dict[str, bytes]) -> Published:
    """Write a tarball and return `published` with its hash."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return dataclasses.replace(published, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def cifar10_members(dump: Any = python2_pickle, per_batch: int = 4) -> tuple[dict[str, bytes], np.ndarray]:
    """Return the members of a small CIFAR-10 in the shuffled order of the real one, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6 * per_batch, 3072), np.uint8)
    members = {}
    for i, name in enumerate(CIFAR10.batches):
        part = slice(i * per_batch, (i + 1) * per_batch)
        labels = [j % 3 for j in range(part.start, part.stop)]
        members[name] = dump({b"data": pixels[part], b"labels": labels, b"filenames": [b"x.png"] * per_batch})
    members[CIFAR10.meta] = dump({b"label_names": [b"frog", b"ant", b"cat"]})
    members["cifar-10-batches-py/readme.html"] = b"<html>"
    return {name: members[name] for name in reversed(members)}, pixels


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
def test_cifar10_is_read_in_order_with_sorted_classes(dump: Any, tmp_path: Path) -> None:
    members, pixels = cifar10_members(dump)
    published = pack(tmp_path / "a.tar.gz", CIFAR10, members)
    dataset = open_cifar(published, downloads=tmp_path / "none", archive=tmp_path / "a.tar.gz")
    assert dataset.name == "cifar10" and dataset.classes == ("ant", "cat", "frog")
    assert [dataset.classes[label] for label in dataset.labels] == ["frog", "ant", "cat"] * 8
    assert dataset.splits == ["train"] * 20 + ["test"] * 4
    assert dataset.names[19:22] == ["cifar10/train/19", "cifar10/test/0", "cifar10/test/1"]
    image = dataset.read(21)
    assert isinstance(image, np.ndarray) and image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels[21].reshape(3, 32, 32).transpose(1, 2, 0))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tar.gz"]  # nothing was unpacked


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    def batch(fine: list[int]) -> bytes:
        data = np.zeros((len(fine), 3072), np.uint8)
        return python2_pickle({b"data": data, b"fine_labels": fine, b"coarse_labels": [0] * len(fine)})

    meta = {b"fine_label_names": [b"bee", b"ape"], b"coarse_label_names": [b"animal"]}
    members = {
        "cifar-100-python/meta": python2_pickle(meta),
        "cifar-100-python/test": batch([1]),
        "cifar-100-python/train": batch([0, 1, 1]),
    }
    published = pack(tmp_path / "a.tar.gz", CIFAR100, members)
    dataset = open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")
    assert dataset.classes == ("ape", "bee") and dataset.labels.tolist() == [1, 0, 0, 0]
    assert dataset.splits == ["train", "train", "train", "test"]


def test_another_archive_is_refused_with_both_hashes(tmp_path: Path) -> None:
    archive = write(tmp_path, "a.tar.gz") / "a.tar.gz"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(DatasetError, match=f"expected sha256 {CIFAR10.sha256}, found {found}; fetch https://"):
        open_dataset("cifar10", downloads=tmp_path, archive=archive)


def test_a_missing_archive_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot read --archive .*No such file"):
        open_dataset("cifar100", downloads=tmp_path, archive=tmp_path / "gone")


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    published = dataclasses.replace(CIFAR10, url="http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DatasetError, match=r"could not download http://127\.0\.0\.1:9/.*--archive FILE"):
        open_cifar(published, downloads=tmp_path / "downloads")


def test_a_download_at_hand_is_used_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    members, _ = cifar10_members()
    published = pack(tmp_path / "a.tar.gz", CIFAR10, members)
    published = dataclasses.replace(published, url="http://127.0.0.1:9/a.tar.gz")
    assert len(open_cifar(published, downloads=tmp_path)) == 24
    damaged = (tmp_path / "a.tar.gz").read_bytes()[:-9]
    (tmp_path / "a.tar.gz").write_bytes(damaged)
    with pytest.raises(DatasetError, match="could not download"):
        open_cifar(published, downloads=tmp_path)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_PIXELS = np.zeros((1, 3072), np.uint8)
BAD_BATCHES: dict[str, tuple[object, str]] = {
    "calls the shell": (Calls(os.system, "true"), r"found a call of (posix|nt)\.system"),
    "calls eval": ({b"data": Calls(eval, "1")}, "found a call of __builtin__.eval"),
    "declares terabytes": ({b"data": Calls(_RECONSTRUCT, np.ndarray, (1 << 42,), b"b")}, r"shape \(0,\)"),
    "calls ndarray": ({b"data": Calls(np.ndarray, (1 << 42,))}, "expected a pickled batch"),
    "is no dict": ([1, 2], "expected a pickled dict, found list"),
    "has no data": ({b"labels": [0]}, "expected uint8 pixels .* found NoneType"),
    "has floats": ({b"data": _PIXELS * 1.0, b"labels": [0]}, r"found float64 \(1, 3072\)"),
    "has another shape": ({b"data": _PIXELS[:, :99], b"labels": [0]}, r"found uint8 \(1, 99\)"),
    "has no labels": ({b"data": _PIXELS}, "expected a list of labels from 0 to 2"),
    "has a label out of range": ({b"data": _PIXELS, b"labels": [3]}, "labels from 0 to 2"),
    "has a negative label": ({b"data": _PIXELS, b"labels": [-1]}, "labels from 0 to 2"),
    "has too few labels": ({b"data": _PIXELS, b"labels": []}, "expected 1 labels, found 0"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_refused_even_if_the_hash_fits(case: str, tmp_path: Path) -> None:
    content, text = BAD_BATCHES[case]
    members, _ = cifar10_members()
    members["cifar-10-batches-py/data_batch_2"] = python3_pickle(content)
    published = pack(tmp_path / "a.tar.gz", CIFAR10, members)
    with pytest.raises(DatasetError, match=f"data_batch_2: .*{text}"):
        open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")


@pytest.mark.parametrize("content", [b"", b"not a pickle", python3_pickle([1, 2, 3])[:-4]])
def test_a_torn_batch_is_refused(content: bytes, tmp_path: Path) -> None:
    members, _ = cifar10_members()
    published = pack(tmp_path / "a.tar.gz", CIFAR10, members | {"cifar-10-batches-py/test_batch": content})
    with pytest.raises(DatasetError, match="test_batch: expected a pickled batch"):
        open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    members, _ = cifar10_members()
    del members["cifar-10-batches-py/data_batch_3"]
    published = pack(tmp_path / "a.tar.gz", CIFAR10, members)
    with pytest.raises(DatasetError, match="expected the members cifar-10-batches-py/data_batch_3,"):
        open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")


def test_a_member_that_is_a_link_is_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(link)
    digest = hashlib.sha256((tmp_path / "a.tar.gz").read_bytes()).hexdigest()
    with pytest.raises(DatasetError, match="test_batch: expected a file of at most 256 MiB"):
        published = dataclasses.replace(CIFAR10, sha256=digest)
        open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")


def test_an_absurdly_large_member_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, _ = cifar10_members()
    published = pack(tmp_path / "a.tar.gz", CIFAR10, members)
    monkeypatch.setattr("pipeline.dataset.cifar._MAX_MEMBER", 1 << 10)
    with pytest.raises(DatasetError, match="test_batch: expected a file of at most 0 MiB"):
        open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")


@pytest.mark.parametrize("at", [0, 20, 200, 5000])
@pytest.mark.parametrize("rest", [b"", b"\xff" * 99_000])
def test_a_torn_archive_is_refused_even_if_the_hash_fits(at: int, rest: bytes, tmp_path: Path) -> None:
    members, _ = cifar10_members()
    pack(tmp_path / "a.tar.gz", CIFAR10, members)
    torn = (tmp_path / "a.tar.gz").read_bytes()[:at] + rest
    (tmp_path / "a.tar.gz").write_bytes(torn)
    published = dataclasses.replace(CIFAR10, sha256=hashlib.sha256(torn).hexdigest())
    with pytest.raises(DatasetError, match=r"expected a (whole \.tar\.gz file|pickled batch)"):
        open_cifar(published, downloads=tmp_path, archive=tmp_path / "a.tar.gz")
