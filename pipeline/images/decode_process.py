"""The other end of `images.loader`: decodes the image files that come in on descriptor 0, and may crash doing so.

Each is answered by two messages: one byte that says what follows, of pixels with the largest value of 16-bit channels
in two more, then that: pixels, or text. The process ends when
the connection does, which is also when whoever started it is killed. It listens to its own stderr: what the libraries
print there while an image is decoded is about that image.
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
    """Answer until there are no more requests. The arguments are size, fit, max_pixels and depth."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group; our parent decides when it is over
        signal.signal(stop, signal.SIG_IGN)
    cv2.setNumThreads(1)  # as many processes run as there are cores
    size, fit, max_pixels, depth = int(sys.argv[1]), cast(decoding.Fit, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    listen()
    with suppress(EOFError, ConnectionError), Connection(0) as parent:
        while True:
            kind, content = _decode(parent.recv_bytes(), size, fit, max_pixels, depth)
            parent.send_bytes(kind)
            parent.send_bytes(content)


def listen() -> None:
    """Let stderr go to a file in memory, where `heard` reads it."""
    if hasattr(os, "memfd_create"):
        os.dup2(os.memfd_create("warnings"), _STDERR)
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), _STDERR)


def heard() -> str:
    """Return what was printed to stderr since the last call. Where nothing was, that takes one system call."""
    length = os.lseek(_STDERR, 0, os.SEEK_CUR)
    if not length:
        return ""
    text = os.pread(_STDERR, length, 0).decode(errors="replace")
    os.ftruncate(_STDERR, 0)
    os.lseek(_STDERR, 0, os.SEEK_SET)
    return text


def decode_whole(data: bytes, size: int, fit: decoding.Fit, max_pixels: int, depth: int) -> tuple[np.ndarray, int]:
    """Return what `images.decode_with_peak` does.

    Raises DecodeError also for a JPEG whose pixels are damaged.
    """
    heard()  # what was left by the last image
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
    except Exception as error:  # told to the parent, who raises it
        return BUG, f"{type(error).__name__}: {error}".encode()
