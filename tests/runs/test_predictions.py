"""`predictions.csv`: what was said image by image, written in two forms and read again."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.utf8 import to_utf8
from pipeline.runs.predictions import Predictions, read_predictions, write_predictions

ODD_NAMES = ["a,b.png", 'quo"te.png', "two\nlines.png", "carriage\rreturn.png", "\udcff\udc80.png", "=1+1", "é漢.png"]


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions_have_a_row_for_each_image(tmp_path: Path) -> None:
    val = Predictions("val", ["a.png"], np.array([1]), np.array([[0.25, 0.75]], np.float32))
    test = Predictions("test", ["b.png"], np.array([1]), np.array([[0.9, 0.1]], np.float32))
    write_predictions(tmp_path / "predictions.csv", [val, test], ["cat", "dog"])
    assert read_csv(tmp_path / "predictions.csv") == [
        ["image", "split", "label", "predicted", "probability", "p:cat", "p:dog"],
        ["a.png", "val", "dog", "dog", "0.75", "0.25", "0.75"],
        ["b.png", "test", "dog", "cat", "0.9", "0.9", "0.1"],
    ]


def test_predictions_of_oddly_named_files_are_written_whole(tmp_path: Path) -> None:
    n = len(ODD_NAMES)
    part = Predictions("test", ODD_NAMES, np.zeros(n, np.int32), np.full((n, 2), 0.5, np.float32))
    write_predictions(tmp_path / "predictions.csv", [part], ["a,\n\udcff", "b"])
    header, *rows = read_csv(tmp_path / "predictions.csv")
    expected = [name.encode("utf-8", "backslashreplace").decode() for name in ODD_NAMES]
    assert [row[0] for row in rows] == expected
    assert {len(row) for row in rows} == {len(header)} == {7}
    assert header[5] == "p:a,\n\\udcff"


def test_names_that_look_spelt_out_are_told_apart(tmp_path: Path) -> None:
    names = ["\udcff", "\\udcff", "\\x5cudcff", "\\\udcff", "\\\\udcff", "A", "a", "\\", "\\udcf", *ODD_NAMES]
    assert len({to_utf8(name) for name in names}) == len(names)
    said = np.roll(np.eye(len(names), dtype=np.float32), 1, axis=1)
    part = Predictions("test", names, np.arange(len(names)), said)
    write_predictions(tmp_path / "predictions.csv", [part], names)
    found = read_predictions(tmp_path / "predictions.csv", names)
    assert found == {
        ("test", to_utf8(name)): [(label, (label + 1) % len(names), 1.0)] for label, name in enumerate(names)
    }


def test_of_many_classes_the_ten_likeliest_are_kept(tmp_path: Path) -> None:
    classes = [f"class {i}" for i in range(201)]
    row = np.zeros((3, 201), np.float32)
    row[0, 100:112] = np.arange(12, 0, -1) / 100
    row[1, [7, 3, 9]] = 0.25
    row[2] = 1 / 201
    part = Predictions("val", ["a", "b", "a"], np.array([5, 3, 200]), row)
    write_predictions(tmp_path / "predictions.csv", [part], classes)
    header, first, second, _ = read_csv(tmp_path / "predictions.csv")
    assert header[:5] == ["image", "split", "label", "predicted", "probability"]
    assert header[5:] == [f"{of}_{rank}" for rank in range(2, 11) for of in ("label", "probability")]
    assert first[2] == "class 5"
    assert first[3::2] == [f"class {i}" for i in range(100, 110)]
    assert first[4::2] == [f"{share / 100:.6g}" for share in range(12, 2, -1)]
    assert second[3:9] == ["class 3", "0.25", "class 7", "0.25", "class 9", "0.25"], "equal ones in their order"
    answers = read_predictions(tmp_path / "predictions.csv", classes)
    assert [said[:2] for said in answers["val", "a"]] == [(5, 100), (200, 0)]
    assert answers["val", "b"] == [(3, 3, 0.25)]


def test_a_file_of_before_is_read_whatever_its_classes_are_called(tmp_path: Path) -> None:
    lines = "image,split,label,predicted,probability,p:\\udcff,p:b\n\\udcff.png,test,\\udcff,b,0.5,0.5,0.5\n"
    (tmp_path / "predictions.csv").write_text(lines)
    for name in ("\udcff", "\\udcff"):  # one of which it was
        assert read_predictions(tmp_path / "predictions.csv", [name, "b"]) == {("test", "\\udcff.png"): [(0, 1, 0.5)]}


def test_what_is_no_probability_is_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("image,split,label,predicted,probability\na,test,a,a,nan\n")
    with pytest.raises(ValueError, match="'nan' where a probability should be"):
        read_predictions(tmp_path / "predictions.csv", ["a"])
