"""Fit, save and load heads: classifiers that map cached rows to class probabilities.

The head `flatten` reads full tensors (n, h, w, c); `gap` and `logreg` read their spatial means (n, c).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import IceboxError, RunError
from pipeline.core.spec import HeadSpec
from pipeline.training.heads.base import JSON_FILE, Data, Fitted, Head
from pipeline.training.heads.ensemble import Ensemble, member_name
from pipeline.training.loop import TrainingContext

READS = {"flatten": "features", "gap": "pooled", "logreg": "pooled"}
_MOST_MEMBERS = 1000
_MOST_BYTES = 2**20  # largest size of a head.json

__all__ = [
    "READS",
    "Data",
    "Ensemble",
    "Fitted",
    "Head",
    "TrainingContext",
    "fit",
    "load",
    "memory_needed",
    "not_of_its_run",
    "of_its_run",
    "release",
    "require_memory",
    "steps",
]


def fit(spec: HeadSpec, data: Data, watch: TrainingContext) -> Fitted:
    """Train a new head of `spec`; `watch.advance(1)` is called after each epoch, or after each fit of the solver."""
    from pipeline.training.heads import dense, logreg

    return logreg.fit_logreg(spec, data, watch) if spec.head == "logreg" else dense.fit_dense(spec, data, watch)


def steps(spec: HeadSpec) -> int:
    """Return the largest number of steps by which `fit` advances: epochs, or fits of the solver."""
    from pipeline.training.heads import logreg

    return logreg.fit_steps(spec) if spec.head == "logreg" else spec.settings["epochs"]


def memory_needed(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> int:
    """Return about how many bytes `fit` takes beside the rows; 0 for `logreg`."""
    from pipeline.training.heads import dense

    return 0 if spec.head == "logreg" else dense.memory_needed(spec, row_shape, classes)


def require_memory(spec: HeadSpec, row_shape: tuple[int, ...], classes: int) -> None:
    """Log the memory that training a large head takes. Raises DoNotFitError if that is more than is free."""
    from pipeline.training.heads import dense

    if spec.head != "logreg":
        dense.require_memory(spec, row_shape, classes)


def release() -> None:
    """Free the global state that Keras keeps of deleted heads."""
    if "keras" in sys.modules:
        sys.modules["keras"].backend.clear_session()


@contextmanager
def of_its_run(directory: Path, classes: int, row_shape: tuple[int, ...]) -> Iterator[None]:
    """Turn a ValueError of Keras, NumPy or scikit-learn into a RunError: the head in `directory` is of another run."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, IceboxError):
            raise
        raise not_of_its_run(directory, classes, row_shape) from error


def not_of_its_run(directory: Path, classes: int, row_shape: tuple[int, ...]) -> RunError:
    """Return the error for a head that does not fit the rows or the number of classes of its run."""
    shape = "x".join(map(str, row_shape))
    return RunError(
        f"the head in {directory} is of another run: it does not tell {classes} classes apart by rows of {shape}"
    )


def load(directory: Path) -> Head:
    """Return the head that `save` wrote to `directory`.

    The head is rebuilt from `head.json` and filled with plain arrays; no saved file can run code.

    Raises
    ------
    RunError
        If files are missing, or do not match `head.json`.
    """
    try:
        made = json.loads(files.read_small(directory / JSON_FILE, _MOST_BYTES))
        return _loaded(directory, made)
    except Exception as error:
        # JSON, Keras, HDF5, zip and skops readers raise many types of errors, some with messages of dozens of lines.
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RunError(f"no head can be loaded from {directory}: {reason}") from error


def _loaded(directory: Path, made: dict[str, Any]) -> Head:
    from pipeline.training.heads import dense, logreg

    if made["head"] == "ensemble":
        if not 1 <= made["members"] <= _MOST_MEMBERS:
            raise RunError(f"an ensemble of {made['members']} heads")
        return Ensemble([load(directory / member_name(number + 1)) for number in range(made["members"])])
    return (logreg.LogregHead if made["head"] == "logreg" else dense.DenseHead).load(directory, made)
