"""Train and publish full models (stages `freeze` and `finetune`), from images or from cached frozen features."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.backbone import source as networks
from pipeline.backbone.graph import activations
from pipeline.backbone.keras_start import KerasModel
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import RunError
from pipeline.core.spec import OWN, FeatureSpec
from pipeline.core.units import counted, duration
from pipeline.dataset import Dataset
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.extract import extract
from pipeline.extraction.feature_choice import FeatureChoice, warn_untrained
from pipeline.extraction.planning import Quarantined
from pipeline.images.decoding import depth_of
from pipeline.runs import store
from pipeline.runs.request import FinetuneRequest
from pipeline.training import full_model, run_folder, tracking
from pipeline.training.batches import Shuffled
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.full_model import FullModel
from pipeline.training.heads import dense
from pipeline.training.heads.base import class_weights, measure, require_numbers
from pipeline.training.image_batches import ImageRows, open_decoder
from pipeline.training.initial_model import InitialModel, open_initial_model
from pipeline.training.labelled_features import LabelledFeatures, LabelledImages, join_features, join_images
from pipeline.training.loop import Entry, NotFiniteError, TrainingContext, TrainingResult, train
from pipeline.training.rows import Rows, StoredRows, select
from pipeline.training.seen_images import initial_images
from pipeline.training.training_data import TrainingData, check_sides, open_image_data, open_tensor_data

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=LabelledImages)

_COLLAPSE = 0.1  # loss of training accuracy, from training mode to inference mode, that counts as a collapse
_TIMED = 32  # images in the batch that is timed
_CHECKED = 16  # test images on which the saved model is compared with the trained one
# Largest allowed difference of probabilities: rows are rounded to the storage type and computed in other batches.
_MOST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
_COPIES = 6  # of the parameters, in memory: weights, gradients, two optimizer moments, best weights, a temporary copy


@dataclass(frozen=True)
class FinetuneResult:
    """Name, folder and summary of the run that `finetune` published, and the images that could not be decoded."""

    name: str
    path: Path
    summary: dict[str, Any]
    quarantined: list[Quarantined]


def finetune(
    dataset: Dataset, workspace: Workspace, request: FinetuneRequest, *, resume: str | None = None
) -> FinetuneResult:
    """Train, measure, save and publish the full model of `request`. `resume` names an unfinished run.

    Raises
    ------
    DatasetError
        If a split has no image, there is only one class to learn, or an image changes during training.
    SpecError
        If the initial model does not fit the request.
    RunError
        If the saved model, read back, predicts other probabilities, or the data of the run to resume have changed.
    """
    start = time.perf_counter()
    if request.tensorboard:
        tracking.require_tensorboard()
    origin = open_initial_model(request, dataset, workspace)
    dataset = origin.matched(dataset)
    warn_untrained(origin.base)
    check_sides(dataset, workspace)  # before anything is computed
    opened = _from_cache if request.from_cache else _from_images
    with opened(dataset, workspace, request, origin) as setting:
        images, spec = setting.training_data.labelled, setting.network.spec
        resolved = replace(origin.resolved.choice, layer=spec.layer, precision=spec.precision, storage=spec.storage)
        if origin.begun is not None:  # run.json of the initial run identifies its weights
            resolved = replace(resolved, weights=request.features.weights)
        until = request.freeze_until or (setting.network.layers[setting.until] if setting.until >= 0 else "none")
        request = replace(request, features=resolved, freeze_until=until)  # record the values chosen for `auto`
        digest = hashlib.sha256((images.digest() + _network_of(origin)).encode()).hexdigest()
        with _run(workspace, request, images, digest, resume, _own_network(origin, workspace)) as (name, directory):
            summary = _train_and_write(name, directory, request, setting, workspace, start)
    return FinetuneResult(name, workspace.runs / name, summary, images.quarantined)


@dataclass(frozen=True)
class _Setting:
    """The model to train and its data; `below` computes the features that the head reads, from the same inputs."""

    origin: InitialModel
    network: FullModel
    model: KerasModel
    below: KerasModel | None
    training_data: TrainingData[Any]
    until: int  # the index of the last frozen layer
    computed: int = 0  # rows that were computed for this training


def _network_of(origin: InitialModel) -> str:
    """Return the text that identifies the trained network: its weights' identity, and the name of an own network.

    Two own networks may share the same weights; only the name tells them apart.
    """
    backbone = origin.base.backbone
    return origin.weights.identity + (backbone if backbone.startswith(OWN) else "")


def _own_network(origin: InitialModel, workspace: Workspace) -> dict[str, Any] | None:
    """Return the record that identifies an own network and its file; None for a network of the backbone table."""
    if not origin.base.backbone.startswith(OWN):
        return None
    recorded = origin.network_record or networks.record(origin.weights, workspace.cache.index) or {}
    return {**recorded, "backbone": origin.base.backbone, "weights": origin.base.weights}


@contextmanager
def _from_images(
    dataset: Dataset, workspace: Workspace, request: FinetuneRequest, origin: InitialModel
) -> Iterator[_Setting]:
    spec = origin.base
    depth = depth_of(spec.decode)
    images = join_images(dataset, workspace, request.max_pixels, spec.fit, depth)
    images = with_initial(images, request, workspace)
    with open_image_data(images, spec.input_size, spec.fit, request.max_pixels, depth) as training_data:
        made = _network(origin, spec, request, training_data.classes)
        yield _Setting(origin, made, made.on_pixels(), made.features_of_pixels(), training_data, origin.until)


@contextmanager
def _from_cache(
    dataset: Dataset, workspace: Workspace, request: FinetuneRequest, origin: InitialModel
) -> Iterator[_Setting]:
    """Compute the missing rows of the frozen part, then yield the setting that trains the layers after it."""
    options = ComputeOptions(max_pixels=request.max_pixels)
    done = extract(dataset, workspace, origin.resolved, options, views=request.views)
    choice = FeatureChoice(space=done.space.name) if done.space else origin.resolved.choice
    labelled = join_features(dataset, workspace, choice, request.max_pixels, views=request.views)
    labelled = with_initial(labelled, request, workspace)
    spec = replace(labelled.space.spec, layer=origin.base.layer)
    made = _network(origin, spec, request, len(dataset.classes))
    model = made.after(origin.cut)
    kept = request.head.settings["batch_size"] * activations(model)
    needed = dense.TENSORFLOW + 4 * (_COPIES * model.count_params() + kept)  # backpropagation needs the activations
    with open_tensor_data(labelled, request.memory, needed) as training_data:
        yield _Setting(origin, made, model, made.features_after(origin.cut), training_data, origin.until, done.computed)


def with_initial(images: S, request: FinetuneRequest, workspace: Workspace) -> S:
    """Return `images` with the record of the images that the initial run was trained on, if there is such a run."""
    if request.init is None:
        return images
    return replace(images, initial=initial_images(Path(request.init), workspace))


def _network(origin: InitialModel, spec: FeatureSpec, request: FinetuneRequest, classes: int) -> FullModel:
    """Return the initial network, with the requested layers frozen."""
    logger.info("building %s", origin.backbone)
    made = FullModel(spec, lambda shape: origin.head(request.head, shape, classes), origin.weights.network)
    made.load_backbone(origin.weights.identity, origin.weights.path)
    made.freeze(origin.until, batch_norm=request.batch_norm == "trainable")
    made.seed(request.head.settings["seed"])
    return made


@contextmanager
def _run(
    workspace: Workspace,
    request: FinetuneRequest,
    images: LabelledImages,
    digest: str,
    resume: str | None,
    own_network: dict[str, Any] | None,
) -> Iterator[tuple[str, Path]]:
    """Yield name and folder of a new run, or of the run to resume if its images and weights are the same."""
    if resume is not None:
        store.require_same(workspace.runs, resume, digest)
        with store.reopened(workspace.runs, resume, workspace.command(request.stage)) as found:
            yield found
        return
    title = f"{images.dataset.name}-{request.stage}"
    with store.new_run(workspace.runs, title, workspace.command(request.stage)) as (name, directory):
        space = images.space.name if isinstance(images, LabelledFeatures) else None
        store.write_request(directory, request.to_dict(), digest, space, own_network)
        yield name, directory


def _train_and_write(
    name: str, directory: Path, request: FinetuneRequest, setting: _Setting, workspace: Workspace, start: float
) -> dict[str, Any]:
    made, training_data = setting.network, setting.training_data
    parameters = made.trainable_parameters  # before the loop leaves the model at its best epoch
    layers = counted(len(made.trains), "layer")
    logger.info("%s parameters train, in %s: %s", f"{parameters:,}", layers, ", ".join(made.trains))
    if not Checkpoint(directory).path.exists():
        _announce(request, setting)
    trained = _trained(directory, request, setting, workspace)
    said = _measured(request, setting, workspace)
    _, train_accuracy = measure(said["train"], training_data.labels["train"])
    _warn_of_collapse(train_accuracy, _best(trained)["accuracy"], request)
    predictions = [training_data.predictions(side, training_data.members[side], said[side]) for side in ("val", "test")]
    metrics = run_folder.compute_split_metrics(predictions, training_data.labelled.dataset.classes)
    recorded = setting.origin.network_record or networks.record(setting.origin.weights, workspace.cache.index)
    about = {
        **_features(setting, made.save(directory)),
        **({"network": recorded} if recorded else {}),
        "head": {**made.head.spec.to_dict(), "head": made.head.kind},
        "asked": request.to_dict(),
    }
    difference = _check_saved(directory, request, setting, said["test"])
    summary = {
        **_summary(name, request, setting, trained),
        **run_folder.summarize_metrics(metrics, training_data.labelled),
        "train_accuracy": train_accuracy,
        "trainable_parameters": parameters,
        "parameters": parameters,
        "max_difference": difference,
        "seconds": round(time.perf_counter() - start + trained.seconds_before, 3),
    }
    about["summary"] = summary
    run_folder.write_results(directory, about, training_data.labelled, metrics, trained.history, "epoch", predictions)
    return summary


def _features(setting: _Setting, identity: str) -> dict[str, Any]:
    """Return the features that the network computes with the weights `identity`, and those of its base weights."""
    made = setting.network
    frozen = [each for each in made.cuts if made.layers.index(each) <= setting.until]
    unchanged = setting.origin.unchanged_until(made.layers, frozen)
    base = replace(made.spec, weights=setting.origin.base.weights)
    features = base if unchanged == made.spec.layer else replace(base, weights=identity)
    return {"features": features.to_dict(), "base": {"features": base.to_dict(), "unchanged_until": unchanged}}


def _summary(name: str, request: FinetuneRequest, setting: _Setting, trained: TrainingResult) -> dict[str, Any]:
    """Return the part of the summary on how the run was trained; `summarize_metrics` gives the accuracies."""
    made, training_data = setting.network, setting.training_data
    return {
        "run": name,
        "head": made.head.kind,
        "stage": request.stage,
        "train_rows": len(training_data.members["train"]) * training_data.views,
        "views": training_data.views,
        "init": request.init and Path(request.init).name,
        "frozen_until": made.layers[setting.until] if setting.until >= 0 else None,
        "trains": made.trains,
        "from_cache": request.from_cache,
        "features_computed": setting.computed,
        "epochs": len(trained.history),
        "best_epoch": _best(trained)["epoch"],
        "seconds_per_epoch": trained.seconds_per_epoch,
        "first_loss": trained.history[0]["loss"],
        "last_loss": trained.history[-1]["loss"],
        "space": training_data.labelled.space.name if isinstance(training_data.labelled, LabelledFeatures) else None,
        "backbone": setting.origin.backbone,
        "weights": setting.origin.label,
        "precision": made.spec.precision,
    }


def _best(trained: TrainingResult) -> Entry:
    return min(trained.history, key=lambda entry: entry["val_loss"])


def _measured(request: FinetuneRequest, setting: _Setting, workspace: Workspace) -> dict[str, np.ndarray]:
    """Return the probabilities of each split in the plain view, (n, k) float32, computed as `predict` does."""
    answer = full_model.compile_model(setting.network, setting.origin.cut if request.from_cache else None)
    rows = {**setting.training_data.rows, "train": _plain(setting.training_data)}
    said = {}
    for side, some in rows.items():
        with workspace.progress(f"measuring {side}", len(some)) as advance:
            said[side] = full_model.probabilities(answer, some, request.head.settings["batch_size"], advance)
    return said


def _trained(directory: Path, request: FinetuneRequest, setting: _Setting, workspace: Workspace) -> TrainingResult:
    """Run the training loop, and leave the network with the weights of its best epoch."""
    settings, training_data = request.head.settings, setting.training_data
    size, labels = settings["batch_size"], training_data.data().train_labels
    checkpoint = Checkpoint(directory)
    if request.init is None and request.head.settings["normalize"] and not checkpoint.path.exists():
        dense.normalise(setting.network.head.model, _head_inputs(setting, size, workspace))
    fresh = None
    if (recipe := request.augment) is not None:
        fresh = lambda rows, epoch: rows.augmented(recipe, settings["seed"], epoch)  # noqa: E731
    batches = Shuffled(training_data.rows["train"], labels, size, settings["seed"], fresh)
    weights = class_weights(labels, training_data.classes, settings["class_weight"])
    val = training_data.rows["val"], training_data.labels["val"]
    with (
        tracking.tensorboard(directory, request.tensorboard) as note,
        workspace.progress("training", settings["epochs"] * len(labels)) as advance,
    ):
        watch = TrainingContext(lambda part: advance(part * len(labels)), note, checkpoint)
        try:
            return train(
                setting.model,
                batches,
                lambda: measure(full_model.probabilities(setting.model.predict_on_batch, val[0], size), val[1]),
                settings,
                weights,
                watch,
                scale_loss=setting.network.spec.precision == "float16",
            )
        except NotFiniteError:
            if request.from_cache:
                for side in ("train", "val"):
                    require_numbers(training_data.rows[side], f"the {side} split")
            raise


def _head_inputs(setting: _Setting, size: int, workspace: Workspace) -> Iterator[np.ndarray]:
    """Yield blocks of training features, as the new head reads them, to compute its normalisation from."""
    rows, pools = setting.training_data.rows["train"], setting.network.head.kind == "gap"
    with workspace.progress("measuring features", len(rows)) as advance:
        if setting.below is None:
            size = min(size, rows.rows_at_once) if isinstance(rows, StoredRows) else size
            parts = [np.arange(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
            blocks: Iterator[np.ndarray] = (rows[part] for part in parts)
        else:
            blocks = full_model.predict(setting.below.predict_on_batch, rows, size, advance)
        for block in blocks:
            yield block.mean(axis=(1, 2), dtype=np.float32) if pools else block


def _announce(request: FinetuneRequest, setting: _Setting) -> None:
    """Log an estimate of the total time, from a timed batch. A backward pass counts as two forward passes."""
    rows, settings, training_data = setting.training_data.rows["train"], request.head.settings, setting.training_data
    some = rows[np.arange(min(len(rows), settings["batch_size"], _TIMED))]
    for _ in range(2):  # the first call compiles; the second one is timed
        start = time.perf_counter()
        full_model.probabilities(setting.model.predict_on_batch, some, len(some))
    each = (time.perf_counter() - start) / len(some)  # pyright: ignore[reportPossiblyUnboundVariable]
    work, trains = setting.network.work(setting.origin.cut)
    train, val, test = (len(training_data.rows[side]) for side in ("train", "val", "test"))
    there = settings["epochs"] * (train + val) + (2 - (request.init is not None)) * train + val + test
    seconds = each * (there + settings["epochs"] * train * 2 * trains / work)
    epochs, take = settings["epochs"], "takes" if settings["epochs"] == 1 else "take"
    told = counted(epochs, "epoch"), counted(train, "image"), take, duration(seconds)
    logger.info("%s of %s %s about %s", *told)


def _plain(training_data: TrainingData[Any]) -> Rows:
    """Return the training rows in the plain view; they precede those of the other views."""
    rows: Rows = training_data.rows["train"]
    return rows if training_data.views == 1 else select(rows, np.arange(len(training_data.labels["train"])))


def _warn_of_collapse(inference: float, training: float, request: FinetuneRequest) -> None:
    """Warn if the training accuracy is much lower in inference mode, as batch norm on small batches can cause."""
    if inference < training - _COLLAPSE:
        advice = "take --batch-norm frozen" if request.batch_norm == "trainable" else "lower --learning-rate"
        logger.warning(
            "in inference mode the model is right about %.3f of its training images, and was about %.3f while it was "
            "trained: it has collapsed; %s",
            inference, training, advice,
        )  # fmt: skip


def _check_saved(directory: Path, request: FinetuneRequest, setting: _Setting, test: np.ndarray) -> float:
    """Read the saved model back and return its largest difference from `test`, the probabilities of the trained one.

    Raises RunError if a few test images differ by more than the precision allows.
    """
    training_data, spec = setting.training_data, setting.network.spec
    images, members = training_data.labelled, training_data.members["test"][:_CHECKED]
    saved = full_model.compile_model(FullModel.load(directory, spec))
    how = spec.input_size, spec.fit, request.max_pixels, depth_of(spec.decode)
    with open_decoder(images.dataset, images.keys, images.usable, *how) as source:
        said = full_model.probabilities(saved, ImageRows(source, members), _CHECKED)
    difference = float(np.abs(said - test[: len(members)]).max())
    if not difference <= _MOST_DIFFERENCE[spec.precision]:
        raise RunError(
            f"the saved model, read back, differs from the trained one by {difference:.2g}; nothing published"
        )
    return difference
