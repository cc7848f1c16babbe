"""Read remote images through fsspec: `https://…`, `s3://…`, or a member of an archive, `zip://a.jpg::…`.

A URL may come from another person's manifest. So only remote protocols are allowed, and an archive on this machine
must be in the folder where plain paths may be. Messages call a URL an address.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from pipeline.core.errors import UsageError
from pipeline.core.machine import require_packages
from pipeline.dataset.http_validators import GRAIN, of_answer, of_file
from pipeline.dataset.refusal import RefusedError, check_status, failure

T = TypeVar("T")

# The package that each protocol needs besides fsspec, and whether `make setup EXTRAS=remote` installs it.
_PACKAGES: dict[str, tuple[str, bool] | None] = {
    **dict.fromkeys(("http", "https"), ("aiohttp", True)),
    **dict.fromkeys(("s3", "s3a"), ("s3fs", True)),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", True)),
    **dict.fromkeys(("az", "abfs", "abfss"), ("adlfs", False)),
    "hf": ("huggingface_hub", False),
    "sftp": ("paramiko", False),
    **dict.fromkeys(("ftp", "webhdfs")),
}
_ARCHIVES = ("zip", "tar")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")

DEFAULT_CONNECTIONS = 16
SILENCE = 30.0  # seconds without a byte after which a request has timed out
LARGEST = 1 << 30  # limit for one image, in bytes
_WHOLE = 900.0  # limit for one request, in seconds
_TRIES = 3
_PAUSE = 0.5  # about so many seconds before the second try; twice that before the third
_LONGEST_PAUSE = 30.0  # seconds; the longest Retry-After of a server that is obeyed
_BLOCK = 1 << 18
_NO_HEAD = {401, 403, 405, 501}  # replies to HEAD of servers without it, and of URLs that are signed for GET only

_PARTS = ("client_kwargs", "config_kwargs")  # entries of fsspec's configuration that contain time-outs


class Fetched(NamedTuple):
    """The bytes of a remote image, and the validator by which a change on the server is noticed, or None."""

    data: bytes
    validator: str | None


def is_url(text: str) -> bool:
    """Return whether `text` is a URL, not a path."""
    return "://" in text and _URL.match(text) is not None


def resolve(url: str, root: str | None) -> str:
    """Return `url` with the path of an archive on this machine made absolute.

    Parameters
    ----------
    url
        The URL as the user wrote it.
    root
        The absolute folder that a local archive must be in, and that relative paths start from. If None, paths start
        from the current folder and may be anywhere.

    Raises
    ------
    ValueError
        If the URL may not be read; the message says what was expected.
    """
    if not url.isprintable():
        raise ValueError("an address of printable characters")
    protocol, rest = _split(url)
    if protocol not in _ARCHIVES:
        if protocol not in _PACKAGES or not rest.strip("/"):
            known = ", ".join((*_PACKAGES, *_ARCHIVES))
            raise ValueError(f"the path of a file, or an address by one of {known}")
        return url
    member, _, archive = rest.partition("::")
    if not member.strip("/") or not archive:
        raise ValueError(f"an archive behind its member, as in {protocol}://a.jpg::https://host/b.{protocol}")
    if is_url(archive) and not archive.startswith("file://"):
        if _split(archive)[0] in _ARCHIVES:
            raise ValueError("an archive that lies in no other archive")
        return f"{protocol}://{member}::{resolve(archive, root)}"
    path = os.path.normpath(os.path.join(root or Path.cwd(), archive.removeprefix("file://")))  # noqa: PTH118
    if root is not None and os.path.commonpath([root, path]) != root:
        raise ValueError(f"an archive inside {root}")
    return f"{protocol}://{member}::{path}"


def require(urls: Iterable[str]) -> None:
    """Check that the packages these URLs need are installed. Raises UsageError with the package to install."""
    protocols = {_split(url if _split(url)[0] not in _ARCHIVES else url.partition("::")[2])[0] for url in urls}
    for protocol in sorted(protocols):
        needed = _PACKAGES.get(protocol)
        if needed is None:
            continue
        package, is_extra = needed
        if is_extra:
            require_packages(f"{protocol}://", [package], "remote")
        elif importlib.util.find_spec(package) is None:
            raise UsageError(f"{protocol}:// needs {package}: .venv/bin/pip install {package}")


def fetch_whole(url: str) -> str:
    """Return the URL whose validator shows changes of an image: its own URL, or that of its archive."""
    protocol, rest = _split(url)
    return f"{protocol}://::{rest.partition('::')[2]}" if protocol in _ARCHIVES else url


def fetch(url: str) -> Fetched:
    """Read the image at a resolved URL; a failure that may be temporary is retried, up to three tries in all.

    Raises
    ------
    OSError
        If the image cannot be read; the message is the cause, short and without the URL.
    """
    held = _state().held.pop(url, None)
    if isinstance(held, OSError):
        raise held
    return held or _tried(lambda: _fetch(url))


def hold(url: str, fetched: Fetched | OSError) -> None:
    """Keep a fetched image, or its error, in memory until the next `fetch` of it; meant for a few images only."""
    _state().held[url] = fetched


def forget_fetched() -> None:
    """Discard all images and errors kept by `hold`."""
    _state().held.clear()


def validator(url: str) -> str | None:
    """Return the present validator of `url`, as returned by `fetch_whole`, without reading it; None if it has none.

    Raises
    ------
    OSError
        For the same reasons as in `fetch`.
    """
    return _tried(lambda: _validator(url))


def connections() -> int:
    """Return how many requests this process may make at once."""
    return _state().connections


def limit_connections(count: int) -> None:
    """Set how many requests this process may make at once."""
    state = _state()
    state.connections, state.gate = count, threading.BoundedSemaphore(count)


def _split(url: str) -> tuple[str, str]:
    protocol, _, rest = url.partition("://")
    return protocol.lower(), rest


# Open file systems and archives of a process


@dataclass
class _State:
    """The file systems and archives of one process: a forked process must not use its parent's connections."""

    pid: int
    connections: int = DEFAULT_CONNECTIONS
    gate: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(DEFAULT_CONNECTIONS))
    lock: threading.Lock = field(default_factory=threading.Lock)
    systems: dict[Any, _System] = field(default_factory=dict)
    archives: dict[str, _Archive] = field(default_factory=dict)
    opening: dict[str, threading.Lock] = field(default_factory=dict)
    held: dict[str, Fetched | OSError] = field(default_factory=dict)


_only = _State(os.getpid())


def _state() -> _State:
    global _only
    if _only.pid != os.getpid():
        _only = _State(os.getpid(), _only.connections, threading.BoundedSemaphore(_only.connections))
    return _only


class _System:
    """An fsspec file system whose methods any thread may call."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self._lock = threading.Lock()

    def ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the file system: with a time-out if it is asynchronous, else one call at a time."""
        if self.made.async_impl:
            return self.run(getattr(self.made, f"_{name}"), *arguments, **named)
        with self._lock:
            return getattr(self.made, name)(*arguments, **named)

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run a coroutine on fsspec's event loop and return its result."""
        from fsspec.asyn import sync

        return sync(self.made.loop, function, *arguments, timeout=_WHOLE, **named)


def _system(url: str) -> tuple[_System, str]:
    """Return the file system of a URL, opened once per process, and the path of the file in it."""
    from fsspec import get_filesystem_class

    protocol = _split(url)[0]
    kind: Any = get_filesystem_class(protocol)
    url_options = kind._get_kwargs_from_urls(url)
    state = _state()
    with state.lock:
        key = protocol, tuple(sorted(url_options.items()))
        if key not in state.systems:
            options = {**_options(protocol, kind.protocol), **url_options}
            state.systems[key] = _System(kind(**options, use_listings_cache=False, skip_instance_cache=True))
            if protocol.startswith("s3"):
                state.systems[key].made.retries = 1  # `_tried` repeats failed requests
        return state.systems[key], kind._strip_protocol(url)


def _options(protocol: str, names: str | tuple[str, ...]) -> dict[str, Any]:
    """Return the time-outs of a file system; the user's configuration of fsspec takes precedence."""
    from fsspec.config import conf

    stated = [conf.get(name, {}) for name in ((names,) if isinstance(names, str) else names)]
    client, config = ({k: v for each in stated for k, v in each.get(part, {}).items()} for part in _PARTS)
    if protocol in ("http", "https"):
        import aiohttp

        ours = {"timeout": aiohttp.ClientTimeout(total=_WHOLE, sock_connect=SILENCE, sock_read=SILENCE)}
        return {"client_kwargs": {"trust_env": True, **ours, **client}}
    if protocol.startswith("s3"):
        ours = {"connect_timeout": SILENCE, "read_timeout": SILENCE, "retries": {"max_attempts": 0}}
        return {"config_kwargs": {**ours, **config}}
    return {"timeout": SILENCE} if protocol in ("ftp", "sftp") else {}


# Requests


def _fetch(url: str) -> Fetched:
    protocol, rest = _split(url)
    if protocol in _ARCHIVES:
        archive = _archive(fetch_whole(url))
        return Fetched(archive.read(rest.partition("::")[0]), archive.validator)
    system, path = _system(url)
    if protocol in ("http", "https"):
        return system.run(_get, system.made, path)
    # The validator is read first: a change between the two requests is then noticed the next time.
    about = system.ask("info", path)
    if about.get("type") == "directory":
        raise FileNotFoundError(path)
    _check_size(about.get("size"))
    return Fetched(system.ask("cat_file", path), of_file(about))


def _validator(url: str) -> str | None:
    protocol, rest = _split(url)
    if protocol in _ARCHIVES:
        now = _validator_of_archive(rest.removeprefix("::"))
        state = _state()
        with state.lock:
            if url in state.archives and (now is None or state.archives[url].validator != now):
                del state.archives[url]  # closed when no thread reads it any more
        return now
    system, path = _system(url)
    if protocol in ("http", "https"):
        return system.run(_head, system.made, path)
    about = system.ask("info", path)
    if about.get("type") == "directory":
        raise FileNotFoundError(path)
    return of_file(about)


def _validator_of_archive(archive: str) -> str | None:
    if is_url(archive):
        return _validator(archive)
    found = Path(archive).stat()
    fresh = time.time() - max(found.st_mtime, found.st_ctime) < GRAIN
    return None if fresh else f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


async def _get(system: Any, url: str) -> Fetched:
    session = await system.set_session()
    async with session.get(system.encode_url(url), **system.kwargs) as response:
        check_status(response)
        _check_size(response.content_length)
        parts, size = list[bytes](), 0
        async for part in response.content.iter_chunked(_BLOCK):
            size += len(part)
            _check_size(size)
            parts.append(part)
        return Fetched(b"".join(parts), of_answer(response))


async def _head(system: Any, url: str) -> str | None:
    session = await system.set_session()
    async with session.head(system.encode_url(url), allow_redirects=True, **system.kwargs) as response:
        if response.status not in _NO_HEAD:
            check_status(response)
            return of_answer(response)
    async with session.get(system.encode_url(url), **system.kwargs) as response:  # the body is not read
        check_status(response)
        return of_answer(response)


# Archives


class _Archive:
    """An open archive with its list of members; they are read one at a time."""

    def __init__(self, kind: str, file: IO[bytes], validator: str | None) -> None:
        self.validator = validator
        self._lock = threading.Lock()
        self._kind = kind
        self._opened: Any
        if kind == "zip":
            self._opened = zipfile.ZipFile(file)
        else:  # a compressed tar would be read from its start for each member
            self._opened = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            self._members = {member.name: member for member in self._opened if member.isreg()}

    def read(self, member: str) -> bytes:
        with self._lock:
            if self._kind == "zip":
                _check_size(self._opened.getinfo(member).file_size)
                return self._opened.read(member)
            found = self._members[member]
            _check_size(found.size)
            return self._opened.extractfile(found).read()


def _archive(url: str) -> _Archive:
    """Return an archive, opened once per process; `url` comes from `fetch_whole`."""
    state = _state()
    with state.lock:
        opening = state.opening.setdefault(url, threading.Lock())
    with opening:
        if (found := state.archives.get(url)) is not None:
            return found
        kind, rest = _split(url)
        place = rest.removeprefix("::")
        before = _validator_of_archive(place)
        if is_url(place):
            system, path = _system(place)
            file = system.made.open(path, "rb")
        else:
            file = Path(place).open("rb")  # noqa: SIM115  kept open with the archive
        try:
            found = _Archive(kind, file, before)
        except BaseException:
            file.close()
            raise
        with state.lock:
            state.archives[url] = found
        return found


def _tried(work: Callable[[], T]) -> T:
    """Call `work`, up to three times with growing pauses, if errors may be temporary. Raises OSError with the cause."""
    for attempt in range(_TRIES):
        try:
            with _state().gate:
                return work()
        except Exception as error:
            refused = failure(error, SILENCE)
            if not refused.passing or attempt == _TRIES - 1:
                raise refused from error
            # A random pause keeps all threads from repeating their requests at the same moment.
            pause = _PAUSE * 2**attempt * (0.5 + random.random())
        time.sleep(max(pause, min(refused.pause, _LONGEST_PAUSE)))
    raise AssertionError("unreachable")


def _check_size(size: int | None) -> None:
    if size is not None and size > LARGEST:
        raise RefusedError(f"more than {LARGEST:,} bytes")
