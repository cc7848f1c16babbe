"""Icebox: a feature cache for image transfer learning.

`Icebox` is a data directory with a method for each command; `open_features` gives cached features to programs of your
own (docs/python.md). The packages follow the pipeline: each imports only from those above it (docs/architecture.md).
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if "ICEBOX_LOCKS" in os.environ:  # before anything loads HDF5
    from pipeline.core.locks import spare_hdf5

    spare_hdf5()

if TYPE_CHECKING:
    from importlib.metadata import version

    from pipeline.api.icebox import Icebox
    from pipeline.api.run import Run
    from pipeline.core.errors import IceboxError
    from pipeline.training.open_features import Features, Items, open_features

    __version__ = version("icebox")

_PLACES = {
    "Icebox": "pipeline.api.icebox",
    "Run": "pipeline.api.run",
    "IceboxError": "pipeline.core.errors",
    "Features": "pipeline.training.open_features",
    "Items": "pipeline.training.open_features",
    "open_features": "pipeline.training.open_features",
}
__all__ = ["Features", "Icebox", "IceboxError", "Items", "Run", "__version__", "open_features"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line starts without it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("icebox")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
