"""Images of no known class, to be judged by a run: files, whole folders, manifests, in the order they are named."""

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
    """List images whose class is not known, all as class "unknown"; none is read. What is passed over is logged.

    A folder stands for the images anywhere below it, sorted; hidden ones, folders of
    other programs and other files are counted in `ignored`.
    A manifest stands for those in its column `path`, which start from `image_root` or its own folder. An address
    (`https://…`, see `remote`) stands for one image. Any other file is taken for an image, whatever its ending.

    Raises
    ------
    DatasetError
        If there is nothing at a path, a folder holds no image, a manifest cannot be read, or an address is none.
    UsageError
        If `image_root` is given without a manifest, or a package is not there that an address needs.
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
            if not path.is_file():  # a pipe would be waited for
                raise DatasetError(f"expected a manifest at {text!r}, found no regular file")
            root, found = manifest_images(path, image_root)
            manifests = True
            names += found
            files += (remote.resolve(name, str(root)) if remote.is_url(name) else str(root / name) for name in found)
        else:
            names.append(text)
            files.append(str(path.absolute()))  # nothing is folded: what follows a link may be elsewhere
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
    except OSError as error:  # a name too long, a parent that may not be entered
        raise DatasetError(f"cannot look at {text!r}: {error.strerror or error}") from error
    raise DatasetError(f"no image, folder or manifest at {text!r}")
