"""`serve`: a page and an endpoint, batched, that survive whatever is sent to them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import httpx
import numpy as np
import pytest
import warm
from conftest import TIMEOUT_S, command_line, environment, icebox, picture
from deployed import Deployed
from looked import Looked

from pipeline.deployment import idle_timeout, serve, web
from pipeline.deployment.serve import Batcher, Pixels
from pipeline.images.decoding import FULL_DEPTH

ASK: Any = {"timeout": TIMEOUT_S, "trust_env": False}
MOST = 1_000_000


@dataclass
class Service:
    """A server that runs, and the JSON object that it printed when it was ready."""

    process: warm.AnyProcess
    ready: dict[str, Any]
    err: IO[str]

    @property
    def url(self) -> str:
        return self.ready["url"]

    def predict(self, data: bytes, name: str = "image.png", **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", files={"image": (name, data)}, **ASK, **more)


@contextmanager
def started(place: Deployed, *arguments: str, uploading: bool = False, **env: str) -> Iterator[Service]:
    """Serve runs until an interrupt, which must end the server in an orderly way, even during an upload.

    Given variables of the environment, `cli.py` is started from nothing.
    """
    line = command_line(place.data, "serve", *arguments, "--port", "0", "--json")
    read, write = os.pipe()
    with os.fdopen(read) as out, tempfile.TemporaryFile("w+") as err:
        streams: dict[str, Any] = {"env": environment(**env), "stdout": write, "stderr": err}
        with warm.ColdProcess(line, **streams) if env else warm.Process(line[2:], **streams) as process:
            os.close(write)
            ready = out.readline()
            assert ready, written(err)
            service = Service(process, json.loads(ready), err)
            yield service
            with half_an_upload(service) if uploading else nullcontext():
                process.send_signal(signal.SIGINT)
                code = process.wait(TIMEOUT_S)
            assert code == 0, written(err)
        assert written(err).splitlines()[-1] == "stopped"
        assert "Traceback" not in written(err)


@contextmanager
def half_an_upload(service: Service) -> Iterator[None]:
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port))) as half:
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n"
        half.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x".encode())
        httpx.get(f"{service.url}/about", **ASK)  # which is answered after the beginning of that was read
        yield


def written(err: IO[str]) -> str:
    err.seek(0)
    return err.read()


LIMITS = ("--max-bytes", f"{MOST}", "--max-pixels", "1000000")
ALLOWED = ("--allow-host", "Pictures.Example.org", "--allow-host", "b\u00fccher.example")


@pytest.fixture(scope="module")
def service(deployed: Deployed) -> Iterator[Service]:
    names = [deployed.name("logreg"), "--also", deployed.name("finetune")]
    with started(deployed, *names, *LIMITS, *ALLOWED, uploading=True) as found:
        yield found


@pytest.fixture(scope="module")
def inception_service(deployed_inception: Deployed) -> Iterator[Service]:
    with started(deployed_inception, deployed_inception.name("gap"), *LIMITS, uploading=False) as found:
        yield found


def test_it_says_what_predict_says(deployed: Deployed, service: Service) -> None:
    names = [deployed.name("logreg"), "--also", deployed.name("finetune")]
    check_says_what_predict_says(service, deployed, *names, within=1e-5)


@pytest.mark.long  # `test_it_says_what_predict_says` asks the same of a network of 32 pixels
def test_of_inception_it_says_what_predict_says(deployed_inception: Deployed, inception_service: Service) -> None:
    names = [deployed_inception.name("gap")]
    check_says_what_predict_says(inception_service, deployed_inception, *names, within=2e-3)  # its rows are float16
    assert httpx.get(f"{inception_service.url}/about", **ASK).json()["untrained"] is True


def test_started_from_nothing_it_says_what_predict_says(deployed: Deployed) -> None:
    """With TensorFlow imported after the variables of the environment are taken away, as in a shell."""
    with started(deployed, deployed.name("gap"), TF_ENABLE_ONEDNN_OPTS="0") as service:
        check_says_what_predict_says(service, deployed, deployed.name("gap"), within=1e-5)
        assert "TF_ENABLE_ONEDNN_OPTS=0" in written(service.err)


def check_says_what_predict_says(service: Service, place: Deployed, *names: str, within: float) -> None:
    files = place.files[:3]
    expected = icebox(place.data, "predict", *names, *files, "--json").json["predictions"]
    for path, theirs in zip(files, expected, strict=True):
        response = service.predict(path.read_bytes(), path.name)
        assert response.status_code == 200
        ours = response.json()
        assert [guess["label"] for guess in ours["top"]] == [guess["label"] for guess in theirs["top"]]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=within)
        assert (ours["label"], ours["probability"]) == tuple(ours["top"][0].values())


def test_many_at_once_are_each_given_their_own_answer(deployed: Deployed, service: Service) -> None:
    contents = [path.read_bytes() for path in deployed.files]
    alone = [service.predict(data).json()["top"] for data in contents[:4]]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(service.predict, contents * 2))
    assert {response.status_code for response in together} == {200}
    for response, expected in zip(together, alone, strict=False):
        for ours, theirs in zip(response.json()["top"], expected, strict=True):
            assert ours["label"] == theirs["label"]
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


def test_it_describes_itself(deployed: Deployed, service: Service) -> None:
    about = httpx.get(f"{service.url}/about", **ASK).json()
    assert about == {
        "runs": [deployed.name("logreg"), deployed.name("finetune")],
        "classes": ["cats", "dogs"],
        "untrained": False,
        "max_bytes": MOST,
    }
    assert service.ready == {"url": service.url, "runs": about["runs"], "classes": about["classes"]}
    described = httpx.get(f"{service.url}/openapi.json", **ASK).json()
    answers = described["paths"]["/predict"]["post"]["responses"]
    assert set(answers) == {"200", "408", "413", "422", "503"}
    assert answers["413"]["content"]["application/json"]["schema"]["$ref"].endswith("Refusal")
    assert httpx.get(f"{service.url}/docs", **ASK).status_code == 404  # which would fetch from elsewhere


def jpeg() -> bytes:
    return cv2.imencode(".jpg", picture(5, 400, 400))[1].tobytes()


def bomb() -> bytes:
    """A PNG of a few kB that says it has 400 million pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


BAD: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 422, "empty file"),
    "half": (jpeg()[: len(jpeg()) // 2], 422, "JPEG cut short"),
    "text": (b"hello, I am no image\n" * 100, 422, "not an image in a supported format"),
    "pixel bomb": (bomb(), 422, "20000 x 20000 pixels, over the limit of 1,000,000"),
    "huge": (bytes(MOST + 1), 413, "the upload is larger than 1,000,000 bytes"),
    "larger still": (bytes(50 * MOST), 413, "the upload is larger than 1,000,000 bytes"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00", 422, "not an image in a supported format"),
    "page": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 422, "SVG drawing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_upload_is_told_why(service: Service, kind: str) -> None:
    data, code, text = BAD[kind]
    response = service.predict(data, "../../etc/passwd" if kind == "text" else "image.jpg")
    assert response.status_code == code, response.text
    assert text in response.json()["detail"]
    assert service.predict(jpeg()).status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b"no form at all"},
        {"json": {"image": "base64"}},
        {"data": {"image": "a field, not a file"}},
        {"files": {"picture": ("x.png", b"under another name")}},
        {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}},
    ],
)
def test_what_is_no_upload_is_told_what_is_expected(service: Service, request_: dict[str, Any]) -> None:
    response = httpx.post(f"{service.url}/predict", **ASK, **request_)
    assert 400 <= response.status_code < 500
    assert isinstance(response.json()["detail"], str)


def test_without_a_length_the_limit_holds_too(service: Service) -> None:
    def endless() -> Iterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=image; filename=x\r\n\r\n"
        for _ in range(100):
            yield bytes(MOST)

    kind = {"content-type": "multipart/form-data; boundary=x"}
    try:
        response = httpx.post(f"{service.url}/predict", content=endless(), headers=kind, **ASK)
        assert response.status_code == 413
    except httpx.TransportError:  # closed while we were still sending
        pass
    assert service.predict(jpeg()).status_code == 200


def test_a_name_from_elsewhere_does_not_lead_here(service: Service) -> None:
    """As a page does that has its own name resolve to this machine."""
    port = service.url.rpartition(":")[2]
    ours = f"localhost:{port}", "[::1]", "pictures.example.org", "PICTURES.example.org.:443", "xn--bcher-kva.example"
    for host in ours:
        assert httpx.get(f"{service.url}/about", headers={"host": host}, **ASK).status_code == 200, host
    for host in (f"evil.example:{port}", "", "example.org", "pictures.example.org.evil.example"):
        response = httpx.get(f"{service.url}/about", headers={"host": host}, **ASK)
        assert response.status_code == 421, host
        assert "--allow-host" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/about", "/openapi.json", "/predict", "/nowhere"])
def test_head_says_what_get_says_but_for_the_body(service: Service, path: str) -> None:
    request = httpx.get(f"{service.url}{path}", **ASK)
    head = httpx.head(f"{service.url}{path}", **ASK)
    assert head.status_code == request.status_code == {"/predict": 405, "/nowhere": 404}.get(path, 200)
    assert head.headers["content-length"] == request.headers["content-length"] == f"{len(request.content)}"
    assert head.content == b""


def test_an_upload_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_PATIENCE_S", 0.2)

    async def scenario() -> int:
        app = web.make_app(web.About(runs=[], classes=[], untrained=False, max_bytes=10), never, None)
        sent = list[dict[str, Any]]()

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"multipart/form-data; boundary=x")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
                 "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(scenario()) == 408


async def never(read: web.Read) -> Sequence[tuple[str, float]]:
    raise AssertionError("nothing to answer")


def test_when_too_many_wait_it_says_so() -> None:
    async def busy(read: web.Read) -> Sequence[tuple[str, float]]:
        raise web.BusyError

    app = web.make_app(web.About(runs=[], classes=[], untrained=False, max_bytes=10), busy, None)

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/predict", files={"image": b"123"})

    response = asyncio.run(scenario())
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_few_uploads_are_in_memory_and_too_many_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_MOST_WAITING", 20)
    most = serve._IN_MEMORY * serve.machine.usable_cores()
    reading, peak = 0, 0

    async def read() -> bytes:
        nonlocal reading, peak
        reading += 1
        peak = max(peak, reading)
        await asyncio.sleep(0.01)
        reading -= 1
        return b"image"

    def answer(data: bytes) -> Future[np.ndarray]:
        future = Future[np.ndarray]()
        future.set_result(np.array([0.25, 0.75], np.float32))
        return future

    async def scenario() -> list[Any]:
        with serve._Answering(answer, ["a", "b"], 1) as answering:
            return await asyncio.gather(*(answering(read) for _ in range(30)), return_exceptions=True)

    found = asyncio.run(scenario())
    assert found.count([("b", 0.75)]) == 20
    assert sum(isinstance(each, web.BusyError) for each in found) == 10
    assert 1 < peak <= most


def test_a_connection_over_which_nothing_is_asked_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a header, too; one that waits for its answer is not."""
    import uvicorn

    class Watched(idle_timeout.IdleTimeoutProtocol):
        latest: Any = None

        def connection_made(self, transport: Any) -> None:
            Watched.latest = self
            super().connection_made(transport)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(5):  # the time that passes until an answer is there
            Watched.latest._look()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(app, http=Watched, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        address = listener.getsockname()
        monkeypatch.setattr(idle_timeout, "PATIENCE_S", 0.2)
        with socket.create_connection(address) as silent, socket.create_connection(address) as half:
            half.sendall(b"GET / HTTP/1.1\r\nHo")
            for connection in (silent, half):
                connection.settimeout(TIMEOUT_S)
                assert connection.recv(100) == b""
        monkeypatch.setattr(idle_timeout, "PATIENCE_S", TIMEOUT_S)
        assert httpx.get(f"http://127.0.0.1:{address[1]}", **ASK).text == "ok"
        server.should_exit = True
        thread.join(TIMEOUT_S)


def test_names_that_are_no_text_are_spelt_out() -> None:
    assert serve.to_utf8("caf\udce9, 猫") == "caf\\udce9, 猫"


# Batches


WAY = (8, "squash", FULL_DEPTH)


def one(value: int) -> Pixels:
    return {WAY: np.full((1,), value)}


def test_what_waits_meanwhile_is_answered_together() -> None:
    sizes, go = list[int](), threading.Event()

    def answer(batch: Sequence[Pixels]) -> np.ndarray:
        go.wait(TIMEOUT_S)
        sizes.append(len(batch))
        return np.stack([pixels[WAY] * 2 for pixels in batch])

    with Batcher(answer) as batcher:
        futures = [batcher(one(i)) for i in range(100)]
        go.set()
        assert [int(future.result(TIMEOUT_S)[0]) for future in futures] == [2 * i for i in range(100)]
    assert sum(sizes) == 100
    assert max(sizes) == 32


def test_an_error_belongs_to_those_who_asked() -> None:
    def answer(batch: Sequence[Pixels]) -> np.ndarray:
        if any(pixels[WAY][0] == 13 for pixels in batch):
            raise ValueError("thirteen")
        return np.stack([pixels[WAY] for pixels in batch])

    with Batcher(answer) as batcher:
        with pytest.raises(ValueError, match="thirteen"):
            batcher(one(13)).result(TIMEOUT_S)
        assert batcher(one(5)).result(TIMEOUT_S)[0] == 5


# The command


def test_a_port_that_is_taken_is_told(deployed: Deployed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = icebox(deployed.data, "serve", deployed.name("logreg"), "--port", port)
    assert done.code == 1
    assert f"nothing can be served at 127.0.0.1 port {port} (Address already in use)" in done.err
    assert "loading" not in done.err  # before anything takes time


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--host", ""), "--host takes an address or a name"),
        (("--max-bytes", "0"), "--max-bytes must be at least 1"),
        (("--allow-host", "https://images.example.org"), "--allow-host takes the name of a host"),
        (("--allow-host", "*.example.org"), "--allow-host takes the name of a host"),
    ],
)
def test_wrong_use(deployed: Deployed, arguments: tuple[str, ...], text: str) -> None:
    done = icebox(deployed.data, "serve", deployed.name("logreg"), *arguments)
    assert (done.code, text in done.err) == (2, True), done.err


def test_missing_packages_are_named_with_their_extra(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.machine.importlib.util, "find_spec", lambda name: None)
    with (
        deployed.workspace() as workspace,
        pytest.raises(
            ValueError, match="serve needs fastapi and uvicorn and python-multipart: make setup EXTRAS=serve"
        ),
    ):
        serve.serve([], workspace, host="127.0.0.1", port=0, top=1, max_bytes=1, max_pixels=1)


def test_without_a_folder_for_uploads_it_does_not_begin(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(serve.tempfile, "gettempdir", none)
    with deployed.workspace() as workspace, pytest.raises(FileNotFoundError, match="usable temporary directory"):
        serve.serve([], workspace, host="127.0.0.1", port=0, top=1, max_bytes=1, max_pixels=1)


def test_the_page_in_a_browser(
    deployed_inception: Deployed, inception_service: Service, tmp_path: Path, browser: Any
) -> None:
    """Images dropped by hand, chosen and bad ones; nothing is fetched from elsewhere, and nothing complains."""
    (bad := tmp_path / "x.jpg").write_text("no image")
    service, files = inception_service, deployed_inception.files
    look = Looked(browser, service.url)
    page = look.page
    page.get_by_text("2 classes, on UNTRAINED weights").wait_for()
    name, content = "<b>bold</b>.png", list(files[0].read_bytes())
    page.evaluate(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], name));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
        }""",
        [name, content],
    )
    card = page.locator("#answers > li")
    card.locator("ol li").nth(1).wait_for()
    assert card.locator(".name").inner_text() == name  # text, not markup
    answer = service.predict(files[0].read_bytes()).json()
    first = card.locator("ol li").first.inner_text().split("\n")
    assert first == [answer["label"], f"{100 * answer['probability']:.1f} %"]
    look.check_quiet(service.url, "blob:")
    page.set_input_files("#pick", [str(files[1]), str(bad)])
    page.locator("#answers > li", has_text="not an image in a supported format").wait_for()
    page.locator("#answers > li ol").nth(1).wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pick"
    assert all(url.startswith((service.url, "blob:", "data:")) for url in look.requests)
