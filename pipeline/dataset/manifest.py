"""Read a CSV, TSV or Parquet manifest: one image a row, in the columns path and label, optionally split and group."""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import DatasetError
from pipeline.dataset import remote
from pipeline.dataset.base import SPLIT_NAMES, Dataset, FileSource, brought_splits, index_labels
from pipeline.dataset.diagnosis import foreign_format, line_that_is_not_utf8, missing_file

logger = logging.getLogger(__name__)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
MANIFEST_ENDINGS = (*_DELIMITERS, ".parquet", ".pq")
_COLUMNS = ("path", "label", "split", "group")

# The number of a line or row, and its path, label, split and group; "" if a value or column is missing.
_Row = tuple[int, Sequence[str]]


def open_manifest(path: Path, image_root: Path | None = None) -> Dataset:
    """Return the images of a manifest as a dataset, in the order of its rows.

    Paths start from `image_root`, by default the manifest's own folder, and must stay inside it, absolute paths too: a
    manifest may come from another person, and Icebox reads the files that it names. Links are followed. URLs, such as
    `https://…` and `s3://…`, are read by `remote`.

    Text is UTF-8, with or without a byte order mark. In Parquet, labels and groups may be whole numbers; such labels
    are sorted as numbers. Other columns are ignored. No image file is read. If files are missing because their paths
    are written differently, a warning is logged.

    Raises
    ------
    DatasetError
        If the manifest cannot be read, a column is missing or a row is malformed; the message names the line.
    UsageError
        If a package that its URLs need is not installed.
    """
    path, root, listed = _listed(path, image_root, ("path", "label"))
    rows = _Rows(path, root)
    for where, values in listed:
        rows.add(where, *values)
    if not rows.names:
        raise DatasetError(_no_rows(path))
    _look_at_paths(path, root, rows.names)
    classes, labels = index_labels(rows.labels, int if _has_whole_numbers(path) else None)
    return Dataset(
        name=path.name,
        classes=classes,
        names=rows.names,
        labels=labels,
        splits=brought_splits(rows.splits) if any(rows.splits) else None,
        groups=rows.groups if any(rows.groups) else None,
        source=FileSource(root, rows.names),
    )


def manifest_images(path: Path, image_root: Path | None = None) -> tuple[Path, list[str]]:
    """Return the folder that the paths of a manifest start from, and the paths; only the column `path` is read.

    Raises DatasetError and UsageError for the same reasons as `open_manifest`.
    """
    path, root, listed = _listed(path, image_root, ("path",))
    names = []
    for where, (name, *_) in listed:
        _check_path(where, name, os.path.normpath(root))
        names.append(name)
    if not names:
        raise DatasetError(_no_rows(path))
    _look_at_paths(path, root, names)
    return root, names


def _look_at_paths(path: Path, root: Path, names: Sequence[str]) -> None:
    """Check that the packages for URLs are installed; log a warning with the likely cause if files are missing."""
    remote.require(name for name in names if remote.is_url(name))
    if found := missing_file(root, names):
        logger.warning("%s: %s", path, found)


def _no_rows(path: Path) -> str:
    return f"{path}: expected at least one image, found no rows below the header"


def _listed(
    path: Path, image_root: Path | None, required: Sequence[str]
) -> tuple[Path, Path, Iterator[tuple[str, Sequence[str]]]]:
    """Return the manifest's path, the folder its paths start from, and its rows, each with "FILE: line N"."""
    path = path.absolute()  # a Dask worker may run in another folder
    root = path.parent if image_root is None else Path(os.path.normpath(image_root.absolute()))
    if not root.is_dir():
        raise DatasetError(f"expected --image-root to be a folder, found none at {root}")
    delimiter = _DELIMITERS.get(path.suffix.lower())
    unit = "row" if delimiter is None else "line"
    rows = _parquet_rows(path, required) if delimiter is None else _text_rows(path, delimiter, required)
    return path, root, ((f"{path}: {unit} {number}", values) for number, values in rows)


class _Rows:
    """The columns of the rows read so far; `add` checks each row. Repeated texts are interned to save memory."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = os.path.normpath(root)
        self.names: list[str] = []
        self.labels: list[str] = []
        self.splits: list[str] = []
        self.groups: list[str] = []

    def add(self, where: str, path: str, label: str, split: str, group: str) -> None:
        label = label.strip()
        _check_path(where, path, self.root)
        if not label:
            raise DatasetError(f"{where}: expected a label for {path!r}, found none")
        side = self._side(where, split.strip())
        self.names.append(path)
        self.labels.append(sys.intern(label))
        self.splits.append(side)
        self.groups.append(sys.intern(group.strip()))

    def _side(self, where: str, split: str) -> str:
        side = SPLIT_NAMES.get(split.lower(), "")
        if split and not side:
            raise DatasetError(f"{where}: expected the split to be {_one_of(SPLIT_NAMES)}, found {split!r}")
        if self.splits and bool(self.splits[0]) != bool(side):
            expected = "a split, as the rows above have one" if not side else "no split, as above"
            raise DatasetError(f"{where}: expected {expected}, found {split!r}; give all rows one, or none")
        return side


def _one_of(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def _check_path(where: str, path: str, root: str) -> None:
    if not path.strip():
        raise DatasetError(f"{where}: expected the path of an image, found none")
    if "\0" in path:
        raise DatasetError(f"{where}: expected the path of an image, found one with a null character")
    if remote.is_url(path):
        try:
            remote.resolve(path, root)
        except ValueError as error:
            raise DatasetError(f"{where}: expected {error}, found {path!r}") from error
        return
    # Only absolute paths and those with ".." can leave the folder; no check of the others keeps a million rows fast.
    if (path.startswith("/") or ".." in path) and not _lies_in(root, path):
        raise DatasetError(
            f"{where}: expected a path inside {root}, found {path!r}; if it is meant, name the folder that all images "
            "are in by --image-root"
        )


def _lies_in(root: str, path: str) -> bool:
    return os.path.commonpath([root, os.path.normpath(os.path.join(root, path))]) == root  # noqa: PTH118


def _columns(path: Path, header: Sequence[str], required: Sequence[str]) -> list[int | None]:
    """Return the indices of path, label, split and group in the header; None for a missing optional column.

    Raises DatasetError if a required column is missing, or a column appears twice.
    """
    names = [name.strip().lower() for name in header]
    for name in _COLUMNS:
        found = names.count(name)
        if found > 1 or (not found and name in required):
            shape = "path" if required == ("path",) else "path,label[,split][,group]"
            raise DatasetError(
                f"{path}: line 1: expected one column {name!r} (of {shape}), found {found} in {','.join(header)!r:.200}"
                f"{_other_delimiter(path, header)}"
            )
    return [names.index(name) if name in names else None for name in _COLUMNS]


def _other_delimiter(path: Path, header: Sequence[str]) -> str:
    """Return a message if the separator of a text file is not that of its ending, else ""."""
    expected = _DELIMITERS.get(path.suffix.lower())
    others = [each for each in ",;\t|" if each != expected and len(header) == 1 and each in header[0]]
    return f"; columns are separated by {expected!r}, found {others[0]!r}" if expected and others else ""


def _text_rows(path: Path, delimiter: str, required: Sequence[str]) -> Iterator[_Row]:
    number = 0
    try:
        if what := foreign_format(path):
            raise DatasetError(f"{path}: expected UTF-8 text in columns, found {what}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: an unclosed quote is an error; otherwise, the rest of the file would become one field.
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = next(reader, [])
            columns, number = _columns(path, header, required), reader.line_num
            for fields in reader:
                number = reader.line_num
                if fields:
                    _check_width(f"{path}: line {number}", header, fields)
                    yield number, ["" if c is None else fields[c] for c in columns]
    except csv.Error as error:
        raise DatasetError(f"{path}: expected UTF-8 text in columns, after line {number}: {error}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: line {line_that_is_not_utf8(path)}: expected UTF-8 text, found another encoding, likely "
            "Windows-1252 or Latin-1; save it as UTF-8"
        ) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error


def _check_width(where: str, header: Sequence[str], fields: Sequence[str]) -> None:
    if len(fields) != len(header):
        raise DatasetError(
            f"{where}: expected {len(header)} values, found {len(fields)}; quote a value that holds a separator"
        )


def _parquet_rows(path: Path, required: Sequence[str]) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if what := foreign_format(path):
            raise DatasetError(f"{path}: expected a Parquet file, found {what}")
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = [None if c is None else schema.field(c) for c in _columns(path, schema.names, required)]
            _check_types(path, columns)
            names = [column.name for column in columns if column is not None]
            for batch in file.iter_batches(batch_size=1 << 14, columns=names):
                blank = [None] * len(batch)
                lists = [blank if c is None else batch.column(c.name).to_pylist() for c in columns]
                for values in zip(*lists, strict=True):
                    number += 1
                    yield number, ["" if value is None else str(value) for value in values]
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: expected a Parquet file, found: {error}") from error


def _has_whole_numbers(path: Path) -> bool:
    """Return whether the labels of a valid manifest are a Parquet column of whole numbers."""
    if path.suffix.lower() in _DELIMITERS:
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    (label,) = (field for field in pq.read_schema(path) if field.name.strip().lower() == "label")
    return pa.types.is_integer(_value_type(label.type))


def _value_type(kind: Any) -> Any:
    """Return the type of a column's values, also for a dictionary-encoded column."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_types(path: Path, columns: Sequence[Any]) -> None:
    """Raise DatasetError unless all columns are text or empty; label and group may be whole numbers."""
    import pyarrow as pa

    for name, column in zip(_COLUMNS, columns, strict=True):
        if column is None:
            continue
        kind = _value_type(column.type)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (text or pa.types.is_null(kind) or (name in ("label", "group") and pa.types.is_integer(kind))):
            raise DatasetError(f"{path}: expected text in the column {name!r}, found {column.type}")
