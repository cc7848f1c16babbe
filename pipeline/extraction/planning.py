"""Plan the computation for a dataset: which of its rows are missing, and which images cannot have a row.

`Planning.plan` compares the keys of the images with the rows of a space and with the quarantine.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.cache.digests import Identities
from pipeline.cache.index import Index
from pipeline.cache.keys import comparable, split
from pipeline.cache.space import FeatureSpace
from pipeline.core.progress import Progress
from pipeline.core.spec import PLAIN_VIEW, Views
from pipeline.dataset import Dataset
from pipeline.extraction.compute import record_failure, record_key
from pipeline.images import decoding
from pipeline.images.loader import Loaded, Loader, decoding_pool

logger = logging.getLogger(__name__)

DEFAULT_FIT = "squash"
_CHECKED_AHEAD = 64  # images
_SIZE = 64  # pixels on a side; only whether an image can be decoded matters
_BLOCK = 1 << 16  # keys compared with the quarantine at a time


@dataclass(frozen=True, eq=False)
class Todo:
    """Rows to compute, ordered by image: image indices (m,) int64, and the view number of each row (m,) int64."""

    images: np.ndarray
    views: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]]) -> Self:
        """Return a Todo of pairs (image index, view number), in their order."""
        return cls(*np.array(rows, np.int64).reshape(-1, 2).T)

    @property
    def distinct(self) -> np.ndarray:
        """The indices of images that lack rows, each once, (k,) int64."""
        return self.images[np.flatnonzero(np.diff(self.images, prepend=-1))]

    def views_of(self, image: int) -> list[int]:
        """Return the numbers of the views that an image lacks."""
        low, high = np.searchsorted(self.images, (image, image + 1))
        return self.views[low:high].tolist()


@dataclass(frozen=True)
class Plan:
    """What to compute for a dataset. A row is one view of one image; image indices are those of the dataset."""

    todo: Todo  # of images with the same key only the first
    reused: int  # rows that exist
    duplicates: int  # rows of images that are copies of another image of the dataset
    quarantined: dict[int, tuple[str, str | None]]  # image index → why it cannot be read or decoded, since when

    @property
    def missing(self) -> int:
        """The number of rows to compute."""
        return len(self.todo)

    @property
    def rows(self) -> int:
        """The number of rows that the dataset has, or will have once `todo` is computed."""
        return self.missing + self.reused + self.duplicates


@dataclass(frozen=True)
class Planning:
    """The inputs of a plan: the images, their keys, the index, the pixel limit, and the wanted views."""

    dataset: Dataset
    identities: Identities
    index: Index
    max_pixels: int
    views: Views = PLAIN_VIEW

    def plan(self, space: FeatureSpace | None) -> Plan:
        """Return the plan, given the rows that `space` has; None stands for a space without rows."""
        identities, unseen = self.identities, np.array(sorted(self.identities.unseen), np.int64)
        to_read = np.array(identities.to_read, np.int64)
        grouped = identities.keys.grouped(but=unseen)
        first = grouped.first
        lacking = self._lacking(space, first)
        lacks = np.asarray(lacking.any(axis=1))
        is_refused, reasons = self._refused(first, lacks)
        refused, groups = np.flatnonzero(is_refused), np.flatnonzero(lacks & ~is_refused)
        quarantined = {i: why for some, why in zip(grouped.members(refused), reasons, strict=True) for i in some}
        copies = len(grouped.images) - len(first) - (len(quarantined) - len(refused)) + len(unseen) - len(to_read)
        unknown = ~identities.keys.known
        unknown[unseen] = False
        quarantined |= {i: (identities.unread[i], None) for i in np.flatnonzero(unknown).tolist()}
        todo = self._todo(
            np.concatenate([first[groups], to_read]),
            np.concatenate([lacking[groups], np.ones((len(to_read), self.views.count), bool)]),
        )
        known = len(first) - len(refused) + len(to_read)
        return Plan(todo, known * self.views.count - len(todo), copies * self.views.count, quarantined)

    def _lacking(self, space: FeatureSpace | None, first: np.ndarray) -> np.ndarray:
        """Return which views have no row in `space`, (k, v) bool, of the k images `first`, ordered by their keys."""
        lacking = np.ones((len(first), self.views.count), bool)
        if space is not None:
            for column, view in enumerate(self.views.numbers):
                lacking[:, column] = ~space.has_rows(self.identities.keys.digests, first, view)
        return lacking

    def _refused(self, some: np.ndarray, lacks: np.ndarray) -> tuple[np.ndarray, list[tuple[str, str | None]]]:
        """Return which of these images are quarantined, (m,) bool, and for each of those the reason and since when.

        The quarantine matters only for images that lack rows, `lacks` (m,) bool. Condemned images have rows, but
        `check_decoding` found that they cannot be decoded: they count in any case.
        """
        known = self.index.refused(decoding.decoder_version(), self.max_pixels) if lacks.any() else {}
        condemned = self.index.condemned()
        is_refused = self._among(some, condemned)
        is_refused[lacks] |= self._among(some[lacks], known)
        found = split(self.identities.keys.digests[some[is_refused]])
        reasons = [condemned.get(key) or known[key] for key in found]
        return is_refused, [(each.reason, each.since) for each in reasons]

    def _among(self, some: np.ndarray, known: Collection[bytes]) -> np.ndarray:
        """Return which of the m images `some` have a key in `known`, (m,) bool."""
        found = np.zeros(len(some), bool)
        if known:
            names = comparable(b"".join(sorted(known)))
            for start in range(0, len(some), _BLOCK):
                keys = comparable(self.identities.keys.digests[some[start : start + _BLOCK]])
                near = np.minimum(np.searchsorted(names, keys), len(names) - 1)
                found[start : start + _BLOCK] = names[near] == keys
        return found

    def _todo(self, some: np.ndarray, lacking: np.ndarray) -> Todo:
        """Return the rows of the images `some`, (m,), in the views where `lacking`, (m, v) bool, is true."""
        numbers = np.array(self.views.numbers, np.int64)
        by_number, order = np.argsort(numbers), np.argsort(some)
        some, lacking = some[order], lacking[order][:, by_number]
        images, views = np.broadcast_arrays(some[:, None], numbers[by_number])
        return Todo(images[lacking], views[lacking])

    def meet_undecodable(self, space: FeatureSpace | None) -> Plan:
        """Return the plan after decoding images that lack rows, one by one, until one can be decoded.

        The images before that one are quarantined. If no image can be decoded, nothing is left to compute, and neither
        TensorFlow nor weights are needed. This happens after the index, which stores the quarantine, was deleted.
        """
        plan = self.plan(space)
        if not plan.todo:
            return plan
        fit = space.spec.fit if space else DEFAULT_FIT
        with Loader(self.dataset, _SIZE, fit, self.max_pixels) as loader:
            loader.until(plan.todo.distinct.tolist(), lambda image: self._lacks_rows(image, space))
        self.identities.remember_fetched(self.index)
        return self.plan(space)

    def _lacks_rows(self, image: Loaded, space: FeatureSpace | None) -> bool:
        """Record the key of an image that was just loaded; return whether a row of it can and must be computed."""
        if image.pixels is None:
            self._note_bad(image)
            return False
        was_unseen = image.i in self.identities.unseen
        record_key(image, self.dataset, self.identities, self.index)
        # An image that was read for the first time may have the bytes of an image with rows.
        return not was_unseen or bool(self._lacking(space, np.array([image.i])).any())

    def try_to_decode(self, some: Iterable[int], fit: str, progress: Progress) -> int:
        """Decode the images `some`, quarantine those that cannot be decoded, and record the keys of unseen ones.

        Returns the largest pixel value of images with 16 bits a channel, 0 if there are none.
        """
        some, peak = list(some), 0
        with (
            Loader(self.dataset, _SIZE, fit, self.max_pixels) as loader,
            decoding_pool() as pool,
            progress("checking images", len(some)) as advance,
        ):
            for image in loader.stream(pool, some, lambda image: image, ahead=_CHECKED_AHEAD):
                if image.pixels is None:
                    self._note_bad(image)
                else:
                    record_key(image, self.dataset, self.identities, self.index)
                    peak = max(peak, image.peak)
                advance(1)
        self.identities.remember_fetched(self.index)
        return peak

    def _note_bad(self, bad: Loaded) -> None:
        record_failure(bad, self.dataset, self.identities, self.index, self.max_pixels)


@dataclass(frozen=True)
class Quarantined:
    """An image without a row, by its name in the dataset, and the reason. Names may repeat in a manifest.

    `since` is when its content was first refused (ISO 8601, UTC). It is None if the image could not be read, because
    such failures are not stored.
    """

    path: str
    reason: str
    since: str | None = None


def warn_dark(peak: int, depth: int) -> None:
    """Log a warning if `peak`, the largest value of the 16-bit images, does not fit to images of `depth` bits."""
    if advice := decoding.depth_advice(peak, depth):
        logger.warning("of the images with 16 bits a channel that were decoded now %s", advice)


def name_quarantined(dataset: Dataset, plan: Plan) -> list[Quarantined]:
    """Return the quarantined images of a plan, in the order of the dataset."""
    return [Quarantined(dataset.names[i], *why) for i, why in sorted(plan.quarantined.items())]
