"""Servers on this machine: one that does what web servers do to people and counts it, and an S3-compatible one."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from conftest import own_share, wait_until
from warm import ColdProcess

LONG_AGO = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class Page:
    """What is behind one path. `says`: which of "etag", "date", "now" its headers tell; "" for nothing."""

    content: bytes = b""
    status: int = 200
    says: str = "etag"
    fails: int = 0  # how many GETs are answered with 500 first
    delay: float = 0
    until: threading.Event | None = None  # what its answers wait for
    missing: int = 0  # bytes of the body that are never sent
    ranges: bool = False
    location: str = ""
    head: int = 0  # the status that HEAD gets instead


@dataclass
class Site:
    """The pages of a running server, by path, and how often each was asked for by each method."""

    address: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    headers: dict[str, str] = field(default_factory=dict)  # of the last request
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str) -> int:
        return sum(n for (each, _), n in self.requests.items() if each == method)

    def gets(self) -> dict[str, int]:
        return {path: n for (method, path), n in self.requests.items() if method == "GET"}


@contextmanager
def served() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            with site.lock:
                site.requests[self.command, self.path] += 1
                site.headers = dict(self.headers)
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
            if page.until is not None:
                page.until.wait()
            status, content = page.status, page.content
            if body and page.fails:
                page.fails -= 1
                status = 500
            if not body and page.head:
                status = page.head
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if page.ranges and wanted and status == 200:
                status, content = 206, content[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(status)
            if page.says == "etag":
                self.send_header("ETag", f'"{hashlib.md5(page.content).hexdigest()}"')
            if page.says in ("date", "now"):
                self.send_header("Last-Modified", LONG_AGO if page.says == "date" else self.date_time_string())
            if page.ranges:
                self.send_header("Accept-Ranges", "bytes")
                if status == 206 and wanted:
                    end = int(wanted[1]) + len(content) - 1
                    self.send_header("Content-Range", f"bytes {wanted[1]}-{end}/{len(page.content)}")
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


@dataclass
class Bucket:
    """A bucket of a running SeaweedFS; `environment` has what boto and fsspec look for."""

    name: str
    environment: dict[str, str]
    client: Any

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)


_PORTS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")


@contextmanager
def bucket_server(folder: Path) -> Iterator[Bucket]:
    """Run SeaweedFS on ports of the loopback interface, with its data in `folder`."""
    keys = {"accessKey": "icebox", "secretKey": "of-a-test"}
    identity = {"name": "icebox", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    for last in (False, False, False, True):  # it cannot be given open sockets, and a free port may be taken meanwhile
        ports: dict[str, int] = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        try:
            with _start_weed(folder, ports) as process:
                bucket = _bucket(process, ports["s3"], keys)
                if bucket is not None:
                    yield bucket
                    return
                assert not last, (folder / "log").read_text()
        finally:
            for name, port in ports.items():  # which it leaves behind
                Path(f"/tmp/seaweedfs-{name.replace('.', '-')}-{port}.sock").unlink(missing_ok=True)


def _start_weed(folder: Path, ports: dict[str, int]) -> ColdProcess:
    options = [
        f"-{name.replace('.grpc', '.port.grpc') if '.' in name else name + '.port'}={ports[name]}" for name in ports
    ]
    command = [
        *(Path(sys.prefix) / "bin" / "weed", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", *options),
        *("-volume.max=8", "-master.volumeSizeLimitMB=64"),
    ]
    with (folder / "log").open("wb") as log:
        return ColdProcess(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def _bucket(process: ColdProcess, port: int, keys: dict[str, str]) -> Bucket | None:
    """Return a new bucket of a server that has just been started, or None if it has ended or is never ready."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = Session().create_client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["accessKey"],
        aws_secret_access_key=keys["secretKey"],
        region_name="us-east-1",
    )
    bucket = Bucket("pictures", environment, client)

    def ready() -> bool:
        with suppress(BotoCoreError, ClientError):
            client.create_bucket(Bucket=bucket.name)
            bucket.put("ready", b"")
            return True
        return False

    with suppress(AssertionError):
        wait_until(ready, 300, process)
        return bucket
    return None


def free_ports(count: int) -> list[int]:
    """Return ports that nobody gets who asks the system for any, so that a server can have them later, or again.

    Each test process draws from numbers of its own.
    """
    numbers, found = own_share(range(20_000, 30_000)), list[socket.socket]()
    with ExitStack() as stack:
        while len(found) < count:
            with suppress(OSError):
                port = random.SystemRandom().choice(numbers)
                found.append(stack.enter_context(socket.create_server(("127.0.0.1", port))))
        return [each.getsockname()[1] for each in found]
