"""The tables that a run keeps, history and predictions, as structured arrays or DataFrames."""

from __future__ import annotations

import csv
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas

_HISTORY, _PREDICTIONS = "history.json", "predictions.csv"
_NAMES = ("image", "split", "label", "predicted")  # columns of text, and all that begin with "label_"


def import_pandas() -> types.ModuleType:
    """Return pandas. Raises UsageError if it is not installed: Icebox itself does without."""
    from pipeline.core.errors import UsageError

    try:
        import pandas as pd
    except ImportError as error:
        raise UsageError(f"a DataFrame needs pandas ({error}): pip install pandas, or take arrays") from error
    return pd


def history_array(folder: Path) -> np.ndarray:
    """Return the history of the run in `folder`, a structured array with an entry an epoch, a fit or a fold.

    Fields are those of history.json: whole numbers are int64, others float64, NaN where a value is missing.

    Raises
    ------
    RunError
        If the file cannot be read.
    """
    import numpy as np

    from pipeline.core import files

    with _read(folder / _HISTORY) as path:
        entries = json.loads(files.read_small(path, files.MOST_JSON_BYTES))
        columns = {name: [entry.get(name) for entry in entries] for name in entries[0]}
        return _structured({name: np.array(values, _type(values)) for name, values in columns.items()})


def predictions_array(folder: Path) -> np.ndarray:
    """Return the predictions of the run in `folder`, a structured array with an entry an image.

    Fields are image, split, label, predicted (text), probability (float32), and, up to 200 classes, probabilities
    (k,) float32 in the order of the run's classes; of more classes label_2 and probability_2 to probability_10.

    Raises
    ------
    RunError
        If the file cannot be read.
    """
    import numpy as np

    with _read(folder / _PREDICTIONS) as path, path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines)
        if tuple(header[:5]) != (*_NAMES, "probability"):
            raise ValueError("its columns have other names")
        some = _columns(header, lines)
        dense = [i for i, name in enumerate(header) if name.startswith("p:")]
        columns: dict[str, Any] = {
            name: np.array(some[i], np.str_ if _is_text(name) else np.float32)
            for i, name in enumerate(header)
            if i not in dense
        }
        if dense:
            columns["probabilities"] = np.array([some[i] for i in dense], np.float32).T
        return _structured(columns)


def history_frame(folder: Path) -> pandas.DataFrame:
    """Return the history of the run in `folder` as a DataFrame. Raises RunError, and UsageError without pandas."""
    return import_pandas().DataFrame(history_array(folder))


def predictions_frame(folder: Path) -> pandas.DataFrame:
    """Return the predictions of the run in `folder` as a DataFrame with the columns of predictions.csv.

    Raises
    ------
    RunError
        If the file cannot be read.
    UsageError
        If pandas is not installed.
    """
    pd = import_pandas()
    with _read(folder / _PREDICTIONS) as path:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        types_of = {name: str if _is_text(name) else "float32" for name in header}
        return pd.read_csv(path, dtype=types_of, keep_default_na=False, encoding="utf-8")


def _is_text(column: str) -> bool:
    return column in _NAMES or column.startswith("label_")


def _columns(header: Sequence[str], lines: Iterator[list[str]]) -> list[Sequence[str]]:
    columns = list(zip(*lines, strict=True))
    if columns and len(columns) != len(header):
        raise ValueError(f"{len(columns)} columns, and names of {len(header)}")
    return list(columns) or [()] * len(header)


def _type(values: Sequence[Any]) -> type:
    """Return the type of a column of numbers: int, or float, in which None becomes NaN."""
    return int if all(isinstance(value, int) for value in values) else float


def _structured(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return columns (n, …) as one structured array (n,)."""
    import numpy as np

    kinds: Any = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    found: Any = np.zeros(len(next(iter(columns.values()))), kinds)
    for name, values in columns.items():
        found[name] = values
    return found


@contextmanager
def _read(path: Path) -> Iterator[Path]:
    """Give the path of a file of a run. Raises RunError if what reads it stumbles."""
    from pipeline.core.errors import RunError

    try:
        yield path
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
