"""Images behind addresses: fetched once, told from others by what servers say, failures listed and tried again."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import cv2
import numpy as np
import pytest
from cached import counts
from conftest import ROOT, command_line, environment, picture, wait_until
from own_networks import StandIn
from served import Bucket, Page, Site, bucket_server, served

import pipeline.extraction.shard_task
from pipeline.cache.digests import identify
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError, MissingRowsError, UsageError
from pipeline.core.hashing import image_key
from pipeline.dataset import Dataset, open_dataset, open_images, refusal, remote
from pipeline.extraction.compute import ComputeOptions
from pipeline.extraction.explain import explain
from pipeline.extraction.extract import Extraction, extract
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images.loader import Loader
from pipeline.training.image_batches import ImageRows, open_decoder
from pipeline.training.labelled_features import join_features, join_images

UNTRAINED = FeatureChoice(weights="untrained", precision="float32")
LISTED = ("features", "--weights", "untrained", "--precision", "float32")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network takes long, and no pause either; what a test opened is closed with it."""
    monkeypatch.setattr(pipeline.extraction.shard_task, "FrozenBackbone", StandIn)
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setattr(remote, "SILENCE", 600)  # a late answer is no lost one
    monkeypatch.setattr(StandIn, "computed", 0)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "_only", remote._State(os.getpid()))
    yield


@pytest.fixture
def site() -> Iterator[Site]:
    with served() as site:
        yield site


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with bucket_server(tmp_path_factory.mktemp("store")) as bucket:
        yield bucket


@pytest.fixture
def bucket(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket on a server of its own, which the environment names as any S3-compatible one is named."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store


def png(seed: int) -> bytes:
    return cv2.imencode(".png", picture(seed))[1].tobytes()


def manifest(path: Path, names: list[str], label: Callable[[int], str] = lambda i: "ab"[i % 2]) -> Dataset:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((name, label(i)) for i, name in enumerate(names))])
    return open_dataset(str(path), downloads=path.parent)


def features(dataset: Dataset, workspace: Workspace, **options: Any) -> Extraction:
    return extract(dataset, workspace, UNTRAINED, ComputeOptions(shard_rows=8, batch_size=4), **options)


# What an address is


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("https://host/a b.jpg?x=1", "https://host/a b.jpg?x=1"),
        ("http://[::1]:8000/a.jpg", "http://[::1]:8000/a.jpg"),
        ("s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("zip://in/a.jpg::b.zip", "zip://in/a.jpg::/root/b.zip"),
        ("zip://a.jpg::/root/x/../b.zip", "zip://a.jpg::/root/b.zip"),
        ("tar://a.jpg::file:///root/b.tar", "tar://a.jpg::/root/b.tar"),
        ("zip://a.jpg::s3://bucket/b.zip", "zip://a.jpg::s3://bucket/b.zip"),
    ],
)
def test_what_is_read_from_an_address(url: str, resolved: str) -> None:
    assert remote.is_url(url)
    assert remote.resolve(url, "/root") == resolved


@pytest.mark.parametrize("path", ["a.jpg", "/a/b.jpg", "a:/b.jpg", "c:\\a.jpg", "a::b.jpg", "über//b.jpg"])
def test_a_path_is_no_address(path: str) -> None:
    assert not remote.is_url(path)


REFUSED = {
    "file:///etc/passwd": "an address by one of http, https, s3,",
    "local:///etc/passwd": "an address by one of",
    "memory://x": "an address by one of",
    "github://owner:name@/a.png": "an address by one of",
    "simplecache::s3://bucket/a.png": "an address by one of",
    "http://": "an address by one of",
    "zip://x::/etc/x.zip": "an archive inside",
    "zip://x::../x.zip": "an archive inside",
    "zip://x::file:///etc/x.zip": "an archive inside",
    "zip://x::memory://x.zip": "an address by one of",
    "zip://x::zip://y::https://host/z.zip": "an archive that lies in no other",
    "zip://x": "an archive behind its member",
    "https://host/\x1b[31m": "printable",
}


@pytest.mark.parametrize("url", REFUSED)
def test_other_addresses_are_refused_when_they_are_listed(url: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"line 3: expected .*{REFUSED[url]}"):
        manifest(tmp_path / "list.csv", ["a.png", url])


def test_an_address_given_by_hand_may_name_any_archive_but_no_other_protocol(tmp_path: Path) -> None:
    found = open_images([f"zip://a.png::{tmp_path}/x.zip", "https://host/a.png"])
    assert list(found.urls()) == [f"zip://a.png::{tmp_path}/x.zip", "https://host/a.png"]
    with pytest.raises(DatasetError, match=r"expected .*an address by one of .*, found 'memory://x'"):
        open_images(["memory://x"])


def test_a_package_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote._PACKAGES, "s3", ("s3-client-nobody-has", True))
    with pytest.raises(UsageError, match=r"^s3:// needs s3-client-nobody-has: make setup EXTRAS=remote$"):
        manifest(tmp_path / "list.csv", ["zip://a.png::s3://bucket/a.zip"])
    monkeypatch.setitem(remote._PACKAGES, "az", ("nobody_has", False))
    with pytest.raises(UsageError, match=r"^az:// needs nobody_has: .*pip install nobody_has$"):
        manifest(tmp_path / "list.csv", ["az://container/a.png"])


# One address


def test_what_is_fetched_and_by_what_it_is_known(site: Site) -> None:
    site.pages["/a.png"] = Page(b"bytes")
    fetched = remote.fetch(f"{site.address}/a.png")
    assert fetched.data == b"bytes"
    assert fetched.validator is not None
    assert remote.validator(f"{site.address}/a.png") == fetched.validator
    assert site.requests == {("GET", "/a.png"): 1, ("HEAD", "/a.png"): 1}
    site.pages["/a.png"] = Page(b"other")
    assert remote.validator(f"{site.address}/a.png") not in (None, fetched.validator)


@pytest.mark.parametrize(("says", "known"), [("etag", True), ("date", True), ("now", False), ("", False)])
def test_only_what_changes_with_the_content_counts(site: Site, says: str, known: bool) -> None:
    site.pages["/a"] = Page(b"x", says=says)
    assert (remote.fetch(f"{site.address}/a").validator is not None) == known
    assert (remote.validator(f"{site.address}/a") is not None) == known


def test_where_head_is_not_answered_the_headers_of_get_do(site: Site) -> None:
    """As with addresses that were signed for GET."""
    site.pages["/a"] = Page(b"x" * 10_000_000, head=403)
    assert remote.validator(f"{site.address}/a") == remote.fetch(f"{site.address}/a").validator


@pytest.mark.parametrize(
    ("page", "cause", "gets"),
    [
        (Page(status=404), "HTTP 404 Not Found", 1),
        (Page(status=403), "HTTP 403 Forbidden", 1),
        (Page(status=401), "HTTP 401 Unauthorized", 1),
        (Page(status=500), "HTTP 500 Internal Server Error", 3),
        (Page(status=429), "HTTP 429 Too Many Requests", 3),
        (Page(b"x", delay=60), "timed out after 0.5 s", 3),
        (Page(b"x" * 100, missing=1), "connection lost", 3),
        (Page(status=302, location="file:///etc/passwd"), "redirects to another protocol", 1),
        (Page(status=302, location="/page"), "too many redirects", 10),
    ],
)
def test_what_goes_wrong_is_named_without_the_address(
    site: Site, page: Page, cause: str, gets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.delay:
        monkeypatch.setattr(remote, "SILENCE", 0.5)
    site.pages["/page"] = page
    with pytest.raises(OSError) as caught:
        remote.fetch(f"{site.address}/page")
    assert str(caught.value) == cause
    assert site.requests["GET", "/page"] == gets


def test_what_passes_is_tried_again(site: Site) -> None:
    site.pages["/a"] = Page(b"x", fails=2)
    assert remote.fetch(f"{site.address}/a").data == b"x"
    assert site.requests["GET", "/a"] == 3


def test_the_users_own_configuration_counts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSSPEC_HTTP_CLIENT_KWARGS sets it."""
    from fsspec.config import conf

    monkeypatch.setitem(conf, "http", {"client_kwargs": {"headers": {"If-Match": "mine"}}})
    site.pages["/a"] = Page(b"x")
    assert remote.fetch(f"{site.address}/a").data == b"x"
    assert site.headers["If-Match"] == "mine"


def test_a_refused_connection_and_an_unknown_host_are_named() -> None:
    with pytest.raises(OSError, match=r"^connection refused$"):
        remote.fetch("http://127.0.0.1:9/a.png")
    assert str(refusal.failure(socket.gaierror(-2, "Name or service not known"), 30)) == "no such host"


def test_a_body_beyond_the_limit_is_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LARGEST", 1000)
    site.pages["/a"] = Page(bytes(1001))
    with pytest.raises(OSError, match=r"^more than 1,000 bytes$"):
        remote.fetch(f"{site.address}/a")
    assert site.requests["GET", "/a"] == 1


def test_no_more_requests_at_once_than_are_allowed(site: Site) -> None:
    three_ask = threading.Event()
    site.pages["/a"] = Page(b"x", delay=0.05, until=three_ask)
    remote.limit_connections(3)
    found = once(lambda: site.at_once == 3, three_ask)
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda _: remote.fetch(f"{site.address}/a").data, range(24))) == {b"x"}
    assert (found, site.most_at_once) == ([True], 3)


# Archives


def archive(kind: str, members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as made:
            for name, content in members.items():
                made.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w") as made:
            for name, content in members.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                made.addfile(about, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_of_archives_are_read_here_and_elsewhere(site: Site, kind: str, tmp_path: Path) -> None:
    members = {f"in/{i}.png": png(i) for i in range(8)}
    content = archive(kind, members)
    (tmp_path / f"x.{kind}").write_bytes(content)
    site.pages["/x"] = Page(content, ranges=True)
    for place in (str(tmp_path / f"x.{kind}"), f"{site.address}/x"):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: remote.fetch(f"{kind}://{name}::{place}").data, members))  # noqa: B023
        assert found == list(members.values())
        with pytest.raises(OSError, match=r"^no such object$"):
            remote.fetch(f"{kind}://in/9.png::{place}")
    assert site.count("GET") < len(members)  # parts of it that hold many


def test_a_file_that_is_no_archive_or_lacks_the_member_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"text" * 1000)
    with pytest.raises(OSError, match=r"^not a whole archive$"):
        remote.fetch(f"zip://a::{tmp_path}/x.zip")
    with pytest.raises(OSError, match=r"^no such object$"):
        remote.fetch(f"zip://a::{tmp_path}/none.zip")
    site.pages["/x.zip"] = Page(archive("zip", {"a": b"x" * 100}))  # of which there are no parts to be had
    with pytest.raises(OSError, match="its server gives no parts"):
        remote.fetch(f"zip://a::{site.address}/x.zip")


def test_a_member_that_unpacks_to_more_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.png", bytes(100_000))
    with pytest.raises(OSError, match=r"^more than 1,000 bytes$"):
        remote.fetch(f"zip://a.png::{tmp_path}/bomb.zip")


def test_an_archive_that_was_exchanged_is_opened_anew(site: Site, workspace: Workspace, tmp_path: Path) -> None:
    site.pages["/x.zip"] = Page(archive("zip", {"a.png": png(1), "b.png": png(2)}), ranges=True)
    dataset = manifest(tmp_path / "list.csv", [f"zip://{name}.png::{site.address}/x.zip" for name in "ab"])
    assert counts(features(dataset, workspace)) == (2, 0, 0, 0)
    site.requests.clear()
    assert counts(features(dataset, workspace)) == (0, 2, 0, 0)
    assert site.requests == {("HEAD", "/x.zip"): 1}
    site.pages["/x.zip"] = Page(archive("zip", {"a.png": png(1), "b.png": png(3)}), ranges=True)
    assert counts(features(dataset, workspace)) == (1, 1, 0, 0)


# Datasets


def test_addresses_that_fail_are_named_and_tried_again_and_nothing_else_is(
    site: Site, workspace: Workspace, tmp_path: Path
) -> None:
    """Cached + failed = rows; causes named; nothing fetched twice; what failed is tried again, and nothing else."""
    for i in range(60):
        site.pages[f"/{i}.png"] = Page(png(i), says=("etag", "date")[i % 2])
    site.pages["/7.png"] = Page(status=404)
    site.pages["/27.png"] = Page(status=403)
    site.pages["/47.png"] = Page(png(47), missing=1)
    site.pages["/50.png"].fails = 1
    site.pages["/51.png"].content = b"no image"
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(60)])
    done = features(dataset, workspace)
    assert counts(done) == (56, 0, 0, 4)
    assert Counter(bad.reason.partition(" (")[0] for bad in done.quarantined) == {
        "cannot be read: HTTP 404 Not Found": 1,
        "cannot be read: HTTP 403 Forbidden": 1,
        "cannot be read: connection lost": 1,
        "not an image in a supported format": 1,
    }
    assert {path: n for path, n in site.gets().items() if n != 1} == {"/47.png": 3, "/50.png": 2}

    site.requests.clear()
    site.pages["/27.png"] = Page(png(27))
    shown = StandIn.computed
    assert counts(features(dataset, workspace)) == (1, 56, 0, 3)
    assert site.gets() == {"/7.png": 1, "/27.png": 1, "/47.png": 3}
    assert StandIn.computed == shown + 1


def test_the_rows_are_those_of_the_same_files(site: Site, workspace: Workspace, tmp_path: Path) -> None:
    """An address and a file with the same bytes are one image, whichever comes first."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        site.pages[f"/{i}.png"] = Page(png(i))
    here = manifest(tmp_path / "here.csv", [f"{i}.png" for i in range(6)])
    there = manifest(tmp_path / "there.csv", [f"{site.address}/{i}.png" for i in range(6)])
    assert counts(features(here, workspace)) == (6, 0, 0, 0)
    shown = StandIn.computed
    assert counts(features(there, workspace)) == (0, 6, 0, 0)
    assert set(site.gets().values()) == {1}
    moved = manifest(tmp_path / "moved.csv", [f"{site.address}/{i}.png?moved" for i in range(6)])
    site.pages |= {f"{path}?moved": page for path, page in site.pages.items()}
    found = extract(moved, workspace, FeatureChoice(), ComputeOptions())  # which says nothing of the space
    assert counts(found) == (0, 6, 0, 0)
    assert set(site.gets().values()) == {1}
    mixed = manifest(tmp_path / "mixed.csv", ["0.png", f"{site.address}/0.png", f"{site.address}/9.png", "1.png"])
    site.pages["/9.png"] = Page(png(9))
    assert counts(features(mixed, workspace)) == (1, 2, 1, 0)
    assert StandIn.computed == shown + 1


def test_copies_behind_addresses_nobody_has_read_are_computed_once(
    site: Site, workspace: Workspace, tmp_path: Path
) -> None:
    for i in range(12):
        site.pages[f"/{i}.png"] = Page(png(i % 3))
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in (*range(12), 5, 5, 99, 99)])
    assert counts(features(dataset, workspace)) == (3, 0, 11, 2)
    assert StandIn.computed == 3
    assert set(site.gets().values()) == {1}


@pytest.mark.parametrize("says", ["etag", "date", ""])
def test_content_that_changed_is_computed_anew(site: Site, workspace: Workspace, tmp_path: Path, says: str) -> None:
    for i in range(4):
        site.pages[f"/{i}.png"] = Page(png(i), says=says)
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(4)])
    assert counts(features(dataset, workspace)) == (4, 0, 0, 0)
    site.requests.clear()
    assert counts(features(dataset, workspace)) == (0, 4, 0, 0)
    assert site.count("GET") == (0 if says else 4)  # without a mark it must be looked at
    if says == "date":
        return  # which does not change here
    site.pages["/2.png"] = Page(png(77), says=says)
    assert counts(features(dataset, workspace)) == (1, 3, 0, 0)


def test_a_server_that_is_gone_costs_no_row_and_no_memory_of_it(
    site: Site, workspace: Workspace, tmp_path: Path
) -> None:
    for i in range(3):
        site.pages[f"/{i}.png"] = Page(png(i))
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(3)])
    features(dataset, workspace)
    pages, site.pages = site.pages, {path: Page(status=503) for path in site.pages}
    done = features(dataset, workspace)
    assert counts(done) == (0, 0, 0, 3)
    assert {bad.reason for bad in done.quarantined} == {"cannot be read: HTTP 503 Service Unavailable"}
    site.pages = pages
    site.requests.clear()
    assert counts(features(dataset, workspace)) == (0, 3, 0, 0)
    assert site.count("GET") == 0


def once(condition: Callable[[], bool], event: threading.Event) -> list[bool]:
    """Set the event once the condition holds, or after five minutes; append True to the returned list if it held."""
    found = list[bool]()

    def wait() -> None:
        try:
            found.append(wait_until(condition, 300))
        finally:
            event.set()

    threading.Thread(target=wait, daemon=True).start()
    return found


def test_one_that_hangs_holds_up_no_other(site: Site, tmp_path: Path) -> None:
    others_came, loaded, ahead = threading.Event(), list[int](), 4
    for i in range(40):
        site.pages[f"/{i}.png"] = Page(png(i), until=others_came if i % 4 == 0 else None)
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(40)])
    found = once(lambda: len(loaded) == 30 - ahead, others_came)
    with ThreadPoolExecutor(2) as pool, Loader(dataset, 32, "squash", 10**6) as loader:
        for image in loader.stream(pool, range(40), lambda image: image, ahead):
            loaded.append(image.i)
    assert found == [True]
    assert sorted(loaded) == list(range(40))
    assert all(i % 4 for i in loaded[: 30 - ahead])


def patient_with(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """Have nothing that this server sends count as lost, whatever SILENCE says: on a busy machine it is late."""
    get = remote._get

    def get_patiently(system: Any, url: str) -> Any:
        if not url.startswith(site.address):
            return get(system, url)
        kwargs = {**system.kwargs, "timeout": aiohttp.ClientTimeout(total=600)}
        return get(SimpleNamespace(set_session=system.set_session, encode_url=system.encode_url, kwargs=kwargs), url)

    monkeypatch.setattr(remote, "_get", get_patiently)


def test_those_that_hang_are_named_and_the_rows_of_all_others_kept(
    site: Site, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served() as silent:
        urls = [f"{(silent if i in (0, 7) else site).address}/{i}.png" for i in range(12)]
        for i, url in enumerate(urls):
            hangs = url.startswith(silent.address)
            (silent if hangs else site).pages[f"/{i}.png"] = Page(png(i), delay=300 if hangs else 0)
        dataset = manifest(tmp_path / "list.csv", urls)
        with monkeypatch.context() as patch:
            patch.setattr(remote, "SILENCE", 0.5)
            patient_with(patch, site)
            done = features(dataset, workspace)
        assert counts(done) == (10, 0, 0, 2)
        assert [bad.path for bad in done.quarantined] == [urls[0], urls[7]]
        assert {bad.reason for bad in done.quarantined} == {"cannot be read: timed out after 0.5 s"}
        assert set(site.gets().values()) == {1}
        for page in silent.pages.values():
            page.delay = 0
        site.requests.clear()
        monkeypatch.setattr(remote, "_only", remote._State(os.getpid()))  # whose connections are patient
        assert counts(features(dataset, workspace)) == (2, 10, 0, 0)
    assert site.count("GET") == 0


def test_what_lies_far_away_is_read_by_many_threads_and_few_decode(site: Site, tmp_path: Path) -> None:
    all_ask = threading.Event()
    for i in range(64):
        site.pages[f"/{i}.png"] = Page(png(i), until=all_ask)
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(64)])
    found = once(lambda: site.at_once == remote.DEFAULT_CONNECTIONS, all_ask)
    with ThreadPoolExecutor(2) as pool, Loader(dataset, 32, "squash", 10**6) as loader:
        keys = {image.i: image.key for image in loader.stream(pool, range(64), lambda image: image, ahead=4)}
    assert keys == {i: image_key(png(i)) for i in range(64)}
    assert found == [True]
    assert site.most_at_once == remote.DEFAULT_CONNECTIONS


def test_read_ahead_stays_within_bounds(site: Site, tmp_path: Path) -> None:
    begun = list[int]()
    for i in range(200):
        site.pages[f"/{i}.png"] = Page(png(1))
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(200)])
    remote.limit_connections(4)
    with ThreadPoolExecutor(2) as pool, Loader(dataset, 32, "squash", 10**6) as loader:
        stream = loader.stream(pool, (begun.append(i) or i for i in range(200)), lambda image: image, ahead=2)
        next(stream)
        assert len(begun) <= 1 + 2 + 2 * 4
        wait_until(lambda: site.count("GET") >= len(begun), 300)
        stream.close()
        assert site.count("GET") == len(begun)


def test_a_source_with_addresses_can_be_sent_to_another_process(site: Site, tmp_path: Path) -> None:
    site.pages["/a.png"] = Page(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/a.png", "b.png"])
    assert dataset.read(0) == png(1)  # connections are open now
    script = (
        "import pickle, sys; source = pickle.load(sys.stdin.buffer); "
        "sys.stdout.buffer.write(source.read(0) + source.read(1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(dataset.source),
        capture_output=True,
        env=environment(no_proxy="127.0.0.1"),
        cwd=ROOT,
        timeout=300,
    )
    assert done.stdout == png(1) + png(2), done.stderr
    assert (dataset.path(0), dataset.path(1), dataset.url(1)) == (None, tmp_path / "b.png", None)


# An S3-compatible server


def test_images_of_a_bucket_are_fetched_once_and_known_by_their_etags(
    bucket: Bucket, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of a bucket, one of them in an archive: fetched once, known by their ETags, changed, and gone."""
    for i in range(10):
        bucket.put(f"in/{i}.png", png(i))
    bucket.put("x.zip", archive("zip", {f"{i}.png": png(i) for i in range(20, 24)}))
    names = [f"s3://{bucket.name}/in/{i}.png" for i in range(12)]
    names += [f"zip://{i}.png::s3://{bucket.name}/x.zip" for i in range(20, 24)]
    dataset = manifest(tmp_path / "list.csv", [*names, "s3://no-such-bucket/a.png"])
    done = features(dataset, workspace)
    assert counts(done) == (14, 0, 0, 3)
    assert {bad.reason for bad in done.quarantined} == {"cannot be read: no such object"}
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_fetch", lambda url: pytest.fail(f"{url} was fetched") if "in/1" not in url else _gone())
        again = features(manifest(tmp_path / "again.csv", names), workspace)
    assert counts(again) == (0, 14, 0, 2)
    bucket.put("in/3.png", png(33))
    bucket.put("in/11.png", png(11))
    assert counts(features(dataset, workspace)) == (2, 13, 0, 2)


def _gone() -> remote.Fetched:
    raise FileNotFoundError


def test_a_bucket_that_is_not_ours_is_named_as_such(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a.png", png(1))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(OSError, match=r"^access denied$"):
        remote.fetch(f"s3://{bucket.name}/a.png")
    with pytest.raises(OSError, match=r"^access denied$"):
        remote.validator(f"s3://{bucket.name}/a.png")


# Others than `features`


def test_what_is_not_fetched_lacks_its_rows(site: Site, workspace: Workspace, tmp_path: Path) -> None:
    for i in range(4):
        site.pages[f"/{i}.png"] = Page(png(i))
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(4)])
    with pytest.raises(MissingRowsError, match=r"^4 of 4 images have no features"):
        join_features(dataset, workspace, UNTRAINED, 10**6)
    assert [image.state for image in explain(dataset, workspace, UNTRAINED, 10**6).images] == ["new"] * 4
    assert site.count("GET") == 0
    features(dataset, workspace)
    site.pages["/3.png"] = Page(png(9))
    site.requests.clear()
    explained = explain(dataset, workspace, UNTRAINED, 10**6)
    assert [image.state for image in explained.images] == ["cached"] * 3 + ["changed"]
    assert site.count("GET") == 0
    with pytest.raises(MissingRowsError, match=r"^1 of 4 images has no features"):
        join_features(dataset, workspace, UNTRAINED, 10**6)
    assert site.gets() == {"/3.png": 1}  # it might not be to be had, and then lack nothing
    for page in (Page(status=404), Page(png(9), missing=1)):
        site.pages["/3.png"] = page
        assert len(join_features(dataset, workspace, UNTRAINED, 10**6).keys) == 3
    site.pages["/3.png"] = Page(png(3))
    assert len(join_features(dataset, workspace, UNTRAINED, 10**6).keys) == 4


def test_images_to_train_on_are_fetched_once_to_be_checked(site: Site, workspace: Workspace, tmp_path: Path) -> None:
    for i in range(6):
        site.pages[f"/{i}.png"] = Page(png(i))
    site.pages["/6.png"] = Page(b"no image")
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(7)])
    images = join_images(dataset, workspace, 10**6, "squash")
    assert images.keys == [image_key(png(i)) for i in range(6)]
    assert [bad.path for bad in images.quarantined] == [f"{site.address}/6.png"]
    assert set(site.gets().values()) == {1}
    with open_decoder(dataset, images.keys, images.usable, 32, "squash", 10**6) as source:
        some = ImageRows(source, np.arange(6))
        assert np.array_equal(some[np.array([4, 1])], some[np.array([1, 4])][::-1])


def test_whoever_needs_all_keys_reads_what_nobody_read(site: Site, workspace: Workspace, tmp_path: Path) -> None:
    site.pages = {"/a.png": Page(png(1)), "/b.png": Page(png(1))}
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{name}.png" for name in "aab"])
    found = identify(dataset, workspace.cache.index, lambda n: None)
    assert found.keys == [image_key(png(1))] * 3
    assert set(site.gets().values()) == {1}
    site.requests.clear()
    assert identify(dataset, workspace.cache.index, lambda n: None).keys == found.keys
    assert site.count("GET") == 0


# The command line


def test_a_second_run_fetches_nothing_and_starts_no_tensorflow(
    site: Site, workspace: Workspace, tmp_path: Path
) -> None:
    """In its own process; the first failure of a kind is named, all of them counted."""
    for i in range(30):
        site.pages[f"/{i}.png"] = Page(png(i))
    for i in range(3):
        site.pages[f"/{i}.png"] = Page(status=404)
    dataset = manifest(tmp_path / "list.csv", [f"{site.address}/{i}.png" for i in range(30)])
    features(dataset, workspace)
    site.requests.clear()
    arguments = command_line(tmp_path / "data", *LISTED, "--dataset", tmp_path / "list.csv", "--json")[2:]
    script = (
        "import sys, cli; code = cli.main(sys.argv[1:]);"
        "print([name for name in ('tensorflow', 'keras') if name in sys.modules]); sys.exit(code)"
    )
    env = environment(no_proxy="127.0.0.1")
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)
    result, modules = done.stdout.splitlines()
    told = json.loads(result)
    assert (told["computed"], told["reused"], told["quarantined"], done.returncode) == (0, 27, 3, 3)
    assert told["causes"] == {"cannot be read: HTTP 404 Not Found": 3}
    assert modules == "[]"
    assert site.gets() == {f"/{i}.png": 1 for i in range(3)}
    assert "3 cannot be read: HTTP 404 Not Found" in done.stderr
