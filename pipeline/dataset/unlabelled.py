"""List images without labels, for classification by a run: files, folders, manifests and URLs, in the given order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import machine
from pipeline.core.errors import DatasetError, UsageError
from pipeline.dataset import remote
from pipeline.dataset.base import Dataset, of_files
from pipeline.dataset.folder import images_below
from pipeline.dataset.ignored import ignored_text
from pipeline.dataset.manifest import MANIFEST_ENDINGS, manifest_images
from pipeline.dataset.notices import notices

logger = logging.getLogger(__name__)


def open_images(paths: Sequence[str], image_root: Path | None = None) -> Dataset:
    """Return a dataset of images without labels, all of class "unknown"; no image is read. Ignored files are logged.

    A folder means all images below it, sorted; hidden files, folders of other programs and files without an image
    ending are counted in `ignored`. A manifest means the images in its column `path`; their paths start from
    `image_root`, by default the manifest's own folder. A URL (`https://…`, see `remote`) means one image. Any other
    file is read as an image, whatever its ending.

    Raises
    ------
    DatasetError
        If a path does not exist, a folder has no image, a manifest cannot be read, or a URL is not valid.
    UsageError
        If `image_root` is given without a manifest, or a package that a URL needs is not installed.
    """
    names, files = list[str](), list[str]()
    ignored: Counter[str] = Counter()
    manifests = False
    for text in paths:
        if remote.is_url(text):
            names.append(text)
            files.append(_resolved(text))
            continue
        path = machine.expand_home(text)
        if _is_folder(path, text):
            passed: Counter[str] = Counter()
            found = [str(path / name) for name in sorted(images_below(path, passed))]
            if not found:
                raise DatasetError(
                    f"{text}: expected images in this folder or below, found none "
                    f"(passed over: {ignored_text(passed) or 'nothing'})"
                )
            ignored += passed
            names += found
            files += (str(Path(name).absolute()) for name in found)
        elif path.suffix.lower() in MANIFEST_ENDINGS:
            if not path.is_file():  # reading a pipe would block
                raise DatasetError(f"expected a manifest at {text!r}, found no regular file")
            root, found = manifest_images(path, image_root)
            manifests = True
            names += found
            files += (remote.resolve(name, str(root)) if remote.is_url(name) else str(root / name) for name in found)
        else:
            names.append(text)
            files.append(str(path.absolute()))  # ".." is kept: after a link, it leads to another folder
    if image_root is not None and not manifests:
        raise UsageError("--image-root goes with a manifest only, found it with images and folders")
    listed = of_files("images", files, names, ignored)
    for text in notices(listed):
        logger.warning("%s", text)
    return listed


def _resolved(url: str) -> str:
    remote.require([url])
    try:
        return remote.resolve(url, None)
    except ValueError as error:
        raise DatasetError(f"expected {error}, found {url!r}") from error


def _is_folder(path: Path, text: str) -> bool:
    try:
        if text and (path.exists() or path.is_symlink()):
            return path.is_dir()
    except OSError as error:  # the name is too long, or a parent folder may not be entered
        raise DatasetError(f"cannot look at {text!r}: {error.strerror or error}") from error
    raise DatasetError(f"no image, folder or manifest at {text!r}")
