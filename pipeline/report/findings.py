"""What a dataset's own features say of it: a map, labels that are likely wrong, images that are nearly the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import near
from pipeline.progress import Progress
from pipeline.report.tiles import Tiles

MAPS = ("tsne", "pca")
_MOST_TSNE = 5_000  # images; beyond, t-SNE takes minutes
_COMPONENTS = 128  # that features are reduced to before anything else: what is left out is mostly noise
_FOLDS = 5
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse penalties of the logistic regression
_UNLIKELY = 0.5  # times chance: how likely a label is at most to be called doubtful
_NEIGHBOURS = 3  # by features, of each image, that are looked at for being nearly the same


@dataclass(frozen=True, eq=False)
class Findings:
    """Of n images.

    Parameters
    ----------
    places
        (n, 2) float: where each lies on the map, 0 to 1.
    method
        How the map was made.
    likely_wrong
        Indices of images whose label is likely wrong, the likeliest first.
    suggested
        (n,) int: the class that cross-validated features say.
    own_probability
        (n,) float: how likely they find the label that is given.
    accuracy
        How often what they say is the label that is given: where this is low, much of what is named is right.
    near
        (m, 2) int: pairs of images that are nearly the same picture, or its mirror image.
    """

    places: np.ndarray
    method: str
    likely_wrong: np.ndarray
    suggested: np.ndarray
    own_probability: np.ndarray
    accuracy: float
    near: np.ndarray


def reduced(pooled: np.ndarray) -> np.ndarray:
    """Return (n, c) float32 features as at most 128 principal components of standardised channels: (n, k) float32."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(pooled)
    return PCA(min(_COMPONENTS, *pooled.shape), svd_solver="randomized", random_state=0).fit_transform(scaled)


def find(
    pooled: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    small: Tiles,
    classes: int,
    method: str | None,
    progress: Progress,
) -> Findings:
    """Look at pooled features (n, c), labels (n,), and groups (n,) whose members must not be told apart by folds."""
    with progress("looking at features", len(_STRENGTHS) + 3, "steps") as advance:
        components = reduced(pooled)
        advance(1)
        probabilities = out_of_sample(components, labels, groups, classes, advance)
        method = method or ("tsne" if len(pooled) <= _MOST_TSNE else "pca")
        places = _map(components, method)
        advance(1)
        near = near_pairs(components, small)
        advance(1)
    suggested = probabilities.argmax(axis=1)
    return Findings(
        places,
        method,
        _issues(labels, probabilities),
        suggested,
        probabilities[np.arange(len(labels)), labels],
        float(np.mean(suggested == labels)),
        near,
    )


def _map(components: np.ndarray, method: str) -> np.ndarray:
    from sklearn.manifold import TSNE

    places = components[:, :2]
    if method == "tsne" and len(components) > 3:
        perplexity = min(30.0, (len(components) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(components[:, :50])
    low, high = places.min(axis=0), places.max(axis=0)
    return (places - low) / np.maximum(high - low, 1e-9)


def out_of_sample(
    components: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, advance: Callable[[int], None]
) -> np.ndarray:
    """Return what a logistic regression says of images it was not fitted on, (n, classes) float64, by five folds.

    Its penalty is the one under which that agrees best with the labels; `advance(1)` is called for each that could be.
    """
    from sklearn.metrics import log_loss

    best, least = np.zeros((0, 0)), np.inf
    for at, strength in enumerate(_STRENGTHS):
        said = _by_folds(components, labels, groups, classes, strength)
        loss = float(log_loss(labels, said, labels=np.arange(classes)))
        if loss >= least:  # and would be with less of a penalty still
            advance(len(_STRENGTHS) - at)
            break
        best, least = said, loss
        advance(1)
    return best


def _by_folds(
    components: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, strength: float
) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    said = np.full((len(labels), classes), 1 / classes)
    count = min(_FOLDS, int(np.bincount(labels).max()), len(np.unique(groups)))
    if count < 2:  # too few images for any of them to be told by others
        return said
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is good enough to be looked at
        for fitted, held in folds.split(components, labels, groups):
            if len(np.unique(labels[fitted])) < 2:
                continue
            regression: Any = LogisticRegression(C=strength, max_iter=200, tol=1e-3)
            regression.fit(components[fitted], labels[fitted])
            answers = regression.predict_proba(components[held]).astype(np.float64)
            said[held] = 0
            said[np.ix_(held, regression.classes_)] = answers / answers.sum(axis=1, keepdims=True)
    return said


def _issues(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the images whose label is likely wrong, the likeliest first.

    They are what confident learning names (Northcutt, Jiang and Chuang 2021) and whose label is found to be less than
    half as likely as by chance: of hard images, which a weak backbone leaves many of, the former names too many.
    """
    from cleanlab.filter import find_label_issues

    named = np.asarray(
        find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1), np.int64
    )
    return named[probabilities[named, labels[named]] < _UNLIKELY / probabilities.shape[1]]


def near_pairs(components: np.ndarray, small: Tiles) -> np.ndarray:
    """Return pairs (m, 2), the smaller index first, of images that are nearly the same picture.

    They are sought by fingerprints and, as these miss what is mirrored or slightly cut, among those whose features
    (n, k) are closest; their pictures decide.
    """
    seen = np.flatnonzero(small.seen)
    by_picture = seen[near.near_pairs(small.fingerprints[seen], small.thumbs[seen], lambda n: None)]
    close = _closest(components)
    close = close[small.seen[close].all(axis=1)]
    close = close[near.alike(small.thumbs, close, mirrored=True)]
    return np.unique(np.concatenate([by_picture, close]), axis=0)


def _closest(components: np.ndarray) -> np.ndarray:
    """Return each row (n, k) with the few whose directions are closest, as pairs (m, 2), the smaller index first."""
    from sklearn.neighbors import NearestNeighbors

    directions = components / np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-9)
    count = min(_NEIGHBOURS + 1, len(directions))  # the closest of all is it itself
    neighbours: Any = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(directions)
    found = neighbours.kneighbors(directions, return_distance=False)
    pairs = np.stack([np.repeat(np.arange(len(found)), found.shape[1]), found.ravel()], axis=1)
    return np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
