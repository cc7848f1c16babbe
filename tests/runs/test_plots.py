"""Pictures: what they cannot be drawn for is a notice, and the library's settings have no say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from pipeline.core import lazy_imports
from pipeline.report import page
from pipeline.runs import plots
from pipeline.runs.plots import draw_calibration, draw_curves

HISTORY = [{"epoch": n, "loss": 1 / n, "accuracy": 0.5, "val_loss": 1 / n, "val_accuracy": 0.4} for n in (1, 2, 3)]
BINS = [{"from": 0.0, "to": 1.0, "confidence": 0.5, "accuracy": 0.5, "images": 3}]


def test_the_settings_of_the_program_around_have_no_say_and_stay(tmp_path: Path) -> None:
    draw_curves(tmp_path / "plain.png", HISTORY, "epoch", "a title")
    plain = page.reliability(BINS)
    odd: dict[Any, Any] = {
        "text.usetex": True,
        "figure.dpi": 31,
        "savefig.dpi": 32,
        "axes.facecolor": "red",
        "lines.linewidth": 9,
    }
    with mpl.rc_context(odd):
        draw_curves(tmp_path / "odd.png", HISTORY, "epoch", "a title")
        assert page.reliability(BINS) == plain
        assert {name: mpl.rcParams[name] for name in odd} == odd
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert plain.startswith("<svg ")
    assert "currentColor" in plain


def test_what_cannot_be_drawn_is_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def import_matplotlib() -> Any:
        raise ValueError("no such backend")

    monkeypatch.setattr(plots, "import_matplotlib", import_matplotlib)
    monkeypatch.setattr(plots, "_matplotlib", plots._matplotlib.__wrapped__)  # which remembers that it is there
    draw_curves(tmp_path / "curves.png", HISTORY, "epoch", "a title")
    assert list(tmp_path.iterdir()) == []
    assert "curves.png is left out, matplotlib cannot draw it (no such backend)" in caplog.text
    assert page.curves(HISTORY, "epoch") == ""
    assert "a picture of the page is left out" in caplog.text


def test_a_figure_that_cannot_be_saved_is_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def savefig(*args: object, **kwargs: object) -> None:
        raise RuntimeError("latex was not able to process the following string")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    draw_curves(tmp_path / "curves.png", HISTORY, "epoch", "a title")
    assert list(tmp_path.iterdir()) == []
    assert "curves.png is left out, matplotlib cannot draw it (latex was not able" in caplog.text


def test_values_that_are_none_are_an_error(tmp_path: Path) -> None:
    """Whoever reads them from a file says so of that file."""
    with pytest.raises(KeyError):
        draw_curves(tmp_path / "curves.png", [{"epoch": 1, "loss": 1.0}, {"epoch": 2}], "epoch", "a title")


def test_a_folder_that_takes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        draw_calibration(tmp_path / "nowhere" / "calibration.png", BINS, "a title")


def test_a_backend_that_is_not_there_is_left_to_those_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.backend")
    assert lazy_imports.import_matplotlib() is mpl
    assert os.environ["MPLBACKEND"] == "module://nowhere.backend"
