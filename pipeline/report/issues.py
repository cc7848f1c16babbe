"""Find issues of a dataset from its features: labels that are likely wrong, and near-duplicate images.

`find_issues` does both; `project` places images on a map. All images are analysed. Memory grows by about one kilobyte
for each image, independent of the number of classes.
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

_MOST_TSNE = 5_000  # most images for t-SNE; with more, it takes minutes
_SAMPLE = 10_000  # images on which components and hyperparameters are fitted
_COMPONENTS = 128  # principal components to which features are reduced first: the rest is mostly noise
_FOLDS = 5
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # values of C tried for the logistic regression
_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # tried for the linear discriminant analysis
_MOST_ITERATED = 1 << 23  # images times classes up to which a regression is fitted: above, it takes hours
_BLOCK = 1 << 22  # probabilities in memory at the same time: 32 MB
_UNLIKELY = 0.5  # a label is doubtful only if its probability is below this factor times chance (1 / classes)
_NEIGHBOURS = 3  # nearest neighbours by features that are compared with each image as near-duplicates

Fold = tuple[Any, np.ndarray, float]  # a fitted model, indices of the images held out, the temperature of its logits


@dataclass(frozen=True, eq=False)
class DatasetIssues:
    """The issues found among n images.

    Parameters
    ----------
    components
        (n, k) float32: principal components of the images' features.
    likely_wrong
        Indices of images whose label is likely wrong, the most doubtful first.
    suggested
        (n,) int: the class predicted by cross-validation; -1 where no model was trained on the image's class.
    own_probability
        (n,) float: the cross-validated probability of the given label.
    accuracy
        The share of images whose prediction is the given label. If it is low, many labels in `likely_wrong` are right.
    near
        (m, 2) int: pairs of near-duplicate images; mirror images count too.
    """

    components: np.ndarray
    likely_wrong: np.ndarray
    suggested: np.ndarray
    own_probability: np.ndarray
    accuracy: float
    near: np.ndarray


def reduce_dimensions(rows: Rows) -> np.ndarray:
    """Reduce features (n, c) to at most 128 principal components of standardised channels: (n, k) float32.

    The components are fitted on at most 10,000 rows. The rows are transformed in blocks.
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
    """Return the issues of images by their pooled features (n, c), labels (n,) and groups (n,).

    Members of one group are always in the same fold. `classes` is the number of classes.
    """
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
    """Return the positions of images on a map, (n, 2) float in [0, 1], from their components, and the method used.

    `method` is "tsne" or "pca"; None chooses t-SNE for up to 5,000 images, else PCA.
    """
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
    """Fit classifiers by five-fold cross-validation; return each with the images held out, or none for too few images.

    The classifiers are logistic regressions. Their penalty is the one with the least cross-validated log loss on at
    most 10,000 images. If images times classes exceed 2^23, they are linear discriminant analyses instead, with the
    temperature chosen in the same way. `advance(1)` is called for each penalty.
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
        if loss >= least:  # an even weaker penalty would not lower the loss either
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
    if count < 2:  # too few images for cross-validation
        return []
    folds = list[Fold]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes with few images
        warnings.simplefilter("ignore", ConvergenceWarning)  # an approximate fit suffices to rank images for review
        for fitted, held in deal_folds(labels, groups, count, 0):
            if len(held) and 2 <= len(np.unique(labels[fitted])) < len(fitted):
                folds.append((model().fit(components[fitted], labels[fitted]), held, 1.0))
    return folds


def _cooled(folds: list[Fold], components: np.ndarray, labels: np.ndarray, classes: int) -> list[Fold]:
    """Return the folds with the temperature of least log loss on a sample of images.

    Without a temperature, the probabilities of a linear discriminant analysis are overconfident.
    """
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
    """Yield indices of held-out images (m,) and their probabilities (m, classes) float64, block by block.

    An image is left out if its fold's model saw no image of its class: the model would always contradict its label.
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
    """Return the images with likely wrong labels; for every image, its predicted class and its label's probability.

    The images with the most doubtful labels come first. An image is listed if confident learning finds it (Northcutt,
    Jiang and Chuang 2021) and its label has less than half the probability of chance. Confident learning alone lists
    too many of the hard images, and a weak backbone makes many images hard.
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
    """Return pairs (m, 2) of near-duplicate images, the smaller index first.

    Candidates are images with similar fingerprints, and images whose features (n, k) are closest, because fingerprints
    miss mirrored and slightly cropped images. The thumbnails of a pair of neighbours decide. Of identical images only
    the first is compared by features; else the neighbours of each would be its own copies.
    """
    seen = np.flatnonzero(looks.seen)
    by_picture = seen[near_duplicates.near_pairs(looks.fingerprints[seen], looks.thumbs[seen], lambda n: None)]
    first = np.unique(looks.copy_of[seen])
    close = first[_closest(components[first])]
    close = close[near_duplicates.alike(looks.thumbs, close, mirrored=True)]
    return np.unique(np.concatenate([by_picture, close]), axis=0)


def _closest(components: np.ndarray) -> np.ndarray:
    """Return pairs (m, 2) of each row (n, k) and its 3 nearest rows by cosine similarity, the smaller index first."""
    from sklearn.neighbors import NearestNeighbors

    if not len(components):
        return np.zeros((0, 2), np.int64)
    directions = components / np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-9)
    count = min(_NEIGHBOURS + 1, len(directions))  # the nearest row is the row itself
    neighbours: Any = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(directions)
    found = neighbours.kneighbors(directions, return_distance=False)
    pairs = np.stack([np.repeat(np.arange(len(found)), found.shape[1]), found.ravel()], axis=1)
    return np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
