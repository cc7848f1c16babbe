"""Icebox: a feature cache for image transfer learning.

`open_features` gives cached features to programs of your own (docs/python.md). The modules stand on floors: each
imports only from those below it (docs/architecture.md has the list).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if "ICEBOX_LOCKS" in os.environ:  # before anything loads HDF5
    from pipeline.core.locks import spare_hdf5

    spare_hdf5()

if TYPE_CHECKING:
    from pipeline.training.open_features import Features, Items, open_features

__all__ = ["Features", "Items", "open_features"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line starts without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.training import open_features

    return getattr(open_features, name)
