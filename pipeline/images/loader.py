"""Read, hash and decode the images of a dataset.

Files are decoded in separate processes, so that a crash of the decoder loses one image only. `Loader` loads images of
a dataset, `Decoders` decodes the bytes of image files.
"""

from __future__ import annotations

import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from pipeline.core import machine
from pipeline.core.errors import DecodeError, read_failure
from pipeline.core.hashing import image_key
from pipeline.dataset import Dataset, remote
from pipeline.images import decoding
from pipeline.images.containers import Header, read_header
from pipeline.images.decode_process import BUG, NO_MEMORY, PIXELS

T = TypeVar("T")
R = TypeVar("R")

_MOST_DECODERS = 16  # each takes about 60 MB; a model on a CPU needs fewer than these
SECONDS = 120.0  # for an image of up to DEFAULT_MAX_PIXELS; large ones take seconds, ten times that on a busy machine
_WAITS = 12
# -P keeps the current folder off the import path, where a file `json.py` would replace the standard module.
# One OpenBLAS thread: the process decodes in one thread, and NumPy would start another for each core.
_COMMAND = (sys.executable, "-P", "-c", "import os, sys; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
            "sys.path.insert(0, sys.argv.pop(1)); "
            "from pipeline.core import environment; environment.isolate(); environment.allow_pixels(int(sys.argv[3])); "
            "from pipeline.images.decode_process import main; main()", str(Path(__file__).parents[2]))  # fmt: skip
# These signals come from outside, for example from the kernel when memory runs out: the image is not the cause.
_STOPPED = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGXCPU}


@dataclass(frozen=True)
class Loaded:
    """An image that was read and decoded: pixels (size, size, 3) uint8 RGB, or None and the reason for the failure.

    `key` is None if the failure may be temporary and the image is not its cause, for example a failed read.
    """

    i: int
    key: bytes | None
    pixels: np.ndarray | None
    reason: str = ""
    view: int = 0  # the number of the augmented view in `pixels`; 0 is the original image
    validator: str | None = None  # the server's validator (ETag, Last-Modified) of a remote image
    header: Header | None = None  # of a decoded image, if the loader returns headers
    peak: int = 0  # the largest value in a file with 16 bits a channel, else 0


@dataclass(frozen=True)
class _Read:
    """An image that was read: its bytes or pixels, or None and the error."""

    i: int
    data: bytes | np.ndarray | None
    validator: str | None = None
    error: OSError | None = None


class Decoders:
    """Decode image files in separate processes, one for each calling thread; a process may crash.

    Leaving the context ends the processes; no thread may be decoding then.
    """

    def __init__(self, size: int, fit: str, max_pixels: int, depth: int = decoding.FULL_DEPTH) -> None:
        self._request = size, fit, max_pixels, depth
        self._mine = threading.local()
        self._all: list[_Decoder] = []

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *error: object) -> None:
        for decoder in self._all:
            decoder.stop()

    def __call__(self, data: bytes) -> np.ndarray:
        """Return the pixels of an image file, (size, size, 3) uint8 RGB. Raises the same errors as `with_peak`."""
        return self.with_peak(data)[0]

    def with_peak(self, data: bytes) -> tuple[np.ndarray, int]:
        """Return the pixels of an image file, (size, size, 3) uint8 RGB, and its largest 16-bit value; 0 for 8 bits.

        Raises
        ------
        DecodeError
            If `data` is not one whole image, crashes the decoder, or takes longer than the time limit.
        MemoryError
            If there is not enough memory to decode it, or the process was ended from outside.
        """
        if not hasattr(self._mine, "decoder"):
            self._mine.decoder = _Decoder(*self._request)
            self._all.append(self._mine.decoder)
        return self._mine.decoder.decode(data)


class Loader:
    """Load images of a dataset, from any thread; the hash is computed from the same bytes that are decoded.

    Files are decoded in other processes; images that come as pixels need no decoding. Remote images are read in more
    threads than there are decoders, because reading waits for the network. Leaving the context ends the processes;
    no thread may be loading then.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        fit: str,
        max_pixels: int,
        decoders: Decoders | None = None,
        headers: bool = False,
        depth: int = decoding.FULL_DEPTH,
    ) -> None:
        """Set up loading of `dataset`; 16-bit channels are scaled as `depth` bits.

        `headers` adds the header to each loaded image. `decoders` must have the same settings; leaving the context
        does not end them.
        """
        self._dataset = dataset
        self._size = size
        self._fit: decoding.Fit = cast(decoding.Fit, fit)
        self._max_pixels = max_pixels
        self._headers = headers
        self._own = Decoders(size, fit, max_pixels, depth)
        self._decoders = decoders or self._own
        self._from_afar = next(dataset.urls(), None) is not None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self._own.__exit__(*error)

    def __call__(self, i: int) -> Loaded:
        """Read, hash and decode image i."""
        return self._decode(self._read(i))

    def stream(
        self, pool: ThreadPoolExecutor, indices: Iterable[int], finish: Callable[[Loaded], R], ahead: int
    ) -> Generator[R]:
        """Load images in the threads of `pool`, call `finish` on each there, and yield its results.

        At most `ahead` results wait to be yielded. They keep the order of `indices`, unless the dataset has remote
        images: then they are yielded as they arrive, so that a slow image does not delay the others.
        """
        if not self._from_afar:
            yield from in_threads(pool, lambda i: finish(self(i)), indices, ahead)
            return
        with closing(self._arriving(indices)) as arriving:
            yield from in_threads(pool, lambda read: finish(self._decode(read)), arriving, ahead)

    def until(self, indices: Iterable[int], enough: Callable[[Loaded], bool]) -> None:
        """Load images one by one until `enough` returns True for one.

        Remote images that were fetched, that one included, are kept for the next call that reads them.
        """
        with closing(
            self._arriving(indices, self._put_back) if self._from_afar else (self._read(i) for i in indices)
        ) as arriving:
            for read in arriving:
                if enough(self._decode(read)):
                    self._put_back(read)
                    return

    def _arriving(self, indices: Iterable[int], left: Callable[[_Read], None] | None = None) -> Generator[_Read]:
        """Yield images read in one thread per allowed request; `left` receives images read but not yielded."""
        connections = remote.connections()
        pool = ThreadPoolExecutor(connections, "reading")
        try:
            yield from _as_they_come(pool, self._read, indices, 2 * connections, left)
        finally:
            pool.shutdown(wait=left is not None, cancel_futures=True)

    def _read(self, i: int) -> _Read:
        try:
            if (url := self._dataset.url(i)) is not None:
                return _Read(i, *remote.fetch(url))
            return _Read(i, self._dataset.read(i))
        except OSError as error:
            return _Read(i, None, error=error)

    def _put_back(self, read: _Read) -> None:
        """Keep a remote image, or its error, for the next call that reads it, which then needs no request."""
        url = self._dataset.url(read.i)
        if url is not None and isinstance(read.data, bytes):
            remote.hold(url, remote.Fetched(read.data, read.validator))
        elif url is not None and read.error is not None:
            remote.hold(url, read.error)

    def _decode(self, read: _Read) -> Loaded:
        i, data = read.i, read.data
        if data is None:
            return Loaded(i, None, None, read_failure(read.error or OSError("no data")))
        key = image_key(data)
        try:
            pixels, peak = self._pixels(data)
            return Loaded(i, key, pixels, validator=read.validator, header=self._header(data), peak=peak)
        except DecodeError as error:
            return Loaded(i, key, None, str(error), validator=read.validator)
        except MemoryError as error:
            # The machine is the cause, not the image. Without a key, the failure is not stored.
            return Loaded(i, None, None, f"cannot be read: {error or 'out of memory'}")

    def _header(self, data: bytes | np.ndarray) -> Header | None:
        if not self._headers:
            return None
        return Header("pixels", *data.shape[1::-1]) if isinstance(data, np.ndarray) else read_header(data)

    def _pixels(self, data: bytes | np.ndarray) -> tuple[np.ndarray, int]:
        if isinstance(data, np.ndarray):
            return decoding.decode(data, size=self._size, fit=self._fit, max_pixels=self._max_pixels), 0
        return self._decoders.with_peak(data)


class _Decoder:
    """A decoding process, started at the first image and again after a crash."""

    def __init__(self, size: int, fit: str, max_pixels: int, depth: int) -> None:
        self._shape = (size, size, 3)
        self._command = [*_COMMAND, str(size), fit, str(max_pixels), str(depth)]
        self._limit = SECONDS * max(1.0, max_pixels / decoding.DEFAULT_MAX_PIXELS)
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def decode(self, data: bytes) -> tuple[np.ndarray, int]:
        """Return the pixels of an image file, and the largest value of 16-bit channels; 0 for 8 bits.

        Raises
        ------
        DecodeError
            If `data` is not one whole image, takes longer than the time limit, or crashes the process twice: an
            earlier image may be the cause of the first crash.
        MemoryError
            If there is not enough memory to decode it, or the process was ended from outside.
        """
        code = 0
        for _ in range(2):
            process, connection = self._running = self._running or self._start()
            try:
                return self._ask(connection, data)
            except _Hangs as error:
                self.stop()
                raise DecodeError(f"keeps the decoder busy for more than {self._limit:,.0f} s") from error
            except (EOFError, ConnectionError):
                code = process.wait()
                self.stop()
        if code >= 0:  # not a crash: Python exited, and its message went to /dev/null
            raise RuntimeError(f"the decoding process ended with exit code {code}; see `{shlex.join(self._command)}`")
        if -code in _STOPPED:
            raise MemoryError(f"the decoder was stopped by {_signal_name(-code)}, perhaps for want of memory")
        raise DecodeError(f"crashes the decoder ({_signal_name(-code)})")

    def stop(self) -> None:
        """End the process at once; it has no data to save."""
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        process.kill()
        process.wait()
        connection.close()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        # A time-out of the socket costs nothing per image; polling before each read would cost a system call.
        wait = struct.pack("@ll", *divmod(int(self._limit * 1e6 / _WAITS), 1_000_000))
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, way, wait)
        with theirs:
            # Output of the libraries would break the progress display; results and errors come over the socket.
            nowhere = subprocess.DEVNULL
            process = subprocess.Popen(self._command, stdin=theirs.fileno(), stdout=nowhere, stderr=nowhere)
        return process, Connection(ours.detach())

    def _ask(self, connection: Connection, data: bytes) -> tuple[np.ndarray, int]:
        try:
            connection.send_bytes(data)
            kind = _first(connection)
            if kind[:1] == PIXELS:
                pixels = np.empty(self._shape, np.uint8)
                connection.recv_bytes_into(pixels.data.cast("B"))
                return pixels, int.from_bytes(kind[1:], "big")
            text = connection.recv_bytes().decode()
        except BlockingIOError as error:
            raise _Hangs from error
        if kind == BUG:
            raise RuntimeError(f"decoding failed: {text}")
        raise (MemoryError if kind == NO_MEMORY else DecodeError)(text)


class _Hangs(Exception):
    """Signal that the decoding process takes longer than the time limit."""


def _first(connection: Connection) -> bytes:
    """Return the first message of the decoder's reply. Raises BlockingIOError if none comes within the time limit.

    The limit is divided into several waits: a program stopped by Ctrl-Z and continued an hour later loses only one.
    """
    for _ in range(_WAITS - 1):
        with suppress(BlockingIOError):
            return connection.recv_bytes()
    return connection.recv_bytes()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def decoding_pool(cores: int | None = None) -> ThreadPoolExecutor:
    """Return a pool of threads to load images in: one for each of `cores` (default: all usable cores), at most 16."""
    return ThreadPoolExecutor(min(cores or machine.usable_cores(), _MOST_DECODERS), "decoding")


def in_threads(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Generator[R]:
    """Yield `work(item)` for each item, in order, at most `ahead` results waiting; `Executor.map` has no such limit."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _as_they_come(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int, left: Callable[[R], None] | None
) -> Generator[R]:
    """Yield `work(item)` as each is done, at most `ahead` running or waiting; `left` receives results not yielded."""
    items, running, done = iter(items), set[Future[R]](), set[Future[R]]()
    try:
        while True:
            running |= {pool.submit(work, item) for item in islice(items, ahead - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            while done:
                yield done.pop().result()
    finally:
        for future in {*done, *running}:
            if not future.cancel() and left is not None and future.exception() is None:
                left(future.result())


def batched(loaded: Iterable[Loaded], size: int) -> Iterator[list[Loaded]]:
    """Yield lists of `size` images; the last list may be shorter."""
    batch: list[Loaded] = []
    for image in loaded:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
