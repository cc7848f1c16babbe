"""What is to be done for a dataset: which of its rows are missing, and which images cannot have any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline import images
from pipeline.backbone import BACKBONES, DEFAULT_BACKBONE
from pipeline.cache.digests import Identities
from pipeline.cache.index import Index
from pipeline.cache.space import FeatureSpace
from pipeline.compute import note_bad, note_key
from pipeline.dataset import Dataset
from pipeline.decoder import Loaded, Loader, decoding_pool
from pipeline.progress import Progress
from pipeline.spec import PLAIN_VIEW, Views

DEFAULT_FIT = "squash"
_CHECKED_AHEAD = 64  # images


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
        first: dict[bytes, int] = {}
        for i, key in enumerate(self.identities.keys):
            if key is not None:
                first.setdefault(key, i)
        lacking = self._lacking(space, list(first))
        refused = self.index.quarantined(list(lacking), images.decoder_version(), self.max_pixels)
        todo = {first[key]: views for key, views in lacking.items() if key not in refused}
        quarantined: dict[int, tuple[str, str | None]] = {}
        copies = 0
        for i, key in enumerate(self.identities.keys):
            if i in self.identities.unseen:
                copies += 1  # but for those that stand below
            elif key is None:
                quarantined[i] = (self.identities.unread[i], None)
            elif key in refused:
                quarantined[i] = (refused[key].reason, refused[key].since)
            else:
                copies += first[key] != i
        to_read = self.identities.to_read
        copies -= len(to_read)
        todo.update((i, list(self.views.numbers)) for i in to_read)
        rows = sorted((i, view) for i, views in todo.items() for view in views)
        known = len(first) - len(refused) + len(to_read)
        reused = known * self.views.count - len(rows)
        return Plan(Todo.of(rows), reused, copies * self.views.count, quarantined)

    def _lacking(self, space: FeatureSpace | None, keys: list[bytes]) -> dict[bytes, list[int]]:
        """Return key → the numbers of the views it has no row of, for those of `keys` that lack any."""
        lacking: dict[bytes, list[int]] = {}
        for view in self.views.numbers:
            found = space.locate(keys, [view] * len(keys)).found if space else np.zeros(len(keys), bool)
            for at in np.flatnonzero(~found).tolist():
                lacking.setdefault(keys[at], []).append(view)
        return lacking

    def meet_undecodable(self, space: FeatureSpace | None) -> Plan:
        """Return the plan after decoding images that lack rows until one can be decoded; those before it are
        quarantined.

        So neither TensorFlow is loaded nor is anything demanded when what lacks rows can have none, as after the
        index, which remembers the quarantine, was lost.
        """
        plan = self.plan(space)
        if not plan.todo:
            return plan
        fit = space.spec.fit if space else DEFAULT_FIT
        with Loader(self.dataset, BACKBONES[DEFAULT_BACKBONE].input_size, fit, self.max_pixels) as loader:
            loader.until(plan.todo.distinct.tolist(), lambda image: self._lacks_rows(image, space))
        self.identities.remember_fetched(self.index)
        return self.plan(space)

    def _lacks_rows(self, image: Loaded, space: FeatureSpace | None) -> bool:
        """Note who an image is that was just loaded; return whether a row of it can and must be computed."""
        if image.pixels is None:
            self._note_bad(image)
            return False
        was_unseen = image.i in self.identities.unseen
        note_key(image, self.dataset, self.identities, self.index)
        # What nobody had read may turn out to be an old acquaintance.
        return not was_unseen or bool(image.key and self._lacking(space, [image.key]))

    def try_to_decode(self, some: Iterable[int], fit: str, progress: Progress) -> None:
        """Decode these images, to know which of them cannot be, and who those are that nobody had read."""
        some = list(some)
        size = BACKBONES[DEFAULT_BACKBONE].input_size
        with (
            Loader(self.dataset, size, fit, self.max_pixels) as loader,
            decoding_pool() as pool,
            progress("checking images", len(some)) as advance,
        ):
            for image in loader.stream(pool, some, lambda image: image, ahead=_CHECKED_AHEAD):
                if image.pixels is None:
                    self._note_bad(image)
                else:
                    note_key(image, self.dataset, self.identities, self.index)
                advance(1)
        self.identities.remember_fetched(self.index)

    def _note_bad(self, bad: Loaded) -> None:
        note_bad(bad, self.dataset, self.identities, self.index, self.max_pixels)


@dataclass(frozen=True)
class Quarantined:
    """An image without a row, by the name people know it under, and why. Names may repeat in a manifest.

    `since` is when its content was first refused (ISO 8601, UTC); None if it could not be read, which is not kept.
    """

    path: str
    reason: str
    since: str | None = None


def name_quarantined(dataset: Dataset, plan: Plan) -> list[Quarantined]:
    """Return the quarantined images in the dataset's order."""
    return [Quarantined(dataset.names[i], *why) for i, why in sorted(plan.quarantined.items())]
