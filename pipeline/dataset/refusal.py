"""Turn the errors of all remote libraries into one error, `RefusedError`, with the same message for the same cause."""

from __future__ import annotations

import errno
import re
from http import HTTPStatus
from typing import Any

_PASSING = {408, 425, 429, 500, 502, 503, 504}


class RefusedError(OSError):
    """A failed request. `passing` if it may be temporary; then the next try comes after at least `pause` seconds."""

    def __init__(self, cause: str, passing: bool = False, pause: float = 0) -> None:
        super().__init__(cause)
        self.passing = passing
        self.pause = pause


def check_status(response: Any) -> None:
    """Raise RefusedError if the status of an aiohttp response is an error, 400 or more."""
    if response.status >= 400:
        wait = response.headers.get("Retry-After", "")
        raise status(response.status, float(wait) if wait.isdecimal() else 0)


def status(code: int, pause: float = 0) -> RefusedError:
    """Return the error for an HTTP status."""
    phrase = HTTPStatus(code).phrase if code in HTTPStatus.__members__.values() else ""
    return RefusedError(f"HTTP {code} {phrase}".strip(), code in _PASSING, pause)


def failure(error: BaseException, silence: float) -> RefusedError:
    """Return the error for an exception of any remote library, with the same message for the same cause.

    `silence` is the time-out in seconds, for the message.
    """
    if isinstance(error, RefusedError):
        return error
    chain = list[BaseException]()
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "os_error", None) or error.__cause__ or error.__context__  # type: ignore[assignment]
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if names & {"TimeoutError", "FSTimeoutError", "ReadTimeoutError", "ConnectTimeoutError"}:
        return RefusedError(f"timed out after {silence:g} s", passing=True)
    codes = {code for each in chain if (code := _code_of(each))}
    if isinstance(chain[0], (FileNotFoundError, KeyError)) or 404 in codes:
        return RefusedError("no such object")
    if isinstance(chain[0], PermissionError) or codes & {401, 403}:
        return RefusedError("access denied")
    if codes:
        return status(min(codes))
    if any(getattr(each, "errno", None) == errno.ECONNREFUSED for each in chain):
        return RefusedError("connection refused", passing=True)
    for kinds, cause, passing in _KINDS:
        if names & kinds:
            return RefusedError(cause, passing)
    if "seek" in str(chain[0]) or "range requests" in str(chain[0]):
        return RefusedError("an archive, and its server gives no parts of files")
    return RefusedError(f"{type(chain[0]).__name__}: {_without_urls(str(chain[0]))}".removesuffix(": "))


_KINDS: tuple[tuple[set[str], str, bool], ...] = (
    ({"ClientConnectorDNSError", "gaierror"}, "no such host", True),
    ({"ClientConnectorCertificateError", "ClientSSLError", "SSLError"}, "its certificate is not trusted", False),
    ({"TooManyRedirects"}, "too many redirects", False),
    ({"NonHttpUrlRedirectClientError"}, "redirects to another protocol", False),
    ({"InvalidURL", "InvalidUrlClientError"}, "not an address", False),
    ({"NoCredentialsError", "DefaultCredentialsError"}, "no credentials for it", False),
    ({"BadZipFile", "ReadError", "HeaderError"}, "not a whole archive", False),
    ({"ClientConnectionError", "ClientPayloadError", "ConnectionError", "EndpointConnectionError",
      "ConnectionClosedError", "HTTPClientError", "EOFError", "IncompleteRead"}, "connection lost", True),
)  # fmt: skip


def _code_of(error: BaseException) -> int:
    """Return the HTTP status, 400 to 599, in an error of boto or gcsfs, or 0."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if type(error).__module__.startswith("aiohttp"):  # aiohttp reports a truncated body as status 400
        return 0
    for code in (answer, getattr(error, "code", None)):
        if isinstance(code, int) and 400 <= code < 600:
            return code
    return 0


def _without_urls(text: str) -> str:
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", "…", text)[:100]
