"""What computing takes is known before it begins."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SPEC

from pipeline.cache.shard import SHARD_BYTES
from pipeline.core import machine
from pipeline.core.errors import DoNotFitError
from pipeline.extraction.compute import ComputeOptions, require_memory, row_bytes
from pipeline.extraction.shard_task import TaskSetup

ROW = (8, 8, 2048)  # 262,144 bytes in float16, and 8,192 of its pooled mean


def test_shards_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 24 * 10**9)
    told = "shards of 65,536 rows take about 35.4 GB of memory, 2 of 17.7 GB at a time, and 24.0 GB are free; at most "
    with pytest.raises(DoNotFitError, match=re.escape(told + "--shard-rows 44,389 fit")):
        require_memory(65_536, ROW, SPEC)
    require_memory(44_389, ROW, SPEC)
    for rows, spec, processes in ((44_390, SPEC, 1), (44_389, SPEC, 2), (44_389, replace(SPEC, storage="float32"), 1)):
        with pytest.raises(DoNotFitError):
            require_memory(rows, ROW, spec, processes)


def test_large_ones_that_fit_are_told_and_usual_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 24 * 10**9)
    with caplog.at_level(logging.WARNING):
        require_memory(256, ROW, SPEC)
        assert caplog.text == ""
        require_memory(8192, ROW, SPEC)
    assert "shards of 8,192 rows take about 4.43 GB of memory, 2 of 2.21 GB at a time; a smaller" in caplog.text


@pytest.mark.parametrize(
    ("shape", "storage", "given", "batch", "rows"),
    [
        (ROW, "float16", None, 16, 256),  # 64 MiB of InceptionV3, as ever
        ((16, 16, 512), "float16", None, 16, 256),  # VGG16 at 512 pixels
        ((37, 37, 2560), "float16", None, 16, 32),  # EfficientNetB7 at 1,200 pixels: 7 MB a row
        ((224, 224, 64), "float32", None, 16, 16),  # VGG16 cut at its first layer: 13 MB a row
        ((301, 301, 192), "float16", None, 16, 16),  # at least one batch
        ((37, 37, 2560), "float16", 64, 16, 64),  # whoever says how many rows gets them
        (ROW, "float16", 100, 16, 96),
        ((1, 1, 576), "float16", None, 32, 256),
    ],
)
def test_shards_are_bounded_in_bytes_too(
    shape: tuple[int, ...], storage: str, given: int | None, batch: int, rows: int
) -> None:
    size = row_bytes(shape, replace(SPEC, storage=storage))
    assert ComputeOptions(shard_rows=given).task_rows(batch, size) == rows
    assert given or rows == batch or rows * size <= SHARD_BYTES


def test_of_large_rows_fewer_are_in_a_batch() -> None:
    setup = TaskSetup(SPEC, None, 16, Path("shards"), batch_bytes=SHARD_BYTES)
    assert [setup.batch_of(shape) for shape in (ROW, (301, 301, 192), (37, 37, 2560))] == [16, 7, 16]
    assert replace(setup, batch_bytes=None).batch_of((301, 301, 192)) == 16, "as somebody said, or as it was begun"
