"""Profile a dataset's images: format, size, bit depth, transparency, EXIF orientation and fingerprint.

`profile_images` decodes each image once; of identical images, only one is decoded.
"""

from __future__ import annotations

import numpy as np

from pipeline.cache.keys import Grouped
from pipeline.core.progress import Progress
from pipeline.extraction.compute import record_failure, record_key
from pipeline.extraction.planning import DEFAULT_FIT, Planning
from pipeline.images import near_duplicates
from pipeline.images.decoding import FULL_DEPTH, orientation
from pipeline.images.loader import Loaded, Loader, decoding_pool

# The profile of an image. Sizes are in pixels, before any rotation; `kind` is "" if the image cannot be decoded.
LOOK = np.dtype(
    [
        ("kind", "U6"),
        ("width", np.int32),
        ("height", np.int32),
        ("deep", np.bool_),  # more than 8 bits a channel
        ("peak", np.uint16),  # the largest value, if it has 16 bits a channel
        ("alpha", np.bool_),  # may be partly transparent; False for a GIF
        ("turned", np.bool_),  # its EXIF orientation is not 1, so decoding rotates or flips it
        ("fingerprint", np.uint64),
        ("thumb", np.uint8, (near_duplicates.THUMB, near_duplicates.THUMB)),
    ]
)
_SIZE = 299  # width and height in pixels to which images are decoded for fingerprints
_AHEAD = 64  # images decoded in advance


def profile_images(planning: Planning, progress: Progress, depth: int = FULL_DEPTH) -> np.ndarray:
    """Return the profiles of a dataset's images, (n,) `LOOK`; identical images are decoded once.

    16-bit channels are assumed to hold `depth` bits. Images that cannot be decoded are quarantined in the index, as by
    `features`.
    """
    identities, dataset = planning.identities, planning.dataset
    known = identities.keys.grouped(but=sorted(identities.unseen)).first
    refused = np.array(list(planning.plan(None).quarantined), np.int64)
    some = np.union1d(np.setdiff1d(known, refused), np.array(identities.to_read, np.int64)).tolist()
    looks = np.zeros(len(dataset), LOOK)
    with (
        Loader(dataset, _SIZE, DEFAULT_FIT, planning.max_pixels, headers=True, depth=depth) as loader,
        decoding_pool() as pool,
        progress("looking at images", len(some)) as advance,
    ):
        for image, look in loader.stream(pool, some, lambda image: (image, _look(image)), ahead=_AHEAD):
            if look is None:
                record_failure(image, dataset, identities, planning.index, planning.max_pixels)
            else:
                record_key(image, dataset, identities, planning.index)
                looks[image.i] = look
            advance(1)
    identities.remember_fetched(planning.index)
    _copy(looks, identities.keys.grouped())
    return looks


def _copy(looks: np.ndarray, grouped: Grouped) -> None:
    """Copy the profile of one image of each group of identical images to the others, in place."""
    group = np.cumsum(grouped.leads) - 1
    seen = looks["kind"][grouped.images] != ""
    found = np.full(len(grouped.first), -1)
    found[group[seen]] = grouped.images[seen]
    of = found[group]
    looks[grouped.images[of >= 0]] = looks[of[of >= 0]]


def _look(image: Loaded) -> tuple | None:
    """Return the profile of an image, the fields of `LOOK`; None if it was not decoded. Called in threads."""
    header = image.header
    if image.pixels is None or header is None:
        return None
    turned = orientation(header.exif) != 1
    return (
        header.kind,
        header.width,
        header.height,
        header.deep,
        image.peak,
        header.alpha,
        turned,
        *near_duplicates.fingerprint(image.pixels),
    )
