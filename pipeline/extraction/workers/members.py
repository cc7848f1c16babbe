"""What is known of each worker of a fleet, and what it has in hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.extraction.shard_task import AT_ONCE, ShardTask


@dataclass(eq=False)
class AssignedTask:
    """A task that a worker has in hand, `alone` if it has nothing else: what ends it then is known."""

    task: ShardTask
    future: Any
    alone: bool
    advanced: float = 0.0


@dataclass(eq=False)
class Worker:
    """What is known of a worker. `fit`: None while that is being found out."""

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
        """Return how many tasks it has in hand; one that is to be alone counts for all."""
        return AT_ONCE if any(hand.alone for hand in self.hands.values()) else len(self.hands)

    @property
    def rate(self) -> float:
        """Rows a second, since it was found fit."""
        return self.advanced / max(1e-3, time.monotonic() - self.since)
