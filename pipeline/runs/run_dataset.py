"""Decide which published runs use the same dataset, by the requested path or by the content of the images."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core import machine
from pipeline.core.errors import RunError
from pipeline.dataset import is_known
from pipeline.dataset.class_names import normalised
from pipeline.runs.run_images import RunImages

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunDataset:
    """The dataset of the run in `folder`; `about` is the run's run.json."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The dataset's name, usually the last part of its path."""
        return str(self.about["dataset"]["name"])

    @property
    def source(self) -> tuple[str, str | None] | None:
        """The dataset's resolved path or known name, and the folder of its images if one was given.

        None for a run of version 0.1.0, which did not store them.
        """
        request = self.about.get("asked")
        if not isinstance(request, Mapping):
            return None
        then = self.about["dataset"]  # it has the path as links were resolved at that time
        now = resolved(request.get("images"))
        return (str(then["path"]), then.get("image_root")) if isinstance(then.get("path"), str) else now

    @property
    def created(self) -> str | None:
        """The time when the run was made, ISO 8601, UTC; None if it is not stored."""
        found = self.about.get("created")
        return found if isinstance(found, str) else None

    @property
    def path(self) -> str | None:
        """The dataset's resolved path or known name; None if it is not stored."""
        return self.source[0] if self.source else None

    @property
    def classes(self) -> frozenset[str]:
        """The names of the classes, in a normalised Unicode form."""
        found = self.about.get("classes")
        return frozenset(normalised(str(name)) for name in found) if isinstance(found, list) else frozenset()

    @cached_property
    def images(self) -> RunImages | None:
        """The images of the run; None if they are not stored, or cannot be read (with a warning)."""
        try:
            return RunImages.read(self.folder)
        except RunError as error:
            logger.warning("%s", error)
            return None

    def is_same(self, other: RunDataset) -> bool:
        """Return whether two runs use the same dataset.

        They do if path and classes are the same, if the content digest is the same, or if they share most of their
        images. A folder that was moved, has grown or has other classes is therefore still the same dataset.
        """
        if self.classes == other.classes and self._same_source(other):
            return True
        content = self.about["dataset"].get("content")
        if content is not None and content == other.about["dataset"].get("content"):
            return True
        return bool(self.images and other.images and self.images.shares_most(other.images))

    def _same_source(self, other: RunDataset) -> bool:
        if self.source is None or other.source is None:  # version 0.1.0 stored only the name
            return self.name == other.name
        return self.source == other.source


def resolved(images: object) -> tuple[str, str | None] | None:
    """Return the path of the dataset in `images` of a run.json, and the folder of its images if one was given.

    Links and ".." are resolved, so that each folder has a single path. A known dataset is returned by its name.
    """
    if not isinstance(images, Mapping) or not isinstance(name := images.get("dataset"), str):
        return None
    root = images.get("image_root")
    path = name if is_known(name) else _real(name)
    return path, _real(root) if isinstance(root, str) else None


def _real(path: str) -> str:
    named = machine.expand_home(path.replace("\0", ""))
    try:
        return os.path.realpath(named)
    except UnicodeEncodeError:  # the file system's encoding lacks a character of the name, so no such file exists
        return os.path.abspath(named)  # noqa: PTH100  like realpath, without access to the file


def distinct(datasets: Sequence[RunDataset]) -> list[RunDataset]:
    """Return the first run of each dataset."""
    found = list[RunDataset]()
    for each in datasets:
        if not any(each.is_same(other) for other in found):
            found.append(each)
    return found


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest end of each path, in whole parts, that no other path has.

    For example, "a/x" and "b/x" stay whole, and "a/y" becomes "y".
    """
    parts = {path: Path(path).parts for path in paths}
    shortest = {path: _shortest(path, parts) for path in parts}
    return [shortest[path] for path in paths]


def _shortest(path: str, parts: Mapping[str, tuple[str, ...]]) -> str:
    mine = parts[path]
    for count in range(1, len(mine) + 1):
        if all(other[-count:] != mine[-count:] for name, other in parts.items() if name != path):
            return os.path.join(*mine[-count:])  # noqa: PTH118  text to show, not a path to open
    return path
