"""A trained run, with the methods of `Icebox` that use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from pipeline.api import run_tables
from pipeline.api.results import Result

if TYPE_CHECKING:
    import numpy as np
    import pandas

    from pipeline.api.base import DataDirectory
    from pipeline.api.deployment_options import (
        EvaluateOptions,
        ExportOptions,
        PredictOptions,
        ReportOptions,
        ServeOptions,
    )
    from pipeline.api.deployment_results import EvaluateResult, ExportResult, PredictResult, ReportResult, ServeResult
    from pipeline.api.options import Text
    from pipeline.api.prediction_stream import PredictionStream
    from pipeline.extraction.planning import Quarantined

_QUARANTINED = "quarantined.json"


@dataclass(frozen=True)
class Run(Result):
    """A published run: what a training returns, and `Icebox.run` opens. Where a name of a run is wanted it will do.

    Parameters
    ----------
    box
        The data directory whose methods are used.
    path
        The run's folder.
    summary
        What the command line prints of the run: accuracies, numbers of images, seconds.
    quarantined
        Images of the dataset that could not be decoded.
    images
        How many images the dataset has, decoded or not; 0 where that was not counted.

    Examples
    --------
    >>> run = box.run("latest")
    >>> run.accuracy, run.classes
    >>> run.predict("new-photos").to_frame()
    """

    box: DataDirectory = field(compare=False, repr=False)
    path: Path
    summary: Mapping[str, Any] = field(compare=False, repr=False)
    quarantined: Sequence[Quarantined] = field(default=(), compare=False, repr=False)
    images: int = field(default=0, compare=False, repr=False, kw_only=True)

    shown = (
        "run", "accuracy", "val_accuracy", "train_accuracy", "train_rows", "val_rows", "test_rows", "classes", "views",
        "folds", "init", "frozen_until", "trainable_parameters", "features_computed", "epochs", "best_epoch", "C",
        "seconds_per_epoch", "max_difference", "seconds", "weights", "precision",
    )  # fmt: skip

    @classmethod
    def open(cls, box: DataDirectory, folder: Path) -> Self:
        """Return the published run in a folder. Raises RunError if it cannot be read."""
        from pipeline.core.errors import RunError
        from pipeline.core.files import MOST_JSON_BYTES, read_small
        from pipeline.extraction.planning import Quarantined
        from pipeline.runs.store import read_run

        summary, path = read_run(folder)["summary"], folder / _QUARANTINED
        try:
            listed = json.loads(read_small(path, MOST_JSON_BYTES)) if path.exists() else []
            return cls(box, folder, summary, [Quarantined(**each) for each in listed])
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{path} cannot be read ({error})") from error

    @property
    def _icebox(self) -> Any:
        """The same data directory: an `Icebox`, whose module imports this one."""
        return self.box

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name, as `runs` lists it."""
        return self.path.name

    @property
    def accuracy(self) -> float:
        """The accuracy on the test split."""
        return float(self.summary["accuracy"])

    @property
    def val_accuracy(self) -> float:
        """The accuracy on the validation split."""
        return float(self.summary["val_accuracy"])

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the probabilities."""
        from pipeline.runs.store import read_run

        return [str(name) for name in read_run(self.path)["classes"]]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary, as the command line prints it with --json."""
        return dict(self.summary)

    def evaluate(self, **options: Unpack[EvaluateOptions]) -> EvaluateResult:
        """Measure the run. See `Icebox.evaluate`."""
        return self._icebox.evaluate(self, **options)

    def predict(self, paths: Text | Sequence[Text], **options: Unpack[PredictOptions]) -> PredictResult:
        """Classify new images. See `Icebox.predict`."""
        return self._icebox.predict(self, paths, **options)

    def iter_predictions(self, paths: Text | Sequence[Text], **options: Unpack[PredictOptions]) -> PredictionStream:
        """Classify any number of new images, one at a time. See `Icebox.iter_predictions`."""
        return self._icebox.iter_predictions(self, paths, **options)

    def export(self, **options: Unpack[ExportOptions]) -> ExportResult:
        """Write the run as one deployable model. See `Icebox.export`."""
        return self._icebox.export(self, **options)

    def serve(
        self, *, on_ready: Callable[[ServeResult], None] = lambda served: None, **options: Unpack[ServeOptions]
    ) -> None:
        """Serve the run over HTTP until that is interrupted. See `Icebox.serve`."""
        self._icebox.serve(self, on_ready=on_ready, **options)

    def report(self, **options: Unpack[ReportOptions]) -> ReportResult:
        """Write a page about the run. See `Icebox.report`."""
        return self._icebox.report(self, **options)

    @overload
    def history(self, *, frame: Literal[False] = False) -> np.ndarray: ...
    @overload
    def history(self, *, frame: Literal[True]) -> pandas.DataFrame: ...
    def history(self, *, frame: bool = False) -> np.ndarray | pandas.DataFrame:
        """Return the training's history: an entry an epoch; of `logreg` one for each C, of folds one for each fold.

        Parameters
        ----------
        frame
            Return a pandas DataFrame instead of a structured array.

        Raises
        ------
        RunError
            If the file cannot be read.
        UsageError
            If a frame is wanted and pandas is not installed.

        Examples
        --------
        >>> run.history()["val_loss"].min()
        >>> run.history(frame=True).plot(x="epoch")
        """
        return run_tables.history_frame(self.path) if frame else run_tables.history_array(self.path)

    @overload
    def predictions(self, *, frame: Literal[False] = False) -> np.ndarray: ...
    @overload
    def predictions(self, *, frame: Literal[True]) -> pandas.DataFrame: ...
    def predictions(self, *, frame: bool = False) -> np.ndarray | pandas.DataFrame:
        """Return what the run predicted, when it was trained, of its validation and test images.

        Parameters
        ----------
        frame
            Return a pandas DataFrame, with the columns of predictions.csv, instead of a structured array with the
            fields image, split, label, predicted, probability and probabilities, (k,) float32. Of more than 200
            classes the ten likeliest are kept: label_2 and probability_2 to probability_10.

        Raises
        ------
        RunError
            If the file cannot be read.
        UsageError
            If a frame is wanted and pandas is not installed.

        Examples
        --------
        >>> found = run.predictions()
        >>> found[(found["split"] == "test") & (found["label"] != found["predicted"])]["image"]
        """
        return run_tables.predictions_frame(self.path) if frame else run_tables.predictions_array(self.path)
