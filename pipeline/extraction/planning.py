"""What is to be done for a dataset: which of its rows are missing, and which images cannot have any."""

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
_SIZE = 64  # of pixels that nobody looks at: it is asked only whether an image can be decoded
_BLOCK = 1 << 16  # keys compared with the quarantine at a time


@dataclass(frozen=True, eq=False)
class Todo:
    """Rows to be computed, ordered by image: image indices (m,) int64 and the number of each row's view (m,) int64."""

    images: np.ndarray
    views: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]]) -> Self:
        """Return these (image, view number)."""
        return cls(*np.array(rows, np.int64).reshape(-1, 2).T)

    @property
    def distinct(self) -> np.ndarray:
        """The images that lack rows, each once, (k,) int64."""
        return self.images[np.flatnonzero(np.diff(self.images, prepend=-1))]

    def views_of(self, image: int) -> list[int]:
        """Return the numbers of the views that an image lacks."""
        low, high = np.searchsorted(self.images, (image, image + 1))
        return self.views[low:high].tolist()


@dataclass(frozen=True)
class Plan:
    """What is to be done for a dataset; indices count its images, and a row is one view of one image."""

    todo: Todo  # of each key the first image stands for all
    reused: int  # rows that are there
    duplicates: int  # rows of images that are copies of another image of the dataset
    quarantined: dict[int, tuple[str, str | None]]  # image → why it cannot be read or decoded, since when

    @property
    def missing(self) -> int:
        """How many rows are to be computed."""
        return len(self.todo)

    @property
    def rows(self) -> int:
        """How many rows the dataset's images have, or will have once `todo` is done."""
        return self.missing + self.reused + self.duplicates


@dataclass(frozen=True)
class Planning:
    """What a plan is made from: the images, who they are, what is known of them, in which views they are wanted."""

    dataset: Dataset
    identities: Identities
    index: Index
    max_pixels: int
    views: Views = PLAIN_VIEW

    def plan(self, space: FeatureSpace | None) -> Plan:
        """Return which rows need computing, given what `space` holds; None holds nothing."""
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
        """Return which views the keys of `first`, images in the order of their keys, have no row of: (k, v) bool."""
        lacking = np.ones((len(first), self.views.count), bool)
        if space is not None:
            for column, view in enumerate(self.views.numbers):
                lacking[:, column] = ~space.has_rows(self.identities.keys.digests, first, view)
        return lacking

    def _refused(self, some: np.ndarray, lacks: np.ndarray) -> tuple[np.ndarray, list[tuple[str, str | None]]]:
        """Return which of these images are known to be undecodable, (m,) bool, and of each of those why, since when.

        Only of images that lack rows, (m,) bool, is it asked, but for those whose rows are condemned.
        """
        known = self.index.refused(decoding.decoder_version(), self.max_pixels) if lacks.any() else {}
        condemned = self.index.condemned()
        is_refused = self._among(some, condemned)
        is_refused[lacks] |= self._among(some[lacks], known)
        found = split(self.identities.keys.digests[some[is_refused]])
        reasons = [condemned.get(key) or known[key] for key in found]
        return is_refused, [(each.reason, each.since) for each in reasons]

    def _among(self, some: np.ndarray, known: Collection[bytes]) -> np.ndarray:
        """Return which of these images have a key that is `known`, (m,) bool."""
        found = np.zeros(len(some), bool)
        if known:
            names = comparable(b"".join(sorted(known)))
            for start in range(0, len(some), _BLOCK):
                keys = comparable(self.identities.keys.digests[some[start : start + _BLOCK]])
                near = np.minimum(np.searchsorted(names, keys), len(names) - 1)
                found[start : start + _BLOCK] = names[near] == keys
        return found

    def _todo(self, some: np.ndarray, lacking: np.ndarray) -> Todo:
        """Return the rows of (m,) images, of the views where `lacking`, (m, v) bool, is true."""
        numbers = np.array(self.views.numbers, np.int64)
        by_number, order = np.argsort(numbers), np.argsort(some)
        some, lacking = some[order], lacking[order][:, by_number]
        images, views = np.broadcast_arrays(some[:, None], numbers[by_number])
        return Todo(images[lacking], views[lacking])

    def meet_undecodable(self, space: FeatureSpace | None) -> Plan:
        """Return the plan after decoding images that lack rows until one can be decoded.

        Those before it are quarantined. So neither TensorFlow is loaded nor is anything demanded when what lacks rows
        can have none, as after the index, which remembers the quarantine, was lost.
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
        """Note who an image is that was just loaded; return whether a row of it can and must be computed."""
        if image.pixels is None:
            self._note_bad(image)
            return False
        was_unseen = image.i in self.identities.unseen
        record_key(image, self.dataset, self.identities, self.index)
        # What nobody had read may turn out to be an old acquaintance.
        return not was_unseen or bool(self._lacking(space, np.array([image.i])).any())

    def try_to_decode(self, some: Iterable[int], fit: str, progress: Progress) -> int:
        """Decode these images, to know which of them cannot be, and who those are that nobody had read.

        Returns the largest value of those with 16 bits a channel.
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
    """An image without a row, by the name people know it under, and why. Names may repeat in a manifest.

    `since` is when its content was first refused (ISO 8601, UTC); None if it could not be read, which is not kept.
    """

    path: str
    reason: str
    since: str | None = None


def warn_dark(peak: int, depth: int) -> None:
    """Say what to do about 16-bit images taken for `depth` bits, if their largest value, `peak`, shows other bits."""
    if advice := decoding.depth_advice(peak, depth):
        logger.warning("of the images with 16 bits a channel that were decoded now %s", advice)


def name_quarantined(dataset: Dataset, plan: Plan) -> list[Quarantined]:
    """Return the quarantined images in the dataset's order."""
    return [Quarantined(dataset.names[i], *why) for i, why in sorted(plan.quarantined.items())]
