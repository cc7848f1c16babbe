"""List a folder of class folders, with or without split folders above them, as a `Dataset`."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import DatasetError
from pipeline.dataset.base import SPLIT_NAMES, Dataset, FileSource, brought_splits, index_labels
from pipeline.dataset.ignored import file_ignored_as, folder_ignored_as, ignored_text
from pipeline.dataset.layout import class_depth

logger = logging.getLogger(__name__)

_LAYOUT = "expected <class>/<image>, or train/<class>/<image> with test/ and perhaps val/ beside it"
_LOOP = "(link loop)"
_LISTED_AT_ONCE = 16  # folders; network file systems are slow, but list many folders in parallel


def open_folder(root: Path) -> Dataset:
    """Return the images below `root` as a dataset, sorted by name.

    The folders directly in `root` are the classes, or the splits with the classes below them; `layout` decides. A
    class has its images at any depth. Links are followed. Hidden files, folders of other programs and files without an
    image ending are counted in `ignored`.

    Raises
    ------
    DatasetError
        If there are no images, an image is outside a class folder, the folders are neither all splits nor all
        classes, or a folder cannot be listed.
    """
    root = root.absolute()  # a Dask worker may run in another folder
    ignored: Counter[str] = Counter()
    names = sorted(images_below(root, ignored))
    if not names:
        raise DatasetError(f"{root}: {_LAYOUT}, found no images (passed over: {ignored_text(ignored) or 'nothing'})")
    folders = {name.rpartition("/")[0] for name in names}
    depth = 0 if "" in folders else class_depth(root, folders)  # the index of the class in the parts of a name
    if stray := [name for name in names if name.count("/") <= depth]:
        raise DatasetError(f"{root}: {_LAYOUT}, found {len(stray)} outside a class folder, as {stray[0]!r}")
    classes, labels = index_labels(name.split("/", depth + 1)[depth] for name in names)
    if depth == 0 and len(splits := [name for name in classes if name.lower() in SPLIT_NAMES]) > 1:
        logger.warning("%s: %s hold images directly, so that they are classes, not splits", root, " and ".join(splits))
    if len(classes) == 1:
        _warn_of_one_class(root, classes[0], {part[0] for each in folders if (part := each.split("/")[depth + 1 :])})
    return Dataset(
        name=root.resolve().name or str(root),
        classes=classes,
        names=names,
        labels=labels,
        splits=brought_splits([SPLIT_NAMES[name.split("/", 1)[0].lower()] for name in names]) if depth else None,
        groups=None,
        source=FileSource(root, names),
        ignored=dict(ignored),
        without_images=tuple(_without_images(root, depth, folders)),
    )


def _warn_of_one_class(root: Path, name: str, below: set[str]) -> None:
    if len(below) > 1:
        logger.warning(
            "%s has one class, %r, with images in %d folders, as %r; if these are the classes, leave out the folder "
            "above them",
            *(root, name, len(below), min(below)),
        )


def _without_images(root: Path, depth: int, folders: set[str]) -> Iterator[str]:
    """Yield the folders of splits and classes without an image, relative to `root`, sorted."""
    filled = {"/".join(folder.split("/")[: level + 1]) for folder in folders for level in range(depth + 1)}
    inside = [""] if depth == 0 else ["", *(f"{split}/" for split in sorted(filled) if "/" not in split)]
    for prefix in inside:
        found = (f"{prefix}{name}" for name in _folders(root / prefix))
        yield from (name for name in found if name not in filled)


def _folders(folder: Path) -> Sequence[str]:
    """Return the sorted names of the folders directly in `folder`, without ignored ones."""
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry) and not folder_ignored_as(entry.name))


@dataclass(frozen=True)
class _Folder:
    """A folder to list: `prefix` starts the names of its images, `above` are the (device, inode) of its parents."""

    path: Path
    prefix: str = ""
    above: frozenset[tuple[int, int]] = frozenset()


def images_below(root: Path, ignored: Counter[str]) -> Iterator[str]:
    """Yield the images below `root` as relative paths with "/", in no fixed order; count other files in `ignored`."""
    pool = ThreadPoolExecutor(_LISTED_AT_ONCE)
    try:
        waiting = deque([pool.submit(_listed, _Folder(root))])
        while waiting:
            names, folders, passed = waiting.popleft().result()
            ignored.update(passed)
            waiting.extend(pool.submit(_listed, folder) for folder in folders)
            yield from names
    finally:
        pool.shutdown(cancel_futures=True)


def _listed(folder: _Folder) -> tuple[list[str], list[_Folder], Counter[str]]:
    """Return the names of the images in a folder, the folders in it, and the counts of what is ignored."""
    names, folders, ignored = list[str](), list[_Folder](), Counter[str]()
    here, entries = _identity(folder.path), _entries(folder.path)
    if here in folder.above:  # a link to a parent folder; listing it would never end
        return [], [], Counter({_LOOP: 1})
    for entry in entries:
        is_folder = _is_folder(entry)
        ignored_as = folder_ignored_as(entry.name) if is_folder else file_ignored_as(entry.name)
        if ignored_as is not None:
            ignored[ignored_as] += 1
        elif is_folder:
            folders.append(_Folder(Path(entry.path), f"{folder.prefix}{entry.name}/", folder.above | {here}))
        else:  # pipes too; reading one fails later and is reported
            names.append(folder.prefix + entry.name)
    return names, folders, ignored


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = folder.stat()
    except OSError as error:
        raise DatasetError(f"cannot look at the folder {folder}: {error.strerror}") from error
    return stat.st_dev, stat.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DatasetError(f"cannot list the folder {folder}: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
