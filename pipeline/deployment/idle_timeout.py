"""HTTP connections that are closed when nothing is asked over them: each of those that are open counts.

Imported by `serve` alone, as it needs the extra of that name.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_S = 10.0


class IdleTimeoutProtocol(H11Protocol):
    """uvicorn's own, which waits for ever for the first request of a connection, and for the end of its headers."""

    def connection_made(self, transport: Any) -> None:
        """Begin to watch."""
        super().connection_made(transport)
        self._was_idle = False
        self._watch: asyncio.TimerHandle = self.loop.call_later(PATIENCE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._was_idle:  # twice in a row
            self.transport.close()
            return
        self._was_idle = idle
        self._watch = self.loop.call_later(PATIENCE_S, self._look)
