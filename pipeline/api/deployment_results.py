"""What the methods of `Icebox` that use trained runs return."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.api.results import Result, plain, readable

if TYPE_CHECKING:
    import numpy as np
    import pandas

    from pipeline.deployment.evaluate_run import Evaluation
    from pipeline.deployment.export import ExportedModel
    from pipeline.extraction.planning import Quarantined

_MOST_LABELS = 10  # counted for people


@dataclass(frozen=True, eq=False)
class EvaluateResult(Result):
    """What a run is worth on some images; `path` is the folder that holds metrics, predictions and plots.

    `per_class` has an object for each class: class, precision, recall, f1, roc_auc, support. `confusion` is (k, k)
    counts, rows being the true classes, or, of more than 200 classes, a list of [true, predicted, count].
    """

    run: str
    dataset: str
    split: str  # train, val, test or all
    images: int  # that were measured
    accuracy: float
    accuracy_interval: list[float]  # 95%, by Wilson's score method
    top5_accuracy: float | None  # None for five classes or fewer
    balanced_accuracy: float
    macro_f1: float
    log_loss: float  # nats
    roc_auc: float | None  # each class against the rest, their mean
    expected_calibration_error: float
    calibration: list[dict[str, Any]]  # 15 bins: from, to, images, confidence, accuracy
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]
    confusion_left_out: int | None  # images in cells of `confusion` that are not listed; None if all are
    trained_on: int | None  # images of the split that the run was trained or selected on; None if not known
    left_out: int  # how many of these were not measured
    path: Path
    features_computed: int  # always 0
    quarantined: int
    quarantined_images: list[Quarantined]
    dataset_images: int  # images of all splits

    shown = (
        "run", "dataset", "split", "images", "left_out", "accuracy", "accuracy_interval", "top5_accuracy",
        "balanced_accuracy", "macro_f1", "log_loss", "roc_auc", "expected_calibration_error",
    )  # fmt: skip

    @classmethod
    def of(cls, done: Evaluation, dataset_images: int) -> Self:
        """Return the same for an evaluation of the library."""
        return cls(
            run=done.run,
            dataset=done.dataset,
            split=done.split,
            **{"confusion_left_out": None, **done.metrics},
            trained_on=done.trained_on,
            left_out=done.left_out,
            path=done.path,
            features_computed=0,
            quarantined=len(done.quarantined),
            quarantined_images=done.quarantined,
            dataset_images=dataset_images,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `evaluate --json` prints them."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}  # its lists are plain, and may be long
        beside = ["quarantined_images", "dataset_images"]
        beside += ["confusion_left_out"] if self.confusion_left_out is None else []
        return {name: value for name, value in found.items() if name not in beside} | {"path": str(self.path)}


@dataclass(frozen=True, eq=False)
class Prediction(Result):
    """What one image shows, by one run or several: the likeliest class, its probability, and those of all classes.

    Where an image cannot be read or decoded, `label`, `probability` and `probabilities` are None, `top` is empty and
    `reason` says why.
    """

    path: str
    label: str | None
    probability: float | None
    top: list[tuple[str, float]]  # the likeliest classes, the likeliest first
    from_cache: bool  # whether it was computed from cached rows alone
    probabilities: np.ndarray | None  # (k,) float32
    reason: str

    shown = ("path", "label", "probability", "reason")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `predict --json` prints them of an image."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "top": [{"label": label, "probability": probability} for label, probability in self.top],
            "from_cache": self.from_cache,
        }


@dataclass(frozen=True, eq=False)
class PredictSummary(Result):
    """What `predict` tells of all images together; `label_counts` is label → how many images show it."""

    runs: list[str]
    classes: list[str]
    images: int
    from_cache: int
    quarantined: int
    quarantined_images: list[Quarantined]
    causes: dict[str, int]  # reason → how many images
    seconds: float
    label_counts: dict[str, int]  # the most frequent first

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `predict --json` prints them behind the predictions."""
        names = (
            "runs", "classes", "images", "from_cache", "quarantined", "quarantined_images", "causes", "seconds",
        )  # fmt: skip
        return {name: plain(getattr(self, name)) for name in names}

    def lines(self) -> dict[str, str]:
        """Return name → value of what people want to know at a glance."""
        counts = [f"{label} {count:,}" for label, count in list(self.label_counts.items())[:_MOST_LABELS]]
        numbers = {name: getattr(self, name) for name in ("images", "from_cache", "quarantined", "seconds")}
        told = {"runs": ", ".join(self.runs), **numbers, "labels": ", ".join(counts)}
        return {name.replace("_", " "): readable(name, value) for name, value in told.items()}


@dataclass(frozen=True, eq=False)
class PredictResult(PredictSummary):
    """What `predict` returns: the predictions of all n images that could be decoded, in the order of the paths.

    Examples
    --------
    >>> found = box.predict("latest", "new-photos")
    >>> found.paths[found.labels == "cats"]
    """

    predictions: list[Prediction]

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The probabilities, (n, k) float32; columns are `classes`."""
        import numpy as np

        rows = [each.probabilities for each in self.predictions if each.probabilities is not None]
        return np.stack(rows) if rows else np.zeros((0, len(self.classes)), np.float32)

    @cached_property
    def labels(self) -> np.ndarray:
        """The likeliest class of each image, (n,) text."""
        import numpy as np

        return np.array([each.label for each in self.predictions], np.str_)

    @cached_property
    def paths(self) -> np.ndarray:
        """The name of each image, (n,) text."""
        import numpy as np

        return np.array([each.path for each in self.predictions], np.str_)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `predict --json` prints them."""
        return {"predictions": [each.to_dict() for each in self.predictions], **super().to_dict()}

    def to_frame(self) -> pandas.DataFrame:
        """Return a DataFrame with a row for each image: path, label, probability, from_cache, and p:<class> for each.

        Raises
        ------
        UsageError
            If pandas is not installed.
        """
        from pipeline.api.run_tables import import_pandas

        pd = import_pandas()
        columns = ("path", "label", "probability", "from_cache")
        told = pd.DataFrame({name: [getattr(each, name) for each in self.predictions] for name in columns})
        further = pd.DataFrame(self.probabilities, columns=pd.Index([f"p:{name}" for name in self.classes]))
        return pd.concat([told, further], axis=1)


@dataclass(frozen=True, eq=False)
class ExportResult(Result):
    """A model that was exported: pixels (n, size, size, 3) uint8 RGB → probabilities (n, k) float32."""

    path: Path  # the model's file or folder
    created: str  # ISO 8601, UTC
    model: str  # name of that file or folder
    model_format: str
    run: str
    backbone: str
    weights: str
    untrained: bool
    input: dict[str, Any]  # name, shape, dtype, channels
    output: dict[str, Any]  # name, shape, dtype
    images: dict[str, Any]  # how they are decoded, made square and resized
    classes: str  # name of the file with the classes' names
    versions: dict[str, str]  # of the packages that wrote the model
    compared_images: int
    run_precision: str
    difference_to_run: float  # of a probability, at most: what the run itself predicts, in its precision
    max_difference: float  # of a probability, at most: what the float32 full model predicts
    bytes: int
    seconds: float

    shown = ("bytes", "compared_images", "max_difference", "run_precision", "difference_to_run", "seconds")

    @classmethod
    def of(cls, done: ExportedModel) -> Self:
        """Return the same for an export of the library."""
        return cls(done.path, **{name: value for name, value in done.about.items() if name not in _EXPORT_FORMAT})


_EXPORT_FORMAT = ("format", "version")  # of the file export.json


@dataclass(frozen=True)
class ServeResult(Result):
    """Runs that are served by now."""

    url: str
    runs: list[str]
    classes: list[str]

    shown = ("url",)


@dataclass(frozen=True, eq=False)
class ReportResult(Result):
    """A page that was written. Of one run, several or a sweep, fields that do not apply are None.

    `likely_wrong` has an object for each label that is likely wrong, `near` one for each pair of near copies.
    """

    page: Path
    bytes: int
    seconds: float
    run: str | None = None  # of one run: all down to `left_out`
    images: int | None = None
    images_shown: int | None = None
    likely_wrong_labels: int | None = None
    near_copies: int | None = None
    near_copies_across_splits: int | None = None
    map: str | None = None  # tsne or pca
    out_of_sample_accuracy: float | None = None
    likely_wrong: list[dict[str, Any]] | None = None
    near: list[dict[str, Any]] | None = None
    left_out: list[str] | None = None  # what the page lacks, and why
    sweep: str | None = None
    runs: int | None = None  # of a comparison or a sweep
    best: str | None = None

    shown = (
        "page", "bytes", "images", "likely_wrong_labels", "near_copies", "near_copies_across_splits", "best",
        "seconds",
    )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `report --json` prints them."""
        if self.run is None:
            names = ("page", "bytes", *(("sweep",) if self.sweep is not None else ()), "runs", "best", "seconds")
        else:
            looked = ("out_of_sample_accuracy", "likely_wrong", "near") if self.likely_wrong is not None else ()
            names = (
                "run", "page", "bytes", "images", "images_shown", "likely_wrong_labels", "near_copies",
                "near_copies_across_splits", "map", *looked, "left_out", "seconds",
            )  # fmt: skip
        return {name: plain(getattr(self, name)) for name in names}


@dataclass(frozen=True, eq=False)
class RunsResult(Result):
    """The trained runs, the oldest first, and what was stopped; iterating gives an object for each run.

    Each is the run's summary with its `dataset`, `dataset_path`, `backbone` and `created` (ISO 8601, UTC).
    """

    runs: list[dict[str, Any]]
    unfinished: list[str]  # names of runs that were stopped and can be resumed
    unfinished_sweeps: list[str]
    resumed_by: dict[str, str]  # name of an unfinished run → the command that resumes it

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `runs ls --json` prints them."""
        return {name: plain(getattr(self, name)) for name in ("runs", "unfinished", "unfinished_sweeps")}

    def to_frame(self) -> pandas.DataFrame:
        """Return a DataFrame with a row for each run. Raises UsageError if pandas is not installed."""
        from pipeline.api.run_tables import import_pandas

        return import_pandas().DataFrame(self.runs)

    def _repr_html_(self) -> str:
        names = ("run", "head", "backbone", "dataset", "accuracy", "accuracy_interval", "val_accuracy", "seconds")
        return html_table([[readable(name, each[name]) for name in names] for each in self.runs], names)


def html_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Return rows of text under headers, as HTML."""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
