"""A run directory appears whole or not at all, under a name of its own; what it holds can be read back."""

import json
import logging
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pipeline.core.errors import RunError
from pipeline.core.files import write_json
from pipeline.runs.checksums import write_checksums
from pipeline.runs.plots import draw_curves
from pipeline.runs.store import (
    find_run,
    latest_of,
    list_runs,
    new_folder,
    new_run,
    now,
    published_names,
    remove_leftovers,
    unfinished,
    write_request,
)

ODD_NAMES = ["a,b.png", 'quo"te.png', "two\nlines.png", "carriage\rreturn.png", "\udcff\udc80.png", "=1+1", "é漢.png"]


def published(root: Path) -> list[str]:
    """What a reader sees: everything that is not hidden."""
    return sorted(path.name for path in root.glob("[!.]*"))


def test_a_run_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with new_run(tmp_path / "runs", "digits-gap") as (name, directory):
        (directory / "run.json").write_text("{}")
        assert published(tmp_path / "runs") == []
    assert published(tmp_path / "runs") == [name]
    assert (tmp_path / "runs" / name / "run.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]


def test_after_an_error_nothing_is_left_and_the_error_is_the_same(tmp_path: Path) -> None:
    fault = ZeroDivisionError("a fault")
    with pytest.raises(ZeroDivisionError) as caught, new_run(tmp_path, "digits-gap") as (_, directory):
        (directory / "run.json").write_text("{}")
        raise fault
    assert caught.value is fault
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_only_a_hidden_folder_is_left(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from pipeline.runs.store import new_run\n"
        "with new_run(Path(sys.argv[1]), 'digits-gap') as (_, directory):\n"
        "    (directory / 'run.json').write_text('{}'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False).returncode == 9
    assert published(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_two_runs_that_start_in_the_same_second_and_overlap_are_both_published(tmp_path: Path) -> None:
    for _ in range(3):  # a second may turn between the two, hardly three times
        with new_run(tmp_path, "digits-gap") as (first, one), new_run(tmp_path, "digits-gap") as (second, two):
            (one / "run.json").write_text(first)
            (two / "run.json").write_text(second)
        assert first != second
    names = published(tmp_path)
    assert len(names) == 6
    assert [(tmp_path / name / "run.json").read_text() for name in names] == names


def test_many_runs_at_once_are_all_published_under_the_names_they_were_told(tmp_path: Path) -> None:
    barrier = threading.Barrier(12)

    def work() -> None:
        barrier.wait()
        with new_run(tmp_path, "digits-gap") as (name, directory):
            (directory / "run.json").write_text(name)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = published(tmp_path)
    assert len(names) == 12
    assert [(tmp_path / name / "run.json").read_text() for name in names] == names


@pytest.mark.parametrize(
    ("title", "slug"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("my photos: 2024/gap", "my-photos-2024-gap"),
        ("\udcff漢字\n", "run"),
        ("..", "run"),
        ("", "run"),
        ("CIFAR_10.v2-gap", "CIFAR_10.v2-gap"),
    ],
)
def test_odd_characters_do_not_get_into_a_name(tmp_path: Path, title: str, slug: str) -> None:
    with new_run(tmp_path / "runs", title) as (name, _):
        pass
    assert name.split("-", 2)[2] == slug
    assert published(tmp_path / "runs") == [name]
    assert published(tmp_path) == ["runs"]


def test_a_long_title_makes_a_name_that_a_file_system_takes(tmp_path: Path) -> None:
    with new_run(tmp_path, "x" * 255 + "-flatten") as (name, _):
        pass
    assert published(tmp_path) == [name]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "runs"
    blocked.write_text("a file stands where the folder should")
    with pytest.raises(RunError, match="no run can be written to") as caught, new_run(blocked, "digits-gap"):
        pass
    assert "\n" not in str(caught.value)


def test_json_that_nobody_would_read_again_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "small.json", ["x" * 50], 100)
    with pytest.raises(RunError, match=r"large\.json would have 109 bytes; 100 are read at most"):
        write_json(tmp_path / "large.json", ["x" * 101], 100)
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]


@pytest.mark.parametrize("value", [ODD_NAMES, dict.fromkeys(ODD_NAMES, "reason")])
def test_json_with_odd_names_reads_back_the_same(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "names.json", value)
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == value


def test_what_killed_evaluations_left_is_removed(tmp_path: Path) -> None:
    name = make_run(tmp_path, "a")
    folder = tmp_path / name / "evaluations"
    (folder / ".partial-killed").mkdir(parents=True)
    (folder / ".partial-killed" / "metrics.json").write_text("{}")
    with new_folder(folder / "photos-test") as partial:
        assert remove_leftovers(tmp_path, resumable=False) == ([folder / ".partial-killed"], 2)
        assert partial.is_dir()
    assert [path.name for path in folder.iterdir()] == ["photos-test"]


DENSE = [{"epoch": i, "loss": 1 / i, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.4} for i in range(1, 4)]
SOLVER = [{"train_rows": n, "accuracy": 1.0, "val_accuracy": 0.5} for n in (10, 20)]


@pytest.mark.parametrize(
    ("history", "x", "panels"),
    [(DENSE, "epoch", 2), (DENSE[:1], "epoch", 2), (SOLVER, "train_rows", 1)],
    ids=["epochs", "one epoch", "solver"],
)
def test_curves_are_a_picture_with_a_panel_for_each_measure(tmp_path: Path, history: list, x: str, panels: int) -> None:
    draw_curves(tmp_path / "curves.png", history, x, "gap on digits")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size == (600 * panels, 432)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50  # lines and letters, not a blank sheet


@pytest.mark.parametrize("title", ["gap on $5_and_$6", "gap on \\frac{$x$", "gap on \udcff", "gap on a_b^c"])
def test_curves_take_any_dataset_name_as_plain_text(tmp_path: Path, title: str) -> None:
    draw_curves(tmp_path / "curves.png", DENSE, "epoch", title)
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def make_run(root: Path, title: str, **more: Any) -> str:
    with new_run(root, title) as (name, directory):
        numbers = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "val_accuracy": 0.5, "seconds": 1.0}
        summary = {"run": name, "head": "gap", "weights": "untrained", **numbers}
        about = {"format": "icebox-run", "version": 1, "dataset": {"name": "x"}, "summary": summary, **more}
        write_json(directory / "run.json", about)
    return name


def test_runs_are_listed_the_oldest_first_without_half_written_ones(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none yet") == []
    names = [make_run(tmp_path, title) for title in ("b", "a", "\udcff")]
    (tmp_path / "a note.txt").write_text("not a run")
    with new_run(tmp_path, "unfinished") as (_, directory):
        (directory / "run.json").write_text("{}")
        assert [about["summary"]["run"] for about in list_runs(tmp_path)] == names


OCTOBER = [  # when the clocks go back: an hour of names comes twice, and a day is over elsewhere
    ("20261025-023000-first", "2026-10-25T00:30:00+00:00"),
    ("20261025-021500-second", "2026-10-25T01:15:00+00:00"),
    ("20261024-193000-third-in-new-york", "2026-10-24T19:30:00-06:00"),
    ("20261025-025959-fourth", "2026-10-25T01:59:59.500+00:00"),
]


def renamed(root: Path, name: str, to: str) -> None:
    (root / name).rename(root / to)


def test_the_latest_run_is_the_last_that_was_made_whatever_clocks_said(tmp_path: Path) -> None:
    for name, created in reversed(OCTOBER):
        renamed(tmp_path, make_run(tmp_path, "x", created=created), name)
    assert published_names(tmp_path) == [name for name, _ in OCTOBER]
    assert find_run(tmp_path, "latest").name == OCTOBER[-1][0]
    (tmp_path / OCTOBER[-1][0]).rename(tmp_path / "00000000-000000-renamed")
    assert find_run(tmp_path, "latest").name == "00000000-000000-renamed"


def test_a_run_that_does_not_say_when_it_was_made_goes_by_its_file(tmp_path: Path) -> None:
    old, said = make_run(tmp_path, "b"), make_run(tmp_path, "a", created="2020-01-01T00:00:00+00:00")
    assert published_names(tmp_path) == [said, old]
    os.utime(tmp_path / old / "run.json", (0, 0))
    assert published_names(tmp_path) == [old, said]


def test_the_last_stopped_run_is_the_last_that_was_begun(tmp_path: Path) -> None:
    for name, created in reversed(OCTOBER):
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        (folder / "checkpoint.npz").touch()
        write_request(folder, {}, "material", None)
        request = json.loads((folder / "request.json").read_text())
        assert datetime.now(UTC) - datetime.fromisoformat(request["created"]) < timedelta(hours=1)
        write_json(folder / "request.json", {**request, "created": created})
    assert unfinished(tmp_path) == [name for name, _ in OCTOBER]
    assert latest_of(unfinished(tmp_path), tmp_path) == OCTOBER[-1][0]


def test_the_best_run_is_of_the_dataset_and_the_classes_of_the_latest(tmp_path: Path) -> None:
    """Two folders called images are two datasets, a class more is another task."""

    def make(path: str, classes: str, val_accuracy: float) -> str:
        about: dict[str, Any] = {"asked": {"images": {"dataset": path}}, "classes": [*classes], "created": now()}
        name = make_run(tmp_path, "images", **about)
        described = json.loads((tmp_path / name / "run.json").read_text())
        described["summary"]["val_accuracy"] = val_accuracy
        write_json(tmp_path / name / "run.json", described)
        write_checksums(tmp_path / name, ())
        return name

    make("/b/images", "xy", 0.99)
    make("/a/images", "xyz", 0.98)
    best = make("/a/images", "xy", 0.9)
    assert find_run(tmp_path, "best").name == best
    latest = make("/a/../a/images", "yx", 0.8)
    assert find_run(tmp_path, "latest").name == latest
    assert find_run(tmp_path, "best").name == best


def test_a_run_whose_description_was_changed_is_not_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, good = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    path = tmp_path / name / "run.json"
    path.write_text(path.read_text().replace("0.5", "0.9", 1))
    with caplog.at_level(logging.WARNING, "pipeline.runs.store"):
        assert [about["summary"]["run"] for about in list_runs(tmp_path)] == [good]
    assert "is not the file that was published" in caplog.text


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other", "version": 1}', '{"format": "icebox-run", "version": 1, "summary": {}}']
)
def test_a_run_that_cannot_be_read_is_named_and_hides_no_other(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, good = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    (tmp_path / name / "run.json").write_text(text)
    with caplog.at_level(logging.WARNING, "pipeline.runs.store"):
        assert [about["summary"]["run"] for about in list_runs(tmp_path)] == [good]
    (record,) = caplog.records
    assert name in record.getMessage()
    assert "\n" not in record.getMessage()
