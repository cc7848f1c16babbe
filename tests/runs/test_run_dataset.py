"""Two runs are of one dataset by the path that was asked for, or by their images; never by a folder's name alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made import key

from pipeline.runs.checksums import write_checksums
from pipeline.runs.run_dataset import RunDataset, distinct, distinct_names, resolved
from pipeline.runs.run_images import RunImages

CAFE = "cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.fixture
def of(tmp_path: Path) -> Any:
    """Make the dataset of a run on a folder, with these images."""

    def make(
        dataset: str, numbers: range | None = None, classes: tuple[str, ...] = ("a", "b"), **more: Any
    ) -> RunDataset:
        folder = tmp_path / "runs" / str(len(list(tmp_path.glob("runs/*"))))
        folder.mkdir(parents=True)
        if numbers is not None:
            RunImages.of({"train": [key(n) for n in numbers]}).write(folder)
            write_checksums(folder, ())
        images = {"images": {"dataset": str(tmp_path / dataset), "image_root": None}}
        return RunDataset(
            folder, {"dataset": {"name": Path(dataset).name, **more}, "asked": images, "classes": [*classes]}
        )

    return make


def test_folders_of_one_name_are_two_datasets(of: Any) -> None:
    one, other = of("x/images", range(10)), of("y/images", range(10, 20))
    assert not one.is_same(other) and distinct([one, other, one]) == [one, other]


def test_without_a_record_of_images_the_path_decides(of: Any) -> None:
    assert not of("x/images").is_same(of("y/images"))
    assert of("x/images").is_same(of("x/../x/images"))


def test_a_link_is_the_folder_it_leads_to(of: Any, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("x")
    assert of("x").is_same(of("link"))


def test_a_path_that_the_file_system_cannot_name_is_a_path(of: Any) -> None:
    name = "x/\ud800"  # as names of elsewhere are where the locale is ASCII or Latin-1
    assert of(name).is_same(of(f"y/../{name}")) and not of(name).is_same(of("x/y"))


def test_where_a_link_led_then_counts(of: Any, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("new")
    then = of("current", path=str(tmp_path / "old"))
    assert not then.is_same(of("current")) and then.is_same(of("old"))


def test_a_moved_or_grown_folder_keeps_its_runs(of: Any) -> None:
    assert of("x", range(10)).is_same(of("moved", range(15)))
    assert of("x", range(10)).is_same(of("x", range(12), classes=("a", "b", "c"))), "a class was added"


def test_the_same_images_under_other_classes_are_the_same_dataset(of: Any) -> None:
    """Of which `best` takes the runs alone that know the classes of the latest."""
    assert of("fine", range(10)).is_same(of("coarse", range(10), classes=("animal", "thing")))
    assert not of("fine", range(10)).is_same(of("fine", range(20, 30), classes=("animal", "thing")))


def test_classes_are_the_same_in_any_order_and_unicode_form(of: Any) -> None:
    assert of("x", classes=("b", CAFE[0])).is_same(of("x", classes=(CAFE[1], "b")))


def test_a_run_that_does_not_say_its_path_goes_by_the_name() -> None:
    first = RunDataset(Path(), {"dataset": {"name": "digits"}, "classes": ["0", "1"]})
    about = {"dataset": {"name": "digits"}, "classes": ["0", "1"], "asked": {"images": {"dataset": "digits"}}}
    assert first.is_same(RunDataset(Path(), about))
    assert not first.is_same(RunDataset(Path(), {**about, "dataset": {"name": "others"}}))


def test_known_datasets_are_no_paths() -> None:
    assert resolved({"dataset": "digits"}) == ("digits", None)
    assert resolved({"dataset": 3}) is None and resolved("digits") is None


def test_paths_are_shown_as_far_as_they_differ() -> None:
    assert distinct_names(["/a/x/images", "/a/y/images", "/b/cats", "/a/x/images", "digits"]) == [
        "x/images", "y/images", "cats", "x/images", "digits",
    ]  # fmt: skip
