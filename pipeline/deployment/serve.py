"""Serve published runs over HTTP: the implementation of `serve`.

Requests that wait at the same time are computed together in one batch (`Batcher`). `service` loads the models; `serve`
runs the web server.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import queue
import re
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager

import numpy as np

from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import IceboxError, UsageError
from pipeline.core.utf8 import to_utf8
from pipeline.deployment.ensemble import RunGroup, group_runs
from pipeline.deployment.predict import top_classes
from pipeline.images.decoding import depth_of
from pipeline.images.loader import Decoders, decoding_pool
from pipeline.training.full_model import compile_model
from pipeline.training.open_run import TrainedRun

logger = logging.getLogger(__name__)

_BATCH = 32
_MOST_WAITING = 256  # uploads that may wait; further ones are refused
_IN_MEMORY = 4  # waiting uploads in memory for each core
_MOST_CONNECTIONS = 512  # open connections; each may hold an upload
_LAST_ANSWERS_S = 5  # seconds for open requests to finish when the server stops
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Way = tuple[int, str, int]  # input size in pixels, `fit` (how an image is made square), bits that 16-bit channels hold
Pixels = Mapping[Way, np.ndarray]  # → (size, size, 3) uint8 RGB
_Asked = tuple[Pixels, Future[np.ndarray]]


class Batcher:
    """Predicts single images given from any thread; a single thread computes all waiting images as one batch."""

    def __init__(self, answer: Callable[[Sequence[Pixels]], np.ndarray]) -> None:
        self._answer = answer
        self._waiting = queue.SimpleQueue[_Asked | None]()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def __call__(self, pixels: Pixels) -> Future[np.ndarray]:
        """Return a future of the image's probabilities, (k,) float32."""
        future = Future[np.ndarray]()
        self._waiting.put((pixels, future))
        return future

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            self._settle([first, *self._following()])

    def _following(self) -> Iterator[_Asked]:
        """Yield the images that wait now, at most one batch of 32 with the first image."""
        for _ in range(min(_BATCH - 1, self._waiting.qsize())):
            following = self._waiting.get()  # never blocks: only this thread takes from the queue
            if following is None:
                self._waiting.put(None)  # put back the end mark, to stop after this batch
                return
            yield following

    def _settle(self, batch: Sequence[_Asked]) -> None:
        batch = [(pixels, future) for pixels, future in batch if future.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            said = self._answer([pixels for pixels, _ in batch])
        except Exception as error:  # the callers that wait for this batch get the exception
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), probabilities in zip(batch, said, strict=True):
            future.set_result(probabilities)


@contextmanager
def service(
    runs: Sequence[TrainedRun], workspace: Workspace, *, max_pixels: int, weights: str | None = None
) -> Iterator[Callable[[bytes], Future[np.ndarray]]]:
    """Yield a function from the bytes of an image file to a future of its probabilities.

    The models are loaded and have already run once. The function may be called from any thread. It decodes the image
    in that thread, and raises DecodeError or MemoryError if the image cannot be decoded.
    """
    groups = group_runs(runs, workspace, weights)
    logger.info("loading %s", ", ".join(run.name for run in runs))
    answerers = [(_seen_by(group), group.share, compile_model(group.network())) for group in groups]

    def answer(batch: Sequence[Pixels]) -> np.ndarray:
        parts = [share * run(np.stack([pixels[way] for pixels in batch])) for way, share, run in answerers]
        return np.stack(parts).sum(axis=0)

    ways = {way for way, _, _ in answerers}
    blank = {way: np.zeros((way[0], way[0], 3), np.uint8) for way in ways}
    for count in (1, _BATCH):
        answer([blank] * count)
    with ExitStack() as stack:
        decoders = {
            (size, fit, depth): stack.enter_context(Decoders(size, fit, max_pixels, depth)) for size, fit, depth in ways
        }
        batcher = stack.enter_context(Batcher(answer))
        yield lambda data: batcher({way: decode(data) for way, decode in decoders.items()})


def _seen_by(group: RunGroup) -> Way:
    return group.spec.input_size, group.spec.fit, depth_of(group.spec.decode)


def serve(
    runs: Sequence[TrainedRun],
    workspace: Workspace,
    *,
    host: str,
    port: int,
    top: int,
    max_bytes: int,
    max_pixels: int,
    allowed: Sequence[str] = (),
    weights: str | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve at `host` and `port` (0 for a free one) until Ctrl-C; call `on_ready(url)` when the server is ready.

    A server on a loopback address accepts requests with the loopback names in their Host header; another server
    accepts any name. With names in `allowed` (those that a proxy forwards, for example), any server accepts only these,
    its own names and the loopback names. An upload has at most `max_bytes`; an answer has the `top` likeliest classes.

    Raises
    ------
    UsageError
        If the packages are missing, or a name in `allowed` is not a host name.
    IceboxError
        If the port cannot be used.
    """
    machine.require_packages("serve", ["fastapi", "uvicorn", "python-multipart"], "serve")
    further = [_host_name(name) for name in allowed]
    tempfile.gettempdir()  # uploads wait in this folder; raises FileNotFoundError if there is none
    import uvicorn

    from pipeline.deployment import idle_timeout, web

    with _listening(host, port) as listener, service(runs, workspace, max_pixels=max_pixels, weights=weights) as answer:
        classes = [to_utf8(name) for name in runs[0].classes]
        about = web.About(
            runs=[to_utf8(run.name) for run in runs],
            classes=classes,
            untrained=any(run.base.untrained for run in runs),
            max_bytes=max_bytes,
        )
        address, port = listener.getsockname()[:2]
        local = ipaddress.ip_address(address).is_loopback
        names = (host.lower(), address, *_LOOPBACK, *further) if local or further else None
        with _Answering(answer, classes, top) as answering:
            config = uvicorn.Config(
                web.make_app(about, answering, names),
                http=idle_timeout.IdleTimeoutProtocol,
                log_config=None,
                access_log=False,
                lifespan="off",
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=_LAST_ANSWERS_S,
            )
            logging.getLogger("uvicorn.error").addFilter(_no_stopped_uploads)
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            try:
                uvicorn.Server(config).run(sockets=[listener])
            except KeyboardInterrupt:  # the usual way to stop; uvicorn has finished open requests
                logger.info("stopped")


class _Answering:
    """Predicts uploads; a few are in memory, the others wait on disk, and above 256 waiting uploads are refused."""

    def __init__(self, answer: Callable[[bytes], Future[np.ndarray]], classes: list[str], top: int) -> None:
        self._answer = answer
        self._classes = classes
        self._top = top
        self._pool = decoding_pool()
        self._memory = asyncio.Semaphore(_IN_MEMORY * machine.usable_cores())
        self._waiting = 0

    def __enter__(self) -> _Answering:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def __call__(self, read: Callable[[], Awaitable[bytes]]) -> list[tuple[str, float]]:
        """Return the likeliest classes with their probabilities. Raises BusyError, DecodeError or MemoryError."""
        from pipeline.deployment import web

        if self._waiting >= _MOST_WAITING:
            raise web.BusyError
        self._waiting += 1
        try:
            async with self._memory:
                loop = asyncio.get_running_loop()
                coming = await loop.run_in_executor(self._pool, self._answer, await read())
            return top_classes(await asyncio.wrap_future(coming), self._classes, self._top)
        finally:
            self._waiting -= 1


def _no_stopped_uploads(record: logging.LogRecord) -> bool:
    """Return whether to show a record of uvicorn's log; errors of uploads cancelled by the server's stop are hidden."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _host_name(text: str) -> str:
    """Return a host name as browsers send it: IDNA-encoded, in lower case. Raises UsageError if it is not valid."""
    try:
        name = text.rstrip(".").encode("idna").decode().lower()
    except UnicodeError:
        name = ""
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
        raise UsageError(f"--allow-host takes the name of a host, as images.example.org, found {text!r:.80}")
    return name


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    if not host:
        raise UsageError("--host takes an address or a name, found nothing; 0.0.0.0 answers every machine")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (while")[0]  # drop Python's addition, which repeats the address
        raise IceboxError(
            f"nothing can be served at {host} port {port} ({reason}); name others by --host, --port"
        ) from error
    with listener:
        yield listener
