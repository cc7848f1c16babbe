"""Cached features for programs of your own: as arrays, shuffled batches, a `tf.data.Dataset`, or one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np

from pipeline.cache.workspace import open_workspace
from pipeline.core.errors import DatasetError, MissingFeaturesError, UsageError
from pipeline.core.spec import Augmentation, Views
from pipeline.dataset import few_groups
from pipeline.dataset.split import SPLITS
from pipeline.extraction.feature_choice import FeatureChoice, warn_untrained
from pipeline.images import decoding
from pipeline.runs.request import DatasetChoice
from pipeline.training.batches import Shuffled
from pipeline.training.labelled_features import LabelledFeatures, join_features
from pipeline.training.rows import Rows, RowSelection, load_or_stream, room_for, stored_rows

SplitName = Literal["train", "val", "test"]
What = Literal["features", "pooled"]


def open_features(
    dataset: str | Path = "digits",
    *,
    what: What = "features",
    data_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    limit: int | None = None,
    space: str | None = None,
    layer: str | None = None,
    backbone: str | Path | None = None,
    input_size: int | None = None,
    scaling: str | None = None,
    views: int = 1,
    augment: str = "",
    memory: int | None = None,
    depth: int | None = None,
) -> Features:
    """Open the cached features of a dataset. Computes none.

    Parameters
    ----------
    dataset, image_root, limit
        As `--dataset`, `--image-root` and `--limit` of the command line say it.
    what
        "features", rows of (h, w, c) in the storage type, or "pooled", their spatial means (c,) float32.
    data_dir
        The data directory; by default what ICEBOX_DATA names, else "data" where the program stands.
    space, layer
        A feature space by name, or the layer it is of; by default the space that holds most of the images.
    backbone, input_size, scaling
        The network, as `--backbone`, `--input-size` and `--scaling` say it; by default that of `space`, else
        InceptionV3.
    views, augment
        Views of each training image, the plain one included, and what the others are like, as `--augment` says it.
        Validation and test images come in the plain view only.
    memory
        Bytes that rows may take in memory, by default half of what is free. If all splits together take more, they
        are read from the shards as they are needed; none is read before it is asked for.
    depth
        Bits that images with 16 bits a channel were taken for, as `--depth` says it.

    Raises
    ------
    MissingFeaturesError
        If an image that can be decoded has no row; the text names the command that computes it.
    DatasetError
        If the dataset cannot be listed, or no image of it can be decoded.
    """
    root = Path(data_dir or os.environ.get("ICEBOX_DATA") or "data")
    wanted = Views(views, Augmentation.parse(augment))
    if what not in ("features", "pooled"):
        raise UsageError(f'what must be "features" or "pooled", found {what!r:.60}')
    choice = DatasetChoice(str(dataset), image_root=image_root and str(image_root), limit=limit)
    stated: dict[str, Any] = {
        "dataset": str(dataset),
        "backbone": backbone,
        "input_size": input_size,
        "scaling": scaling,
        "layer": layer,
        "depth": depth,
    }
    stated |= {"views": views if views > 1 else None, "augment": augment or None}
    with ExitStack() as stack:
        workspace = stack.enter_context(open_workspace(root))
        name = None if backbone is None else str(backbone)
        chosen = FeatureChoice(
            space=space, layer=layer, depth=depth, backbone=name, input_size=input_size, scaling=scaling
        )
        limits = decoding.DEFAULT_MAX_PIXELS
        try:
            labelled = join_features(choice.open(workspace), workspace, chosen, limits, views=wanted)
        except MissingFeaturesError as error:
            error.options = (
                {"dataset": str(dataset), **{key: each for key, each in stated.items() if each is not None}},
            )
            raise
        stack.enter_context(labelled.space.reading())
        warn_untrained(labelled.space.spec)
        features = Features(labelled, what, memory)
        features.on_close(stack.pop_all())
        return features


class Features:
    """The cached rows of a dataset, split. `cache gc` waits until it is closed; a `with` statement does that."""

    def __init__(self, labelled: LabelledFeatures, what: What, memory: int | None) -> None:
        self._material = labelled
        self._closing = ExitStack()
        numbers = {"train": labelled.views.numbers}
        wanted = {side: RowSelection(labelled.members(side), numbers.get(side, (0,))) for side in SPLITS}
        self._wanted = {side: each for side, each in wanted.items() if len(each.at)}
        stored = stored_rows(labelled.space, labelled.keys, what, list(self._wanted.values()))
        self._stored = dict(zip(self._wanted, stored, strict=True))
        self._room = room_for(stored, memory=memory)
        self._opened = cache(self._open)  # of this object alone, so it goes with it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the cache. Rows in memory stay usable."""
        self._closing.close()

    def on_close(self, stack: ExitStack) -> None:
        """Have `stack` closed by `close`."""
        self._closing.enter_context(stack)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted; a label is an index into them."""
        return self._material.dataset.classes

    @property
    def space(self) -> str:
        """The name of the feature space."""
        return self._material.space.name

    def names(self, split: SplitName = "train") -> list[str]:
        """Return what the image of each row of `split` is called."""
        names, wanted = self._material.dataset.names, self._request(split)
        return [names[int(i)] for i in self._material.usable[wanted.at]] * len(wanted.views)

    def arrays(self, split: SplitName = "train") -> tuple[np.ndarray, np.ndarray]:
        """Return all rows of `split` in memory, (n, …), and their labels (n,) int32."""
        rows, labels = self._opened(split)
        return rows if isinstance(rows, np.ndarray) else rows[np.arange(len(rows))], labels

    def batches(
        self, split: SplitName = "train", size: int = 64, *, epoch: int = 1, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each row of `split` once, in batches (size, …) with labels (size,), the last one perhaps smaller.

        Seed and epoch decide the order. What does not fit memory is read ahead in large pieces, and shuffled
        within a window as large as the memory allows.
        """
        return self._shuffled(split, size, seed).epoch(epoch)

    def tf_dataset(self, split: SplitName = "train", size: int = 64, *, seed: int = 0) -> Any:
        """Return a `tf.data.Dataset` of batches as `batches` yields them, in a new order each time it is gone through.

        Rows are (None, …), labels (None,) int32.
        """
        from pipeline.backbone.keras_start import import_keras

        import_keras(whole=True)  # quietly, and with GPU memory that grows as needed
        import tensorflow as tf

        shuffled, epoch = self._shuffled(split, size, seed), 0

        def following() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal epoch
            epoch += 1
            return shuffled.epoch(epoch)

        rows, labels = shuffled.rows, shuffled.labels
        row_type = cast(np.ndarray, rows[np.arange(1)]).dtype
        signature = (tf.TensorSpec((None, *rows.shape[1:]), row_type), tf.TensorSpec((None,), labels.dtype))
        made = tf.data.Dataset.from_generator(following, output_signature=signature)
        return made.apply(tf.data.experimental.assert_cardinality(len(shuffled))).prefetch(2)

    def items(self, split: SplitName = "train") -> Items:
        """Return the rows of `split` one by one: an object that PyTorch's DataLoader takes as a dataset."""
        return Items(*self._opened(split))

    def _request(self, split: SplitName) -> RowSelection:
        if split not in SPLITS:
            raise UsageError(f"split must be one of {', '.join(SPLITS)}, found {split!r:.60}")
        if split not in self._wanted:
            images = self._material.dataset
            cause = few_groups(images)
            raise DatasetError(f"no images in the {split} split of {images.name}{f'; {cause}' if cause else ''}")
        return self._wanted[split]

    def _open(self, split: SplitName) -> tuple[Rows, np.ndarray]:
        wanted = self._request(split)
        labels = np.tile(self._material.labels(wanted.at), len(wanted.views)).astype(np.int32)
        return load_or_stream(self._stored[split], self._room), labels

    def _shuffled(self, split: SplitName, size: int, seed: int) -> Shuffled:
        if size < 1:
            raise UsageError(f"the size of a batch must be at least 1, found {size}")
        rows, labels = self._opened(split)
        return Shuffled(rows, labels, size, seed)


class Items:
    """n pairs (row, label) by index, row (…) as stored, label int. May be pickled, and used by many processes."""

    def __init__(self, rows: Rows, labels: np.ndarray) -> None:
        self._rows = rows
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} is not one of {len(self)} rows")
        return self.__getitems__([i % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, int]]:
        """Return several at once, each shard being opened once: DataLoader asks for its batches by this."""
        rows = self._rows[np.asarray(indices)]
        return [(row, int(label)) for row, label in zip(rows, self._labels[indices], strict=True)]
