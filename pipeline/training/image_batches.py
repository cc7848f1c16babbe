"""Read images as training data: decoded each time they are needed, augmented anew in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pipeline.core.errors import DatasetError
from pipeline.core.spec import Augmentation
from pipeline.dataset import Dataset
from pipeline.images import augment
from pipeline.images.decoding import FULL_DEPTH
from pipeline.images.loader import Loaded, Loader, decoding_pool


class ImageDecoder:
    """Decoder of a dataset's images, with a pool of threads.

    `usable` (m,) are the indices of the images that can be decoded; `keys` (m, of 32 bytes) are their expected keys.
    """

    def __init__(self, dataset: Dataset, keys: Sequence[bytes], usable: np.ndarray, loader: Loader, size: int) -> None:
        self.dataset = dataset
        self.keys = keys
        self.usable = usable
        self.loader = loader
        self.size = size
        self.pool = decoding_pool()


@contextmanager
def open_decoder(
    dataset: Dataset,
    keys: Sequence[bytes],
    usable: np.ndarray,
    size: int,
    fit: str,
    max_pixels: int,
    depth: int = FULL_DEPTH,
) -> Iterator[ImageDecoder]:
    """Yield a decoder of the images `usable` of a dataset; its threads and processes end with the context."""
    with Loader(dataset, size, fit, max_pixels, depth=depth) as loader:
        found = ImageDecoder(dataset, keys, usable, loader, size)
        try:
            yield found
        finally:
            found.pool.shutdown(cancel_futures=True)


class ImageRows:
    """Images as `Rows`: indexing decodes them to (n, size, size, 3) uint8 RGB.

    With a `recipe` each image is augmented; its key and `draw` decide the random numbers.
    """

    def __init__(
        self, decoding: ImageDecoder, at: np.ndarray, recipe: Augmentation | None = None, draw: int | None = None
    ) -> None:
        self._decoding = decoding
        self._at = at
        self._recipe = recipe
        self._draw = draw
        self.shape = (len(at), decoding.size, decoding.size, 3)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices`. Raises DatasetError if a file has changed or can no longer be decoded."""
        at, decoding = self._at[indices], self._decoding
        wanted = decoding.usable[at].tolist()
        members = dict(zip(wanted, at.tolist(), strict=True))

        def seen(loaded: Loaded) -> tuple[int, np.ndarray]:
            return loaded.i, self._seen(loaded, members[loaded.i])

        found = dict(decoding.loader.stream(decoding.pool, wanted, seen, ahead=len(wanted)))
        return np.stack([found[i] for i in wanted])

    def augmented(self, recipe: Augmentation, seed: int, epoch: int) -> ImageRows:
        """Return the same images, augmented as in epoch `epoch` of a training with `seed`."""
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        return ImageRows(self._decoding, self._at, recipe, int.from_bytes(digest[:8], "big"))

    def _seen(self, loaded: Loaded, member: int) -> np.ndarray:
        decoding, name = self._decoding, self._decoding.dataset.names[loaded.i]
        if loaded.pixels is None:
            raise DatasetError(f"{name}: {loaded.reason}, and could be decoded before; mend it")
        if loaded.key is None or loaded.key != decoding.keys[member]:
            raise DatasetError(f"{name} was changed while the training ran; run it again")
        if self._recipe is None or self._draw is None:
            return loaded.pixels
        return augment.warp(loaded.pixels, self._recipe, augment.draws(loaded.key, self._draw))
