"""Define the web application of `serve`: an upload page and a JSON endpoint.

Only `serve` imports this module, because it needs the optional packages of that name. FastAPI reads the annotations, so
the module does not postpone their evaluation.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, File, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.errors import DecodeError

_OVERHEAD = 2**16  # bytes of a form besides the file in it
_PATIENCE_S = 60.0  # seconds until an upload must be complete


class Guess(BaseModel):
    """A class and its probability."""

    label: str
    probability: float = Field(ge=0, le=1)


class Prediction(Guess):
    """The likeliest class of an image, and `top`, the likeliest classes in descending order of probability."""

    top: list[Guess]


class About(BaseModel):
    """The served runs, their classes and the limits of requests."""

    runs: list[str]
    classes: list[str]
    untrained: bool = Field(description="Whether the backbone's weights were never trained.")
    max_bytes: int = Field(description="How large an upload may be.")


class Refusal(BaseModel):
    """The reason why a request was refused."""

    detail: str


class BusyError(Exception):
    """Raised if too many images wait already."""


Read = Callable[[], Awaitable[bytes]]  # reads an upload, which may be on disk until then


def make_app(
    about: About, answer: Callable[[Read], Awaitable[Sequence[tuple[str, float]]]], names: Sequence[str] | None
) -> FastAPI:
    """Return the application.

    `answer` returns the likeliest classes of an image file, or raises DecodeError, MemoryError or BusyError. `names`
    are the host names that requests may use, None for any.
    """
    app = FastAPI(
        title="Icebox",
        summary="Class probabilities of images.",
        docs_url=None,  # FastAPI's documentation pages load scripts from another server
        redoc_url=None,
    )
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/about")
    async def describe() -> About:
        """Describe the served runs."""
        return about

    refusals: dict[int | str, dict[str, Any]] = {code: {"model": Refusal} for code in (408, 413, 422, 503)}

    @app.post("/predict", responses=refusals)
    async def predict(
        image: Annotated[UploadFile, File(description="An image file, of any kind OpenCV reads.")],
    ) -> Prediction:
        """Classify an image."""
        if (image.size or 0) > about.max_bytes:
            raise _too_large(about.max_bytes)
        try:
            top = await answer(image.read)
        except DecodeError as error:
            raise HTTPException(422, str(error)) from error
        except (BusyError, MemoryError) as error:
            raise HTTPException(503, "too busy to answer now; try again", {"Retry-After": "1"}) from error
        guesses = [Guess(label=label, probability=share) for label, share in top]
        return Prediction(**guesses[0].model_dump(), top=guesses)

    app.add_exception_handler(RequestValidationError, _no_image)
    app.add_middleware(_Guard, most=about.max_bytes, names=names)
    return app


async def _no_image(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "expected a form (multipart/form-data) with a file in its field `image`"}, 422)


def _page() -> tuple[str, str]:
    """Return the page and its Content-Security-Policy: browsers run only the page's own script and style."""
    text = (resources.files("pipeline.deployment") / "pages" / "upload.html").read_text("utf-8")

    def digest(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        content = found[1] if found else ""
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the upload is larger than {most:,} bytes")


class _Guard:
    """Refuses requests that are too large, too slow, or have another host name in their Host header.

    The check of the host name prevents DNS rebinding: the owner of another site can let its name resolve to this
    server. HEAD requests are handled as GET requests; the server leaves out the body.
    """

    def __init__(self, app: ASGIApp, most: int, names: Sequence[str] | None) -> None:
        self._app = app
        self._most = most + _OVERHEAD
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._names is not None and _host(headers.get(b"host", "")) not in self._names:
            detail = "this host name does not lead here; `serve --allow-host NAME` lets it"
            await JSONResponse({"detail": detail}, 421)(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        until, seen = asyncio.get_running_loop().time() + _PATIENCE_S, 0

        async def guarded() -> Message:
            nonlocal seen
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the upload took too long") from None
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise _too_large(self._most - _OVERHEAD)
            return message

        await self._app(scope, guarded, send)


def _host(header: str) -> str | None:
    """Return the host name in a Host header without a final dot, or None if there is none."""
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".") or None
    except ValueError:
        return None
