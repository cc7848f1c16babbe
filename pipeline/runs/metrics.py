"""Compute the metrics of a classifier from labels and probabilities; independent of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_DENSE = 200  # classes up to which the full confusion matrix and the probabilities of all classes are stored
_MOST_CELLS = 1_000_000  # cells of a larger matrix that are stored, those with the highest counts first
_BINS = 15  # bins of the calibration
_TOP = 5
_BLOCK = 1 << 22  # probabilities processed at the same time: 32 MB as float64


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a classifier on one split; rows are processed in blocks to save memory.

    Parameters
    ----------
    labels : (n,) int
        Indices into `classes`.
    probabilities : (n, k) float
        One row for each image, summing to 1.

    Returns
    -------
    dict with `accuracy` and its 95% Wilson interval, `top5_accuracy` (None for five classes or fewer),
    `balanced_accuracy`, `macro_f1`, `log_loss` (nats), `roc_auc` (each class against the rest, their mean; None if it
    is defined for no class), `expected_calibration_error` and its bins `calibration`, `per_class` (precision, recall,
    f1, roc_auc, support) and `confusion`. This is (k, k), rows being the true classes. For more than 200 classes it is
    a list of [true, predicted, count]. If that list would have more than a million entries, the largest are kept, and
    `confusion_left_out` is the number of images in the others.
    """
    from sklearn import metrics

    predicted, confidence, own, sums, in_top = _by_image(labels, probabilities)
    indices = np.arange(len(classes))
    scores: Any = metrics.precision_recall_fscore_support(
        labels,
        predicted,
        labels=indices,
        zero_division=0.0,  # pyright: ignore[reportArgumentType]
    )
    _, recall, f1, support = scores
    present = support > 0
    hits = int((predicted == labels).sum())
    areas = _roc_areas(labels, probabilities, sums)
    known = [area for area in areas if area is not None]
    bins = calibration(confidence, predicted == labels)
    least = np.finfo(own.dtype).eps
    return {
        "images": len(labels),
        "accuracy": hits / len(labels),
        "accuracy_interval": list(wilson_interval(hits, len(labels))),
        "top5_accuracy": float(in_top.mean()) if len(classes) > _TOP else None,
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "log_loss": float(-np.log(np.clip(own, least, 1 - least)).mean()),
        "roc_auc": float(np.mean(known)) if known else None,
        "expected_calibration_error": _calibration_error(bins),
        "calibration": bins,
        "per_class": [_of_class(*each) for each in zip(classes, *scores, areas, strict=True)],
        **_confusion(labels, predicted, len(classes)),
    }


def _of_class(
    name: str, precision: float, recall: float, f1: float, support: int, area: float | None
) -> dict[str, Any]:
    measured = {"precision": float(precision), "recall": float(recall), "f1": float(f1), "roc_auc": area}
    return {"class": name, **measured, "support": int(support)}


def _by_image(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return five arrays (n,), one value for each image.

    They are the predicted class, its probability, the probability of the true class, the sum of the row, and whether
    the true class is among the five likeliest. Of classes with equal probability, the last one ranks highest, as in
    scikit-learn's `top_k_accuracy_score`.
    """
    n, k = probabilities.shape
    predicted, in_top = np.zeros(n, np.int64), np.zeros(n, bool)
    confidence, own, sums = np.zeros((3, n))
    for start in range(0, n, rows := max(1, _BLOCK // k)):
        part = slice(start, start + rows)
        shares = probabilities[part].astype(np.float64)
        sums[part] = shares.sum(axis=1)
        shares /= sums[part, None]  # float32 rows sum to 1 only within 1e-7
        truth = labels[part, None]
        of_truth = np.take_along_axis(shares, truth, axis=1)
        before = (shares > of_truth) | ((shares == of_truth) & (np.arange(k) > truth))
        predicted[part], confidence[part], own[part] = shares.argmax(axis=1), shares.max(axis=1), of_truth[:, 0]
        in_top[part] = before.sum(axis=1) < _TOP
    return predicted, confidence, own, sums, in_top


def _roc_areas(labels: np.ndarray, probabilities: np.ndarray, sums: np.ndarray) -> list[float | None]:
    """Return the area under the ROC curve of each class against the rest; None if no image or every image has it."""
    n, k = probabilities.shape
    areas: list[float | None] = []
    for start in range(0, k, columns := max(1, _BLOCK // n)):
        shares = probabilities[:, start : start + columns].T / sums  # float64
        for i, share in enumerate(shares, start):
            positive = labels == i
            areas.append(_area(share[positive], np.sort(share)) if positive.any() and not positive.all() else None)
    return areas


def _area(positive: np.ndarray, ordered: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs in which the positive scores higher; ties count half.

    `positive` are the scores of the positives, `ordered` the sorted scores of all images.
    """
    p, n = len(positive), len(ordered)
    below = (np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")).sum() / 2
    return float((below - p * p / 2) / (p * (n - p)))  # subtract pairs of two positives, of which half count


def _confusion(labels: np.ndarray, predicted: np.ndarray, k: int) -> dict[str, Any]:
    cells, counts = np.unique(labels.astype(np.int64) * k + predicted, return_counts=True)
    if k <= MOST_DENSE:
        return {"confusion": np.bincount(cells, counts, k * k).astype(int).reshape(k, k).tolist()}
    kept = np.sort(np.argsort(-counts, kind="stable")[:_MOST_CELLS])
    left_out = int(counts.sum() - counts[kept].sum())
    triples = np.stack([cells // k, cells % k, counts], axis=1)[kept].tolist()
    return {"confusion": triples, **({"confusion_left_out": left_out} if left_out else {})}


def confusion_cells(confusion: Any, k: int) -> np.ndarray:
    """Return the cells (m, 3) int64 of a stored confusion matrix: true class, predicted class, number of images (> 0).

    Raises
    ------
    ValueError
        If `confusion` is neither (k, k) counts nor a list of triples within k classes.
    """
    found = np.array(confusion)
    if found.dtype.kind == "i" and found.shape == (k, k):  # early versions used this form for any k
        return np.column_stack([*np.nonzero(found), found[np.nonzero(found)]])
    if k <= MOST_DENSE or found.dtype.kind != "i" or found.shape[1:] != (3,) or not (found[:, :2] >= 0).all():
        raise ValueError(f"a confusion matrix of another shape or kind, {found.shape} {found.dtype}")
    if not (found[:, :2] < k).all() or not (found[:, 2] > 0).all():
        raise ValueError("a confusion matrix of other classes")
    return found


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Return the confidence and the accuracy of a classifier, in 15 bins of equal width over [0, 1].

    Parameters
    ----------
    confidence : (n,) float
        The probability of the predicted class.
    right : (n,) bool
        Whether the predicted class is the true class.

    Returns
    -------
    list of dicts with `from`, `to`, `images`, and the means `confidence` and `accuracy` (None in an empty bin).
    """
    edges = np.linspace(0, 1, _BINS + 1)
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)  # bins are (low, high], as in Guo et al.
    found = []
    for i in range(_BINS):
        inside = place == i
        some = bool(inside.any())
        found.append(
            {
                "from": float(edges[i]),
                "to": float(edges[i + 1]),
                "images": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if some else None,
                "accuracy": float(right[inside].mean()) if some else None,
            }
        )
    return found


def _calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Return the expected calibration error (Guo et al. 2017, On Calibration of Modern Neural Networks)."""
    n = sum(each["images"] for each in bins)
    return sum(each["images"] / n * abs(each["accuracy"] - each["confidence"]) for each in bins if each["images"])


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion, by Wilson's score method."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
