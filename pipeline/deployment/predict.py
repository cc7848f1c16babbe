"""`predict`: what runs say of new images, a window of them at a time, so that millions are fine.

A row that the cache has is not computed again; what is computed is not kept.
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

WINDOW = 512  # images whose answers are in memory together
_BATCH = 32


@dataclass(frozen=True)
class ImagePrediction:
    """What was said of one image: probabilities (k,) float32, or None and the reason why nothing is.

    `cached` tells whether all of it came from cached rows.
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
    """Yield what `runs` say on average of each image, in the dataset's order.

    Its bytes are decoded and preprocessed as those were that the runs were trained on. `weights` is a file to look
    at for a backbone's weights that the index does not know; `advance(n)` is called as images are done.

    Raises
    ------
    DatasetError
        If the runs know different classes.
    WeightsError
        If the weights of a backbone that has to compute are not on this machine.
    """
    groups = group_runs(runs, workspace, weights)
    with ExitStack() as stack:
        loaders = [_loader(images, group, max_pixels) for group in groups]
        for load in loaders:
            stack.enter_context(load)
        pool = stack.enter_context(decoding_pool())  # whose threads end before the decoders do
        speakers = [_Speaker(group, load, pool, max_pixels) for group, load in zip(groups, loaders, strict=True)]
        for start in range(0, len(images), WINDOW):
            window = images.take(np.arange(start, min(start + WINDOW, len(images))))
            try:
                answers = _window_answers(window, start, speakers, workspace, advance)
            except IndexDamagedError as damage:
                # Begun anew here, not by the command as a whole: the answers before these are printed by now.
                workspace.cache.index.renew(damage)
                answers = _window_answers(window, start, speakers, workspace, lambda n: None)
            yield from answers


def _window_answers(
    window: Dataset, start: int, speakers: Sequence[_Speaker], workspace: Workspace, advance: Callable[[float], None]
) -> list[ImagePrediction]:
    """Return what is said of some images, the first of them being image `start` of all."""
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
    """Return the `count` likeliest classes and their probabilities, equal ones in their order; none of None."""
    if probabilities is None:
        return []
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(classes[i], min(1.0, float(probabilities[i]))) for i in order.tolist()]  # a mean may round to more


@dataclass(frozen=True)
class _Window:
    """Some images of a dataset, the first of them being image `start` of it; who they are is corrected on the way."""

    images: Dataset
    identities: Identities
    start: int


@dataclass(frozen=True)
class _Said:
    """What one group of runs says of a window: probabilities (n, k), or instead the reasons why there are none."""

    probabilities: np.ndarray
    cached: np.ndarray  # (n,) bool
    reasons: dict[int, str]


class _Speaker:
    """Answers for one group of runs; its network is built when the first image needs it."""

    def __init__(self, group: RunGroup, load: Loader, pool: ThreadPoolExecutor, max_pixels: int) -> None:
        self._group = group
        self.share = group.share
        self._index = group.workspace.cache.index
        self._load = load
        self._pool = pool
        self._max_pixels = max_pixels
        self._answerer: BatchPredictor | None = None

    def answers(self, window: _Window, advance: Callable[[float], None]) -> _Said:
        """Return what is said of a window's images; an answer belongs to the very bytes that were decoded."""
        keys, unread = window.identities.keys, window.identities.unread
        condemned = self._index.condemned()
        said = self._from_cache(list({key for key in keys if key is not None and key not in condemned}))
        cached, computed = set(said), 0
        refused = self._refused([key for key in keys if key is not None and key not in said])
        # Once is enough, unless a file changes after it was hashed: its former copies then lack an answer.
        # What is behind addresses may turn out to be an old acquaintance when it is fetched.
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
        """Return what cached rows tell, of those that have one."""
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
        """Decode images and note what is said of them, or why they cannot be decoded.

        It is said by the network, or by rows of those that nobody had read; returns the keys of these.
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
        """Pass on what was decoded and has no row; note why the others were not."""
        for image in loaded:
            if image.pixels is not None:
                was_unseen = image.i in window.identities.unseen
                record_key(image, window.images, window.identities, self._index)
                if was_unseen and image.key and (rows := self._from_cache([image.key])):  # it can be decoded
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
    """Return the first image of each key that is not answered: copies are answered once."""
    first: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        if key is not None and key not in answered:
            first.setdefault(key, i)
    return list(first.values())
