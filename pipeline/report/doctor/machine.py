"""Describe this machine: versions, devices, memory, and the state of the data directory."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
from pipeline.backbone.weights import find_imagenet
from pipeline.cache.workspace import Workspace
from pipeline.core import files, machine

_PACKAGES = ("tensorflow", "keras", "opencv-python", "h5py", "hdf5plugin", "scikit-learn", "typer")


def examine(workspace: Workspace) -> dict[str, Any]:
    """Return the properties of this machine and of the data directory by name; sizes are in bytes.

    This function imports TensorFlow, to count the GPUs that TensorFlow can use.
    """
    found = asdict(machine.inspect_machine())
    spaces = [space.totals() for space in workspace.cache.spaces()]
    imagenet = find_imagenet(BACKBONES[DEFAULT_BACKBONE], workspace.downloads)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **machine.versions(_PACKAGES),
        **found,
        "tensorflow_gpus": _tensorflow_gpus(),
        "precision_auto": machine.best_precision(),
        "data_dir": str(workspace.root),
        "data_dir_free": files.free_bytes(workspace.root),
        "imagenet_weights": str(imagenet) if imagenet else "not downloaded",
        "cache_spaces": len(spaces),
        "cache_rows": sum(totals.rows for totals in spaces),
        "cache_bytes": sum(totals.bytes for totals in spaces),
    }


def _tensorflow_gpus() -> int:
    from pipeline.backbone.keras_start import import_keras

    import_keras()
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))
