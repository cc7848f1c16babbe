"""Fit one setting of a sweep, write its outcome to a folder of its own, and read it back."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import files
from pipeline.core.errors import DoNotFitError, RunError
from pipeline.core.locks import exclusive
from pipeline.core.spec import HeadSpec
from pipeline.training import heads
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.fitting import fit_head, predict_probabilities
from pipeline.training.heads.base import measure
from pipeline.training.loop import NotFiniteError, OtherCheckpointError
from pipeline.training.sweep.leaderboard import ExtractionCost, Trial

logger = logging.getLogger(__name__)

TRIAL = "trial.json"
_MOST_BYTES = 2**26  # largest size of a JSON file in an unfinished sweep


def run_trial(
    spec: HeadSpec, data: heads.Data, folder: Path, advance: Callable[[float], None] = lambda n: None
) -> None:
    """Fit one setting, and write head and outcome to `folder`.

    An existing checkpoint is resumed; a finished trial is not repeated. If the loss becomes NaN or infinite, or the
    training does not fit into memory, the outcome is the error.
    """
    folder.mkdir(exist_ok=True)
    with exclusive(folder / ".lock", lambda holder: logger.info("waiting: %s is trying %s", holder, spec.identity)):
        if (folder / TRIAL).exists():
            return
        start = time.perf_counter()
        try:
            fitted = _fitted(spec, data, folder, advance)
        except (NotFiniteError, DoNotFitError) as error:
            files.write_json(folder / TRIAL, {"error": str(error), "seconds": time.perf_counter() - start})
            return
        said = predict_probabilities(fitted.head, data.val, "val")
        val_loss, _ = measure(said, data.val_labels)
        fitted.head.save(folder)
        outcome = {
            "error": None,
            "val_loss": val_loss,
            "right": np.packbits(said.argmax(axis=1) == data.val_labels).tobytes().hex(),
            "images": len(data.val_labels),
            "seconds": round(time.perf_counter() - start + fitted.seconds_before, 3),
            "parameters": fitted.head.parameters,
            "bytes": sum(path.stat().st_size for path in folder.glob("head.*")),
            "x": fitted.x,
            "history": fitted.history,
            "seconds_per_epoch": fitted.seconds_per_epoch,
            "facts": fitted.facts,
        }
        files.write_json(folder / TRIAL, outcome)
        Checkpoint(folder).remove()
        heads.release()


def _fitted(spec: HeadSpec, data: heads.Data, folder: Path, advance: Callable[[float], None]) -> heads.Fitted:
    try:
        return fit_head(spec, data, folder, advance)
    except OtherCheckpointError as error:
        logger.warning("%s: tried anew, as %s", spec.identity, error)
        Checkpoint(folder).remove()
        return fit_head(spec, data, folder, advance)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of an unfinished sweep. Raises RunError if it cannot be read."""
    try:
        return dict(json.loads(files.read_small(path, _MOST_BYTES)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it and resume the sweep") from error


def read_trial(folder: Path, spec: HeadSpec, cost: ExtractionCost) -> Trial:
    """Return the outcome that `run_trial` wrote to `folder`. Raises RunError if it cannot be read."""
    found = read_json(folder / TRIAL)
    about = folder.name, spec, cost
    if found["error"] is not None:
        return Trial(*about, np.zeros(0, bool), float("inf"), found["seconds"], 0, 0, found["error"])
    bits = np.frombuffer(bytes.fromhex(found["right"]), np.uint8)
    right = np.unpackbits(bits, count=found["images"]).astype(bool)
    return Trial(*about, right, *(found[name] for name in ("val_loss", "seconds", "parameters", "bytes")))
