"""The client of a Dask scheduler: list its workers, submit calls to one of them, and receive the results.

If the scheduler is lost, `InterruptedComputationError.recover` waits until it is back.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.core.errors import IceboxError, InterruptedComputationError, UsageError
from pipeline.extraction.workers.connect import Client, ClusterChoice, connected
from pipeline.extraction.workers.health import WorkerHealth

logger = logging.getLogger(__name__)

SILENT_S = 30.0  # without a heartbeat, then a worker is lost; they come every few seconds, and Dask waits minutes
PATIENCE_S = 60.0  # to wait for a lost scheduler, or for a first worker
LOOK_EVERY_S = 1.0

Future = Any  # distributed.Future


class LostError(Exception):
    """The workers that ran a call were lost, more than once."""


class SchedulerClient:
    """The connection to the scheduler of a cluster; `wait` returns its events."""

    def __init__(self, choice: ClusterChoice, topic: str) -> None:
        self.name = choice.name
        self._choice = choice
        self._topic = topic
        self._stack = ExitStack()
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.health = WorkerHealth()
        self._heartbeats: dict[str, tuple[float, float]] = {}  # address → `last_seen`, and when it changed last

    def open(self) -> None:
        """Connect to the scheduler. Raises UsageError if no scheduler answers."""
        self._client: Client = self._stack.enter_context(connected(self._choice))
        self._client.subscribe_topic(self._topic, self._heard)
        self.health.listen(self._client)

    def close(self) -> None:
        """Close the connection, and end the workers that were started for it."""
        self._stack.close()

    def _heard(self, event: tuple[float, Any]) -> None:
        self._events.put(("reported", event[1]))

    def workers(self) -> tuple[dict[str, Any], set[str]]:
        """Return the registered workers, and the addresses of those with a recent heartbeat.

        The first is a dict: address → what the scheduler knows of the worker.

        Raises
        ------
        InterruptedComputationError
            If the scheduler is lost.
        """
        with self._talking():
            if self._client.status != "running":
                raise OSError("the connection was lost")
            there = self._client.scheduler_info(n_workers=-1)["workers"]
        now = time.monotonic()
        return there, {address for address, about in there.items() if self._beats(address, about["last_seen"], now)}

    def _beats(self, address: str, last_seen: float, now: float) -> bool:
        before, since = self._heartbeats.get(address, (None, now))
        if before != last_seen:
            since = now
        self._heartbeats[address] = last_seen, since
        return now - since < SILENT_S

    def submit(self, address: str, function: Any, *arguments: Any, gpu: float = 0) -> Future:
        """Submit a call of `function` to one worker, and return its future; `wait` reports when it is done.

        `gpu` is the share of a GPU that the call takes, 0 to 1. Raises InterruptedComputationError if the scheduler is
        lost.
        """
        with self._talking():
            future = self._client.submit(
                function,
                *arguments,
                workers=[address],
                allow_other_workers=False,
                pure=False,
                resources={"GPU": gpu} if gpu else None,
            )
        future.add_done_callback(lambda done: self._events.put(("done", done)))
        return future

    def wait(self) -> tuple[str, Any]:
        """Return the next event: ("done", future) or ("reported", message of a worker).

        After `LOOK_EVERY_S` seconds without an event it is ("", None).
        """
        try:
            return self._events.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            return "", None

    def outcome(self, future: Future) -> tuple[Any, BaseException | None]:
        """Return (result, None) of a future that is done, or (None, error) if it failed.

        The error is LostError if Dask gave the call up because its workers were lost, else the call's own. Raises
        InterruptedComputationError if the scheduler is lost.
        """
        from distributed import KilledWorker

        with self._talking():
            if future.status in ("cancelled", "lost"):  # by the scheduler; those Icebox cancels are never read
                raise OSError("it knows nothing of what it was given")
            if future.status == "finished":
                return future.result(), None
            error = future.exception()
        return None, LostError() if isinstance(error, KilledWorker) else error

    @contextmanager
    def _talking(self) -> Iterator[None]:
        from distributed import CancelledError

        try:
            yield
        except (CancelledError, OSError, TimeoutError) as error:  # also CommClosedError, which is an OSError
            text = f"the Dask scheduler of {self.name} is gone ({error})"
            raise InterruptedComputationError(text, self._recover) from error

    def _recover(self) -> None:
        """Wait for the scheduler to come back. Raises IceboxError if it does not within `PATIENCE_S` seconds."""
        logger.warning("the Dask scheduler of %s is gone; waiting for it to come back", self.name)
        self._stack.close()
        self._heartbeats.clear()
        self._events = queue.SimpleQueue()
        start = time.monotonic()
        while True:
            try:
                self.open()
                return
            except UsageError as error:
                if time.monotonic() - start > PATIENCE_S:
                    raise IceboxError(
                        f"the Dask scheduler of {self.name} has been gone for {PATIENCE_S:.0f} s; start it and run the "
                        "command again: what was computed is kept"
                    ) from error
                time.sleep(LOOK_EVERY_S)
