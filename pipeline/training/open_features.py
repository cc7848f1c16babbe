"""Open cached features from your own program: as arrays, shuffled batches, a `tf.data.Dataset`, or single rows."""

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
        As `--dataset`, `--image-root` and `--limit` on the command line.
    what
        "features", rows of (h, w, c) in the storage type, or "pooled", their spatial means (c,) float32.
    data_dir
        The data directory; by default the value of ICEBOX_DATA, else "data" in the current directory.
    space, layer
        The name of a feature space, or the layer of one; by default the space that holds most of the images.
    backbone, input_size, scaling
        The network, as `--backbone`, `--input-size` and `--scaling`; by default that of `space`, else InceptionV3.
    views, augment
        The number of views of each training image, the plain view included, and the augmentation of the others, as
        `--augment`. Validation and test images have the plain view only.
    memory
        Bytes that rows may take in memory; by default half of the free memory. If all splits together take more,
        rows are read from the shards when needed. No split is read before it is used.
    depth
        Bits of each channel that were used of 16-bit images, as `--depth`.

    Raises
    ------
    MissingFeaturesError
        If an image that can be decoded has no row; the message names the command that computes it.
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
    """The cached rows of a dataset, by split. Close it, or use `with`: `cache gc` waits until it is closed."""

    def __init__(self, labelled: LabelledFeatures, what: What, memory: int | None) -> None:
        self._material = labelled
        self._closing = ExitStack()
        numbers = {"train": labelled.views.numbers}
        wanted = {side: RowSelection(labelled.members(side), numbers.get(side, (0,))) for side in SPLITS}
        self._wanted = {side: each for side, each in wanted.items() if len(each.at)}
        stored = stored_rows(labelled.space, labelled.keys, what, list(self._wanted.values()))
        self._stored = dict(zip(self._wanted, stored, strict=True))
        self._room = room_for(stored, memory=memory)
        self._opened = cache(self._open)  # a cache for each object, so that rows are freed with it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the cache, so that `cache gc` can run. Rows in memory stay usable."""
        self._closing.close()

    def on_close(self, stack: ExitStack) -> None:
        """Make `close` close `stack` too."""
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
        """Return the image name of each row of `split`."""
        names, wanted = self._material.dataset.names, self._request(split)
        return [names[int(i)] for i in self._material.usable[wanted.at]] * len(wanted.views)

    def arrays(self, split: SplitName = "train") -> tuple[np.ndarray, np.ndarray]:
        """Return all rows of `split` as an array (n, …), and their labels (n,) int32."""
        rows, labels = self._opened(split)
        return rows if isinstance(rows, np.ndarray) else rows[np.arange(len(rows))], labels

    def batches(
        self, split: SplitName = "train", size: int = 64, *, epoch: int = 1, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each row of `split` once, in batches (size, …) with labels (size,); the last batch may be smaller.

        Seed and epoch decide the order. Rows that do not fit into memory are read ahead in large pieces, and shuffled
        within a window as large as the memory allows.
        """
        return self._shuffled(split, size, seed).epoch(epoch)

    def tf_dataset(self, split: SplitName = "train", size: int = 64, *, seed: int = 0) -> Any:
        """Return a `tf.data.Dataset` of the batches of `batches`, in a new order in each iteration.

        Rows have the shape (None, …), labels (None,) int32.
        """
        from pipeline.backbone.keras_start import import_keras

        import_keras(whole=True)  # before TensorFlow: sets its log level, and GPU memory that grows as needed
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
        """Return the rows of `split` as a map-style dataset for PyTorch's DataLoader."""
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
    """A sequence of n pairs (row, label): row (…) as stored, label int. Can be pickled, and used in many processes."""

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
        """Return several pairs, opening each shard once. DataLoader fetches its batches by this method."""
        rows = self._rows[np.asarray(indices)]
        return [(row, int(label)) for row, label in zip(rows, self._labels[indices], strict=True)]
