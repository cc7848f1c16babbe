"""The record that `DaskPool` has of each worker: its state, its tasks and its rate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.extraction.shard_task import AT_ONCE, ShardTask


@dataclass(eq=False)
class AssignedTask:
    """A task that is assigned to a worker.

    `alone`: the worker has no other task, so if the worker is lost, this task is the suspect. `advanced` is the number
    of its rows computed so far.
    """

    task: ShardTask
    future: Any
    alone: bool
    advanced: float = 0.0


@dataclass(eq=False)
class Worker:
    """What is known of a worker.

    `fit` is None until the worker was checked; `vetting` is the future of that check, and `reason` says why the worker
    is unfit. `hands` is task number → assigned task. `since` is the time of `time.monotonic` when it was found fit.
    """

    address: str
    name: str
    gpu: bool
    about: Mapping[str, Any]  # what the scheduler knows of it
    fit: bool | None = None
    vetting: Any = None
    reason: str = ""
    hands: dict[int, AssignedTask] = field(default_factory=dict)
    since: float = 0.0
    rows: int = 0  # published
    advanced: float = 0.0  # rows computed, published or not
    model_seconds: float = 0.0

    def load(self) -> int:
        """Return the number of tasks assigned; a task that runs alone counts as `AT_ONCE`."""
        return AT_ONCE if any(hand.alone for hand in self.hands.values()) else len(self.hands)

    @property
    def rate(self) -> float:
        """Rows per second since the worker was found fit."""
        return self.advanced / max(1e-3, time.monotonic() - self.since)
