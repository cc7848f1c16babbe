"""What computing takes is known before it begins."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
from conftest import SPEC

from pipeline import machine
from pipeline.compute import require_memory
from pipeline.errors import DoNotFitError

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
