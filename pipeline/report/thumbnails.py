"""Make thumbnails of images for a page, and the fingerprints that find near-duplicates.

`make_thumbnails` decodes identical images once. `pack_sheets` packs the thumbnails into a few large pictures, which are
embedded in the page because the page must open offline.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.core.progress import Progress
from pipeline.images import near_duplicates
from pipeline.images.loader import Loaded, Loader, decoding_pool
from pipeline.training.labelled_features import LabelledImages

_COLUMNS = 16
_ON_A_SHEET = _COLUMNS**2
_SIDES = (96, 64, 48, 32)  # possible thumbnail sizes in pixels; the largest with which all fit is used
_MANY = 3_000  # above this number of images, the largest size is not tried
_QUALITY = 70  # of WebP, 1 to 100
_ROOM = 9_000_000  # most bytes of all sheets, base64-encoded
_AHEAD = 64  # images decoded in advance
_SIZE, _FIT = 299, "pad"  # decoding size and fit: images are neither distorted nor cropped
_MISSING = 128  # grey value of images that cannot be read any more


@dataclass(frozen=True, eq=False)
class ImageLooks:
    """Thumbnails and fingerprints of n images.

    `pictures` are thumbnails (n, side, side, 3) uint8 RGB; side is 0 if only fingerprints were requested.
    `fingerprints` (n,) uint64 and `thumbs` (n, 16, 16) uint8 are those of `near_duplicates`. `seen` (n,) bool is false
    for images that cannot be read. `copy_of` (n,) int is the index of the first image with the same content.
    """

    pictures: np.ndarray
    fingerprints: np.ndarray
    thumbs: np.ndarray
    seen: np.ndarray
    copy_of: np.ndarray


@dataclass(frozen=True)
class ThumbnailSheets:
    """Thumbnails packed as tiles into a few large pictures, the sheets.

    Tile i is on sheet i // 256, in row i % 256 // 16 and column i % 16. Each tile is `side` pixels wide and high.
    `sheets` are WebP pictures as data URLs.
    """

    side: int
    sheets: list[str]
    columns: int = _COLUMNS


def make_thumbnails(
    images: LabelledImages, positions: np.ndarray, max_pixels: int, progress: Progress, depth: int, *, pictures: bool
) -> ImageLooks:
    """Return fingerprints of the images at these positions, and thumbnails if `pictures` is set.

    Images with the same content are decoded once. `depth` is the number of bits that 16-bit channels hold.
    """
    side = _SIDES[len(positions) > _MANY] if pictures else 0
    of_key: dict[bytes, int] = {}
    copy_of = np.array([of_key.setdefault(images.keys[at], i) for i, at in enumerate(positions.tolist())], np.int64)
    place = {int(images.usable[positions[i]]): i for i in of_key.values()}
    made = np.full((len(positions), side, side, 3), _MISSING, np.uint8)
    seen, fingerprints = np.zeros(len(positions), bool), np.zeros(len(positions), np.uint64)
    thumbs = np.zeros((len(positions), near_duplicates.THUMB, near_duplicates.THUMB), np.uint8)
    with (
        Loader(images.dataset, _SIZE, _FIT, max_pixels, depth=depth) as loader,
        decoding_pool() as pool,
        progress("making thumbnails" if pictures else "looking at images", len(place)) as advance,
    ):
        for image, marks in loader.stream(pool, list(place), lambda image: (image, _marks(image, side)), ahead=_AHEAD):
            if marks is not None:
                at = place[image.i]
                seen[at] = True
                made[at], fingerprints[at], thumbs[at] = marks
            advance(1)
    if len(place) < len(positions):
        made, fingerprints, thumbs, seen = (each[copy_of] for each in (made, fingerprints, thumbs, seen))
    return ImageLooks(made, fingerprints, thumbs, seen, copy_of)


def _marks(image: Loaded, side: int) -> tuple[np.ndarray, int, np.ndarray] | None:
    if image.pixels is None:
        return None
    empty = np.empty((0, 0, 3), np.uint8)
    small = cv2.resize(image.pixels, (side, side), interpolation=cv2.INTER_AREA) if side else empty
    return (small, *near_duplicates.fingerprint(image.pixels))


def pack_sheets(pictures: np.ndarray) -> ThumbnailSheets:
    """Return thumbnails (n, side, side, 3) packed into sheets, with the largest tile size that fits a page."""
    sides = [side for side in _SIDES if side <= pictures.shape[1]]
    side = next((side for side in sides if _estimate(pictures, side) < _ROOM), _SIDES[-1])
    return ThumbnailSheets(side, list(_sheets(pictures, side)))


def _estimate(pictures: np.ndarray, side: int) -> float:
    """Return the estimated bytes of all sheets, from one sheet with evenly spaced images."""
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
