"""Workers that are lost again and again, or paused for good, are told from those that may be given work."""

from __future__ import annotations

from typing import Any

import pytest

import pipeline.extraction.workers.health
from pipeline.extraction.workers.health import MOST_AT_WORK, MOST_LOSSES, WorkerHealth

LIMITED = {"nanny": "tcp://10.0.0.1:9", "host": "10.0.0.1", "memory_limit": 200_000_000, "status": "running"}


def lost(health: WorkerHealth, about: dict[str, Any], times: int, *, for_memory: bool = False) -> str | None:
    """Have a worker lost, each time under another address; return what is wrong with it then."""
    for number in range(times):
        address = f"tcp://10.0.0.1:{number}"
        if for_memory:
            health._heard((0.0, {"worker": address, "pid": 1, "rss": 199_000_000}))
        assert health.ended_for_memory(address) == for_memory
        health.lost(address, about)
    return health.problem("tcp://10.0.0.1:99", about)


@pytest.mark.parametrize(
    ("more", "for_memory", "problem"),
    [
        (
            {},
            True,
            "was ended 3 times as it came near its memory limit of 200 MB; start it with more by "
            "`dask worker --memory-limit`",
        ),
        ({}, False, "was lost 3 times before it had done anything (its memory limit is 200 MB); see its log"),
        (
            {"memory_limit": 0},
            False,
            "was lost 3 times before it had done anything (it has no memory limit); see its log",
        ),
        (
            {"memory_limit": 0, "host": "127.0.0.1"},
            False,
            "was lost 3 times before it had done anything (5.00 GB of memory are left on this machine); see its log",
        ),
    ],
)
def test_one_that_is_lost_again_and_again_is_given_up_and_its_memory_named(
    more: dict[str, Any], for_memory: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.workers.health.machine, "available_memory", lambda: 5_000_000_000)
    health = WorkerHealth()
    assert lost(health, LIMITED | more, MOST_LOSSES - 1, for_memory=for_memory) is None
    assert lost(health, LIMITED | more, 1, for_memory=for_memory) == problem


def test_one_that_has_done_something_in_between_is_not_given_up() -> None:
    health = WorkerHealth()
    for _ in range(5):
        assert lost(health, LIMITED, MOST_LOSSES - 1, for_memory=True) is None
        health.worked("tcp://10.0.0.1:99", LIMITED)


def test_one_that_is_lost_at_work_may_be_so_more_often() -> None:
    """An image may be the cause; tasks are halved until it is found."""
    health, address = WorkerHealth(), "tcp://10.0.0.1:1"
    for number in range(MOST_AT_WORK):
        assert health.problem(address, LIMITED) is None, number
        health.lost(address, LIMITED, at_work=True)
    assert "was lost 20 times at work with nothing done in between (its memory limit is 200 MB)" in str(
        health.problem(address, LIMITED)
    )
    health.worked(address, LIMITED)
    assert health.problem(address, LIMITED) is None


def test_others_are_not_held_to_account_for_it() -> None:
    health = WorkerHealth()
    lost(health, LIMITED, MOST_LOSSES)
    assert health.problem("tcp://10.0.0.1:7", LIMITED | {"nanny": "tcp://10.0.0.1:8"}) is None


def test_one_that_is_paused_for_good_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask gives a worker near its limit no task; one that has none gives no memory back."""
    health, at, now = WorkerHealth(), "tcp://10.0.0.1:1", 1000.0
    monkeypatch.setattr(pipeline.extraction.workers.health.time, "monotonic", lambda: now)
    paused = LIMITED | {"status": "paused"}
    for about in (paused, LIMITED, paused | {"metrics": {"task_counts": {"executing": 1}}}, paused):
        assert health.problem(at, about) is None
        now += 29
    now += 2
    assert "is paused and does nothing, as it came near its memory limit of 200 MB" in str(health.problem(at, paused))
