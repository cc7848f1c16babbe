"""Classify new images with one or more published runs: the implementation of `predict`.

Images are processed in windows of 512, so memory does not grow with their number. Rows in the cache are used; features
that are computed here are not stored. Main parts: `predict` (all images) and `_Speaker` (one group of runs).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from pipeline.cache.digests import Identities, identify
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import IndexDamagedError
from pipeline.dataset import Dataset
from pipeline.deployment.ensemble import RunGroup, group_runs
from pipeline.extraction.compute import record_failure, record_key
from pipeline.images import decoding as decoding_policy
from pipeline.images.loader import Loaded, Loader, batched, decoding_pool
from pipeline.training.full_model import BatchPredictor, compile_model
from pipeline.training.open_run import TrainedRun

WINDOW = 512  # images whose probabilities are in memory at the same time
_BATCH = 32


@dataclass(frozen=True)
class ImagePrediction:
    """The prediction for one image: probabilities (k,) float32, or None and the reason why there are none.

    `cached` is true if the rows of all runs came from the cache.
    """

    name: str
    probabilities: np.ndarray | None
    reason: str = ""
    cached: bool = False


def predict(
    runs: Sequence[TrainedRun],
    images: Dataset,
    workspace: Workspace,
    *,
    max_pixels: int,
    weights: str | None = None,
    advance: Callable[[float], None] = lambda n: None,
) -> Generator[ImagePrediction, None, None]:
    """Yield the mean prediction of `runs` for each image, in the dataset's order.

    Images are decoded and preprocessed like the training images of the runs. `weights` is a file with a backbone's
    weights, for weights that the index does not know; `advance(n)` is called when n images are done.

    Raises
    ------
    DatasetError
        If the runs have different classes.
    WeightsError
        If rows must be computed and the backbone's weights are not on this machine.
    """
    groups = group_runs(runs, workspace, weights)
    with ExitStack() as stack:
        loaders = [_loader(images, group, max_pixels) for group in groups]
        for load in loaders:
            stack.enter_context(load)
        pool = stack.enter_context(decoding_pool())  # entered last: its threads end before the decoders
        speakers = [_Speaker(group, load, pool, max_pixels) for group, load in zip(groups, loaders, strict=True)]
        for start in range(0, len(images), WINDOW):
            window = images.take(np.arange(start, min(start + WINDOW, len(images))))
            try:
                answers = _window_answers(window, start, speakers, workspace, advance)
            except IndexDamagedError as damage:
                # Only this window is repeated, not the whole command: earlier predictions are already printed.
                workspace.cache.index.renew(damage)
                answers = _window_answers(window, start, speakers, workspace, lambda n: None)
            yield from answers


def _window_answers(
    window: Dataset, start: int, speakers: Sequence[_Speaker], workspace: Workspace, advance: Callable[[float], None]
) -> list[ImagePrediction]:
    """Return the predictions for a window of images; its first image is image `start` of the dataset."""
    identities = identify(window, workspace.cache.index, lambda n: None, read_unseen=False)
    found = [
        speaker.answers(_Window(window, identities, start), lambda n: advance(n / len(speakers)))
        for speaker in speakers
    ]
    reasons = {i: reason for said in found for i, reason in said.reasons.items()}
    mean = np.sum([each.share * said.probabilities for each, said in zip(speakers, found, strict=True)], axis=0)
    cached = np.all([said.cached for said in found], axis=0)
    return [
        ImagePrediction(name, None, reasons[i])
        if i in reasons
        else ImagePrediction(name, mean[i], cached=bool(cached[i]))
        for i, name in enumerate(window.names)
    ]


def _loader(images: Dataset, group: RunGroup, max_pixels: int) -> Loader:
    spec = group.spec
    return Loader(images, spec.input_size, spec.fit, max_pixels, depth=decoding_policy.depth_of(spec.decode))


def top_classes(probabilities: np.ndarray | None, classes: list[str], count: int) -> list[tuple[str, float]]:
    """Return the `count` likeliest classes and their probabilities, ties in class order; an empty list for None."""
    if probabilities is None:
        return []
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(classes[i], min(1.0, float(probabilities[i]))) for i in order.tolist()]  # a mean may round above 1


@dataclass(frozen=True)
class _Window:
    """A window of a dataset, from image `start` on; `identities` is updated while images are read."""

    images: Dataset
    identities: Identities
    start: int


@dataclass(frozen=True)
class _Said:
    """The predictions of one group of runs for a window of n images.

    `probabilities` is (n, k), with zeros for images without a prediction; `reasons` has the reason for each of those.
    """

    probabilities: np.ndarray
    cached: np.ndarray  # (n,) bool
    reasons: dict[int, str]


class _Speaker:
    """Computes the predictions of one group of runs; builds its network when the first image needs it."""

    def __init__(self, group: RunGroup, load: Loader, pool: ThreadPoolExecutor, max_pixels: int) -> None:
        self._group = group
        self.share = group.share
        self._index = group.workspace.cache.index
        self._load = load
        self._pool = pool
        self._max_pixels = max_pixels
        self._answerer: BatchPredictor | None = None

    def answers(self, window: _Window, advance: Callable[[float], None]) -> _Said:
        """Return the predictions for a window's images.

        Each prediction belongs to the key of the bytes that were decoded, also if a file changes meanwhile.
        """
        keys, unread = window.identities.keys, window.identities.unread
        condemned = self._index.condemned()
        said = self._from_cache(list({key for key in keys if key is not None and key not in condemned}))
        cached, computed = set(said), 0
        refused = self._refused([key for key in keys if key is not None and key not in said])
        # One pass is enough, unless a file changes after it was hashed: copies of its old content then have no
        # prediction yet. A remote image may turn out to have a key that is already known.
        while todo := [*window.identities.to_read, *_lacking(keys, said.keys() | refused.keys())]:
            cached |= self._compute(window, todo, said, refused, advance)
            computed += len(todo)
        window.identities.remember_fetched(self._index)
        advance(len(keys) - computed)
        reasons = {i: unread[i] if key is None else refused[key] for i, key in enumerate(keys) if key not in said}
        nothing = np.zeros(len(self._group.runs[0].classes), np.float32)
        probabilities = np.stack([nothing if key is None else said.get(key, nothing) for key in keys])
        return _Said(probabilities, np.array([key in cached for key in keys]), reasons)

    def _from_cache(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """Return the probabilities by key, for the keys that have a cached row."""
        space = self._group.space()
        if space is None or not keys:
            return {}
        with space.reading():
            found = [keys[at] for at in np.flatnonzero(space.locate(keys).found).tolist()]
            return dict(zip(found, self._group.of_rows(space, found), strict=True)) if found else {}

    def _refused(self, keys: list[bytes]) -> dict[bytes, str]:
        known = self._index.quarantined(keys, decoding_policy.decoder_version(), self._max_pixels)
        return {key: refusal.reason for key, refusal in known.items()}

    def _compute(
        self,
        window: _Window,
        todo: list[int],
        said: dict[bytes, np.ndarray],
        refused: dict[bytes, str],
        advance: Callable[[float], None],
    ) -> set[bytes]:
        """Decode images; add their probabilities to `said`, or the reason why they cannot be decoded to `refused`.

        The network computes the probabilities. A remote image whose key was unknown before may have a cached row,
        which is used instead; the keys of such images are returned.
        """

        def within(image: Loaded) -> Loaded:
            return replace(image, i=image.i - window.start)

        found = set[bytes]()
        loaded = self._load.stream(self._pool, [window.start + i for i in todo], within, ahead=2 * _BATCH)
        for batch in batched(self._good(loaded, window, said, found, refused, advance), _BATCH):
            pixels = np.stack([image.pixels for image in batch if image.pixels is not None])
            keys = [image.key for image in batch if image.key is not None]
            said.update(zip(keys, self._network()(pixels), strict=True))
            advance(len(batch))
        return found

    def _good(
        self,
        loaded: Iterable[Loaded],
        window: _Window,
        said: dict[bytes, np.ndarray],
        found: set[bytes],
        refused: dict[bytes, str],
        advance: Callable[[float], None],
    ) -> Iterator[Loaded]:
        """Yield the decoded images without a cached row; record the reasons for those that cannot be decoded."""
        for image in loaded:
            if image.pixels is not None:
                was_unseen = image.i in window.identities.unseen
                record_key(image, window.images, window.identities, self._index)
                if was_unseen and image.key and (rows := self._from_cache([image.key])):  # now known to decode
                    said.update(rows)
                    found.update(rows)
                    advance(1)
                else:
                    yield image
                continue
            record_failure(image, window.images, window.identities, self._index, self._max_pixels)
            if image.key is not None:
                refused[image.key] = image.reason
            advance(1)

    def _network(self) -> BatchPredictor:
        if self._answerer is None:
            self._answerer = compile_model(self._group.network())
        return self._answerer


def _lacking(keys: Sequence[bytes | None], answered: Set[bytes]) -> list[int]:
    """Return the index of the first image of each key without a prediction, so that copies are computed once."""
    first: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        if key is not None and key not in answered:
            first.setdefault(key, i)
    return list(first.values())
