"""Predictions of any number of images, one at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Self

from pipeline.api import requests
from pipeline.api.deployment_results import Prediction, PredictSummary
from pipeline.api.results import causes

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.deployment.predict import ImagePrediction
    from pipeline.extraction.planning import Quarantined


class PredictionStream(Iterator[Prediction]):
    """Predictions in the order of the paths; an image that cannot be decoded has one, too, with its reason.

    Memory does not grow with the number of images. The data directory is open until the last prediction was given,
    the stream is closed, or its `with` statement ends.

    Attributes
    ----------
    runs : list of str
        The names of the runs.
    classes : list of str
        What the probabilities of a prediction are of.
    images : int
        How many predictions there will be.
    """

    def __init__(
        self,
        directory: AbstractContextManager[Workspace],
        runs: Sequence[str],
        paths: Sequence[str],
        given: Mapping[str, Any],
    ) -> None:
        """Open the data directory, the runs and the list of images; `given` are all options of `predict`."""
        from pipeline.dataset import open_images, remote
        from pipeline.deployment.predict import predict
        from pipeline.training.open_run import open_run

        self._start, self._seconds = time.perf_counter(), None
        self._top: int = given["top"]
        self._bad, self._labels, self._from_cache = list["Quarantined"](), Counter[int](), 0
        remote.limit_connections(given["connections"])
        weights = given["weights"] and str(given["weights"])
        with ExitStack() as held:
            workspace = held.enter_context(directory)
            trained = [open_run(workspace.runs, name) for name in runs]
            images = open_images(paths, requests.path_or_none(given["image_root"]))
            advance = held.enter_context(workspace.progress("predicting", len(images)))
            self._source = predict(
                trained, images, workspace, max_pixels=given["max_pixels"], weights=weights, advance=advance
            )
            held.callback(self._source.close)
            self._held = held.pop_all()
        self.runs = [run.name for run in trained]
        self.classes = trained[0].classes
        self.images = len(images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __next__(self) -> Prediction:
        try:
            found = next(self._source)
        except BaseException:  # the last prediction was given, or there will be none
            self.close()
            raise
        return self._counted(found)

    def close(self) -> None:
        """End the work, and close the data directory."""
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._start
        self._held.close()

    def summary(self) -> PredictSummary:
        """Return what was counted in the predictions that were given so far."""
        seconds = time.perf_counter() - self._start if self._seconds is None else self._seconds
        return PredictSummary(
            runs=self.runs,
            classes=self.classes,
            images=self.images,
            from_cache=self._from_cache,
            quarantined=len(self._bad),
            quarantined_images=list(self._bad),
            causes=causes(self._bad),
            seconds=round(seconds, 3),
            label_counts={self.classes[i]: count for i, count in self._labels.most_common()},
        )

    def _counted(self, found: ImagePrediction) -> Prediction:
        from pipeline.deployment.predict import top_classes
        from pipeline.extraction.planning import Quarantined

        self._from_cache += found.cached
        if found.probabilities is None:
            self._bad.append(Quarantined(found.name, found.reason))
            return Prediction(found.name, None, None, [], found.cached, None, found.reason)
        self._labels[int(found.probabilities.argmax())] += 1
        top = top_classes(found.probabilities, self.classes, self._top)
        return Prediction(found.name, *top[0], top, found.cached, found.probabilities, "")
