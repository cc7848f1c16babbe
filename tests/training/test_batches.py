"""Batches: each row once an epoch, in an order of seed and epoch alone; what is streamed mixes rows from everywhere."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from made import SPEC, add, key

from pipeline.cache.space import Cache
from pipeline.core.errors import DatasetError, DoNotFitError
from pipeline.core.spec import HeadSpec
from pipeline.training import heads
from pipeline.training.batches import Shuffled, block_order
from pipeline.training.heads import Data, TrainingContext
from pipeline.training.heads.base import stratified_folds
from pipeline.training.rows import Rows, RowSelection, open_rows
from pipeline.training.tracking import tensorboard

N = 400
ROW = 2 * 3 * 8 * 2  # bytes


def opened(cache: Cache, memory: int | None) -> Rows:
    space = cache.create(SPEC, {})
    if not space.totals().rows:
        for start in range(0, N, 50):
            add(space, list(range(start, start + 50)))
    return open_rows(space, [key(n) for n in range(N)], "features", [RowSelection(np.arange(N))], memory=memory)[0]


@pytest.mark.parametrize("memory", [None, 3 * 64 * ROW], ids=["held", "streamed"])
def test_each_row_comes_once_with_its_label_in_an_order_of_seed_and_epoch(cache: Cache, memory: int | None) -> None:
    rows, labels = opened(cache, memory), np.arange(N)
    everything = rows[np.arange(N)]

    def order(seed: int, epoch: int) -> list[int]:
        found = list(Shuffled(rows, labels, 32, seed).epoch(epoch))
        assert [len(some) for some, _ in found] == [32] * 12 + [16]
        for some, at in found:
            assert np.array_equal(some, everything[at])
        return np.concatenate([at for _, at in found]).tolist()

    first = order(1, 1)
    assert sorted(first) == list(range(N))
    assert order(1, 1) == first
    assert order(1, 2) != first
    assert order(2, 1) != first


def test_a_streamed_batch_mixes_rows_from_many_blocks() -> None:
    order = block_order(np.arange(4096), 512, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(4096))
    for start in range(0, 4096, 64):
        assert len(np.unique(order[start : start + 64] // 32)) >= 8, "blocks that a batch of 64 has rows of"
    together = np.abs(np.diff(order)) == 1
    assert together.mean() < 0.1


def test_a_batch_that_does_not_fit_is_refused_with_what_would(cache: Cache) -> None:
    rows = opened(cache, 3 * 64 * ROW)
    with pytest.raises(DoNotFitError, match=rf"batches of 65 rows, --memory must hold {3 * 65 * ROW:,} bytes, found"):
        Shuffled(rows, np.arange(N), 65, 0)


def test_folds_leave_none_empty_and_two_classes_to_learn() -> None:
    """Groups of these sizes leave one of five folds empty with most seeds."""
    groups = np.repeat(np.arange(5), [1, 2, 3, 9, 5])
    labels = np.arange(20) % 2
    folds = stratified_folds(labels, groups, 5)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(20))
    for some, held in folds:
        assert len(held)
        assert np.unique(labels[some]).size == 2
        assert not set(groups[some]) & set(groups[held])
    with pytest.raises(DatasetError, match="too few, or too much alike, for 3 folds"):
        stratified_folds(np.array([0] * 12 + [1]), np.arange(13), 3)


def test_folds_of_many_groups_and_classes_are_dealt_out_without_counting_each_in_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.training.heads.base._MOST_COUNTED", 0)
    labels = np.repeat(np.arange(40), 10)
    groups = np.arange(400) // 2  # pairs, each of one class
    folds = stratified_folds(labels, groups, 5)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(400))
    for some, held in folds:
        assert np.bincount(labels[held]).tolist() == [2] * 40
        assert not set(groups[some]) & set(groups[held])


def data(labels: list[int], val: list[int]) -> Data:
    rng = np.random.default_rng(0)
    some, other = (rng.random((len(each), 8), np.float32) for each in (labels, val))
    return Data(some, np.array(labels), other, np.array(val), 3)


def test_choosing_c_by_folds_of_too_few_is_refused() -> None:
    spec = HeadSpec.make("logreg", C="0.1,1", select="cv")
    with pytest.raises(DatasetError, match="too few, or too much alike, for 5 folds"):
        heads.fit(spec, data([0] * 40 + [1], [0, 1]), TrainingContext())


def test_a_validation_split_of_unknown_classes_calibrates_nothing() -> None:
    fitted = heads.fit(HeadSpec.make("logreg", C=1.0), data([0, 1] * 10, [2, 2]), TrainingContext())
    assert fitted.facts["temperature"] == 1.0


def test_the_history_goes_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path, True) as note:
        for epoch in (1, 2):
            note({"epoch": epoch, "loss": 1 / epoch})
    (file,) = tmp_path.rglob("*tfevents*")
    read = EventAccumulator(str(file.parent), size_guidance={"tensors": 0})
    read.Reload()
    assert [event.step for event in read.Tensors("loss")] == [1, 2]
    with tensorboard(tmp_path / "none", False) as note:
        note({"loss": 1.0})
    assert not (tmp_path / "none").exists()


def test_what_was_said_of_memory_is_what_is_streamed(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.training.rows"):
        opened(cache, 3 * 64 * ROW)
    assert "400 rows, 38.4 kB, are streamed from disk (18.4 kB allowed)" in caplog.text
