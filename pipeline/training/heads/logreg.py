"""Fit the baseline head `logreg`: standardisation and multinomial logistic regression over pooled rows.

The inverse penalty C is chosen from an ascending path of values, by the loss on the validation split or by
cross-validation within the training split. Each fit starts from the coefficients of the previous one. Then one
temperature calibrates the probabilities (Guo et al. 2017, On Calibration of Modern Neural Networks); the
coefficients are divided by it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import files, machine
from pipeline.core.errors import DatasetError, DoNotFitError, RunError
from pipeline.core.files import write_json
from pipeline.core.lazy_imports import without
from pipeline.core.spec import HeadSpec
from pipeline.core.units import counted, size_text
from pipeline.training.heads.base import JSON_FILE, Data, Fitted, cross_entropy, not_numbers, stratified_folds
from pipeline.training.loop import TrainingContext
from pipeline.training.rows import Rows, StoredRows, blocks

logger = logging.getLogger(__name__)

_SKOPS_FILE = "head.skops"
_FOLDS = 5
_WORSE = 2  # stop after this many successive larger C that are worse than the best so far
_WORTH_THREADS = 2**24  # values in the training rows; with fewer, several threads of linear algebra are slower than one
_TEMPERATURES = (0.05, 20.0)
_AT_ONCE = 1 << 23  # probabilities in memory at a time: 64 MB
_TABLES = 3  # float32 tables of rows times classes that the solver has in memory at a time


def _skops() -> Any:
    with without("dask", "torch"):  # skops walks all of scikit-learn's modules, which would import these two
        import skops.io
    return skops.io


class LogregHead:
    """Standardisation and multinomial logistic regression over pooled rows."""

    def __init__(self, pipeline: Any, classes: int) -> None:
        self.pipeline = pipeline
        self.classes = classes

    def predict(self, rows: Rows) -> np.ndarray:
        """Return class probabilities (n, k) float32; 0 for a class without training rows."""
        probabilities = np.zeros((len(rows), self.classes), np.float32)
        for at, some in blocks(rows):
            probabilities[np.ix_(at, self.pipeline.classes_)] = self.pipeline.predict_proba(some)
        return probabilities

    def save(self, directory: Path) -> None:
        """Write a skops file and `head.json`."""
        _skops().dump(self.pipeline, directory / _SKOPS_FILE)
        digest = files.sha256_file(directory / _SKOPS_FILE)
        write_json(directory / JSON_FILE, {"head": "logreg", "classes": self.classes, "sha256": digest})

    @classmethod
    def load(cls, directory: Path, made: Mapping[str, Any]) -> LogregHead:
        """Return the head in `directory`; `made` is the content of `head.json`.

        Raises RunError if the file is not the saved one, or holds types that skops does not trust.
        """
        from sklearn.pipeline import Pipeline

        skops = _skops()
        path = directory / _SKOPS_FILE
        if files.sha256_file(path) != made["sha256"]:
            raise RunError(f"{_SKOPS_FILE} is not the file that was saved")
        if strange := skops.get_untrusted_types(file=path):
            raise RunError(f"{path} holds types that a logistic regression does not: {', '.join(strange)}")
        pipeline = skops.load(path, trusted=[])
        if not isinstance(pipeline, Pipeline) or not max(pipeline.classes_) < made["classes"]:
            raise RunError(f"{path} does not hold a logistic regression over {made['classes']} classes")
        return cls(pipeline, made["classes"])

    @property
    def kind(self) -> str:
        """The head's name."""
        return "logreg"

    @property
    def parameters(self) -> int:
        """The number of coefficients and intercepts."""
        regression = self.pipeline[-1]
        return regression.coef_.size + regression.intercept_.size


@dataclass(frozen=True)
class _Fit:
    """A calibrated regression at one C, and its validation loss and accuracy."""

    c: float
    regression: Any
    temperature: float
    converged: bool
    val_loss: float
    val_accuracy: float


def fit_steps(spec: HeadSpec) -> int:
    """Return the largest number of fits that `fit_logreg` makes."""
    path = len(spec.settings["C"])
    return path * (_FOLDS + 1) if spec.settings["select"] == "cv" and path > 1 else path


def fit_logreg(spec: HeadSpec, data: Data, watch: TrainingContext) -> Fitted:
    """Fit a new regression. Needs all rows in memory twice: unchanged and standardised.

    Raises
    ------
    DoNotFitError
        If the rows are streamed from disk, or the solver's tables do not fit into memory.
    DatasetError
        If a row holds NaN or infinity, or if C is chosen by cross-validation and there are too few rows for folds.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    settings = spec.settings
    train, val = _all(data.train, "the training split"), _all(data.val, "the validation split")
    _require_room(len(train), data.classes)
    scaler: Any = StandardScaler().fit(train)
    train, val = scaler.transform(train), scaler.transform(val)
    path = settings["C"]
    by_folds = settings["select"] == "cv" and len(path) > 1
    losses = _losses_by_folds(settings, train, data, watch.advance) if by_folds else None
    fits, history = list[_Fit](), list[dict[str, float]]()
    for fit in _along(path, settings, train, data.train_labels, val, data.val_labels):
        entry = _entry(fit, train, data.train_labels)
        if losses is not None:
            entry["cv_loss"] = losses[len(fits)]
        fits.append(fit)
        history.append(entry)
        watch.note(entry)
        watch.advance(1)
        if losses is None and len(fits) - 1 - _best([fit.val_loss for fit in fits]) >= _WORSE:
            watch.advance(len(path) - len(fits))  # larger C take longer than all before, and overfit more
            break
    chosen = _best([fit.val_loss for fit in fits] if losses is None else losses)
    best = fits[chosen]
    _warn(best, fits, settings["max_iter"])
    facts: dict[str, float | bool] = {"C": best.c, "converged": best.converged, "temperature": best.temperature}
    return Fitted(LogregHead(make_pipeline(scaler, best.regression), data.classes), history, "C", None, facts)


def _best(losses: Sequence[float] | np.ndarray) -> int:
    return int(np.argmin(losses))


def _along(
    path: tuple[float, ...],
    settings: Mapping[str, Any],
    train: np.ndarray,
    labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
) -> Iterator[_Fit]:
    """Yield a calibrated fit for each C of the ascending `path`; each fit starts from the previous coefficients."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    threads = 1 if train.size < _WORTH_THREADS else machine.usable_cores()
    weight = None if settings["class_weight"] == "none" else settings["class_weight"]
    moving: Any = LogisticRegression(max_iter=settings["max_iter"], class_weight=weight, warm_start=True)
    for c in path:
        moving.C = c
        with warnings.catch_warnings(), machine.computing_threads(threads):
            warnings.simplefilter("ignore", ConvergenceWarning)  # `_warn` reports it
            warnings.simplefilter("ignore", UserWarning)  # that there are many classes for few images
            moving.fit(train, labels)
        temperature = _temperature(moving, val, val_labels) if settings["calibrate"] else 1.0
        fixed: Any = LogisticRegression(C=c, max_iter=settings["max_iter"], class_weight=weight)
        fixed.classes_, fixed.n_iter_, fixed.n_features_in_ = moving.classes_, moving.n_iter_, moving.n_features_in_
        fixed.coef_, fixed.intercept_ = moving.coef_ / temperature, moving.intercept_ / temperature
        converged = bool(max(moving.n_iter_) < settings["max_iter"])
        yield _Fit(c, fixed, temperature, converged, *_measured(fixed, val, val_labels))


def _temperature(regression: Any, val: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature: the divisor of the logits with the least loss on the validation split."""
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    known = np.isin(labels, regression.classes_)
    if not known.any():
        return 1.0
    truth = np.searchsorted(regression.classes_, labels[known])
    logits = regression.decision_function(val[known])
    if logits.ndim == 1:  # for two classes there is one logit; the first class has the logit 0
        logits = np.column_stack([np.zeros_like(logits), logits])

    def losses(some: np.ndarray, temperature: float) -> np.ndarray:
        scaled = logits[some].astype(np.float64) / temperature
        return logsumexp(scaled, axis=1) - scaled[np.arange(len(some)), truth[some]]

    def loss(log_temperature: float) -> float:
        found = [losses(some, np.exp(log_temperature)) for some in _blocks(*logits.shape)]
        return float(np.concatenate(found).mean())

    found: Any = minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def _losses_by_folds(
    settings: Mapping[str, Any], train: np.ndarray, data: Data, advance: Callable[[int], None]
) -> np.ndarray:
    """Return for each C the mean loss over folds of the training split; the rows of a group stay in one fold."""
    from sklearn.preprocessing import StandardScaler

    groups = np.arange(len(train)) if data.groups is None else data.groups
    losses = np.zeros(len(settings["C"]))
    labels = data.train_labels
    for some, held in stratified_folds(labels, groups, _FOLDS):
        scaler: Any = StandardScaler().fit(train[some])  # held-out rows must not influence it
        ours, theirs = scaler.transform(train[some]), scaler.transform(train[held])
        fits = _along(settings["C"], settings, ours, labels[some], theirs, labels[held])
        for i, fit in enumerate(fits):
            losses[i] += fit.val_loss * len(held) / len(train)
            advance(1)
    return losses


def _entry(fit: _Fit, train: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    loss, accuracy = _measured(fit.regression, train, labels)
    return {
        "C": fit.c,
        "loss": loss,
        "accuracy": accuracy,
        "val_loss": fit.val_loss,
        "val_accuracy": fit.val_accuracy,
        "iterations": int(max(fit.regression.n_iter_)),
        "converged": fit.converged,
        "temperature": fit.temperature,
    }


def _measured(regression: Any, rows: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return loss and accuracy as `measure` computes them, in blocks of rows that limit memory."""
    classes = int(max(labels.max(), regression.classes_.max())) + 1
    truth, right = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for some in _blocks(len(rows), classes):
        said = np.zeros((len(some), classes))
        said[:, regression.classes_] = regression.predict_proba(rows[some])
        truth[some], right[some] = said[np.arange(len(some)), labels[some]], said.argmax(axis=1) == labels[some]
    return cross_entropy(truth), float(right.mean())


def _blocks(rows: int, columns: int) -> Iterator[np.ndarray]:
    size = max(1, _AT_ONCE // columns)
    return (np.arange(start, min(start + size, rows)) for start in range(0, rows, size))


def _require_room(rows: int, classes: int) -> None:
    """Raise DoNotFitError if the solver's tables of rows times classes do not fit into memory."""
    needed, available = _TABLES * rows * classes * 4, machine.available_memory()
    if needed > available:
        raise DoNotFitError(
            f"logreg of {rows:,} rows and {classes:,} classes takes {size_text(needed)} of memory, and "
            f"{size_text(available)} are available: train the same model streamed, by --head gap --hidden none"
        )


def _all(rows: Rows, where: str) -> np.ndarray:
    """Return all rows as one array (n, c) of finite numbers.

    Raises DoNotFitError if the rows are streamed from disk, DatasetError if a row holds NaN or infinity.
    """
    if isinstance(rows, StoredRows):
        size = f"{len(rows):,} of {where} alone are {len(rows) * rows.row_bytes:,} bytes"
        raise DoNotFitError(
            f"logreg needs all rows in memory, and {size}: allow more by --memory, or train the same model streamed, "
            "by --head gap --hidden none"
        )
    held = rows if isinstance(rows, np.ndarray) else rows[np.arange(len(rows))]
    if not np.isfinite(held).all():
        raise DatasetError(not_numbers(where))
    return held


def _warn(best: _Fit, fits: list[_Fit], max_iter: int) -> None:
    if not best.converged:
        tried = counted(max_iter, "iteration")
        logger.warning("the regression at C=%g did not converge in %s: raise --max-iter", best.c, tried)
    if len(fits) > 1 and best.c in (fits[0].c, fits[-1].c):
        logger.warning("the best C, %g, is the %s tried: try %s ones by --C", *_edge(best, fits))


def _edge(best: _Fit, fits: list[_Fit]) -> tuple[float, str, str]:
    return (best.c, "smallest", "smaller") if best.c == fits[0].c else (best.c, "largest", "larger")
