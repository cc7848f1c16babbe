"""A web server on this machine that does what servers do to people, and counts what it is asked."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LONG_AGO = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class Page:
    """What is behind one path. `says`: which of "etag", "date", "now" its headers tell; "" for nothing."""

    content: bytes = b""
    status: int = 200
    says: str = "etag"
    fails: int = 0  # how many GETs are answered with 500 first
    delay: float = 0
    missing: int = 0  # bytes of the body that are never sent
    ranges: bool = False
    location: str = ""
    head: int = 0  # the status that HEAD gets instead


@dataclass
class Site:
    """The pages of a running server, by path, and how often each was asked for by each method."""

    address: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str) -> int:
        return sum(n for (each, _), n in self.asked.items() if each == method)

    def gets(self) -> dict[str, int]:
        return {path: n for (method, path), n in self.asked.items() if method == "GET"}


@contextmanager
def served() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            with site.lock:
                site.asked[self.command, self.path] += 1
                site.at_once += 1
                site.most_at_once = max(site.most_at_once, site.at_once)
            try:
                self.send_page(site.pages.get(self.path, Page(status=404)), body)
            finally:
                with site.lock:
                    site.at_once -= 1

        def send_page(self, page: Page, body: bool) -> None:
            if site.stopped.wait(page.delay):
                return
            status, content = page.status, page.content
            if body and page.fails:
                page.fails -= 1
                status = 500
            if not body and page.head:
                status = page.head
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if page.ranges and wanted and status == 200:
                start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
                status, content = 206, content[start:end]
            self.send_response(status)
            if page.says == "etag":
                self.send_header("ETag", f'"{hashlib.md5(page.content).hexdigest()}"')
            if page.says in ("date", "now"):
                self.send_header("Last-Modified", LONG_AGO if page.says == "date" else self.date_time_string())
            if page.ranges:
                self.send_header("Accept-Ranges", "bytes")
                if status == 206 and wanted:
                    self.send_header("Content-Range", f"bytes {wanted[1]}-{end - 1}/{len(page.content)}")
            if page.location:
                self.send_header("Location", page.location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) - page.missing])
            if page.missing:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
