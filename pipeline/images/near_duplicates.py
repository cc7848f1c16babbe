"""Which images are nearly the same picture: by a fingerprint of 64 bits and a look at few pixels.

The fingerprint is the perceptual hash of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions" (2010): the signs of the lowest frequencies of a small grey picture. It changes little when a picture is
saved anew, made larger or smaller, or brighter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import cv2
import numpy as np

THUMB = 16  # side of the pictures that are compared
_SMALL = 32  # side of the picture that is transformed
_LOW = 8  # frequencies in either direction: 64 bits
_BANDS = 8
WITHIN = _BANDS - 1  # bits in which fingerprints of one picture differ at most: one band of eight is equal then
_ALIKE = 0.97  # correlation of two thumbs of one picture, at least
_PLAIN = 4.0  # grey levels of deviation, below which a picture has nothing on it to be correlated
_BLOCK = 1 << 11
_MOST_COMPARED = 1 << 22  # fingerprints at a time: 32 MB
_MOST_PAIRS = 2_000_000  # that are kept: 32 MB
_BYTE_ORDER = np.array([1 << bit for bit in range(64)], np.uint64)


def fingerprint(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the fingerprint of a picture, (h, w, 3) uint8 RGB, and its thumb, (16, 16) uint8 grey."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:])  # the first one is the brightness
    return int(_BYTE_ORDER[bits].sum()), cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA)


def near_pairs(fingerprints: np.ndarray, thumbs: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    """Return the pairs (m, 2) int64 of nearly equal pictures, the smaller index first, in ascending order.

    Not every pair of a group is told, but enough to connect it: of pictures with one fingerprint each with the next one
    in brightness, and where there are millions of pairs, of each group those with its first picture. `fingerprints` is
    (n,) uint64, `thumbs` (n, 16, 16) uint8; `advance(1)` is called eight times.
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
    """Return pairs that connect the same images, of each group those with its first one."""
    return np.array([[group[0], other] for group in clusters(pairs, count) for other in group[1:]], np.int64)


def _within_band(distinct: np.ndarray, band: int) -> Iterator[np.ndarray]:
    """Yield pairs (m, 2) of indices into `distinct` that share a band of bits and differ in few of the others."""
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
    """Return whether the thumbs of these pairs (m, 2) show the same, or with `mirrored` its mirror image: (m,) bool."""
    found = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _BLOCK):
        left, right = (thumbs[side].astype(np.float32) for side in pairs[start : start + _BLOCK].T)
        found[start : start + _BLOCK] = _same(left, right)
        if mirrored:
            found[start : start + _BLOCK] |= _same(left, right[:, :, ::-1])
    return found


def _same(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return whether thumbs (m, 16, 16) float32 show the same, (m,) bool."""
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    means = left.mean(1), right.mean(1)
    left, right = left - means[0][:, None], right - means[1][:, None]
    deviations = left.std(1), right.std(1)
    plain = np.maximum(*deviations) < _PLAIN
    correlation = (left * right).mean(1) / np.maximum(deviations[0] * deviations[1], 1e-6)
    return np.where(plain, np.abs(means[0] - means[1]) < _PLAIN, correlation >= _ALIKE)


def clusters(pairs: np.ndarray, count: int) -> list[list[int]]:
    """Return the images that `pairs` (m, 2) connect, of `count` images, as groups of at least two, in their order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, of = connected_components(graph, directed=False)
    some = np.unique(pairs)
    groups: dict[int, list[int]] = {}
    for i in some.tolist():
        groups.setdefault(int(of[i]), []).append(i)
    return list(groups.values())
