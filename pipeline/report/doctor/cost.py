"""Measure the cost of computing and storing the missing rows of a dataset, on some of its own images."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from pipeline.backbone import source as networks
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.backbone.table import BACKBONES
from pipeline.backbone.weights import Weights, find_imagenet
from pipeline.cache.shard import SHARD_BYTES, Rows, shard_image
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.spec import OWN
from pipeline.extraction.compute import batch_of, default_batch
from pipeline.extraction.feature_choice import ResolvedChoice, weights_of
from pipeline.extraction.planning import Plan, Planning
from pipeline.images.decoding import depth_of
from pipeline.images.loader import Loader

_UNIT = 1024 if sys.platform.startswith("linux") else 1  # bytes in the unit of `ru_maxrss`


@dataclass(frozen=True)
class Cost:
    """The cost of the missing rows: `seconds` to compute them, and `bytes` on disk.

    `memory` is the peak memory of this process in bytes, after the measurement. `row_shape` is the shape of one image's
    features. `weights` are those used to measure: untrained weights are as fast as others, but their rows are larger on
    disk.
    """

    seconds: float
    bytes: int
    memory: int
    images_per_second: float
    bytes_per_row: int
    weights: str
    row_shape: tuple[int, ...]


def measure(
    planning: Planning, plan: Plan, space: FeatureSpace | None, resolved: ResolvedChoice, workspace: Workspace
) -> Cost | None:
    """Run the network for some seconds on images with missing rows; return None if none of them can be decoded.

    Nothing is downloaded: if the weights are not on this machine, untrained ones replace them.
    """
    weights = _at_hand(space, resolved, workspace)
    spec = replace(space.spec if space else resolved.new_spec(weights), weights=weights.identity)
    batch = batch_of(space) or default_batch()
    how = spec.input_size, spec.fit, planning.max_pixels
    with Loader(planning.dataset, *how, depth=depth_of(spec.decode)) as loader:
        loaded = map(loader, plan.todo.distinct.tolist())
        pixels = list(islice((image.pixels for image in loaded if image.pixels is not None), batch))
    if not pixels:
        return None
    # Features of untrained weights may exceed float16. They are clipped, so that the cost can still be measured.
    exact, most = replace(spec, storage="float32"), np.finfo(spec.storage).max
    model = FrozenBackbone(exact, weights.path, batch, machine.usable_cores(), weights.network)
    if batch_of(space) is None:
        model.bound_batch(SHARD_BYTES)
    pixels = pixels[: model.batch_size]
    features, pooled = model(np.stack(pixels))
    features = np.clip(features, -most, most).astype(spec.storage)
    keys, views = np.zeros((len(pixels), 32), np.uint8), np.zeros(len(pixels), np.int64)
    row = math.ceil(len(shard_image(Rows(features, pooled, keys, views), spec)) / len(pixels))
    rate = model.rate()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return Cost(plan.missing / rate, plan.missing * row, memory, rate, row, weights.label, model.row_shape)


def _at_hand(space: FeatureSpace | None, resolved: ResolvedChoice, workspace: Workspace) -> Weights:
    """Return the weights that `features` would use if they are on this machine, else untrained weights."""
    source, stated = resolved.source, resolved.weights
    if source.name.startswith(OWN):
        return stated or (weights_of(space, workspace) if space else networks.resolve(source, "auto", workspace))
    found: Weights | None = None
    if space is not None:
        found = networks.find(space.spec, None, workspace)
    elif stated is not None and (stated.path or stated.kind == "untrained"):
        found = stated
    elif stated is None and find_imagenet(BACKBONES[source.name], workspace.downloads):
        found = networks.resolve(source, "imagenet", workspace)
    return found or networks.resolve(source, "untrained", workspace)
