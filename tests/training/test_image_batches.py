"""Images as training data: decoded as they are, warped afresh each epoch, refused once they changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_picture

from pipeline.core.errors import DatasetError
from pipeline.core.hashing import image_key
from pipeline.core.spec import Augmentation
from pipeline.dataset import open_dataset
from pipeline.images import decoding as images
from pipeline.training.batches import Shuffled
from pipeline.training.image_batches import ImageDecoder, ImageRows, open_decoder
from pipeline.training.rows import read_ahead, select

SIZE = 32


@pytest.fixture
def source(photos: Path) -> Iterator[ImageDecoder]:
    dataset = open_dataset(str(photos), downloads=photos)
    usable = np.arange(len(dataset))[::-1]
    keys = [image_key(dataset.read(int(i))) for i in usable]
    with open_decoder(dataset, keys, usable, SIZE, "squash", images.DEFAULT_MAX_PIXELS) as found:
        yield found


def plain(source: ImageDecoder, members: list[int]) -> np.ndarray:
    return np.stack([images.decode(source.dataset.read(int(source.usable[i])), size=SIZE) for i in members])


def test_they_are_decoded_as_everywhere_else(source: ImageDecoder) -> None:
    pixels = ImageRows(source, np.array([7, 2, 2, 11]))
    assert pixels.shape == (4, SIZE, SIZE, 3)
    assert np.array_equal(pixels[np.array([3, 0, 1])], plain(source, [11, 7, 2]))
    parts = [np.array([0, 1]), np.array([3])]
    ahead = list(read_ahead(pixels, parts))
    assert np.array_equal(np.concatenate(ahead), plain(source, [7, 2, 11]))
    assert np.array_equal(next(iter(read_ahead(select(pixels, np.array([2, 3])), parts[:1]))), plain(source, [2, 11]))


def test_each_epoch_shows_them_otherwise_and_every_time_the_same(source: ImageDecoder) -> None:
    pixels, at = ImageRows(source, np.arange(6)), np.arange(6)
    recipe = Augmentation()
    first, again = (pixels.augmented(recipe, 3, 1)[at] for _ in range(2))
    assert np.array_equal(first, again)
    for other in (pixels.augmented(recipe, 3, 2), pixels.augmented(recipe, 4, 1), pixels):
        different = (other[at] != first).reshape(6, -1).any(axis=1)
        assert different.all(), "each image by itself"
    assert np.array_equal(pixels[at], plain(source, list(range(6)))), "what is plain stays so"


def test_batches_are_those_of_the_epochs_images(source: ImageDecoder) -> None:
    recipe, labels = Augmentation(), np.arange(12)
    pixels = ImageRows(source, np.arange(12))
    batches = Shuffled(pixels, labels, 5, 1, lambda rows, epoch: pixels.augmented(recipe, 1, epoch))
    for epoch in (1, 2):
        found = list(batches.epoch(epoch))
        assert [len(some) for some, _ in found] == [5, 5, 2]
        order = np.concatenate([some for _, some in found])
        assert sorted(order) == list(range(12))
        assert np.array_equal(np.concatenate([some for some, _ in found]), pixels.augmented(recipe, 1, epoch)[order])


def test_an_image_that_changed_or_vanished_is_named(source: ImageDecoder) -> None:
    pixels = ImageRows(source, np.arange(12))
    changed, gone = (source.dataset.path(int(source.usable[i])) for i in (4, 9))
    assert changed is not None and gone is not None
    write_picture(changed, seed=99)
    gone.unlink()
    with pytest.raises(DatasetError, match=rf"{changed.name} was changed while the training ran"):
        pixels[np.array([0, 4])]
    with pytest.raises(DatasetError, match=rf"{gone.name}: cannot be read: .*could be decoded before"):
        pixels[np.array([9])]
