"""`export`: a run as one deployable model, raw pixels in, class probabilities out, checked in its own runtime."""

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
_PARTIAL = "-export"  # how names of unfinished ones end
_MOST_ABOUT = 2**20  # bytes
_COMPARED = 32  # images
_MOST_REASON = 300  # characters
_MOST_DIFFERENCE = 1e-3  # of a probability, from the float32 full model


@dataclass(frozen=True)
class ExportedModel:
    """What `export` made: the model's path, and how far it is from the run."""

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
    """Write `run` in the format `name` into a folder of its own, which appears whole or not at all.

    The model computes in float32. It is loaded again in its own runtime and compared on some of `images` with the
    float32 full model, and with what the run itself says, in the precision it was trained in.

    Raises
    ------
    UsageError
        If the format's package is missing, or `out` holds something else.
    DatasetError
        If none of `images` can be decoded.
    RunError
        If the exported model says something else by more than 1e-3, or cannot be converted or written.
    """
    form = FORMATS[name]
    form.require()
    final = Path(os.path.realpath(out or workspace.root / _FOLDER / f"{run.name}-{name}"))  # it has a parent and a name
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
    """Return a few images of all classes that can be decoded, and their pixels (n, size, size, 3) uint8."""
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
    """Return how far what the run itself says of images is from `expected`, (n, k)."""
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

    `named` gives the output in a dict, so that formats that name their outputs call it "probabilities".
    """
    keras = import_keras()
    size = network.spec.input_size
    head = keras.models.clone_model(network.head.model, clone_function=_standard, recursive=True)
    inputs = keras.Input((size, size, 3), dtype="uint8", name="pixels")
    output = head(network.below(scale(keras.ops.cast(inputs, "float32"), network.spec.scaling)))
    return keras.Model(inputs, {"probabilities": output} if named else output, name="icebox")


def _standard(layer: Any) -> Any:
    """Return a layer itself, a normalisation as a batch norm in inference mode.

    A normalisation keeps its numbers outside the graph, where converters (tf2onnx 1.17 for one) lose them.
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
    """Raise RunError for whatever a converter or a runtime raises, by types of its own, of a model it cannot take."""
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
    """Load the model that was written and return how far its answers are from those expected."""
    logger.info("loading it again, and comparing on %s", counted(len(pixels), "image"))
    said = form.load(path)(pixels)
    difference = float(np.abs(said - expected).max()) if said.shape == expected.shape else np.inf
    if not difference <= _MOST_DIFFERENCE:  # so that NaN counts as different
        raise RunError(
            f"{run.name} as {form.name} says something else than the full model, by {difference:.2g} of a "
            "probability; nothing was exported"
        )
    return difference


def _remove_leftovers(folder: Path) -> None:
    """Remove what exports that were killed left behind."""
    for name in files.list_folders(folder):
        if files.is_partial(name) and name.endswith(_PARTIAL):
            remove_abandoned(folder / name)


def _require_free(final: Path) -> None:
    """Raise UsageError if `final` is anything but an empty folder or an earlier export, which is replaced."""
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
    """Give a folder to fill, as `runs.new_folder` does. Raises RunError if it cannot be written."""
    try:
        with store.new_folder(final, _PARTIAL) as folder:
            yield folder
    except OSError as error:
        if isinstance(error, IceboxError):
            raise
        raise RunError(f"nothing can be exported to {final}: {error.strerror or error}") from error
