"""The other end of `pipeline.decoder`: decodes the image files that come in on descriptor 0, and may crash doing so.

Each is answered by two messages: one byte that says what follows, then that: pixels, or text. The process ends when
the connection does, which is also when whoever started it is killed.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import cast

import cv2

from pipeline import images
from pipeline.errors import DecodeError

PIXELS, REFUSED, NO_MEMORY, BUG = b"P", b"R", b"M", b"B"


def main() -> None:
    """Answer until there are no more requests. The arguments are size, fit and max_pixels."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group; our parent decides when it is over
        signal.signal(stop, signal.SIG_IGN)
    cv2.setNumThreads(1)  # as many processes run as there are cores
    size, fit, max_pixels = int(sys.argv[1]), cast(images.Fit, sys.argv[2]), int(sys.argv[3])
    with suppress(EOFError, ConnectionError), Connection(0) as parent:
        while True:
            kind, content = _decode(parent.recv_bytes(), size, fit, max_pixels)
            parent.send_bytes(kind)
            parent.send_bytes(content)


def _decode(data: bytes, size: int, fit: images.Fit, max_pixels: int) -> tuple[bytes, bytes | memoryview]:
    try:
        return PIXELS, images.decode(data, size=size, fit=fit, max_pixels=max_pixels).data.cast("B")
    except DecodeError as error:
        return REFUSED, str(error).encode()
    except MemoryError as error:
        return NO_MEMORY, str(error).encode()
    except Exception as error:  # told to the parent, who raises it
        return BUG, f"{type(error).__name__}: {error}".encode()
