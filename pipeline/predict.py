"""`predict`: what runs say of new images, a window of them at a time, so that millions are fine.

A row that the cache has is not computed again; what is computed is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import images as decoding_policy
from pipeline.answering import Answerer, Group, compiled, grouped, stated_weights, weights_of
from pipeline.cache.digests import Identities, identify
from pipeline.compute import note_bad
from pipeline.dataset import Dataset
from pipeline.decoder import Loaded, Loader, batched, decoding_pool, in_threads
from pipeline.extract import warn_untrained
from pipeline.trained import TrainedRun
from pipeline.weights import Weights
from pipeline.workspace import Workspace

WINDOW = 512  # images whose answers are in memory together
_BATCH = 32  # as features are computed by default


@dataclass(frozen=True)
class Answer:
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
) -> Iterator[Answer]:
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
    groups = grouped(runs)
    given = stated_weights(groups, workspace, weights)
    for run in runs:
        warn_untrained(run.base)
    speakers = [_Speaker(group, workspace, given, max_pixels) for group in groups]
    shares = [len(group.runs) / len(runs) for group in groups]
    for start in range(0, len(images), WINDOW):
        window = images.take(np.arange(start, min(start + WINDOW, len(images))))
        identities = identify(window, workspace.cache.index, lambda n: None)
        said = np.zeros((len(window), len(runs[0].classes)), np.float32)
        cached = np.ones(len(window), bool)
        reasons: dict[int, str] = {}
        for speaker, share in zip(speakers, shares, strict=True):
            found = speaker.answers(window, identities, lambda n: advance(n / len(speakers)))
            said += share * found.probabilities
            cached &= found.cached
            reasons |= found.reasons
        for i, name in enumerate(window.names):
            bad = i in reasons
            yield Answer(name, None, reasons[i]) if bad else Answer(name, said[i], cached=bool(cached[i]))


def likeliest(probabilities: np.ndarray | None, classes: list[str], count: int) -> list[tuple[str, float]]:
    """Return the `count` likeliest classes and their probabilities, equal ones in their order; none of None."""
    if probabilities is None:
        return []
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(classes[i], float(probabilities[i])) for i in order.tolist()]


@dataclass(frozen=True)
class _Said:
    """What one group of runs says of a window: probabilities (n, k), or instead the reasons why there are none."""

    probabilities: np.ndarray
    cached: np.ndarray  # (n,) bool
    reasons: dict[int, str]


class _Speaker:
    """Answers for one group of runs; its network is built when the first image needs it."""

    def __init__(self, group: Group, workspace: Workspace, given: Weights | None, max_pixels: int) -> None:
        self._group = group
        self._workspace = workspace
        self._given = given
        self._max_pixels = max_pixels
        self._answerer: Answerer | None = None

    def answers(self, window: Dataset, identities: Identities, advance: Callable[[float], None]) -> _Said:
        """Return what is said of a window's images."""
        first: dict[bytes, int] = {}  # copies are answered once
        for i, key in enumerate(identities.keys):
            if key is not None:
                first.setdefault(key, i)
        said = np.zeros((len(window), len(self._group.runs[0].classes)), np.float32)
        cached = self._from_cache(first, said)
        refused = self._refused([key for key in first if key not in cached])
        todo = [i for key, i in first.items() if key not in cached and key not in refused]
        advance(len(window) - len(todo))
        reasons = {first[key]: reason for key, reason in refused.items()}
        reasons |= self._computed(window, identities, todo, said, advance)
        origin = [i if key is None else first[key] for i, key in enumerate(identities.keys)]
        reasons = {i: reasons[at] for i, at in enumerate(origin) if at in reasons} | identities.unread
        return _Said(said[origin], np.array([key in cached for key in identities.keys]), reasons)

    def _from_cache(self, first: dict[bytes, int], said: np.ndarray) -> set[bytes]:
        """Fill in what cached rows tell; return whose they are."""
        space = self._group.space(self._workspace)
        if space is None or not first:
            return set()
        with space.reading():
            keys = list(first)
            found = [keys[at] for at in np.flatnonzero(space.locate(keys).found).tolist()]
            if found:
                said[[first[key] for key in found]] = self._group.of_rows(space, found)
        return set(found)

    def _refused(self, keys: list[bytes]) -> dict[bytes, str]:
        index = self._workspace.cache.index
        known = index.quarantined(keys, decoding_policy.decoder_version(), self._max_pixels)
        return {key: refusal.reason for key, refusal in known.items()}

    def _computed(
        self,
        window: Dataset,
        identities: Identities,
        todo: list[int],
        said: np.ndarray,
        advance: Callable[[float], None],
    ) -> dict[int, str]:
        """Decode images and fill in what the network says; return why some cannot be decoded."""
        if not todo:
            return {}
        spec, reasons = self._group.spec, dict[int, str]()
        with Loader(window, spec.input_size, spec.fit, self._max_pixels) as load, decoding_pool() as pool:
            loaded = in_threads(pool, load, todo, ahead=2 * _BATCH)
            good = self._good(loaded, window, identities, reasons, advance)
            for batch in batched(good, _BATCH):
                pixels = np.stack([image.pixels for image in batch if image.pixels is not None])
                said[[image.i for image in batch]] = self._network()(pixels)
                advance(len(batch))
        return reasons

    def _good(
        self,
        loaded: Iterable[Loaded],
        window: Dataset,
        identities: Identities,
        reasons: dict[int, str],
        advance: Callable[[float], None],
    ) -> Iterator[Loaded]:
        """Pass on what was decoded; note in `reasons` why the others were not."""
        for image in loaded:
            if image.pixels is not None:
                yield image
                continue
            note_bad(image, window, identities, self._workspace.cache.index, self._max_pixels)
            reasons[image.i] = image.reason
            advance(1)

    def _network(self) -> Answerer:
        if self._answerer is None:
            weights = weights_of(self._group, self._workspace, self._given)
            self._answerer = compiled(self._group.network(weights).on_pixels(), self._group.spec.input_size)
        return self._answerer
