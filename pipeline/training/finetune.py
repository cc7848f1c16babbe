"""`freeze` and `finetune`: the full model, trained from images or from cached rows of its frozen part; published."""

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

_COLLAPSE = 0.1  # of accuracy on the training images, between training mode and inference mode
_TIMED = 32  # images
_CHECKED = 16  # test images on which the saved model is compared with the trained one
# By how much probabilities may differ then: rows are rounded to the storage type and computed in other batches.
_MOST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
_COPIES = 6  # of the trained numbers, in memory: weights, gradients, two of the optimizer, the best, one on its way


@dataclass(frozen=True)
class FinetuneResult:
    """What `train_full` made."""

    name: str
    path: Path
    summary: dict[str, Any]
    quarantined: list[Quarantined]


def finetune(
    dataset: Dataset, workspace: Workspace, asked: FinetuneRequest, *, resume: str | None = None
) -> FinetuneResult:
    """Train, measure, save and publish a full model as asked. `resume` names an unfinished run.

    Raises
    ------
    DatasetError
        If a split has no image, there is only one class to learn, or an image changes on the way.
    SpecError
        If what it is to begin with does not fit.
    RunError
        If the saved model, read back, says something else, or what is to be resumed has changed.
    """
    start = time.perf_counter()
    if asked.tensorboard:
        tracking.require_tensorboard()
    origin = open_initial_model(asked, dataset, workspace)
    dataset = origin.matched(dataset)
    warn_untrained(origin.base)
    check_sides(dataset, workspace)  # before anything is computed
    opened = _from_cache if asked.from_cache else _from_images
    with opened(dataset, workspace, asked, origin) as setting:
        images, spec = setting.ready.material, setting.network.spec
        settled = replace(origin.settled.choice, layer=spec.layer, precision=spec.precision, storage=spec.storage)
        if origin.begun is not None:  # whose weights are known by its run.json
            settled = replace(settled, weights=asked.features.weights)
        until = asked.freeze_until or (setting.network.layers[setting.until] if setting.until >= 0 else "none")
        asked = replace(asked, features=settled, freeze_until=until)  # what `auto` turned out to mean
        digest = hashlib.sha256((images.digest() + _network_of(origin)).encode()).hexdigest()
        with _run(workspace, asked, images, digest, resume, _own_network(origin, workspace)) as (name, directory):
            summary = _train_and_write(name, directory, asked, setting, workspace, start)
    return FinetuneResult(name, workspace.runs / name, summary, images.quarantined)


@dataclass(frozen=True)
class _Setting:
    """What is trained, on what: `below` gives the features the head stands on, of the same rows."""

    origin: InitialModel
    network: FullModel
    model: KerasModel
    below: KerasModel | None
    ready: TrainingData[Any]
    until: int  # the index of the last frozen layer
    computed: int = 0  # rows, for this


def _network_of(origin: InitialModel) -> str:
    """Return what the network that is trained is known by: of one's own, others may have weights as its own are."""
    backbone = origin.base.backbone
    return origin.weights.identity + (backbone if backbone.startswith(OWN) else "")


def _own_network(origin: InitialModel, workspace: Workspace) -> dict[str, Any] | None:
    """Return by what an own network, and its file, are known again; None for a network of the table."""
    if not origin.base.backbone.startswith(OWN):
        return None
    recorded = origin.network_record or networks.record(origin.weights, workspace.cache.index) or {}
    return {**recorded, "backbone": origin.base.backbone, "weights": origin.base.weights}


@contextmanager
def _from_images(
    dataset: Dataset, workspace: Workspace, asked: FinetuneRequest, origin: InitialModel
) -> Iterator[_Setting]:
    spec = origin.base
    depth = depth_of(spec.decode)
    images = join_images(dataset, workspace, asked.max_pixels, spec.fit, depth)
    images = with_initial(images, asked, workspace)
    with open_image_data(images, spec.input_size, spec.fit, asked.max_pixels, depth) as ready:
        made = _network(origin, spec, asked, ready.classes)
        yield _Setting(origin, made, made.on_pixels(), made.features_of_pixels(), ready, origin.until)


@contextmanager
def _from_cache(
    dataset: Dataset, workspace: Workspace, asked: FinetuneRequest, origin: InitialModel
) -> Iterator[_Setting]:
    """Compute what is missing of the frozen part's rows, then train what comes after it."""
    options = ComputeOptions(max_pixels=asked.max_pixels)
    done = extract(dataset, workspace, origin.settled, options, views=asked.views)
    choice = FeatureChoice(space=done.space.name) if done.space else origin.settled.choice
    material = join_features(dataset, workspace, choice, asked.max_pixels, "features", views=asked.views)
    material = with_initial(material, asked, workspace)
    spec = replace(material.space.spec, layer=origin.base.layer)
    made = _network(origin, spec, asked, len(dataset.classes))
    model = made.after(origin.cut)
    kept = asked.head.settings["batch_size"] * activations(model)
    needed = dense.TENSORFLOW + 4 * (_COPIES * model.count_params() + kept)  # kept for the way back
    with open_tensor_data(material, asked.memory, needed) as ready:
        yield _Setting(origin, made, model, made.features_after(origin.cut), ready, origin.until, done.computed)


def with_initial(images: S, asked: FinetuneRequest, workspace: Workspace) -> S:
    """Return the images with those that the run was trained on with which the model begins."""
    if asked.init is None:
        return images
    return replace(images, initial=initial_images(Path(asked.init), workspace))


def _network(origin: InitialModel, spec: FeatureSpec, asked: FinetuneRequest, classes: int) -> FullModel:
    """Return the network to begin with, frozen as asked for."""
    logger.info("building %s", origin.backbone)
    made = FullModel(spec, lambda shape: origin.head(asked.head, shape, classes), origin.weights.network)
    made.load_backbone(origin.weights.identity, origin.weights.path)
    made.freeze(origin.until, batch_norm=asked.batch_norm == "trainable")
    made.seed(asked.head.settings["seed"])
    return made


@contextmanager
def _run(
    workspace: Workspace,
    asked: FinetuneRequest,
    images: LabelledImages,
    digest: str,
    resume: str | None,
    own_network: dict[str, Any] | None,
) -> Iterator[tuple[str, Path]]:
    """Give name and folder of the run: a new one, or the one to go on with if its images and weights are the same."""
    if resume is not None:
        store.require_same(workspace.runs, resume, digest)
        with store.reopened(workspace.runs, resume, workspace.command(asked.stage)) as found:
            yield found
        return
    title = f"{images.dataset.name}-{asked.stage}"
    with store.new_run(workspace.runs, title, workspace.command(asked.stage)) as (name, directory):
        space = images.space.name if isinstance(images, LabelledFeatures) else None
        store.write_request(directory, asked.to_dict(), digest, space, own_network)
        yield name, directory


def _train_and_write(
    name: str, directory: Path, asked: FinetuneRequest, setting: _Setting, workspace: Workspace, start: float
) -> dict[str, Any]:
    made, ready = setting.network, setting.ready
    parameters = made.trainable_parameters  # before the loop leaves the model at its best epoch
    layers = counted(len(made.trains), "layer")
    logger.info("%s parameters train, in %s: %s", f"{parameters:,}", layers, ", ".join(made.trains))
    if not Checkpoint(directory).path.exists():
        _announce(asked, setting)
    trained = _trained(directory, asked, setting, workspace)
    said = _measured(asked, setting, workspace)
    _, train_accuracy = measure(said["train"], ready.labels["train"])
    _warn_of_collapse(train_accuracy, _best(trained)["accuracy"], asked)
    predictions = [ready.predictions(side, ready.members[side], said[side]) for side in ("val", "test")]
    metrics = run_folder.compute_split_metrics(predictions, ready.material.dataset.classes)
    recorded = setting.origin.network_record or networks.record(setting.origin.weights, workspace.cache.index)
    about = {
        **_features(setting, made.save(directory)),
        **({"network": recorded} if recorded else {}),
        "head": {**made.head.spec.to_dict(), "head": made.head.kind},
        "asked": asked.to_dict(),
    }
    difference = _check_saved(directory, asked, setting, said["test"])
    summary = {
        **_summary(name, asked, setting, trained),
        **run_folder.summarize_metrics(metrics, ready.material),
        "train_accuracy": train_accuracy,
        "trainable_parameters": parameters,
        "parameters": parameters,
        "max_difference": difference,
        "seconds": round(time.perf_counter() - start + trained.seconds_before, 3),
    }
    about["summary"] = summary
    run_folder.write_results(directory, about, ready.material, metrics, trained.history, "epoch", predictions)
    return summary


def _features(setting: _Setting, identity: str) -> dict[str, Any]:
    """Return what features the network computes, its weights being `identity`, and which it began with."""
    made = setting.network
    frozen = [each for each in made.cuts if made.layers.index(each) <= setting.until]
    unchanged = setting.origin.unchanged_until(made.layers, frozen)
    base = replace(made.spec, weights=setting.origin.base.weights)
    features = base if unchanged == made.spec.layer else replace(base, weights=identity)
    return {"features": features.to_dict(), "base": {"features": base.to_dict(), "unchanged_until": unchanged}}


def _summary(name: str, asked: FinetuneRequest, setting: _Setting, trained: TrainingResult) -> dict[str, Any]:
    """Return what is told of how a run was trained; what it is worth stands beside that."""
    made, ready = setting.network, setting.ready
    return {
        "run": name,
        "head": made.head.kind,
        "stage": asked.stage,
        "train_rows": len(ready.members["train"]) * ready.views,
        "views": ready.views,
        "init": asked.init and Path(asked.init).name,
        "frozen_until": made.layers[setting.until] if setting.until >= 0 else None,
        "trains": made.trains,
        "from_cache": asked.from_cache,
        "features_computed": setting.computed,
        "epochs": len(trained.history),
        "best_epoch": _best(trained)["epoch"],
        "seconds_per_epoch": trained.seconds_per_epoch,
        "first_loss": trained.history[0]["loss"],
        "last_loss": trained.history[-1]["loss"],
        "space": ready.material.space.name if isinstance(ready.material, LabelledFeatures) else None,
        "backbone": setting.origin.backbone,
        "weights": setting.origin.label,
        "precision": made.spec.precision,
    }


def _best(trained: TrainingResult) -> Entry:
    return min(trained.history, key=lambda entry: entry["val_loss"])


def _measured(asked: FinetuneRequest, setting: _Setting, workspace: Workspace) -> dict[str, np.ndarray]:
    """Return what the network says of each split in the plain view, (n, k) float32, as `predict` will answer."""
    answer = full_model.compile_model(setting.network, setting.origin.cut if asked.from_cache else None)
    rows = {**setting.ready.rows, "train": _plain(setting.ready)}
    said = {}
    for side, some in rows.items():
        with workspace.progress(f"measuring {side}", len(some)) as advance:
            said[side] = full_model.probabilities(answer, some, asked.head.settings["batch_size"], advance)
    return said


def _trained(directory: Path, asked: FinetuneRequest, setting: _Setting, workspace: Workspace) -> TrainingResult:
    """Run the loop, and leave the network at its best epoch."""
    settings, ready = asked.head.settings, setting.ready
    size, labels = settings["batch_size"], ready.data().train_labels
    checkpoint = Checkpoint(directory)
    if asked.init is None and asked.head.settings["normalize"] and not checkpoint.path.exists():
        dense.normalise(setting.network.head.model, _head_inputs(setting, size, workspace))
    fresh = None
    if (recipe := asked.augment) is not None:
        fresh = lambda rows, epoch: rows.augmented(recipe, settings["seed"], epoch)  # noqa: E731
    batches = Shuffled(ready.rows["train"], labels, size, settings["seed"], fresh)
    weights = class_weights(labels, ready.classes, settings["class_weight"])
    val = ready.rows["val"], ready.labels["val"]
    with (
        tracking.tensorboard(directory, asked.tensorboard) as note,
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
            if asked.from_cache:
                for side in ("train", "val"):
                    require_numbers(ready.rows[side], f"the {side} split")
            raise


def _head_inputs(setting: _Setting, size: int, workspace: Workspace) -> Iterator[np.ndarray]:
    """Yield what the new head is to be normalised by: the features of the training rows, as it reads them."""
    rows, pools = setting.ready.rows["train"], setting.network.head.kind == "gap"
    with workspace.progress("measuring features", len(rows)) as advance:
        if setting.below is None:
            size = min(size, rows.rows_at_once) if isinstance(rows, StoredRows) else size
            parts = [np.arange(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
            blocks: Iterator[np.ndarray] = (rows[part] for part in parts)
        else:
            blocks = full_model.predict(setting.below.predict_on_batch, rows, size, advance)
        for block in blocks:
            yield block.mean(axis=(1, 2), dtype=np.float32) if pools else block


def _announce(asked: FinetuneRequest, setting: _Setting) -> None:
    """Say how long all will take, from a batch that is timed: the way back takes twice as long as the way there."""
    rows, settings, ready = setting.ready.rows["train"], asked.head.settings, setting.ready
    some = rows[np.arange(min(len(rows), settings["batch_size"], _TIMED))]
    for _ in range(2):  # the first time compiles
        start = time.perf_counter()
        full_model.probabilities(setting.model.predict_on_batch, some, len(some))
    each = (time.perf_counter() - start) / len(some)  # pyright: ignore[reportPossiblyUnboundVariable]
    work, trains = setting.network.work(setting.origin.cut)
    train, val, test = (len(ready.rows[side]) for side in ("train", "val", "test"))
    there = settings["epochs"] * (train + val) + (2 - (asked.init is not None)) * train + val + test
    seconds = each * (there + settings["epochs"] * train * 2 * trains / work)
    epochs, take = settings["epochs"], "takes" if settings["epochs"] == 1 else "take"
    told = counted(epochs, "epoch"), counted(train, "image"), take, duration(seconds)
    logger.info("%s of %s %s about %s", *told)


def _plain(ready: TrainingData[Any]) -> Rows:
    """Return the training rows in the plain view, which come first."""
    rows: Rows = ready.rows["train"]
    return rows if ready.views == 1 else select(rows, np.arange(len(ready.labels["train"])))


def _warn_of_collapse(inference: float, training: float, asked: FinetuneRequest) -> None:
    """Batch norm that trained on small batches can say other things in inference mode."""
    if inference < training - _COLLAPSE:
        advice = "take --batch-norm frozen" if asked.batch_norm == "trainable" else "lower --learning-rate"
        logger.warning(
            "in inference mode the model is right about %.3f of its training images, and was about %.3f while it was "
            "trained: it has collapsed; %s",
            inference, training, advice,
        )  # fmt: skip


def _check_saved(directory: Path, asked: FinetuneRequest, setting: _Setting, test: np.ndarray) -> float:
    """Read the model back and compare what it says of a few test images with what was measured."""
    ready, spec = setting.ready, setting.network.spec
    images, members = ready.material, ready.members["test"][:_CHECKED]
    saved = full_model.compile_model(FullModel.load(directory, spec))
    how = spec.input_size, spec.fit, asked.max_pixels, depth_of(spec.decode)
    with open_decoder(images.dataset, images.keys, images.usable, *how) as source:
        said = full_model.probabilities(saved, ImageRows(source, members), _CHECKED)
    difference = float(np.abs(said - test[: len(members)]).max())
    if not difference <= _MOST_DIFFERENCE[spec.precision]:
        raise RunError(
            f"the saved model, read back, differs from the trained one by {difference:.2g}; nothing published"
        )
    return difference
