"""Which Dask workers get no more tasks: those lost again and again, and those paused for the memory they use."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.core import machine
from pipeline.core.units import size_text
from pipeline.extraction.workers.connect import LOOPBACK, Client

MOST_LOSSES = 3  # losses during the check or near the memory limit, with no task finished in between
MOST_AT_WORK = 20  # losses with tasks assigned: an image may crash the worker, and its task is halved to find it
PAUSED_S = 30.0  # after which a paused worker without a task is given up
_ENDED = "worker-restart-memory"  # Dask topic: nannies report workers that they ended

About = Mapping[str, Any]  # what a scheduler knows of a worker


class WorkerHealth:
    """Counts the losses of workers; `about` is what the scheduler knows of a worker.

    The nanny of a lost worker (the process that watches it) starts it again under another address. Losses are
    therefore counted by nanny.
    """

    def __init__(self) -> None:
        self._losses = Counter[str]()
        self._at_work = Counter[str]()
        self._ended = set[str]()  # addresses of workers that were ended for the memory they used
        self._lost = defaultdict[str, set[str]](set)  # nanny → addresses of its lost workers
        self._paused: dict[str, float] = {}  # address → when the pause was first seen (time.monotonic)

    def listen(self, client: Client) -> None:
        """Subscribe to the reports of nannies that ended a worker for the memory it used."""
        client.subscribe_topic(_ENDED, self._heard)

    def _heard(self, event: tuple[float, Any]) -> None:
        self._ended.add(event[1]["worker"])

    def ended_for_memory(self, address: str) -> bool:
        """Return whether its nanny ended the worker because it came near its memory limit."""
        return address in self._ended

    def lost(self, address: str, about: About, *, at_work: bool = False) -> None:
        """Count the loss of a worker; `at_work` if one of its tasks may be the reason."""
        (self._at_work if at_work else self._losses)[_nanny(address, about)] += 1
        self._lost[_nanny(address, about)].add(address)

    def worked(self, address: str, about: About) -> None:
        """Forget the losses of a worker that finished a task."""
        for losses in (self._losses, self._at_work):
            losses.pop(_nanny(address, about), None)
        self._lost.pop(_nanny(address, about), None)

    def problem(self, address: str, about: About) -> str | None:
        """Return why a worker must get no more tasks, or None if it may.

        The text continues a sentence that begins with the worker's name.
        """
        limit = f"its memory limit of {size_text(about.get('memory_limit') or 0)}"
        if (count := self._losses[_nanny(address, about)]) >= MOST_LOSSES:
            if self._ended & self._lost[_nanny(address, about)]:  # a nanny's report may come after the loss was seen
                return f"was ended {count} times as it came near {limit}; {_MORE}"
            return f"was lost {count} times before it had done anything ({_memory(about)}); see its log"
        if (count := self._at_work[_nanny(address, about)]) >= MOST_AT_WORK:
            return f"was lost {count} times at work with nothing done in between ({_memory(about)}); see its log"
        if self._is_stuck(address, about):
            return f"is paused and does nothing, as it came near {limit}; {_MORE}"
        return None

    def _is_stuck(self, address: str, about: About) -> bool:
        """Return whether a worker has been paused for over `PAUSED_S` seconds without a running task."""
        tasks = about.get("metrics", {}).get("task_counts", {})
        if about.get("status") != "paused" or tasks.get("executing", 0):
            self._paused.pop(address, None)
            return False
        return time.monotonic() - self._paused.setdefault(address, time.monotonic()) > PAUSED_S


_MORE = "start it with more by `dask worker --memory-limit`"


def _memory(about: About) -> str:
    if limit := about.get("memory_limit"):
        return f"its memory limit is {size_text(limit)}"
    if about.get("host") == LOOPBACK:
        return f"{size_text(machine.available_memory())} of memory are left on this machine"
    return "it has no memory limit"


def _nanny(address: str, about: About) -> str:
    return about.get("nanny") or address
