"""A CSV, TSV or Parquet manifest: one image a row, with the columns path, label and perhaps split, group."""

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

# The number of a line or row, and its path, label, split and group; "" where a value or column is missing.
_Row = tuple[int, Sequence[str]]


def open_manifest(path: Path, image_root: Path | None = None) -> Dataset:
    """List the images of a manifest, in its order.

    Paths start from `image_root`, or from the manifest's own folder, and may not leave it: a manifest may come from
    somebody else, and what it names is read. Absolute ones must lie in there too. Links are followed. Addresses, such
    as `https://…` and `s3://…`, are read as `remote` says.

    The text is UTF-8, with or without a byte order mark; labels and groups may be whole numbers in Parquet, and such
    labels are sorted as numbers. Other columns are passed over. No image file is read; where some are not there
    because of how their paths are written, a notice says so.

    Raises
    ------
    DatasetError
        If it cannot be read, a column is missing or a row is malformed; the text names the line.
    UsageError
        If a package is not there that its addresses need.
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
    """Return the folder that a manifest's paths start from, and the paths; of its columns only `path` is looked at.

    Raises DatasetError and UsageError as `open_manifest` does.
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
    """Check that packages for addresses are there, and say why files are likely to be missing."""
    remote.require(name for name in names if remote.is_url(name))
    if found := missing_file(root, names):
        logger.warning("%s: %s", path, found)


def _no_rows(path: Path) -> str:
    return f"{path}: expected at least one image, found no rows below the header"


def _listed(
    path: Path, image_root: Path | None, required: Sequence[str]
) -> tuple[Path, Path, Iterator[tuple[str, Sequence[str]]]]:
    """Return the manifest, the folder its paths start from, and its rows, each with where it stands."""
    path = path.absolute()  # a worker elsewhere may run in another folder
    root = path.parent if image_root is None else Path(os.path.normpath(image_root.absolute()))
    if not root.is_dir():
        raise DatasetError(f"expected --image-root to be a folder, found none at {root}")
    delimiter = _DELIMITERS.get(path.suffix.lower())
    unit = "row" if delimiter is None else "line"
    rows = _parquet_rows(path, required) if delimiter is None else _text_rows(path, delimiter, required)
    return path, root, ((f"{path}: {unit} {number}", values) for number, values in rows)


class _Rows:
    """The rows so far, checked one by one. Texts that repeat are interned, so a million rows stay small."""

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
    # Only for the few paths that could leave it: a million rows are checked in a second.
    if (path.startswith("/") or ".." in path) and not _lies_in(root, path):
        raise DatasetError(
            f"{where}: expected a path inside {root}, found {path!r}; if it is meant, name the folder that all images "
            "are in by --image-root"
        )


def _lies_in(root: str, path: str) -> bool:
    return os.path.commonpath([root, os.path.normpath(os.path.join(root, path))]) == root  # noqa: PTH118


def _columns(path: Path, header: Sequence[str], required: Sequence[str]) -> list[int | None]:
    """Return where path, label, split and group stand in the header; None for an optional one not there."""
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
    """Say so if the columns of a text are separated by something else than its ending says."""
    expected = _DELIMITERS.get(path.suffix.lower())
    others = [each for each in ",;\t|" if each != expected and len(header) == 1 and each in header[0]]
    return f"; columns are separated by {expected!r}, found {others[0]!r}" if expected and others else ""


def _text_rows(path: Path, delimiter: str, required: Sequence[str]) -> Iterator[_Row]:
    number = 0
    try:
        if what := foreign_format(path):
            raise DatasetError(f"{path}: expected UTF-8 text in columns, found {what}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: an unclosed quote is an error, where it would swallow the rest of the file as one field.
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
    """Return whether the labels of a manifest that could be read are a Parquet column of whole numbers."""
    if path.suffix.lower() in _DELIMITERS:
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    (label,) = (field for field in pq.read_schema(path) if field.name.strip().lower() == "label")
    return pa.types.is_integer(_value_type(label.type))


def _value_type(kind: Any) -> Any:
    """Return the type of a column's values, of a dictionary's too."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_types(path: Path, columns: Sequence[Any]) -> None:
    """Refuse columns whose text would be a guess: only text, and whole numbers where no path is meant."""
    import pyarrow as pa

    for name, column in zip(_COLUMNS, columns, strict=True):
        if column is None:
            continue
        kind = _value_type(column.type)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (text or pa.types.is_null(kind) or (name in ("label", "group") and pa.types.is_integer(kind))):
            raise DatasetError(f"{path}: expected text in the column {name!r}, found {column.type}")
