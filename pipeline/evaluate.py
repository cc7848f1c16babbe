"""Labels and probabilities → named numbers. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_BINS = 15  # of the calibration


def evaluate(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a classifier on one split.

    Parameters
    ----------
    labels : (n,) int
        Indices into `classes`.
    probabilities : (n, k) float
        One row an image, summing to 1.

    Returns
    -------
    dict with `accuracy` and its 95% Wilson interval, `top5_accuracy` (None for five classes or fewer),
    `balanced_accuracy`, `macro_f1`, `log_loss` (nats), `roc_auc` (each class against the rest, their mean; None if
    no class can be told from the rest), `expected_calibration_error` and its bins `calibration`, `per_class`
    (precision, recall, f1, roc_auc, support) and `confusion` (k, k), rows being the true classes.
    """
    from sklearn import metrics

    probabilities = probabilities.astype(np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)  # float32 sums to 1 within 1e-7, not within 1e-15
    predicted = probabilities.argmax(axis=1)
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
    areas = [_roc_auc(labels == i, probabilities[:, i]) for i in indices]
    known = [area for area in areas if area is not None]
    bins = calibration(probabilities.max(axis=1), predicted == labels)
    return {
        "images": len(labels),
        "accuracy": hits / len(labels),
        "accuracy_interval": list(wilson_interval(hits, len(labels))),
        "top5_accuracy": _top_accuracy(labels, probabilities, 5),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "log_loss": float(metrics.log_loss(labels, probabilities, labels=indices)),
        "roc_auc": float(np.mean(known)) if known else None,
        "expected_calibration_error": _calibration_error(bins),
        "calibration": bins,
        "per_class": [_of_class(*each) for each in zip(classes, *scores, areas, strict=True)],
        "confusion": metrics.confusion_matrix(labels, predicted, labels=indices).tolist(),
    }


def _of_class(
    name: str, precision: float, recall: float, f1: float, support: int, area: float | None
) -> dict[str, Any]:
    measured = {"precision": float(precision), "recall": float(recall), "f1": float(f1), "roc_auc": area}
    return {"class": name, **measured, "support": int(support)}


def _top_accuracy(labels: np.ndarray, probabilities: np.ndarray, k: int) -> float | None:
    from sklearn.metrics import top_k_accuracy_score

    classes = probabilities.shape[1]
    if classes <= k:
        return None
    return float(top_k_accuracy_score(labels, probabilities, k=k, labels=np.arange(classes)))


def _roc_auc(positive: np.ndarray, score: np.ndarray) -> float | None:
    """Return the area under the ROC curve of one class against the rest; None if either is absent."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, score)) if positive.any() and not positive.all() else None


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Return how sure a classifier was and how often it was right, in 15 bins of equal width over [0, 1].

    Parameters
    ----------
    confidence : (n,) float
        The probability of the predicted class.
    right : (n,) bool
        Whether it was the true one.

    Returns
    -------
    list of dicts with `from`, `to`, `images`, and the means `confidence` and `accuracy` (None in an empty bin).
    """
    edges = np.linspace(0, 1, _BINS + 1)
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)  # (low, high], as in Guo et al.
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
