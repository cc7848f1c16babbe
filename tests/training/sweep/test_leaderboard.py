"""Trials in their order, with what chance allows."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.core.spec import HeadSpec
from pipeline.runs.plots import draw_cost
from pipeline.training.sweep.leaderboard import (
    ExtractionCost,
    Trial,
    best_of_each,
    cost_points,
    draw_leaderboard,
    fastest_sentence,
    leaderboard,
    mcnemar,
    noise_sentence,
    pareto_front,
    unmeasured_sentence,
    varied,
    write_leaderboard,
)

COST = ExtractionCost("small.keras", "own_00000000-out-00000000", 100.0, 500)
GAP = [HeadSpec.make("gap", learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2)]


def trial(spec: HeadSpec, right: int, *, of: int = 100, loss: float = 1.0, error: str | None = None) -> Trial:
    hits = np.arange(of) < right
    return Trial(spec.identity, spec, COST, hits if error is None else hits[:0], loss, 2.0, 1000, 4000, error)


def test_the_best_stands_first_and_a_failure_last() -> None:
    rows = leaderboard([trial(GAP[0], 50), trial(GAP[1], 0, error="the loss is nan"), trial(GAP[2], 60)])
    assert [row["settings"]["learning_rate"] for row in rows] == [1e-2, 1e-4, 1e-3]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert rows[2]["error"] == "the loss is nan"
    assert rows[2]["val_accuracy"] is None


def test_equal_accuracies_are_ranked_by_the_loss() -> None:
    rows = leaderboard([trial(GAP[0], 50, loss=0.9), trial(GAP[1], 50, loss=0.8)])
    assert rows[0]["val_loss"] == 0.8


def test_mcnemar_counts_only_where_the_two_disagree() -> None:
    one, other = np.zeros(1000, bool), np.zeros(1000, bool)
    one[:12], other[10:14] = True, True  # 10 that only one got right, 2 that only the other did
    assert mcnemar(one, other) == pytest.approx(binomtest(10, 12).pvalue) == mcnemar(other, one)
    assert mcnemar(one, one) == 1.0


def test_differences_within_noise_are_told_from_others() -> None:
    rows = leaderboard([trial(GAP[0], 60), trial(GAP[1], 57), trial(GAP[2], 40)])
    assert [row["within_noise"] for row in rows] == [True, True, False]
    assert rows[1]["p_value"] == pytest.approx(0.25)  # three of three coins
    assert rows[0]["low"] < 0.6 < rows[0]["high"]


@pytest.mark.parametrize(
    ("right", "sentence"),
    [
        ([60], "no other setting to compare the best with"),
        ([60, 40], "the best is better than the 1 other setting, beyond chance (p of McNemar's test < 0.05)"),
        ([60, 40, 30], "the best is better than all 2 other settings, beyond chance (p of McNemar's test < 0.05)"),
        (
            [60, 57],
            "of 1 other setting, 1 may be as good as the best on the validation split (p of McNemar's test ≥ 0.05)",
        ),
        ([60, 57, 40], "of 2 other settings, 1 may be as good as the best on the validation split"),
    ],
)
def test_how_many_others_may_be_as_good_is_a_sentence_for_any_number(right: list[int], sentence: str) -> None:
    trials = [trial(spec, count) for spec, count in zip(GAP, right, strict=False)]
    assert noise_sentence(leaderboard(trials)).startswith(sentence)
    failed = trial(HeadSpec.make("logreg"), 0, error="the loss is nan")
    assert noise_sentence(leaderboard([*trials, failed])).startswith(sentence), "a failure is compared with nothing"


def test_settings_are_told_by_what_was_varied() -> None:
    rows = leaderboard([trial(GAP[0], 60), trial(GAP[1], 57), trial(HeadSpec.make("logreg"), 50)])
    assert list(varied(rows).values()) == ["learning_rate=0.0001", "learning_rate=0.001", ""]


def test_table_and_picture_are_written(tmp_path: Path) -> None:
    rows = leaderboard([trial(GAP[0], 60), trial(GAP[1], 0, error="nan"), trial(HeadSpec.make("logreg"), 50)])
    write_leaderboard(tmp_path / "leaderboard.csv", rows)
    draw_leaderboard(tmp_path / "leaderboard.png", rows, "$odd_title")
    with (tmp_path / "leaderboard.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["head"] for row in read] == ["gap", "logreg", "gap"]
    assert read[0]["val_accuracy"] == "0.6"
    assert read[1]["learning_rate"] == ""
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def on(backbone: str, right: int, rate: float | None) -> Trial:
    """A trial on the rows of one backbone."""
    cost = ExtractionCost(backbone, f"{backbone}-out-00000000", rate, 500)
    return replace(trial(GAP[0], right), name=f"{backbone}-{right}", cost=cost)


def test_a_backbone_is_on_the_front_unless_another_is_as_good_and_better_in_one() -> None:
    rows = best_of_each(
        leaderboard([on("a", 90, 10.0), on("b", 80, 20.0), on("c", 80, 15.0), on("d", 70, None), on("a", 20, 10.0)])
    )
    assert [row["backbone"] for row in rows] == ["a", "b", "c", "d"]
    assert pareto_front(rows) == [True, True, False, False]
    assert [point.name for point in cost_points(rows)] == [
        "a\n500 bytes a row",
        "b\n500 bytes a row",
        "c\n500 bytes a row",
    ]


def test_the_fastest_backbone_within_noise_of_the_best_is_named() -> None:
    rows = leaderboard([on("slow", 60, 10.0), on("fast", 57, 900.0), on("worse", 30, 9_000.0), on("unknown", 58, None)])
    expected = "fast is within noise of the best and extracted at 900 images/s, slow at 10"
    assert fastest_sentence(rows) == expected
    assert fastest_sentence(leaderboard([on("fast", 60, 900.0), on("slow", 57, 10.0)])) is None
    assert fastest_sentence(leaderboard([on("unknown", 60, None), on("fast", 57, 900.0)])) is None


def test_backbones_without_a_rate_are_named() -> None:
    rows = leaderboard([on("unknown", 60, None), on("fast", 57, 900.0), on("unknown", 50, None)])
    expected = "not in the plot, as no images/s are known here: unknown (`backbones --measure` measures them)"
    assert unmeasured_sentence(rows) == expected
    assert unmeasured_sentence(rows[1:2]) is None


def test_costs_are_drawn_beside_a_name_that_is_no_formula(tmp_path: Path) -> None:
    draw_cost(tmp_path / "cost.png", cost_points(leaderboard([on("$odd_name", 60, 3.0)])), "$odd_title")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
