"""Yield shuffled batches of rows, in an order that depends only on the seed and the epoch's number.

Rows in memory are shuffled as a whole. Rows on disk are shuffled in blocks: adjacent rows are read together,
blocks from the whole dataset fill a window as large as the memory allows, and the rows of a window are shuffled.
So each epoch reads each shard a few times, in large pieces, and a batch still mixes rows of the whole dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import DoNotFitError
from pipeline.training.rows import Rows, StoredRows, read_ahead, read_ahead_in_place

_BLOCK = 32  # adjacent rows in a block; fewer in a small window, so that it still holds many blocks
_BLOCKS_IN_WINDOW = 16


@dataclass(frozen=True)
class Shuffled:
    """Batches of `size` rows and their labels (n,) int; the last batch of an epoch may be smaller.

    `fresh`, if given, takes the rows and the epoch's number, and returns the rows of that epoch.
    Raises DoNotFitError if streamed rows have too little memory for a batch.
    """

    rows: Rows
    labels: np.ndarray
    size: int
    seed: int
    fresh: Callable[[Rows, int], Rows] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, StoredRows) and self.rows.rows_at_once < self.size:
            least = self.rows.least_room(self.size)
            raise DoNotFitError(
                f"to stream batches of {self.size:,} rows, --memory must hold {least:,} bytes, found "
                f"{self.rows.room:,}: allow more, or take a smaller --batch-size"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self.rows) // self.size)

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the batches of epoch `number`: each row once."""
        random = np.random.default_rng([self.seed, number])
        rows = self.rows if self.fresh is None else self.fresh(self.rows, number)
        batches = self._streamed(rows, random) if isinstance(rows, StoredRows) else self._held(rows, random)
        yield from ((some, self.labels[at]) for some, at in batches)

    def _held(self, rows: Rows, random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        parts = _parts(random.permutation(len(rows)), self.size)
        yield from zip(read_ahead(rows, parts), parts, strict=True)

    def _streamed(self, rows: StoredRows, random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        stored = rows.as_stored()
        window = self.size * (rows.rows_at_once // self.size)
        windows = _parts(block_order(stored, window, random), window)
        rank = np.argsort(stored)  # of each row, its position in the order on disk
        sorts = [np.argsort(rank[at]) for at in windows]
        ahead = read_ahead_in_place(rows, [at[sort] for at, sort in zip(windows, sorts, strict=True)])
        for at, sort, read in zip(windows, sorts, ahead, strict=True):
            places = np.argsort(sort)  # where `read`, which is in the order on disk, has each row of the window
            for some, these in zip(_parts(places, self.size), _parts(at, self.size), strict=True):
                yield read[some], these


def _parts(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def block_order(stored: np.ndarray, window: int, random: np.random.Generator) -> np.ndarray:
    """Return the indices `stored`, given in their order on disk, block-shuffled for windows of `window` rows."""
    block = max(1, min(_BLOCK, window // _BLOCKS_IN_WINDOW))
    starts = random.permutation(np.arange(0, len(stored), block))
    order = np.concatenate([stored[start : start + block] for start in starts])
    for start in range(0, len(order), window):
        random.shuffle(order[start : start + window])
    return order
