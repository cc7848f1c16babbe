"""Decode images that have rows again: an earlier version may have accepted images that this one finds damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.digests import Identities, identify
from pipeline.cache.index import CONDEMNED
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.dataset import Dataset
from pipeline.extraction.planning import DEFAULT_FIT, Quarantined
from pipeline.images import decoding
from pipeline.images.loader import Loader, decoding_pool

_SMALL = 32  # pixels on a side; only whether an image can be decoded matters
_ANY_SIZE = 2**40  # pixels: each image was decoded before, within a limit that was not stored
_AHEAD = 64  # images


@dataclass(frozen=True)
class DecodeCheck:
    """The result of `check_decoding`.

    `images` is the number of images decoded again, `quarantined` those that failed. `released` is the number of images
    that failed in an earlier check and can be decoded now.
    """

    images: int
    quarantined: list[Quarantined]
    released: int


def check_decoding(dataset: Dataset, workspace: Workspace, space: str | None = None) -> DecodeCheck:
    """Decode the images of `dataset` that have rows, in `space` or in any; quarantine those that cannot be decoded.

    The rows of quarantined images stay on disk, but are not used any more. Images that an earlier check quarantined
    and that can be decoded now are released.

    Raises
    ------
    SpecError
        If there is no space of that name.
    """
    index = workspace.cache.index
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, index, advance, read_unseen=False)
    spaces = [workspace.cache.open(space)] if space else workspace.cache.spaces()
    condemned = index.condemned()
    some = _with_rows(identities, spaces, set(condemned))
    reasons, sound = dict[bytes, str](), set[bytes]()
    with (
        Loader(dataset, _SMALL, DEFAULT_FIT, _ANY_SIZE) as loader,
        decoding_pool() as pool,
        workspace.progress("decoding again", len(some)) as advance,
    ):
        for image in loader.stream(pool, some, lambda image: image, ahead=_AHEAD):
            if image.key is not None and image.pixels is None:
                reasons[image.key] = image.reason
            elif image.key is not None:
                sound.add(image.key)
            advance(1)
    index.remember_quarantined(reasons, decoding.decoder_version(), CONDEMNED)
    released = sound & set(condemned)
    index.forget_quarantined(released, condemned=True)
    since = index.condemned()
    bad = [
        Quarantined(dataset.names[i], reasons[key], since[key].since)
        for i, key in enumerate(identities.keys)
        if key in reasons and key is not None
    ]
    return DecodeCheck(len(some), bad, len(released))


def _with_rows(identities: Identities, spaces: Sequence[FeatureSpace], condemned: set[bytes]) -> list[int]:
    """Return the first image of each key that has a row, or was quarantined by an earlier check (`condemned`)."""
    first = identities.keys.grouped(but=sorted(identities.unseen)).first
    has_row = np.array([identities.keys[int(i)] in condemned for i in first], bool)
    for space in spaces:
        has_row |= space.has_rows(identities.keys.digests, first, 0)
    return first[has_row].tolist()
