"""Evaluate a published run on its own dataset or on another dataset with the same classes.

A head reads cached rows, a full model reads images. The results are stored as metrics, predictions and plots.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.backbone.frozen import ENGINE
from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import DatasetError, MissingRowsError, RunError, UsageError
from pipeline.core.units import counted
from pipeline.dataset import Dataset
from pipeline.extraction.compute import DEFAULT_BATCH_SIZE
from pipeline.extraction.feature_choice import FeatureChoice, warn_untrained
from pipeline.extraction.planning import Quarantined
from pipeline.images.decoding import depth_of
from pipeline.runs import store
from pipeline.runs.metrics import compute_metrics, confusion_cells
from pipeline.runs.plots import draw_calibration, draw_confusion
from pipeline.runs.predictions import Predictions, write_predictions
from pipeline.runs.run_images import SEEN, RunImages
from pipeline.training.fitting import predict_probabilities
from pipeline.training.full_model import compile_model, probabilities
from pipeline.training.image_batches import ImageRows, open_decoder
from pipeline.training.labelled_features import LabelledFeatures, LabelledImages, join_features, join_images
from pipeline.training.open_run import TrainedRun
from pipeline.training.rows import RowSelection, open_rows
from pipeline.training.seen_images import seen_images

logger = logging.getLogger(__name__)

Side = Literal["train", "val", "test", "all"]
_FILES = {"metrics.json", "predictions.csv", "confusion.png", "calibration.png"}


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: the metrics of `compute_metrics`, and the folder `path` that stores all results."""

    run: str
    dataset: str
    split: Side
    metrics: dict[str, Any]
    path: Path
    quarantined: list[Quarantined]
    trained_on: int | None  # requested images that the run was trained or selected on; None if not known
    left_out: int  # how many of those were not measured


def evaluate_run(
    run: TrainedRun,
    dataset: Dataset,
    workspace: Workspace,
    *,
    max_pixels: int,
    split: Side | None = None,
    space: str | None = None,
    own: bool = False,
    memory: int | None = None,
    include_trained: bool = False,
    out: Path | None = None,
) -> Evaluation:
    """Measure `run` on `dataset` and store metrics, predictions and plots in the run's folder, or in `out`.

    A head reads cached rows, a full model reads images. The classes of `dataset` are matched to the run's by name.
    Images that the run was trained or selected on are recognised by their content. They are left out by default.

    Parameters
    ----------
    split
        The images to measure. The default is the test split, or all images of another dataset without splits. "train"
        and "all" include images that the run was trained on; "val" includes images that the run was selected on.
    space
        The name of a feature space to read, instead of the run's own.
    own
        Whether `dataset` is the run's training dataset; the default of `split` is then "test".
    include_trained
        Also measure images that the run was trained on.
    out
        The folder to create, instead of one in the run's folder.

    Raises
    ------
    SpecError
        If the space is not the one that the run was trained in.
    UsageError
        If a space is named for a full model, or `out` contains other files than an earlier evaluation.
    DatasetError
        If a class is not one of the run's classes, or no image is left to measure.
    MissingRowsError
        If an image that can be decoded has no row.
    """
    dataset = run.matched(dataset)
    _require_writable(run, out)
    labelled = _gathered(run, dataset, workspace, max_pixels, space, memory)
    chosen = _choose(run, labelled, seen_images(run, workspace, labelled), split, own, include_trained)
    side, members = chosen.side, chosen.members
    if isinstance(labelled, LabelledFeatures):
        said = _said_of_rows(run, labelled, members, side, memory)
    else:
        said = _said_of_images(run, labelled, members, max_pixels, workspace)
    predictions = Predictions(side, labelled.names(members), labelled.labels(members), said)
    metrics = compute_metrics(predictions.labels, predictions.probabilities, run.classes)
    title = (
        side if own or labelled.content == run.content else f"{dataset.name}-{side}-{labelled.digest()[:8]}"
    )  # the digest separates datasets of the same name
    title += "-trained-included" * (include_trained and bool(chosen.trained_on))
    path = _keep(run, title, predictions, metrics, out)
    return Evaluation(
        run.name, dataset.name, side, metrics, path, labelled.quarantined, chosen.trained_on, chosen.left_out
    )


@dataclass(frozen=True)
class _Chosen:
    """The images to measure: `members` (n,) are positions in the dataset; for the counts see `Evaluation`."""

    side: Side
    members: np.ndarray
    trained_on: int | None
    left_out: int


def _choose(
    run: TrainedRun,
    images: LabelledImages,
    known: RunImages | None,
    split: Side | None,
    own: bool,
    include_trained: bool,
) -> _Chosen:
    """Choose the images to measure; warn of images that the run has seen. Raises DatasetError if none is left."""
    side: Side = split or ("test" if own or not images.split.drawn else "all")
    members = np.arange(len(images.keys)) if side == "all" else images.members(side)
    if not len(members):
        raise DatasetError(f"no images in the {side} split of {images.dataset.name}; name another by --split")
    if known is None:
        return _Chosen(side, members, None, 0)
    keys = [images.keys[i] for i in members.tolist()]
    seen = known.contains(keys, *SEEN)
    if split == "val":  # the user requests images the run was selected on, so only the others count as seen
        seen, selected = known.contains(keys, "train", "initial"), seen
        _tell(f"{_count(selected)} were trained on or decided which model was kept: new ones will be harder", selected)
    if include_trained or split in ("train", "all"):
        _tell(f"{_count(seen)} were trained on: new ones will be harder", seen)
        return _Chosen(side, members, int(seen.sum()), 0)
    if seen.all():
        raise DatasetError(f"{_count(seen)} were trained on by {run.name}: none is left; --include-trained takes them")
    _tell(f"{_count(seen)} were trained on and are left out; --include-trained takes them too", seen)
    members = members[~seen]
    if split is None and np.array_equal(members, images.members("test")):  # the run's own dataset, under another name
        side = "test"
    return _Chosen(side, members, int(seen.sum()), int(seen.sum()))


def _count(some: np.ndarray) -> str:
    return f"{int(some.sum()):,} of these {len(some):,} images"


def _tell(text: str, some: np.ndarray) -> None:
    if some.any():
        logger.warning("%s", text)


def _gathered(
    run: TrainedRun,
    dataset: Dataset,
    workspace: Workspace,
    max_pixels: int,
    space: str | None,
    memory: int | None,
) -> LabelledImages:
    if run.full:
        for name, value in (("space", space), ("memory", memory)):
            if value is not None:
                raise UsageError(f"the run {run.name} is a full model, which reads images; leave out --{name}")
        images = join_images(dataset, workspace, max_pixels, run.spec.fit, depth_of(run.spec.decode))
        warn_untrained(run.base)
        return images
    labelled = join_features(dataset, workspace, _choice(run, workspace, space), max_pixels)
    run.require_space(labelled.space.spec)
    warn_untrained(labelled.space.spec)
    return labelled


def _choice(run: TrainedRun, workspace: Workspace, space: str | None) -> FeatureChoice:
    if space is not None:
        return FeatureChoice(space=space)
    if run.spec.directory not in workspace.cache.names():
        if run.spec.engine != ENGINE:
            raise MissingRowsError(
                f"the feature space {run.spec.directory} of the run {run.name} is not in the cache, and was begun by "
                "an earlier version, so that it cannot be made anew: restore its folder, or train anew"
            )
        raise MissingRowsError(
            f"the feature space {run.spec.directory} of the run {run.name} is not in the cache; make it by `features`"
            f" with --backbone {run.backbone} --input-size {run.spec.input_size} --scaling {run.spec.scaling}"
            f" --layer {run.spec.layer} --precision {run.spec.precision} --storage {run.spec.storage}"
            f" --fit {run.spec.fit} --depth {depth_of(run.spec.decode)} and the same weights ({run.spec.weights})"
        )
    return FeatureChoice(space=run.spec.directory)


def _said_of_rows(
    run: TrainedRun, labelled: LabelledFeatures, members: np.ndarray, side: Side, memory: int | None
) -> np.ndarray:
    with labelled.space.reading():
        (rows,) = open_rows(labelled.space, labelled.keys, run.reads, [RowSelection(members)], memory=memory)
        return predict_probabilities(run, rows, side)


def _said_of_images(
    run: TrainedRun, images: LabelledImages, members: np.ndarray, max_pixels: int, workspace: Workspace
) -> np.ndarray:
    answer, spec = compile_model(run.network()), run.spec
    how = spec.input_size, spec.fit, max_pixels, depth_of(spec.decode)
    with (
        open_decoder(images.dataset, images.keys, images.usable, *how) as source,
        workspace.progress("measuring", len(members)) as advance,
    ):
        pixels = ImageRows(source, members)
        return probabilities(answer, pixels, DEFAULT_BATCH_SIZE, advance)


def _require_writable(run: TrainedRun, out: Path | None) -> None:
    """Raise, before anything is measured, if results cannot be stored in `out` (None: in the run's folder).

    Raises
    ------
    UsageError
        If `out` exists and is neither an empty folder nor an earlier evaluation. Both of these are replaced.
    RunError
        If the folder cannot be written to.
    """
    if out is not None and out.exists():
        here = out.resolve() == Path.cwd()
        if here or not out.is_dir() or {path.name for path in out.iterdir()} - _FILES:
            raise UsageError(f"{out} exists and is no earlier evaluation; name another folder by --out")
    folder = (out or run.path).resolve()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(there, os.W_OK):
        raise RunError(f"the evaluation cannot be written to {folder}: {there} is read-only; name a folder by --out")


def _keep(run: TrainedRun, title: str, predictions: Predictions, metrics: dict[str, Any], out: Path | None) -> Path:
    """Write all results into a folder of the run, or into `out`; an earlier evaluation there is replaced."""
    final = run.path / "evaluations" / store.slug(title) if out is None else out.resolve()
    heading = f"{run.name}\non {title}: accuracy {metrics['accuracy']:.3f}, {counted(metrics['images'], 'image')}"
    try:
        with store.new_folder(final) as folder:
            files.write_json(folder / "metrics.json", metrics)
            write_predictions(folder / "predictions.csv", [predictions], run.classes)
            draw_confusion(
                folder / "confusion.png", confusion_cells(metrics["confusion"], len(run.classes)), run.classes, heading
            )
            draw_calibration(folder / "calibration.png", metrics["calibration"], heading)
    except OSError as error:
        why = error.strerror or error
        raise RunError(f"the evaluation cannot be written to {final}: {why}; name a folder by --out") from error
    return final
