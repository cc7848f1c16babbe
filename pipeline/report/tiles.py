"""Small pictures of many images, packed into a few large ones, as a page that must open offline can carry them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline import near
from pipeline.dataset import Dataset
from pipeline.decoder import Loaded, Loader, decoding_pool
from pipeline.images import FULL_DEPTH
from pipeline.progress import Progress

_COLUMNS = 16
_ON_A_SHEET = _COLUMNS**2
_SIDES = (96, 64, 48, 32)  # pixels; the largest with which all fit
_MANY = 3_000  # images from which on they are not made in the largest size first
_QUALITY = 70
_ROOM = 9_000_000  # bytes of all sheets as text
_AHEAD = 64  # images
_SIZE, _FIT = 299, "pad"  # in which images are decoded: undistorted, and with nothing cut off
_MISSING = 128  # the grey of an image that cannot be read any more


@dataclass(frozen=True)
class Tiles:
    """Tile i lies on sheet i // 256, in row i % 256 // 16 and column i % 16; each is `side` pixels wide and high.

    `sheets` are WebP pictures as data URLs. `fingerprints` (n,) uint64 and `thumbs` (n, 16, 16) uint8 are those of
    `near`; `seen` (n,) bool is false for images that cannot be read.
    """

    side: int
    sheets: list[str]
    fingerprints: np.ndarray
    thumbs: np.ndarray
    seen: np.ndarray
    columns: int = _COLUMNS


def tiles(dataset: Dataset, some: Sequence[int], max_pixels: int, progress: Progress, depth: int = FULL_DEPTH) -> Tiles:
    """Return small pictures of these images of `dataset`, in this order."""
    largest = _SIDES[len(some) > _MANY]
    pictures = np.full((len(some), largest, largest, 3), _MISSING, np.uint8)
    seen, fingerprints = np.zeros(len(some), bool), np.zeros(len(some), np.uint64)
    thumbs = np.zeros((len(some), near.THUMB, near.THUMB), np.uint8)
    place = {i: at for at, i in enumerate(some)}
    with (
        Loader(dataset, _SIZE, _FIT, max_pixels, depth=depth) as loader,
        decoding_pool() as pool,
        progress("making thumbnails", len(some)) as advance,
    ):
        for image, made in loader.stream(pool, some, lambda image: (image, _small(image, largest)), ahead=_AHEAD):
            if made is not None:
                at = place[image.i]
                seen[at] = True
                pictures[at], fingerprints[at], thumbs[at] = made
            advance(1)
    side = next((side for side in _SIDES if side <= largest and _estimate(pictures, side) < _ROOM), _SIDES[-1])
    return Tiles(side, list(_sheets(pictures, side)), fingerprints, thumbs, seen)


def _small(image: Loaded, side: int) -> tuple[np.ndarray, int, np.ndarray] | None:
    if image.pixels is None:
        return None
    small = cv2.resize(image.pixels, (side, side), interpolation=cv2.INTER_AREA)
    return (small, *near.fingerprint(image.pixels))


def _estimate(pictures: np.ndarray, side: int) -> float:
    """Return about how many bytes all sheets take, by one of images from everywhere."""
    some = pictures[:: max(1, len(pictures) // _ON_A_SHEET)][:_ON_A_SHEET]
    return sum(map(len, _sheets(some, side))) / max(1, len(some)) * len(pictures)


def _sheets(pictures: np.ndarray, side: int) -> Iterator[str]:
    for start in range(0, len(pictures), _ON_A_SHEET):
        some = pictures[start : start + _ON_A_SHEET]
        rows = -(-len(some) // _COLUMNS)
        sheet = np.zeros((rows * side, _COLUMNS * side, 3), np.uint8)
        for at, picture in enumerate(some):
            row, column = divmod(at, _COLUMNS)
            small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
            sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = small
        options = [cv2.IMWRITE_WEBP_QUALITY, _QUALITY]
        encoded = cv2.imencode(".webp", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), options)[1]
        yield "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode()
