"""Explain for each image of a dataset whether its features would be computed, and why: `cache explain`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.backbone.source import label
from pipeline.cache.digests import Identities, identify
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import UsageError
from pipeline.core.spec import PLAIN_VIEW, Views
from pipeline.dataset import Dataset
from pipeline.extraction.feature_choice import FeatureChoice, find_space, resolve_choice
from pipeline.extraction.planning import Plan, Planning

State = Literal["cached", "copy", "quarantined", "bad shard", "other space", "changed", "new"]


@dataclass(frozen=True)
class ImageExplained:
    """An image: its name in the dataset, its state, and the reason for it, "" if it is cached."""

    path: str
    state: State
    why: str


@dataclass(frozen=True)
class SpaceExplained:
    """A space on disk: how many rows of the dataset it has, and in which fields it differs from the requested one.

    `differs` has for each such field the requested value ("asked") and that of the space ("found"). `backbone` is the
    name of its network in messages.
    """

    space: str
    backbone: str
    rows: int
    chosen: bool
    differs: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Explanation:
    """What `features` would do with a dataset, and why: the result of `explain`."""

    space: str | None  # None: a new space would be created
    backbone: str  # name of the requested network in messages
    images: list[ImageExplained]
    spaces: list[SpaceExplained]

    @property
    def counts(self) -> dict[str, int]:
        """The number of images in each state."""
        return dict(Counter(image.state for image in self.images).most_common())


def explain(
    dataset: Dataset, workspace: Workspace, choice: FeatureChoice, max_pixels: int, views: Views = PLAIN_VIEW
) -> Explanation:
    """Return for each image of `dataset` whether it has its rows, in all `views`, and if not, why.

    Nothing on disk changes.

    Raises
    ------
    IceboxError
        If the stated weights or the stated space are not available.
    """
    index = workspace.cache.index
    before = _digests_before(dataset, workspace)
    with workspace.progress("identifying images", len(dataset)) as advance:
        identities = identify(dataset, index, advance, remember=False, read_unseen=False)
    resolved = resolve_choice(workspace, choice)
    space = find_space(workspace, resolved, identities, views)
    plan = Planning(dataset, identities, index, max_pixels, views).plan(space)
    request = resolved.request()
    keys = [key for key in dict.fromkeys(identities.keys) if key is not None]
    on_disk = workspace.cache.spaces()
    spaces = []
    for each in on_disk:
        pairs = {
            name: {"asked": getattr(request, name), "found": getattr(each.spec, name)}
            for name in request.differences(each.spec)
        }
        chosen = space is not None and each.name == space.name
        rows = sum(int(each.locate(keys, [view] * len(keys)).found.sum()) for view in views.numbers)
        spaces.append(SpaceExplained(each.name, label(each.spec, each.provenance.get("network")), rows, chosen, pairs))
    reasons = _Reasons(identities, plan, space, on_disk, before)
    images = [ImageExplained(dataset.names[i], *reasons.of(i)) for i in range(len(dataset))]
    return Explanation(space.name if space else None, resolved.source.label, images, spaces)


def _digests_before(dataset: Dataset, workspace: Workspace) -> list[bytes | None]:
    """Return for each image the digest that the index has stored for its file or address, or None."""
    index, before = workspace.cache.index, list[bytes | None]([None] * len(dataset))
    files = {i: path.absolute() for i in range(len(dataset)) if (path := dataset.path(i)) is not None}
    urls = {i: url for i in range(len(dataset)) if (url := dataset.url(i)) is not None}
    remembered = (*index.file_digests(files.values()), *index.url_digests(urls.values()))
    for i, known in zip((*files, *urls), remembered, strict=True):
        before[i] = known[1] if known else None
    return before


def select_images(images: Sequence[ImageExplained], dataset: Dataset, wanted: Sequence[str]) -> list[ImageExplained]:
    """Return those of `images` that `wanted` names: by names in the dataset, or by paths on disk.

    Raises
    ------
    UsageError
        If a name is not in the dataset.
    """
    named: dict[str, list[int]] = {}
    for i, name in enumerate(dataset.names):
        path = dataset.path(i)
        for known in {name, *([os.path.normpath(path)] if path else [])}:
            named.setdefault(known, []).append(i)
    found: list[ImageExplained] = []
    for each in wanted:
        at = named.get(each) or named.get(os.path.normpath(Path.cwd() / each))
        if at is None:
            raise UsageError(f"{each} is not an image of {dataset.name}; its first is {dataset.names[0]}")
        found.extend(images[i] for i in at)
    return found


_UNSEEN = "it has not been fetched before"


class _Reasons:
    """Finds the state and reason of each image, with one look-up in the index for all images."""

    def __init__(
        self,
        identities: Identities,
        plan: Plan,
        space: FeatureSpace | None,
        spaces: Sequence[FeatureSpace],
        before: Sequence[bytes | None],
    ) -> None:
        self._keys = identities.keys
        self._unseen = identities.unseen
        self._plan = plan
        self._before = before
        self._space = space
        todo = zip(plan.todo.images.tolist(), plan.todo.views.tolist(), strict=True)
        rows = [(key, view) for i, view in todo if (key := identities.keys[i])]
        missing, views = [key for key, _ in rows], [view for _, view in rows]
        self._missing = set(missing)
        # `find_space` counts lost rows too, so the rows of damaged shards are in the space that it chose.
        self._lost = space.index.lost(space.name, missing, views) if space else {}
        self._elsewhere: dict[bytes, list[str]] = {}
        for each in spaces:
            found = each.locate(missing, views).found
            for key in {key for key, has_row in zip(missing, found, strict=True) if has_row}:
                self._elsewhere.setdefault(key, []).append(each.name)
        self._first = {key: i for i, key in reversed(list(enumerate(identities.keys))) if key is not None}

    def of(self, i: int) -> tuple[State, str]:
        """Return the state and the reason of image `i`."""
        key = self._keys[i]
        if i in self._plan.quarantined:
            reason, since = self._plan.quarantined[i]
            return "quarantined", f"{reason}{f', since {since}' if since else ''}"
        if i in self._unseen:
            return ("changed", "its server has another one than before") if self._before[i] else ("new", _UNSEEN)
        if key is None or key not in self._missing:
            first = self._first.get(key or b"", i)
            return ("cached", "") if first == i else ("copy", "its bytes are those of an image before it")
        return self._missing_because(i, key)

    def _missing_because(self, i: int, key: bytes) -> tuple[State, str]:
        lacking = self._plan.todo.views_of(self._first[key])
        if key in self._lost:
            return "bad shard", f"its row was in shard {self._lost[key]}"
        if key in self._elsewhere:
            return "other space", f"it has a row in {', '.join(self._elsewhere[key])}"
        if self._before[i] not in (None, key):
            return "changed", "the bytes of the file are others than before"
        if 0 not in lacking:
            return "new", f"{len(lacking)} of its augmented views have not been computed before"
        return "new", "its bytes have not been computed before"
