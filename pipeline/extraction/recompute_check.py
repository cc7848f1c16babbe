"""Check the cache against this machine: compute random cached rows again, and compare them."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import numpy as np

from pipeline.backbone import source as networks
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.cache.digests import identify
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import MissingRowsError, SpecError
from pipeline.core.spec import Augmentation
from pipeline.core.units import counted
from pipeline.dataset import Dataset, of_files, open_dataset
from pipeline.extraction.compute import DEFAULT_BATCH_SIZE, batch_of
from pipeline.extraction.feature_choice import version_differences, weights_of
from pipeline.images import augment, decoding
from pipeline.images.loader import Loaded, Loader

logger = logging.getLogger(__name__)

SAME = 0.1  # relative to a row's norm; another way of rounding to bfloat16 changes features by about 0.02


@dataclass(frozen=True)
class RecomputeResult:
    """How much rows that were computed now differ from those in the cache."""

    space: str
    rows: int
    identical: int  # rows that agree in every bit
    max_difference: float  # largest absolute difference of two numbers
    max_relative: float  # largest of all rows: norm of the difference / norm of the cached row

    @property
    def same(self) -> bool:
        """Whether the rows are the same features, apart from rounding."""
        return self.max_relative <= SAME


def recompute(space: FeatureSpace, count: int, workspace: Workspace, dataset: Dataset | None) -> RecomputeResult | None:
    """Compute up to `count` random rows of `space` again and compare them; return None if the space has no row.

    Their images are searched in `dataset`. Without a dataset they are searched among all files that were hashed on this
    machine, and in the embedded digits.

    Raises
    ------
    MissingRowsError
        If none of the images is available.
    SpecError
        If this version cannot compute features of this space.
    WeightsError
        If the weights of the space are not available.
    """
    if not space.totals().rows:
        return None
    if differing := version_differences(space.spec):
        raise SpecError(f"{space.name} was made by another version, with another {', '.join(differing)}")
    sources = [dataset] if dataset is not None else _known_images(workspace)
    drawn = _draw(space, count, sources, workspace)
    if not drawn:
        raise MissingRowsError(
            f"none of the images of {space.name} is at hand; name the dataset they are of by `--dataset`"
        )
    pixels = np.stack([each.pixels for each in drawn])
    batch_size = batch_of(space) or DEFAULT_BATCH_SIZE
    weights = weights_of(space, workspace)
    rows = counted(len(drawn), "row")
    name = networks.label(space.spec, space.provenance.get("network"))
    logger.info("loading TensorFlow and %s to compute %s of %s", name, rows, space.name)
    backbone = FrozenBackbone(space.spec, weights.path, batch_size, network=weights.network)
    fresh = [backbone(pixels[at : at + batch_size])[0] for at in range(0, len(pixels), batch_size)]
    return _compare(space, drawn, np.concatenate(fresh))


def _known_images(workspace: Workspace) -> list[Dataset]:
    known = list(workspace.cache.index.files())
    digits = open_dataset("digits", downloads=workspace.downloads)
    return [*([of_files("files seen before", known)] if known else []), digits]


@dataclass(frozen=True)
class _Drawn:
    """A cached row to compare: key and view, and the pixels of its image in that view."""

    key: bytes
    view: int
    pixels: np.ndarray


def _draw(space: FeatureSpace, count: int, sources: list[Dataset], workspace: Workspace) -> list[_Drawn]:
    """Return up to `count` random rows of `space`, including augmented views, whose images are available."""
    found: dict[tuple[bytes, int], _Drawn] = {}
    recipes = space.recipes()
    for dataset in sources:
        with workspace.progress("identifying images", len(dataset)) as advance:
            identities = identify(dataset, workspace.cache.index, advance, remember=False, read_unseen=False)
        at = {key: i for i, key in enumerate(identities.keys) if key is not None}
        keys = list(at)
        rows = [
            (key, view)
            for view in recipes
            for key, has_row in zip(keys, space.locate(keys, [view] * len(keys)).found, strict=True)
            if has_row
        ]
        random.shuffle(rows)
        how = space.spec.input_size, space.spec.fit, decoding.DEFAULT_MAX_PIXELS
        with Loader(dataset, *how, depth=decoding.depth_of(space.spec.decode)) as loader:
            for key, view in rows:
                if len(found) >= count:
                    break
                image: Loaded = loader(at[key])
                if image.key == key and image.pixels is not None:
                    pixels = _seen(image.pixels, key, view, recipes[view])
                    found[key, view] = _Drawn(key, view, pixels)
    return list(found.values())


def _seen(pixels: np.ndarray, key: bytes, view: int, recipe: Augmentation | None) -> np.ndarray:
    return pixels if recipe is None else augment.warp(pixels, recipe, augment.draws(key, view))


def _compare(space: FeatureSpace, drawn: list[_Drawn], fresh: np.ndarray) -> RecomputeResult:
    located = space.locate([each.key for each in drawn], [each.view for each in drawn])
    space.require(located)
    cached = space.reader("features").read(located)
    flat = (len(drawn), -1)
    identical = int((cached == fresh).reshape(flat).all(axis=1).sum())
    before, after = cached.astype(np.float64).reshape(flat), fresh.astype(np.float64).reshape(flat)
    difference = np.abs(after - before)
    norms = np.maximum(np.linalg.norm(before, axis=1), np.finfo(np.float32).tiny)
    relative = np.linalg.norm(difference, axis=1) / norms
    return RecomputeResult(space.name, len(drawn), identical, float(difference.max()), float(relative.max()))
