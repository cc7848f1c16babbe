"""Export a run as one deployable model, from raw pixels to class probabilities: the implementation of `export`.

`export_run` writes the model, loads it again in its own runtime, and compares its probabilities with the run's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.backbone.scaling import scale
from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import DatasetError, IceboxError, RunError, UsageError, exhausted
from pipeline.core.locks import remove_abandoned
from pipeline.core.units import counted
from pipeline.dataset import Dataset, limit
from pipeline.deployment.ensemble import group_runs
from pipeline.deployment.export_formats import CLASSES, FORMATS, Format
from pipeline.deployment.predict import predict
from pipeline.images.decoding import depth_of
from pipeline.images.loader import Loader
from pipeline.runs import store
from pipeline.training.full_model import FullModel
from pipeline.training.open_run import TrainedRun

logger = logging.getLogger(__name__)

FORMAT = "icebox-export"
ABOUT = "export.json"
_FOLDER = "exports"  # in the data directory
_PARTIAL = "-export"  # ending of the folder names of unfinished exports
_MOST_ABOUT = 2**20  # largest size of an export.json in bytes
_COMPARED = 32  # images on which the exported model is compared
_MOST_REASON = 300  # characters of a converter's message that are shown
_MOST_DIFFERENCE = 1e-3  # largest allowed difference of a probability from the float32 full model


@dataclass(frozen=True)
class ExportedModel:
    """An exported model: its path and the content of its export.json, with the measured differences to the run."""

    path: Path
    about: dict[str, Any]


def export_run(
    run: TrainedRun,
    name: str,
    images: Dataset,
    workspace: Workspace,
    *,
    max_pixels: int,
    out: Path | None = None,
    weights: str | None = None,
) -> ExportedModel:
    """Write `run` in the format `name` into a new folder, either completely or not at all.

    The model computes in float32. It is loaded again in its own runtime and compared on up to 32 of `images`: with the
    float32 full model, and with the run's predictions in the precision it was trained in.

    Raises
    ------
    UsageError
        If the format's package is missing, or `out` contains other files than an earlier export.
    DatasetError
        If none of `images` can be decoded.
    RunError
        If a probability of the exported model differs by more than 1e-3 from the float32 full model, or the model
        cannot be converted or written.
    """
    form = FORMATS[name]
    form.require()
    final = Path(os.path.realpath(out or workspace.root / _FOLDER / f"{run.name}-{name}"))  # resolved: "." has no name
    _require_free(final)
    _remove_leftovers(final.parent)
    start = time.perf_counter()
    (group,) = group_runs([run], workspace, weights)
    some, pixels = _some(images, run, max_pixels)
    logger.info("building %s in float32", run.backbone)
    network = group.network("float32")
    expected = np.asarray(network.on_pixels().predict_on_batch(pixels), np.float32)
    compared: dict[str, Any] = {
        "compared_images": len(pixels),
        "run_precision": run.spec.precision,
        "difference_to_run": _difference_to_run(run, some, expected, workspace, max_pixels, weights),
    }
    with _published(final) as folder:
        logger.info("writing %s", name)
        with _failures_reported(run, form):
            form.write(deployable(network, named=form.named), folder / form.file, run.classes)
            compared["max_difference"] = _difference(form, folder / form.file, pixels, expected, run)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        about = {
            **_description(run, form, pixels.shape[1:]),
            **compared,
            "bytes": size,
            "seconds": round(time.perf_counter() - start, 3),
        }
        files.write_json(folder / CLASSES, run.classes)
        files.write_json(folder / ABOUT, about)
    return ExportedModel(final / form.file, about)


def _description(run: TrainedRun, form: Format, image: tuple[int, ...]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": form.file,
        "model_format": form.name,
        "run": run.name,
        "backbone": run.backbone,
        "weights": run.weights,
        "untrained": run.base.untrained,
        "input": {"name": "pixels", "shape": ["n", *image], "dtype": "uint8", "channels": "RGB"},
        "output": {"name": "probabilities", "shape": ["n", len(run.classes)], "dtype": "float32"},
        "images": {"decode": run.spec.decode, "fit": run.spec.fit, "resize": run.spec.resize},
        "classes": CLASSES,
        "versions": {package: importlib.metadata.version(package) for package in form.packages},
    }


def _some(images: Dataset, run: TrainedRun, max_pixels: int) -> tuple[Dataset, np.ndarray]:
    """Return up to 32 decodable images, from all classes, and their pixels (n, size, size, 3) uint8."""
    spec, good, pixels = run.spec, list[int](), list[np.ndarray]()
    some = limit(images, 4 * _COMPARED)
    with Loader(some, spec.input_size, spec.fit, max_pixels, depth=depth_of(spec.decode)) as load:
        for i in range(len(some)):
            loaded = load(i)
            if loaded.pixels is not None:
                good.append(i)
                pixels.append(loaded.pixels)
            if len(good) == _COMPARED:
                break
    if not good:
        raise DatasetError(
            f"none of the first {len(some)} images of {images.name} can be decoded, and the exported model is to be "
            "compared on some; name others by --images"
        )
    return some.take(good), np.stack(pixels)


def _difference_to_run(
    run: TrainedRun, some: Dataset, expected: np.ndarray, workspace: Workspace, max_pixels: int, weights: str | None
) -> float:
    """Return the largest difference between the run's own probabilities and `expected`, (n, k)."""
    answers = predict([run], some, workspace, max_pixels=max_pixels, weights=weights)
    found = [
        float(np.abs(answer.probabilities - full).max())
        for answer, full in zip(answers, expected, strict=True)
        if answer.probabilities is not None
    ]
    if not found:
        raise DatasetError(f"the images of {some.name} changed while they were compared; run it again")
    return max(found)


def deployable(network: FullModel, *, named: bool) -> KerasModel:
    """Return a network as one Keras model of standard layers: pixels (n, size, size, 3) uint8 RGB → probabilities.

    With `named` the output is a dict with the key "probabilities", the output's name in formats with named outputs.
    """
    keras = import_keras()
    size = network.spec.input_size
    head = keras.models.clone_model(network.head.model, clone_function=_standard, recursive=True)
    inputs = keras.Input((size, size, 3), dtype="uint8", name="pixels")
    output = head(network.below(scale(keras.ops.cast(inputs, "float32"), network.spec.scaling)))
    return keras.Model(inputs, {"probabilities": output} if named else output, name="icebox")


def _standard(layer: Any) -> Any:
    """Return a layer unchanged, but a `Normalization` layer as an equal `BatchNormalization` in inference mode.

    A `Normalization` layer stores its mean and variance outside the graph; converters such as tf2onnx 1.17 lose them.
    """
    layers = import_keras().layers
    if not isinstance(layer, layers.Normalization):
        return layer
    same = layers.BatchNormalization(name=layer.name, center=False, scale=False, epsilon=0.0, trainable=False)
    same.build(layer.input.shape)
    same.set_weights([np.ravel(layer.mean), np.ravel(layer.variance)])
    return same


@contextlib.contextmanager
def _failures_reported(run: TrainedRun, form: Format) -> Iterator[None]:
    """Turn exceptions of a converter or a runtime, which have types of their own, into RunError."""
    try:
        yield
    except (IceboxError, OSError):
        raise
    except Exception as error:
        if exhausted(error):
            raise
        reason = " ".join(str(error).split())[:_MOST_REASON].rstrip(".") or type(error).__name__
        other = next(name for name in ("savedmodel", "keras") if name != form.name)
        raise RunError(
            f"{run.name} cannot be exported as {form.name} ({reason}); nothing was exported; take another format, as "
            f"--format {other}"
        ) from error


def _difference(form: Format, path: Path, pixels: np.ndarray, expected: np.ndarray, run: TrainedRun) -> float:
    """Load the written model and return the largest difference of its probabilities from `expected`.

    Raises RunError if the difference exceeds 1e-3.
    """
    logger.info("loading it again, and comparing on %s", counted(len(pixels), "image"))
    said = form.load(path)(pixels)
    difference = float(np.abs(said - expected).max()) if said.shape == expected.shape else np.inf
    if not difference <= _MOST_DIFFERENCE:  # not `>`: NaN must count as different
        raise RunError(
            f"{run.name} as {form.name} says something else than the full model, by {difference:.2g} of a "
            "probability; nothing was exported"
        )
    return difference


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished folders of killed exports."""
    for name in files.list_folders(folder):
        if files.is_partial(name) and name.endswith(_PARTIAL):
            remove_abandoned(folder / name)


def _require_free(final: Path) -> None:
    """Raise UsageError if `final` exists and is neither an empty folder nor an earlier export, which is replaced."""
    if final == Path.cwd():
        raise UsageError("--out is the folder you stand in; name one to be made")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    made = {ABOUT, CLASSES, "model.bin", *(form.file for form in FORMATS.values())}
    if not final.is_dir() or not _is_export(final / ABOUT) or {path.name for path in final.iterdir()} - made:
        raise UsageError(f"{final} exists and holds more than an earlier export; name another folder by --out")


def _is_export(path: Path) -> bool:
    try:
        about = json.loads(files.read_small(path, _MOST_ABOUT))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get("format") == FORMAT


@contextlib.contextmanager
def _published(final: Path) -> Iterator[Path]:
    """Yield a folder to fill, like `store.new_folder`. Raises RunError if it cannot be written."""
    try:
        with store.new_folder(final, _PARTIAL) as folder:
            yield folder
    except OSError as error:
        if isinstance(error, IceboxError):
            raise
        raise RunError(f"nothing can be exported to {final}: {error.strerror or error}") from error
