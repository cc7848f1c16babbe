"""Metrics against cases small enough to work out by hand."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as metrics_of_sklearn

from pipeline.runs.metrics import compute_metrics, confusion_cells, wilson_interval

CLASSES = ("ant", "bee", "cow", "dog")

# Truth: two ants, two bees, one dog and no cow. Said: ant bee | bee bee | cow.
LABELS = np.array([0, 0, 1, 1, 3], np.int32)
PROBABILITIES = np.array(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.2, 0.6, 0.1, 0.1],
        [0.0, 1.0, 0.0, 0.0],
        [0.25, 0.5, 0.25, 0.0],
        [0.1, 0.1, 0.6, 0.2],
    ],
    np.float32,
)


@pytest.fixture
def metrics() -> dict:
    return compute_metrics(LABELS, PROBABILITIES, CLASSES)


def test_accuracy_is_the_share_of_hits(metrics: dict) -> None:
    assert metrics["images"] == 5
    assert metrics["accuracy"] == 3 / 5


def test_confusion_has_a_row_for_each_true_class_and_a_column_for_each_predicted(metrics: dict) -> None:
    assert metrics["confusion"] == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_each_class_has_its_precision_recall_f1_and_support(metrics: dict) -> None:
    table = {entry.pop("class"): entry for entry in metrics["per_class"]}
    areas = [entry.pop("roc_auc") for entry in table.values()]
    assert areas == [pytest.approx(5 / 6), pytest.approx(5 / 6), None, 1.0]
    assert metrics["roc_auc"] == pytest.approx((5 / 6 + 5 / 6 + 1) / 3)
    assert list(table) == list(CLASSES)
    assert table["ant"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2})
    assert table["bee"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "support": 2})
    assert table["cow"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert table["dog"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_means_over_classes_leave_out_a_class_without_images(metrics: dict) -> None:
    assert metrics["balanced_accuracy"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)  # ant, bee, dog
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0.0) / 3)


def test_log_loss_is_the_mean_of_minus_the_log_of_what_the_truth_was_given(metrics: dict) -> None:
    expected = -(math.log(0.7) + math.log(0.2) + math.log(1.0) + math.log(0.5) + math.log(0.2)) / 5
    assert metrics["log_loss"] == pytest.approx(expected, rel=1e-6)


def test_log_loss_stays_finite_when_the_truth_was_given_nothing() -> None:
    sure_and_wrong = np.array([[0.0, 1.0]], np.float32)
    assert 30 < compute_metrics(np.array([0]), sure_and_wrong, ("a", "b"))["log_loss"] < 800


def test_the_interval_is_wilsons(metrics: dict) -> None:
    n, p, z = 5, 3 / 5, 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert metrics["accuracy_interval"] == pytest.approx((centre - half, centre + half), rel=1e-9)


@pytest.mark.parametrize(("hits", "expected"), [(0, (0.0, 0.2775)), (10, (0.7225, 1.0))])
def test_the_interval_of_no_or_only_hits_is_not_a_point(hits: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(hits, 10) == pytest.approx(expected, abs=1e-4)


def test_softmax_in_float32_gives_no_warning() -> None:
    """Rows of float32 sum to 1 within 1e-7 only, which scikit-learn's log loss takes amiss."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, (500, 100)).astype(np.float32)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    assert np.any(shares.sum(axis=1, dtype=np.float64) != 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics(rng.integers(0, 90, 500).astype(np.int32), shares, [str(i) for i in range(100)])
    assert sum(map(sum, metrics["confusion"])) == 500


def test_what_was_handed_in_is_not_altered() -> None:
    labels, probabilities = LABELS.copy(), PROBABILITIES.astype(np.float64) * 3
    before = probabilities.copy()
    compute_metrics(labels, probabilities, CLASSES)
    assert np.array_equal(probabilities, before)
    assert np.array_equal(labels, LABELS)


def test_calibration_error_is_the_mean_gap_between_sure_and_right(metrics: dict) -> None:
    # Sure 0.7 right, 0.6 wrong twice, 1.0 right, 0.5 right.
    assert metrics["expected_calibration_error"] == pytest.approx((0.3 + 2 * 0.6 + 0 + 0.5) / 5, rel=1e-6)
    filled = [each for each in metrics["calibration"] if each["images"]]
    assert [each["images"] for each in filled] == [1, 2, 1, 1]
    assert [each["accuracy"] for each in filled] == [1.0, 0.0, 1.0, 1.0]
    assert all(each["from"] < each["confidence"] <= each["to"] + 1e-6 for each in filled)
    assert len(metrics["calibration"]) == 15


def test_top_five_counts_only_where_there_are_more_classes(metrics: dict) -> None:
    assert metrics["top5_accuracy"] is None
    probabilities = np.tile(np.array([0.3, 0.25, 0.2, 0.12, 0.08, 0.05], np.float32), (4, 1))
    found = compute_metrics(np.array([0, 4, 5, 5]), probabilities, list("abcdef"))
    assert found["top5_accuracy"] == 0.5
    assert found["accuracy"] == 0.25


def many(count: int = 201) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, count, 700).astype(np.int32)
    shares = rng.random((700, count)).round(2) + 0.001  # with ties
    shares[np.arange(700), labels] += rng.choice([0, 1], 700)
    return labels, (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32), [str(i) for i in range(count)]


def test_of_many_classes_the_confusion_is_kept_as_its_cells() -> None:
    labels, shares, classes = many()
    found = compute_metrics(labels, shares, classes)["confusion"]
    whole = metrics_of_sklearn.confusion_matrix(labels, shares.argmax(axis=1), labels=range(201))
    assert found == [[truth, said, whole[truth, said]] for truth, said in np.argwhere(whole).tolist()]
    assert confusion_cells(found, 201).tolist() == confusion_cells(whole.tolist(), 201).tolist() == found


def test_the_rarest_cells_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runs.metrics._MOST_CELLS", 3)
    shares = np.zeros((7, 201), np.float32)
    shares[np.arange(7), [1, 1, 5, 1, 2, 2, 9]] = 1
    found = compute_metrics(np.array([1, 1, 5, 1, 4, 4, 9]), shares, [str(i) for i in range(201)])
    assert found["confusion"] == [[1, 1, 3], [4, 2, 2], [5, 5, 1]]
    assert found["confusion_left_out"] == 1


@pytest.mark.parametrize("value", [[[1, 2, 0]], [[1, -2, 3]], [[1, 201, 3]], [1, 2], [[1.5, 2, 3]], []])
def test_what_is_no_confusion_of_many_classes_is_refused(value: list) -> None:
    with pytest.raises(ValueError, match=r"a confusion matrix of (another shape|other classes)"):
        confusion_cells(value, 201)


@pytest.mark.parametrize("count", [2, 6, 201])
def test_measures_are_those_of_scikit_learn(count: int) -> None:
    """Which are worked out without its (n, k) tables."""
    labels, shares, classes = many(count)
    found, wide = compute_metrics(labels, shares, classes), shares.astype(np.float64)
    wide /= wide.sum(axis=1, keepdims=True)
    assert found["log_loss"] == pytest.approx(metrics_of_sklearn.log_loss(labels, wide, labels=range(count)), rel=1e-12)
    for i, each in enumerate(found["per_class"]):
        area = metrics_of_sklearn.roc_auc_score(labels == i, wide[:, i]) if (labels == i).any() else None
        assert each["roc_auc"] == pytest.approx(area, abs=1e-12)
    if count > 5:
        five = metrics_of_sklearn.top_k_accuracy_score(labels, wide, k=5, labels=range(count))
        assert found["top5_accuracy"] == five
