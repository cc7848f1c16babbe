"""Labels and probabilities → named numbers. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


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
    dict with `accuracy` and its 95% Wilson interval, `balanced_accuracy`, `macro_f1`, `log_loss` (nats),
    `per_class` (precision, recall, f1, support) and `confusion` (k, k), rows being the true classes.
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
    precision, recall, f1, support = scores
    present = support > 0
    hits = int((predicted == labels).sum())
    return {
        "images": len(labels),
        "accuracy": hits / len(labels),
        "accuracy_interval": wilson_interval(hits, len(labels)),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "log_loss": float(metrics.log_loss(labels, probabilities, labels=indices)),
        "per_class": [
            {
                "class": name,
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        ],
        "confusion": metrics.confusion_matrix(labels, predicted, labels=indices).tolist(),
    }


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion, by Wilson's score method."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
