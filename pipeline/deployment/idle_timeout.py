"""Close idle HTTP connections, because the server limits the number of open ones.

Only `serve` imports this module, because it needs the optional packages of that name.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_S = 10.0  # seconds between checks; a connection is closed when it is idle at two checks in a row


class IdleTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP protocol with an idle timeout.

    Without it, uvicorn waits without limit for a connection's first request and for the end of its headers.
    """

    def connection_made(self, transport: Any) -> None:
        """Start the timer."""
        super().connection_made(transport)
        self._was_idle = False
        self._watch: asyncio.TimerHandle = self.loop.call_later(PATIENCE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._was_idle:  # idle at two checks in a row
            self.transport.close()
            return
        self._was_idle = idle
        self._watch = self.loop.call_later(PATIENCE_S, self._look)
