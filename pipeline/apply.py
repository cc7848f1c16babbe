"""A published run applied to cached rows: those of its own dataset, or of another with the same classes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import heads, runs
from pipeline.asked import Asked, FullAsked
from pipeline.cache import storage
from pipeline.compute import DEFAULT_BATCH_SIZE
from pipeline.dataset import Dataset
from pipeline.errors import DatasetError, IceboxError, MissingRowsError, RunError, SpecError, UsageError
from pipeline.evaluate import evaluate
from pipeline.extract import FeatureChoice, Quarantined, warn_untrained
from pipeline.fitting import answers
from pipeline.gather import Material, Sorted, gather, gather_images
from pipeline.network import Network, predict
from pipeline.pictures import draw_calibration, draw_confusion
from pipeline.pixels import Pixels, decoding
from pipeline.rows import Wanted, open_rows
from pipeline.spec import FeatureSpec
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

Side = Literal["train", "val", "test", "all"]
_MOST_NAMED = 5  # classes in an error's text


@dataclass(frozen=True)
class TrainedRun:
    """A published run: its folder, the feature space and the classes it knows, what was asked for."""

    path: Path
    spec: FeatureSpec
    classes: list[str]
    kind: str  # the head's name
    base: FeatureSpec  # the features of the weights that its backbone once began with; of a head those it reads
    asked: Asked | FullAsked | None  # None for a run of 0.1.0, which did not keep it

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def full(self) -> bool:
        """Whether it is a full model, which reads images, not rows."""
        return isinstance(self.asked, FullAsked)

    @property
    def saw_validation(self) -> bool:
        """Whether it was trained on the images of the validation split, too."""
        return isinstance(self.asked, Asked) and self.asked.folds > 0

    @cached_property
    def head(self) -> heads.Head:
        """The head, read when it is first needed. Raises RunError."""
        head = heads.load(self.path)
        if head.kind != self.kind:
            raise RunError(f"{self.path} holds a {head.kind} head, and its run.json says {self.kind}")
        return head

    def require_space(self, spec: FeatureSpec) -> None:
        """Raise SpecError, naming each field that differs, unless `spec` is the space the run was trained in."""
        mine, other = asdict(self.spec), asdict(spec)
        if differing := [name for name in mine if mine[name] != other[name]]:
            listed = ", ".join(f"{name} {mine[name]}, not {other[name]}" for name in differing)
            raise SpecError(f"the run {self.name} was trained in another feature space: {listed}")

    def require_classes(self, classes: Sequence[str]) -> None:
        """Raise DatasetError, naming the difference, unless these are the run's classes."""
        if list(classes) == self.classes:
            return
        lacking = [name for name in self.classes if name not in set(classes)]
        strange = [name for name in classes if name not in set(self.classes)]
        parts = [_some("it has no", lacking), _some("the run does not know", strange)]
        raise DatasetError(
            f"the classes are not those of the run {self.name}: {' and '.join(filter(None, parts)) or 'another order'}"
        )


def _some(what: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:_MOST_NAMED])
    return f"{what} {listed}{f' and {len(names) - _MOST_NAMED:,} more' * (len(names) > _MOST_NAMED)}" if names else ""


def open_run(root: Path, name: str) -> TrainedRun:
    """Return the run `name`: as `runs ls` lists it, a path, or "latest". Raises RunError."""
    path = runs.find_run(root, name)
    about = runs.read_run(path)
    try:
        classes, spec = [str(each) for each in about["classes"]], FeatureSpec.from_dict(about["features"])
        kind = about["head"]["head"]
        if kind not in heads.READS:
            raise KeyError(kind)
        base = FeatureSpec.from_dict(about["base"]["features"]) if "base" in about else spec
        asked = _asked(about["asked"]) if "asked" in about else None
    except (KeyError, TypeError, SpecError) as error:
        raise RunError(f"{path / 'run.json'} is not that of a trained head ({error})") from error
    return TrainedRun(path, spec, classes, kind, base, asked)


def _asked(value: Any) -> Asked | FullAsked:
    return FullAsked.from_dict(value) if "stage" in value else Asked.from_dict(value)


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
    if said.shape[1] != len(run.classes):
        raise RunError(f"the head in {run.path} tells {said.shape[1]} classes apart, not {len(run.classes)}")
    predictions = runs.Predictions(side, material.names(members), material.labels(members), said)
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
        reads = heads.READS[run.kind]
        (rows,) = open_rows(material.space, material.keys, reads, [Wanted(members)], memory=memory)
        try:
            return answers(run.head, rows, side)
        except ValueError as error:
            if isinstance(error, IceboxError):
                raise
            shape = "x".join(map(str, rows.shape[1:]))
            raise RunError(f"the head in {run.path} does not take rows of {shape}: it is of another run") from error


def _said_of_images(
    run: TrainedRun, images: Sorted, members: np.ndarray, max_pixels: int, workspace: Workspace
) -> np.ndarray:
    model, spec = Network.load(run.path, run.spec).on_pixels(), run.spec
    with (
        decoding(images.dataset, images.keys, images.usable, spec.input_size, spec.fit, max_pixels) as source,
        workspace.progress("measuring", len(members)) as advance,
    ):
        pixels = Pixels(source, members)
        return np.concatenate(list(predict(model, pixels, DEFAULT_BATCH_SIZE, advance)))


def _keep(run: TrainedRun, title: str, predictions: runs.Predictions, metrics: dict[str, Any]) -> Path:
    """Write everything into a folder of the run, replacing what an earlier evaluation of the same left there."""
    final = run.path / "evaluations" / runs.slug(title)
    partial = storage.partial_name(final.parent)
    heading = f"{run.name}\non {title}: accuracy {metrics['accuracy']:.3f}, {metrics['images']:,} images"
    try:
        partial.mkdir(parents=True)
        runs.write_json(partial / "metrics.json", metrics)
        runs.write_predictions(partial / "predictions.csv", [predictions], run.classes)
        draw_confusion(partial / "confusion.png", np.array(metrics["confusion"]), run.classes, heading)
        draw_calibration(partial / "calibration.png", metrics["calibration"], heading)
        if final.exists():
            shutil.rmtree(final)
        storage.publish(partial, final)
    except OSError as error:
        raise RunError(f"the evaluation cannot be written to {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
