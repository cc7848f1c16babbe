"""The decoding process that `images.loader` starts: it decodes the image files sent to descriptor 0, and may crash.

For each image the process sends two messages. The first is the kind of the result, one byte; for pixels, two more
bytes hold the largest value of 16-bit channels. The second is the pixels, or the text of the error. The process ends
when the connection closes, also if its parent is killed. The process captures its own stderr: messages that libraries
print during decoding are about that image.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import cast

import cv2
import numpy as np

from pipeline.core.errors import DecodeError
from pipeline.images import decoding, jpeg

PIXELS, REFUSED, NO_MEMORY, BUG = b"P", b"R", b"M", b"B"
_STDERR = 2


def main() -> None:
    """Decode images until the connection closes. The arguments of the process are size, fit, max_pixels and depth."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the parent decides when to end
        signal.signal(stop, signal.SIG_IGN)
    cv2.setNumThreads(1)  # one process runs per core already
    size, fit, max_pixels, depth = int(sys.argv[1]), cast(decoding.Fit, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    listen()
    with suppress(EOFError, ConnectionError), Connection(0) as parent:
        while True:
            kind, content = _decode(parent.recv_bytes(), size, fit, max_pixels, depth)
            parent.send_bytes(kind)
            parent.send_bytes(content)


def listen() -> None:
    """Redirect stderr to a file in memory, which `heard` reads."""
    if hasattr(os, "memfd_create"):
        os.dup2(os.memfd_create("warnings"), _STDERR)
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), _STDERR)


def heard() -> str:
    """Return the text printed to stderr since the last call. If there is none, this costs one system call."""
    length = os.lseek(_STDERR, 0, os.SEEK_CUR)
    if not length:
        return ""
    text = os.pread(_STDERR, length, 0).decode(errors="replace")
    os.ftruncate(_STDERR, 0)
    os.lseek(_STDERR, 0, os.SEEK_SET)
    return text


def decode_whole(data: bytes, size: int, fit: decoding.Fit, max_pixels: int, depth: int) -> tuple[np.ndarray, int]:
    """Return the same as `decoding.decode_with_peak`: pixels, (size, size, 3) uint8 RGB, and the largest 16-bit value.

    Raises DecodeError also for a JPEG whose pixels are damaged.
    """
    heard()  # discards messages about the previous image
    decoded = decoding.decode_with_peak(data, size, fit, max_pixels, depth)
    warning = heard()
    looked_at = data.startswith(jpeg.MAGIC) and (warning or jpeg.is_suspect(data))
    if looked_at and (fault := jpeg.damage(data, warning, _warning_of)):
        raise DecodeError(f"JPEG damaged inside: {fault}")
    return decoded


def _warning_of(data: bytes) -> str:
    cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    return heard()


def _decode(data: bytes, size: int, fit: decoding.Fit, max_pixels: int, depth: int) -> tuple[bytes, bytes | memoryview]:
    try:
        pixels, peak = decode_whole(data, size, fit, max_pixels, depth)
        return PIXELS + peak.to_bytes(2, "big"), pixels.data.cast("B")
    except DecodeError as error:
        return REFUSED, str(error).encode()
    except MemoryError as error:
        return NO_MEMORY, str(error).encode()
    except Exception as error:  # sent to the parent process, which raises it
        return BUG, f"{type(error).__name__}: {error}".encode()
