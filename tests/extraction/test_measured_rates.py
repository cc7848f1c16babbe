"""How fast a network is here: kept for what decides it, and never a reason to fail."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import SPEC

from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.extraction import measured_rates


def test_the_last_rate_of_a_network_counts_whatever_its_weights(workspace: Workspace) -> None:
    assert measured_rates.recall(workspace, SPEC) is None
    measured_rates.remember(workspace, SPEC, 10.0, 100)
    measured_rates.remember(workspace, replace(SPEC, backbone="mobilenet_v2"), 300.0, 100)
    measured_rates.remember(workspace, replace(SPEC, weights="sha256:" + "0" * 64, storage="float32"), 12.34567, 200)
    assert measured_rates.recall(workspace, SPEC) == 12.35
    assert measured_rates.recall(workspace, replace(SPEC, backbone="mobilenet_v2")) == 300.0
    for other in ({"precision": "bfloat16"}, {"layer": "mixed8"}, {"input_size": 224}, {"backbone": "xception"}):
        assert measured_rates.recall(workspace, replace(SPEC, **other)) is None


def test_another_machine_has_rates_of_its_own(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cache was copied from a machine with a GPU."""
    measured_rates.remember(workspace, SPEC, 10.0, 100)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "gpu_count", lambda: 7)
        assert measured_rates.recall(workspace, SPEC) is None
        measured_rates.remember(workspace, SPEC, 1000.0, 100)
    assert measured_rates.recall(workspace, SPEC) == 10.0


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "icebox-rates", "version": 9, "rates": []}', "[" * 9999]
)
def test_a_file_that_cannot_be_read_is_told_and_replaced(
    workspace: Workspace, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    measured_rates.remember(workspace, SPEC, 10.0, 100)
    (workspace.cache.root / measured_rates.FILE).write_text(content)
    assert measured_rates.recall(workspace, SPEC) is None
    assert "rates are measured again" in caplog.text
    measured_rates.remember(workspace, SPEC, 11.0, 100)
    assert measured_rates.recall(workspace, SPEC) == 11.0


@pytest.mark.parametrize("value", [0, -1.0, "fast", None, 1e999])
def test_a_rate_that_is_none_is_passed_over(workspace: Workspace, value: object) -> None:
    measured_rates.remember(workspace, SPEC, 10.0, 100)
    path = workspace.cache.root / measured_rates.FILE
    about = json.loads(path.read_text())
    about["rates"][0]["images_per_second"] = value
    path.write_text(json.dumps(about))
    assert measured_rates.recall(workspace, SPEC) is None


def test_a_cache_that_cannot_be_written_is_a_notice(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr("pipeline.extraction.measured_rates.files.write_whole", refused)
    measured_rates.remember(workspace, SPEC, 10.0, 100)
    assert "rates.json cannot be written" in caplog.text
    assert measured_rates.recall(workspace, SPEC) is None
