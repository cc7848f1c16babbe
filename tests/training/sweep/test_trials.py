"""What a sweep tries: every combination or a draw, checked before anything is trained."""

from __future__ import annotations

import math

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.spec import HEADS
from pipeline.training.sweep.trials import DEFAULTS, make_trials


def settings(name: str, *given: str, heads: tuple[str, ...] = ("gap",), draws: int | None = None) -> list[object]:
    return [spec.settings[name] for spec in make_trials(heads, given, draws, 0)]


def test_a_grid_is_every_combination_of_what_was_stated() -> None:
    specs = make_trials(["gap"], ["learning_rate=1e-3,1e-2", "gap.hidden=64,[128,64],none"], None, 0)
    found = {(spec.settings["learning_rate"], spec.settings["hidden"]) for spec in specs}
    assert found == {(rate, hidden) for rate in (1e-3, 1e-2) for hidden in ((64,), (128, 64), ())}
    assert {spec.settings["epochs"] for spec in specs} == {50}, "what is not stated keeps its default"


def test_what_is_stated_for_one_head_is_not_tried_with_another() -> None:
    specs = make_trials(["gap", "flatten"], ["seed=0,1", "flatten.dropout=0,0.5"], None, 0)
    assert [spec.head for spec in specs].count("gap") == 2
    assert [spec.head for spec in specs].count("flatten") == 4


def test_a_head_of_which_nothing_is_stated_has_its_small_grid() -> None:
    for head in HEADS:
        assert 1 <= len(make_trials([head], [], None, 0)) <= 8
    assert DEFAULTS.keys() == set(HEADS)


def test_what_is_stated_for_one_head_counts_before_what_is_for_all() -> None:
    for stated in (["seed=0", "gap.seed=1"], ["gap.seed=1", "seed=0"]):
        specs = make_trials(["gap", "flatten"], stated, None, 0)
        assert {spec.head: spec.settings["seed"] for spec in specs} == {"gap": 1, "flatten": 0}


def test_equal_settings_are_tried_once() -> None:
    assert len(make_trials(["gap", "gap"], ["learning_rate=0.001,1e-3"], None, 0)) == 1


def test_a_draw_is_decided_by_its_seed() -> None:
    stated = ["gap.learning_rate=1e-5..1e-1", "gap.epochs=5..50", "gap.optimizer=adam,sgd"]
    one, same, other = (make_trials(["gap"], stated, 20, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert len({spec.identity for spec in one}) == 20
    assert all(5 <= spec.settings["epochs"] <= 50 for spec in one)


def test_rates_are_drawn_such_that_every_power_of_ten_is_as_likely() -> None:
    rates = settings("learning_rate", "learning_rate=1e-5..1e-1", draws=400)
    powers = [math.floor(math.log10(float(str(rate)))) for rate in rates]
    assert all(60 <= powers.count(power) <= 140 for power in (-5, -4, -3, -2))


def test_a_draw_from_fewer_than_asked_for_ends_with_all_of_them() -> None:
    assert sorted(settings("seed", "seed=0,1,2", draws=50)) == [0, 1, 2]  # type: ignore[type-var]


def test_a_draw_ends_when_there_is_no_more(caplog: pytest.LogCaptureFixture) -> None:
    assert len(make_trials(["gap"], ["seed=0,1"], 3000, 0)) == 2
    assert "there are no more than 2 different settings to draw from" in caplog.text
    with pytest.raises(UsageError, match="--random takes 1 to 10,000 settings, found 100,000"):
        make_trials(["gap"], ["learning_rate=1e-4..1e-2"], 100_000, 0)


@pytest.mark.parametrize(
    ("heads", "stated", "message"),
    [
        (["gpa"], [], "no head named 'gpa'; there are flatten, gap, logreg"),
        (["gap"], ["C=1,10"], "the gap head has no C; its settings are epochs"),
        (["gap", "logreg"], ["learning_rate=1e-3"], "the logreg head has no learning_rate"),
        (["gap"], ["head=flatten"], "the gap head has no head; its settings are epochs"),
        (["gap"], ["cls=1"], "the gap head has no cls; its settings are epochs"),
        (["gap"], ["gap.self=1"], "the gap head has no self; its settings are epochs"),
        (["gap"], ["given=0..1"], "the gap head has no given; its settings are epochs"),
        (["gap"], ["seed=0,1", "seed=2"], "'seed=2': seed was stated before; list all its values in one --set"),
        (["gap"], ["gap.seed=0", "gap.seed=2"], "'gap.seed=2': seed was stated before"),
        (["gap"], ["flatten.dropout=0.1"], "'flatten.dropout=0.1' is for a head that is not tried"),
        (["gap"], ["dropout"], "--set takes NAME=VALUE"),
        (["gap"], ["dropout="], "--set takes NAME=VALUE"),
        (["gap"], [".dropout=1"], "--set takes NAME=VALUE"),
        (["gap"], ["dropout=0.1,2"], "--dropout must be a number in 0 … 0.99, found '2'"),
        (["gap"], ["dropout=0.1..0.5"], "dropout is a range, of which there is no grid"),
        (["gap"], ["dropout=0.5..0.1"], "dropout has no range"),
        (["gap"], ["optimizer=adam..sgd"], "optimizer has no range"),
        (["gap"], ["weight_decay=0..1"], "weight_decay is drawn on a logarithmic scale, which has no 0"),
        (
            ["gap"],
            ["seed=" + ",".join(map(str, range(101))), "epochs=" + ",".join(map(str, range(1, 101)))],
            "too many",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused(heads: list[str], stated: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_trials(heads, stated, None, 0)
    assert message in str(caught.value)
