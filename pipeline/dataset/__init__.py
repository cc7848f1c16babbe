"""Open a dataset by its name, from a folder of class folders or from a manifest, as a `Dataset`."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from pipeline.core import machine
from pipeline.core.errors import DatasetError, UsageError, did_you_mean
from pipeline.core.progress import Progress, silent
from pipeline.dataset.base import Dataset, Source, identical_images, limit, of_files
from pipeline.dataset.cifar import CIFAR10, CIFAR100, open_cifar
from pipeline.dataset.digits import open_digits
from pipeline.dataset.folder import open_folder
from pipeline.dataset.manifest import MANIFEST_ENDINGS, open_manifest
from pipeline.dataset.notices import notices
from pipeline.dataset.split import Split, assign, few_groups, groups
from pipeline.dataset.unlabelled import open_images

logger = logging.getLogger(__name__)

__all__ = [
    "Dataset",
    "Source",
    "Split",
    "assign",
    "few_groups",
    "groups",
    "identical_images",
    "is_known",
    "limit",
    "notices",
    "of_files",
    "open_dataset",
    "open_images",
]

_ARCHIVES = {published.name: published for published in (CIFAR10, CIFAR100)}
_MOST_BESIDE = 1_000  # file names compared with a mistyped one; a folder may hold millions
_KNOWN = ("digits", *_ARCHIVES)
_OTHERWISE = f"a folder of class folders, or a manifest ({', '.join(MANIFEST_ENDINGS)})"


def is_known(name: str) -> bool:
    """Return whether `name` is the name of a built-in dataset, not a path."""
    return name in _KNOWN


def open_dataset(
    name: str,
    *,
    downloads: Path,
    archive: Path | None = None,
    image_root: Path | None = None,
    progress: Progress = silent,
) -> Dataset:
    """Return the dataset called `name` as a list of images; no image file is read. Its `notices` are logged.

    The name of a built-in dataset takes precedence over a folder of that name, and a warning says so. Name the folder
    as "./digits".

    Parameters
    ----------
    name
        "digits", "cifar10", "cifar100", or the path of a folder or manifest.
    downloads
        The folder where downloaded archives are kept; created when first needed.
    progress
        Shows the progress of a download.
    archive
        The published CIFAR tarball, if it is already on this machine, in place of a download.
    image_root
        The folder that the paths of a manifest start from and may not leave. By default the manifest's own folder.

    Raises
    ------
    DatasetError
        If there is no such dataset, or it cannot be listed.
    UsageError
        If `archive` is given with a dataset other than CIFAR, or `image_root` without a manifest.
    """
    found = _open(name, downloads, archive, image_root, progress)
    for text in notices(found):
        logger.warning("%s", text)
    return found


def _open(name: str, downloads: Path, archive: Path | None, image_root: Path | None, progress: Progress) -> Dataset:
    known = is_known(name)
    if known and Path(name).is_dir():
        logger.warning("%s is the published dataset; the folder of that name here is ./%s", name, name)
    if image_root is not None and (known or Path(name).suffix.lower() not in MANIFEST_ENDINGS):
        raise UsageError(f"--image-root goes with a manifest only, found it with {name!r}")
    if name in _ARCHIVES:
        return open_cifar(_ARCHIVES[name], downloads=downloads, archive=archive, progress=progress)
    if archive is not None:
        raise UsageError(f"--archive goes with {' and '.join(_ARCHIVES)} only, found it with {name!r}")
    if name == "digits":
        return open_digits()
    return _open_path(name, image_root)


def _open_path(name: str, image_root: Path | None) -> Dataset:
    path = machine.expand_home(name)
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:  # the name is too long, or a parent folder may not be entered
        raise DatasetError(f"cannot look at {name!r}: {error.strerror or error}") from error
    if not name or not exists:
        raise DatasetError(_unknown(name))
    if is_folder:
        return open_folder(path)
    if not is_file:  # reading a pipe would block
        raise DatasetError(f"expected {_OTHERWISE}, found {name!r}, which is neither a file nor a folder")
    if path.suffix.lower() in MANIFEST_ENDINGS:
        return open_manifest(path, image_root)
    raise DatasetError(f"expected {_OTHERWISE}, found the file {name!r}: give it the ending of what it is")


def _unknown(name: str) -> str:
    text = f"no dataset {name!r}: known are {', '.join(_KNOWN)}; no such file or folder exists either"
    return text + (did_you_mean(name, [*_KNOWN, *_beside(Path(name))]) or f" (expected {_OTHERWISE})")


def _beside(path: Path) -> list[str]:
    """Return the paths of the files and folders beside `path`, as candidates for the correct spelling."""
    try:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        return [str(each) for each in itertools.islice(beside, _MOST_BESIDE)]
    except OSError:  # the folder may not be listed, so there are no candidates
        return []
