"""Export a dataset with its cached rows to one HDF5 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.export import Columns, What, export
from pipeline.cache.workspace import Workspace
from pipeline.dataset import Dataset
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.extraction.planning import Quarantined
from pipeline.training.labelled_features import join_features


@dataclass(frozen=True)
class Exported:
    """The result of `cache export`: counts of rows, missing rows, shards and bytes."""

    rows: int
    missing: int  # rows that are not in the cache: NaN in a virtual file; a self-contained file has none
    shards: int  # shards that hold the rows; reading a virtual file opens as many files
    bytes: int
    space: str
    quarantined: list[Quarantined]


def export_dataset(
    dataset: Dataset,
    workspace: Workspace,
    choice: FeatureChoice,
    max_pixels: int,
    out: Path,
    what: What,
    *,
    virtual: bool,
) -> Exported:
    """Write the rows of `dataset` to `out`, in the dataset's order, without the images that cannot be decoded.

    Raises
    ------
    MissingRowsError
        If an image that can be decoded has no row, unless the file is `virtual`.
    CacheError
        If a shard is damaged, or the disk is full.
    """
    labelled = join_features(dataset, workspace, choice, max_pixels, partly=virtual)
    images = labelled.usable.tolist()
    columns = Columns(
        dataset.name,
        labelled.keys,
        [str(dataset.names[i]) for i in images],
        dataset.labels[labelled.usable],
        [str(labelled.split.sides[i]) for i in images],
        dataset.classes,
    )
    size = export(labelled.space, columns, out, what, virtual=virtual)
    located = labelled.space.locate(labelled.keys)
    missing, shards = int((~located.found).sum()), len(np.unique(located.shards[located.found]))
    return Exported(len(images), missing, shards, size, labelled.space.name, labelled.quarantined)
