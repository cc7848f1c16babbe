"""A published run applied to cached rows: those of its own dataset, or of another with the same classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import runs
from pipeline.backbone import ENGINE
from pipeline.compute import DEFAULT_BATCH_SIZE
from pipeline.dataset import Dataset
from pipeline.errors import DatasetError, MissingRowsError, RunError, UsageError
from pipeline.evaluate import confusion_cells, evaluate
from pipeline.extract import FeatureChoice, warn_untrained
from pipeline.fitting import answers
from pipeline.gather import Material, Sorted, gather, gather_images
from pipeline.network import compiled, probabilities
from pipeline.pictures import draw_calibration, draw_confusion
from pipeline.pixels import Pixels, decoding
from pipeline.planning import Quarantined
from pipeline.predictions import Predictions, write_predictions
from pipeline.rows import Wanted, open_rows
from pipeline.trained import TrainedRun
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

Side = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Evaluation:
    """What a run is worth on some images: metrics as `evaluate` gives them, and where all of it is kept."""

    run: str
    dataset: str
    split: Side
    metrics: dict[str, Any]
    path: Path
    quarantined: list[Quarantined]


def evaluate_run(
    run: TrainedRun,
    dataset: Dataset,
    workspace: Workspace,
    features_command: str,
    *,
    max_pixels: int,
    split: Side | None = None,
    space: str | None = None,
    own: bool = True,
    memory: int | None = None,
) -> Evaluation:
    """Measure `run` on `dataset` and keep metrics, predictions and pictures in the run's folder.

    A head reads cached rows, a full model images.

    Parameters
    ----------
    split
        Which images; by default the test split, of a dataset not its own and without splits all of them.
    space
        A feature space by name, instead of the run's own.
    own
        Whether `dataset` is the one it was trained on.

    Raises
    ------
    SpecError
        If the space is not the one it was trained in.
    UsageError
        If a space is named for a full model.
    DatasetError
        If the classes differ, or the split is empty.
    MissingRowsError
        If an image that can be decoded has no row; the text names `features_command`.
    """
    run.require_classes(dataset.classes)
    material = _gathered(run, dataset, workspace, features_command, max_pixels, space, memory)
    side: Side = split or ("test" if own or not material.split.drawn else "all")
    if own and (side in ("train", "all") or (side == "val" and run.saw_validation)):
        logger.warning("the run %s was trained on images of this split: new ones will be harder", run.name)
    members = np.arange(len(material.keys)) if side == "all" else material.members(side)
    if not len(members):
        raise DatasetError(f"no images in the {side} split of {dataset.name}; name another by --split")
    if isinstance(material, Material):
        said = _said_of_rows(run, material, members, side, memory)
    else:
        said = _said_of_images(run, material, members, max_pixels, workspace)
    predictions = Predictions(side, material.names(members), material.labels(members), said)
    metrics = evaluate(predictions.labels, predictions.probabilities, run.classes)
    title = side if own else f"{dataset.name}-{side}-{material.digest()[:8]}"  # names may be alike, images not
    path = _keep(run, title, predictions, metrics)
    return Evaluation(run.name, dataset.name, side, metrics, path, material.quarantined)


def _gathered(
    run: TrainedRun,
    dataset: Dataset,
    workspace: Workspace,
    features_command: str,
    max_pixels: int,
    space: str | None,
    memory: int | None,
) -> Sorted:
    if run.full:
        for name, value in (("space", space), ("memory", memory)):
            if value is not None:
                raise UsageError(f"the run {run.name} is a full model, which reads images; leave out --{name}")
        images = gather_images(dataset, workspace, max_pixels, run.spec.fit)
        warn_untrained(run.base)
        return images
    material = gather(dataset, workspace, _choice(run, workspace, space), max_pixels, features_command)
    run.require_space(material.space.spec)
    warn_untrained(material.space.spec)
    return material


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
            f" with --layer {run.spec.layer} --precision {run.spec.precision} --storage {run.spec.storage}"
            f" --fit {run.spec.fit} and the same weights ({run.spec.weights})"
        )
    return FeatureChoice(space=run.spec.directory)


def _said_of_rows(
    run: TrainedRun, material: Material, members: np.ndarray, side: Side, memory: int | None
) -> np.ndarray:
    with material.space.reading():
        (rows,) = open_rows(material.space, material.keys, run.reads, [Wanted(members)], memory=memory)
        return answers(run, rows, side)


def _said_of_images(
    run: TrainedRun, images: Sorted, members: np.ndarray, max_pixels: int, workspace: Workspace
) -> np.ndarray:
    answer, spec = compiled(run.network()), run.spec
    with (
        decoding(images.dataset, images.keys, images.usable, spec.input_size, spec.fit, max_pixels) as source,
        workspace.progress("measuring", len(members)) as advance,
    ):
        pixels = Pixels(source, members)
        return probabilities(answer, pixels, DEFAULT_BATCH_SIZE, advance)


def _keep(run: TrainedRun, title: str, predictions: Predictions, metrics: dict[str, Any]) -> Path:
    """Write everything into a folder of the run, replacing what an earlier evaluation of the same left there."""
    final = run.path / "evaluations" / runs.slug(title)
    heading = f"{run.name}\non {title}: accuracy {metrics['accuracy']:.3f}, {metrics['images']:,} images"
    try:
        with runs.new_folder(final) as folder:
            runs.write_json(folder / "metrics.json", metrics)
            write_predictions(folder / "predictions.csv", [predictions], run.classes)
            draw_confusion(
                folder / "confusion.png", confusion_cells(metrics["confusion"], len(run.classes)), run.classes, heading
            )
            draw_calibration(folder / "calibration.png", metrics["calibration"], heading)
    except OSError as error:
        raise RunError(f"the evaluation cannot be written to {final}: {error.strerror or error}") from error
    return final
