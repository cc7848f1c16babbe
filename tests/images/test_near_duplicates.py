"""Nearly equal pictures: the fingerprint, the search for pairs, the groups they form."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import picture

from pipeline.images import near_duplicates


def scene(seed: int) -> np.ndarray:
    """A picture with shapes on it, (240, 320, 3) uint8 RGB."""
    rng = np.random.default_rng(seed)
    pixels = picture(seed, 240, 320)
    for _ in range(12):
        centre = tuple(int(value) for value in rng.integers(0, (320, 240)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        cv2.circle(pixels, centre, int(rng.integers(10, 60)), colour, -1)
    return pixels


CHANGES = {
    "saved as a poor JPEG": lambda p: cv2.imdecode(cv2.imencode(".jpg", p, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1),
    "made smaller": lambda p: cv2.resize(p, (160, 120), interpolation=cv2.INTER_AREA),
    "brighter": lambda p: cv2.convertScaleAbs(p, alpha=0.85, beta=30),
    "a little cut": lambda p: p[3:-3, 4:-4],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_that_was_changed_a_little_is_found_among_others(change: str) -> None:
    pixels = [scene(seed) for seed in range(60)]
    pixels.append(CHANGES[change](pixels[17]))
    marks, thumbs = zip(*map(near_duplicates.fingerprint, pixels), strict=True)
    passes: list[int] = []
    pairs = near_duplicates.near_pairs(np.array(marks, np.uint64), np.array(thumbs), passes.append)
    assert pairs.tolist() == [[17, 60]]
    assert sum(passes) == 8


def test_every_pair_within_the_distance_is_found() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 40, np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, n, replace=False)) for n in rng.integers(0, 12, 400)]
    marks = base[rng.integers(0, 40, 400)] ^ np.array(flips, np.uint64)
    marks = np.unique(marks)  # of equal ones not every pair is told
    rng.shuffle(marks)
    same = np.zeros((len(marks), near_duplicates.THUMB, near_duplicates.THUMB), np.uint8)
    found = near_duplicates.near_pairs(marks, same, lambda n: None)
    apart = np.bitwise_count(marks[:, None] ^ marks[None, :])
    left, right = np.nonzero(apart <= near_duplicates.WITHIN)
    expected = np.stack([left, right], axis=1)[left < right]
    assert len(expected) > 100
    assert np.array_equal(found, expected)


def test_thousands_of_one_picture_are_one_group() -> None:
    marks = np.array([5, 9 << 40, *[7 << 20] * 3000], np.uint64)
    thumbs = np.zeros((len(marks), near_duplicates.THUMB, near_duplicates.THUMB), np.uint8)
    thumbs[:2] = np.random.default_rng(0).integers(0, 256, (2, near_duplicates.THUMB, near_duplicates.THUMB), np.uint8)
    pairs = near_duplicates.near_pairs(marks, thumbs, lambda n: None)
    assert len(pairs) == 2999
    assert near_duplicates.clusters(pairs, len(marks)) == [list(range(2, 3002))]


def test_plain_pictures_of_other_brightness_are_no_copies() -> None:
    white, grey, black = (np.full((50, 50, 3), value, np.uint8) for value in (255, 128, 0))
    marks, thumbs = zip(*map(near_duplicates.fingerprint, (white, grey, black, grey)), strict=True)
    assert near_duplicates.near_pairs(np.array(marks, np.uint64), np.array(thumbs), lambda n: None).tolist() == [[1, 3]]


def test_nothing_has_no_pairs() -> None:
    none = np.zeros((0, near_duplicates.THUMB, near_duplicates.THUMB), np.uint8)
    assert near_duplicates.near_pairs(np.zeros(0, np.uint64), none, lambda n: None).shape == (0, 2)
    assert near_duplicates.clusters(np.zeros((0, 2), np.int64), 0) == []
