"""Find images that are nearly the same picture, by a fingerprint of 64 bits and the correlation of small thumbnails.

The fingerprint is the perceptual hash of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions" (2010): the signs of the lowest frequencies of a small grey picture. It changes little when a picture is
saved again, resized or made brighter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import cv2
import numpy as np

THUMB = 16  # side of the thumbnails that are compared, in pixels
_SMALL = 32  # side of the picture before the cosine transform, in pixels
_LOW = 8  # frequencies in each direction: 64 bits
_BANDS = 8
WITHIN = _BANDS - 1  # most bits in which near duplicates may differ; then at least one of the eight bands is equal
_ALIKE = 0.97  # least correlation of the thumbnails of near duplicates
_PLAIN = 4.0  # a standard deviation in grey levels; below it, a picture has too little contrast to correlate
_BLOCK = 1 << 11
_MOST_COMPARED = 1 << 22  # pairs of fingerprints compared at a time: 32 MB
_MOST_PAIRS = 2_000_000  # pairs that are kept before they are reduced to one star per group: 32 MB
_BYTE_ORDER = np.array([1 << bit for bit in range(64)], np.uint64)


def fingerprint(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the fingerprint of a picture, (h, w, 3) uint8 RGB, and its thumbnail, (16, 16) uint8 grey."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:])  # the first coefficient is the mean brightness
    return int(_BYTE_ORDER[bits].sum()), cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA)


def near_pairs(fingerprints: np.ndarray, thumbs: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    """Return pairs (m, 2) int64 of near duplicates, the smaller index first, in ascending order.

    The pairs connect each group of near duplicates, but are not all pairs of it. Pictures with equal fingerprints are
    paired with the next one in brightness only. If there are more than two million pairs, each group keeps the pairs
    with its first picture. `fingerprints` is (n,) uint64, `thumbs` (n, 16, 16) uint8; `advance(1)` is called eight
    times.
    """
    order = np.lexsort((thumbs.mean(axis=(1, 2)), fingerprints))
    distinct, first = np.unique(fingerprints[order], return_index=True)
    first = order[first]
    chain = np.stack([order[:-1], order[1:]], axis=1)
    chain = chain[fingerprints[chain[:, 0]] == fingerprints[chain[:, 1]]]
    found = [chain[alike(thumbs, chain)]]
    for band in range(_BANDS):
        for some in _within_band(distinct, band):
            pairs = first[some]
            found.append(pairs[alike(thumbs, pairs)])
            if sum(map(len, found)) > _MOST_PAIRS:
                found = [_stars(np.concatenate(found), len(fingerprints))]
        found = [np.unique(np.sort(np.concatenate(found), axis=1), axis=0)]
        advance(1)
    return found[0]


def _stars(pairs: np.ndarray, count: int) -> np.ndarray:
    """Return pairs (m, 2) int64 that connect the same groups: the first image of a group with each other image."""
    return np.array([[group[0], other] for group in clusters(pairs, count) for other in group[1:]], np.int64)


def _within_band(distinct: np.ndarray, band: int) -> Iterator[np.ndarray]:
    """Yield pairs (m, 2) of indices into `distinct` with equal bits in `band` that differ in at most `WITHIN` bits."""
    value = (distinct >> np.uint64(8 * band)) & np.uint64(255)
    order = np.argsort(value, kind="stable")
    bounds = np.searchsorted(value[order], np.arange(257))
    for low, high in pairwise(bounds.tolist()):
        members = order[low:high]
        rows = max(1, _MOST_COMPARED // max(1, len(members)))
        for start in range(0, len(members), rows):
            some = members[start : start + rows]
            near = np.bitwise_count(distinct[some][:, None] ^ distinct[members][None, :]) <= WITHIN
            left, right = np.nonzero(near)
            pairs = np.stack([some[left], members[right]], axis=1)
            yield pairs[pairs[:, 0] < pairs[:, 1]]


def alike(thumbs: np.ndarray, pairs: np.ndarray, *, mirrored: bool = False) -> np.ndarray:
    """Return for each of `pairs` (m, 2) whether its thumbnails show the same picture: (m,) bool.

    With `mirrored`, a picture and its mirror image count as the same.
    """
    found = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _BLOCK):
        left, right = (thumbs[side].astype(np.float32) for side in pairs[start : start + _BLOCK].T)
        found[start : start + _BLOCK] = _same(left, right)
        if mirrored:
            found[start : start + _BLOCK] |= _same(left, right[:, :, ::-1])
    return found


def _same(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return for each pair of thumbnails, (m, 16, 16) float32, whether they show the same picture: (m,) bool."""
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    means = left.mean(1), right.mean(1)
    left, right = left - means[0][:, None], right - means[1][:, None]
    deviations = left.std(1), right.std(1)
    plain = np.maximum(*deviations) < _PLAIN
    correlation = (left * right).mean(1) / np.maximum(deviations[0] * deviations[1], 1e-6)
    return np.where(plain, np.abs(means[0] - means[1]) < _PLAIN, correlation >= _ALIKE)


def clusters(pairs: np.ndarray, count: int) -> list[list[int]]:
    """Return the groups of images that `pairs` (m, 2) connect, of `count` images in all, each in ascending order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, of = connected_components(graph, directed=False)
    some = np.unique(pairs)
    groups: dict[int, list[int]] = {}
    for i in some.tolist():
        groups.setdefault(int(of[i]), []).append(i)
    return list(groups.values())
