"""What a dataset's own features say of it: a map, labels that are likely wrong, images that are nearly the same.

All of it is about every image, in memory that grows by about a kilobyte an image, whatever the number of classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.progress import Progress
from pipeline.images import near_duplicates
from pipeline.report.thumbnails import ImageLooks
from pipeline.training.heads.base import deal_folds
from pipeline.training.rows import Rows, blocks

_MOST_TSNE = 5_000  # images; beyond, t-SNE takes minutes
_SAMPLE = 10_000  # images that components, and what is to be chosen, are learned from
_COMPONENTS = 128  # that features are reduced to before anything else: what is left out is mostly noise
_FOLDS = 5
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse penalties of the logistic regression
_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # of the discriminant analysis
_MOST_ITERATED = 1 << 23  # images times classes up to which a regression is fitted: beyond, it takes hours
_BLOCK = 1 << 22  # probabilities that are in memory together: 32 MB
_UNLIKELY = 0.5  # times chance: how likely a label is at most to be called doubtful
_NEIGHBOURS = 3  # by features, of each image, that are looked at for being nearly the same

Fold = tuple[Any, np.ndarray, float]  # a fitted model, the images held out, what to divide logits by


@dataclass(frozen=True, eq=False)
class DatasetIssues:
    """Of n images.

    Parameters
    ----------
    components
        (n, k) float32: principal components of their features.
    likely_wrong
        Indices of images whose label is likely wrong, the likeliest first.
    suggested
        (n,) int: the class that cross-validated features say; -1 where nothing could be learned of the image's class.
    own_probability
        (n,) float: how likely they find the label that is given.
    accuracy
        How often what they say is the label that is given: where this is low, much of what is named is right.
    near
        (m, 2) int: pairs of images that are nearly the same picture, or its mirror image.
    """

    components: np.ndarray
    likely_wrong: np.ndarray
    suggested: np.ndarray
    own_probability: np.ndarray
    accuracy: float
    near: np.ndarray


def reduce_dimensions(rows: Rows) -> np.ndarray:
    """Return (n, c) features as at most 128 principal components of standardised channels: (n, k) float32.

    They are learned from 10,000 rows at most, and the rows gone through in blocks.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    sample = rows[_sample(len(rows))]
    scaler: Any = StandardScaler().fit(sample)
    pca: Any = PCA(min(_COMPONENTS, *sample.shape), svd_solver="randomized", random_state=0)
    pca.fit(scaler.transform(sample))
    components = np.empty((len(rows), pca.n_components_), np.float32)
    for at, some in blocks(rows):
        components[at] = pca.transform(scaler.transform(some))
    return components


def _sample(count: int) -> np.ndarray:
    if count <= _SAMPLE:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _SAMPLE, replace=False))


def find_issues(
    rows: Rows, labels: np.ndarray, groups: np.ndarray, looks: ImageLooks, classes: int, progress: Progress
) -> DatasetIssues:
    """Look at pooled features (n, c), labels (n,), and groups (n,) whose members must not be told apart by folds."""
    with progress("looking at features", len(_STRENGTHS) + 4, "steps") as advance:
        components = reduce_dimensions(rows)
        advance(1)
        folds = cross_validated(components, labels, groups, classes, advance)
        advance(1)
        likely_wrong, suggested, own_probability = _judged(components, labels, classes, folds)
        advance(1)
        near = near_pairs(components, looks)
        advance(1)
    accuracy = float(np.mean(suggested == labels))
    return DatasetIssues(components, likely_wrong, suggested, own_probability, accuracy, near)


def project(components: np.ndarray, method: str | None) -> tuple[np.ndarray, str]:
    """Return where some images lie on a map, (n, 2) float within 0 to 1, by their components, and how it was made."""
    from sklearn.manifold import TSNE

    method = method or ("tsne" if len(components) <= _MOST_TSNE else "pca")
    places = components[:, :2]
    if method == "tsne" and len(components) > 3:
        perplexity = min(30.0, (len(components) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(components[:, :50])
    low, high = places.min(axis=0), places.max(axis=0)
    return (places - low) / np.maximum(high - low, 1e-9), method


def cross_validated(
    components: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, advance: Callable[[int], None]
) -> list[Fold]:
    """Return models of the labels, each with the images it was not fitted on, by five folds; none of too few images.

    They are logistic regressions, with the penalty under which some 10,000 images agree best with their labels; of more
    images and classes than these can be fitted to, discriminant analyses, with the temperature for which they do.
    `advance(1)` is called for each penalty.
    """
    if len(labels) * classes > _MOST_ITERATED:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        advance(len(_STRENGTHS))
        return _cooled(_by_folds(components, labels, groups, LinearDiscriminantAnalysis), components, labels, classes)
    some = _sample(len(labels))
    best, least, chosen = list[Fold](), np.inf, _STRENGTHS[0]
    for at, strength in enumerate(_STRENGTHS):
        folds = _by_folds(components[some], labels[some], groups[some], lambda: _regression(strength))  # noqa: B023
        loss = _loss(folds, components[some], labels[some], classes)
        if loss >= least:  # and would be with less of a penalty still
            advance(len(_STRENGTHS) - at)
            break
        best, least, chosen = folds, loss, strength
        advance(1)
    if len(some) < len(labels) and best:
        return _by_folds(components, labels, groups, lambda: _regression(chosen))
    return best


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=200, tol=1e-3)


def _by_folds(components: np.ndarray, labels: np.ndarray, groups: np.ndarray, model: Callable[[], Any]) -> list[Fold]:
    from sklearn.exceptions import ConvergenceWarning

    count = min(_FOLDS, int(np.bincount(labels).max()), len(np.unique(groups)))
    if count < 2:  # too few images for any of them to be told by others
        return []
    folds = list[Fold]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with few images
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is good enough to be looked at
        for fitted, held in deal_folds(labels, groups, count, 0):
            if len(held) and 2 <= len(np.unique(labels[fitted])) < len(fitted):
                folds.append((model().fit(components[fitted], labels[fitted]), held, 1.0))
    return folds


def _cooled(folds: list[Fold], components: np.ndarray, labels: np.ndarray, classes: int) -> list[Fold]:
    """Return the folds with the temperature of least loss on some images: an analysis alone is too sure of itself."""
    some = np.isin(np.arange(len(labels)), _sample(len(labels)))
    tried = [[(model, held, warm) for model, held, _ in folds] for warm in _TEMPERATURES]
    losses = [_loss([(model, held[some[held]], warm) for model, held, warm in of], components, labels, classes)
              for of in tried]  # fmt: skip
    return tried[int(np.argmin(losses))]


def _loss(folds: list[Fold], components: np.ndarray, labels: np.ndarray, classes: int) -> float:
    total = count = 0.0
    for at, shares in _said(folds, components, labels, classes):
        own = shares[np.arange(len(at)), labels[at]]
        total, count = total - float(np.log(np.maximum(own, np.finfo(own.dtype).eps)).sum()), count + len(at)
    return total / count if count else 0.0


def _said(
    folds: list[Fold], components: np.ndarray, labels: np.ndarray, classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and what is said of them, (m, classes) float64, block by block.

    An image is left out if nothing of its class was fitted: it would only be told that it is something else.
    """
    from scipy.special import softmax

    size = max(1, _BLOCK // classes)
    for model, held, temperature in folds:
        known = held[np.isin(labels[held], model.classes_)]
        for start in range(0, len(known), size):
            at = known[start : start + size]
            shares = np.zeros((len(at), classes))
            logits = model.predict_log_proba(components[at]).astype(np.float64) / temperature
            shares[:, model.classes_] = softmax(logits, axis=1)
            yield at, shares


def _judged(
    components: np.ndarray, labels: np.ndarray, classes: int, folds: list[Fold]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images whose label is likely wrong, the likeliest first; the class suggested for each; its own share.

    Named is what confident learning names (Northcutt, Jiang and Chuang 2021) and whose label is found to be less than
    half as likely as by chance: of hard images, which a weak backbone leaves many of, the former names too many.
    """
    from cleanlab.experimental.label_issues_batched import LabelInspector

    inspector = LabelInspector(num_class=classes, verbose=False)
    suggested, own = np.full(len(labels), -1), np.zeros(len(labels))
    for at, shares in _said(folds, components, labels, classes):
        inspector.update_confident_thresholds(labels[at], shares)
        suggested[at], own[at] = shares.argmax(axis=1), shares[np.arange(len(at)), labels[at]]
    order = list[np.ndarray]()
    for at, shares in _said(folds, components, labels, classes):
        inspector.score_label_quality(labels[at], shares)
        order.append(at)
    if not order:
        return np.zeros(0, np.int64), suggested, own
    named = np.concatenate(order)[np.asarray(inspector.get_label_issues(), np.int64)]
    return named[own[named] < _UNLIKELY / classes], suggested, own


def near_pairs(components: np.ndarray, looks: ImageLooks) -> np.ndarray:
    """Return pairs (m, 2), the smaller index first, of images that are nearly the same picture.

    They are sought by fingerprints and, as these miss what is mirrored or slightly cut, among those whose features
    (n, k) are closest; their pictures decide. Of copies only the first has neighbours: else each would have the others.
    """
    seen = np.flatnonzero(looks.seen)
    by_picture = seen[near_duplicates.near_pairs(looks.fingerprints[seen], looks.thumbs[seen], lambda n: None)]
    first = np.unique(looks.copy_of[seen])
    close = first[_closest(components[first])]
    close = close[near_duplicates.alike(looks.thumbs, close, mirrored=True)]
    return np.unique(np.concatenate([by_picture, close]), axis=0)


def _closest(components: np.ndarray) -> np.ndarray:
    """Return each row (n, k) with the few whose directions are closest, as pairs (m, 2), the smaller index first."""
    from sklearn.neighbors import NearestNeighbors

    if not len(components):
        return np.zeros((0, 2), np.int64)
    directions = components / np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-9)
    count = min(_NEIGHBOURS + 1, len(directions))  # the closest of all is it itself
    neighbours: Any = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(directions)
    found = neighbours.kneighbors(directions, return_distance=False)
    pairs = np.stack([np.repeat(np.arange(len(found)), found.shape[1]), found.ravel()], axis=1)
    return np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
