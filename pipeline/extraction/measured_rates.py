"""Store and read how fast each network computed features on this machine, in a file of the cache folder.

<cache>/rates.json    the last rate of each network, layer, input size and precision, on each machine

The other fields of a feature space (weights, scaling, storage) hardly change the rate, and are left out.
"""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.cache.workspace import Workspace
from pipeline.core import files, machine
from pipeline.core.locks import exclusive, without_locks
from pipeline.core.spec import FeatureSpec

logger = logging.getLogger(__name__)

FILE = "rates.json"
_FORMAT = "icebox-rates"
_VERSION = 1
_MOST_BYTES = 2**22
_DECIDING = ("backbone", "layer", "input_size", "precision", "engine")  # fields of a FeatureSpec


def remember(workspace: Workspace, spec: FeatureSpec, images_per_second: float, images: int) -> None:
    """Store the rate at which this machine computed features, in place of an earlier one.

    Parameters
    ----------
    spec
        Spec of the feature space; backbone, layer, input size, precision and engine identify the rate.
    images_per_second
        Finite and positive.
    images
        Number of images of the measurement.
    """
    if not (math.isfinite(images_per_second) and images_per_second > 0):
        raise ValueError(f"a rate must be finite and positive, found {images_per_second}")
    path, key = workspace.cache.root / FILE, _key(spec)
    entry = {
        **key,
        "images_per_second": float(f"{images_per_second:.4g}"),
        "images": images,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        files.make_folder(path.parent)
        with exclusive(path.with_name(f".{FILE}.lock"), lambda holder: None):
            if not without_locks():
                files.remove_partials(path.parent)  # left by a program that was killed here
            others = [each for each in _read(path) if not _is_of(each, key)]
            about = {"format": _FORMAT, "version": _VERSION, "rates": [*others, entry]}
            files.write_whole(path, (json.dumps(about, indent=1) + "\n").encode())
    except OSError as error:  # a read-only cache is still of use
        logger.warning("%s cannot be written (%s): how fast %s is will be measured again", path, error, spec.backbone)


def recall(workspace: Workspace, spec: FeatureSpec) -> float | None:
    """Return the last rate of this machine for `spec`, in images/s, or None if it was never measured."""
    key = _key(spec)
    found = [each for each in _read(workspace.cache.root / FILE) if _is_of(each, key)]
    return found[-1]["images_per_second"] if found else None


def known(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the rates measured on this machine, the oldest first.

    Each has backbone, layer, input_size, precision and engine of the FeatureSpec, and `images_per_second`, `images` and
    `measured` (ISO 8601, UTC).
    """
    here = _here()
    return [each for each in _read(workspace.cache.root / FILE) if _is_of(each, here)]


def _key(spec: FeatureSpec) -> dict[str, Any]:
    """Return the values that a rate depends on, as JSON values."""
    return {**_here(), **{name: getattr(spec, name) for name in _DECIDING}}


def _here() -> dict[str, Any]:
    return {"cpu": machine.inspect_machine().cpu, "cores": machine.usable_cores(), "gpus": machine.gpu_count()}


def _is_of(entry: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(entry.get(name) == value for name, value in key.items())


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the rates in a file, the oldest first; an empty list if the file is missing or cannot be read."""
    if not files.exists(path):
        return []
    try:
        about = json.loads(files.read_small(path, _MOST_BYTES))
        if (about["format"], about["version"]) != (_FORMAT, _VERSION):
            raise ValueError("another format")
        return [dict(each) for each in about["rates"] if _is_rate(dict(each).get("images_per_second"))]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): rates are measured again; remove it", path, error)
        return []


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
