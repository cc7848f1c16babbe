"""What it takes to compute and to keep the rows that a dataset lacks, measured on some of its own images."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from pipeline import machine
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
from pipeline.backbone.weights import Weights, find_by_identity, find_imagenet, resolve
from pipeline.cache.shard import Rows, shard_image
from pipeline.cache.space import FeatureSpace
from pipeline.compute import batch_of, default_batch
from pipeline.decoder import Loader
from pipeline.extract import FeatureChoice, new_spec
from pipeline.images import depth_of
from pipeline.planning import Plan, Planning
from pipeline.workspace import Workspace

_UNIT = 1024 if sys.platform.startswith("linux") else 1  # of what the system says of a process's memory


@dataclass(frozen=True)
class Cost:
    """Of the rows that are missing: seconds, bytes on disk; and the most memory that the process took to measure it.

    `weights` are those it was measured with: untrained ones are as fast as others, but their rows are larger.
    """

    seconds: float
    bytes: int
    memory: int
    images_per_second: float
    bytes_per_row: int
    weights: str


def measure(
    planning: Planning, plan: Plan, space: FeatureSpace | None, choice: FeatureChoice, workspace: Workspace
) -> Cost | None:
    """Run the network on some of the images that lack rows, for some seconds; None if none of them can be decoded.

    Nothing is downloaded: without weights at hand, untrained ones stand in.
    """
    weights = _at_hand(space, choice, workspace)
    spec = replace(space.spec if space else new_spec(choice, weights), weights=weights.identity)
    batch = batch_of(space) or default_batch()
    how = spec.input_size, spec.fit, planning.max_pixels
    with Loader(planning.dataset, *how, depth=depth_of(spec.decode)) as loader:
        loaded = map(loader, plan.todo.distinct.tolist())
        pixels = list(islice((image.pixels for image in loaded if image.pixels is not None), batch))
    if not pixels:
        return None
    model = FrozenBackbone(spec, weights.path, batch, machine.usable_cores())
    features, pooled = model(np.stack(pixels))
    keys, views = np.zeros((len(pixels), 32), np.uint8), np.zeros(len(pixels), np.int64)
    row = math.ceil(len(shard_image(Rows(features, pooled, keys, views), spec)) / len(pixels))
    rate = model.rate()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return Cost(plan.missing / rate, plan.missing * row, memory, rate, row, weights.label)


def _at_hand(space: FeatureSpace | None, choice: FeatureChoice, workspace: Workspace) -> Weights:
    """Return the weights that would be used, if they are on this machine, else untrained ones."""
    backbone, index = BACKBONES[DEFAULT_BACKBONE], workspace.cache.index
    if space is not None and (found := find_by_identity(space.spec.weights, backbone.name, workspace.downloads, index)):
        return found
    wanted = choice.weights
    if space is not None or (wanted in ("auto", "imagenet") and find_imagenet(backbone, workspace.downloads) is None):
        wanted = "untrained"
    return resolve(wanted, backbone.name, workspace.downloads, index, offline=True)
