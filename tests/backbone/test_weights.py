"""Which weights the backbone gets: the published file or none, a file by its hash, or a recipe and a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.backbone.source import find, of_row
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE, Backbone
from pipeline.backbone.weights import Weights, describe, find_by_identity, find_imagenet, resolve
from pipeline.cache.digests import file_stamp
from pipeline.cache.index import Index
from pipeline.cache.workspace import open_workspace
from pipeline.core.errors import SpecError, UsageError, WeightsError
from pipeline.extraction.feature_choice import FeatureChoice, ResolvedChoice

PUBLISHED = b"what the weights file on the net holds" * 100
WRONG = b"what somebody else put under its name!" * 100
FILE = BACKBONES[DEFAULT_BACKBONE].weights_file
UNHASHED = "mobilenet_v2"
UNHASHED_FILE = BACKBONES[UNHASHED].weights_file
NOTE = f"{UNHASHED_FILE}.sha256"


def identity(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass
class Place:
    """Where weights are looked for, in this test only."""

    index: Index
    downloads: Path
    keras_models: Path

    def find(self, name: str) -> Weights | None:
        return find_by_identity(name, DEFAULT_BACKBONE, self.downloads, self.index)

    def resolve(self, choice: str, *, offline: bool = False, backbone: str = DEFAULT_BACKBONE) -> Weights:
        return resolve(choice, backbone, self.downloads, self.index, offline=offline)

    @property
    def downloaded(self) -> list[str]:
        return sorted(path.name for path in self.downloads.iterdir()) if self.downloads.exists() else []


@dataclass
class Server:
    """A web server on this machine: answers with `content` and notes what was asked."""

    content: bytes = PUBLISHED
    cut_at: int | None = None  # where the line breaks
    request: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: object) -> None:
        self.answers = server
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        self.answers.request.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answers.content)))
        self.end_headers()
        self.wfile.write(self.answers.content[: self.answers.cut_at])

    def log_message(self, format: str, *args: object) -> None:
        pass


def set_url(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """Let the weights be published at a server on this machine: InceptionV3's with a hash, MobileNetV2's without."""
    for name, published in {DEFAULT_BACKBONE: f"md5:{hashlib.md5(PUBLISHED).hexdigest()}", UNHASHED: None}.items():
        url = f"{server}/{BACKBONES[name].weights_file}"
        row = dataclasses.replace(BACKBONES[name], weights_url=url, weights_hash=published)
        monkeypatch.setitem(BACKBONES, name, row)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Empty folders, and a backbone whose weights are published at an address where nobody answers."""
    set_url(monkeypatch, "http://127.0.0.1:9")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "keras" / "models").mkdir(parents=True)
    index = Index(tmp_path / "cache.db")
    yield Place(index, tmp_path / "downloads", tmp_path / "keras" / "models")
    index.close()


@pytest.fixture
def server(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The published address answers."""
    answers = Server()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, answers)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        set_url(monkeypatch, f"http://127.0.0.1:{http.server_address[1]}")
        yield answers
        http.shutdown()
        thread.join()


def row() -> Backbone:
    return BACKBONES[DEFAULT_BACKBONE]


def put(path: Path, content: bytes = PUBLISHED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Untrained


@pytest.mark.parametrize(
    ("choice", "seed"),
    [("untrained", 0), ("untrained:7", 7), ("untrained:0", 0), ("untrained:", 0), ("untrained:007", 7)],
)
def test_untrained_weights_are_known_by_recipe_and_seed(place: Place, choice: str, seed: int) -> None:
    weights = place.resolve(choice)
    assert weights == Weights("untrained", f"untrained:glorot_centred_1:{seed}", None)
    assert weights.label == "untrained"


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", " ", "7:7", "²"])
def test_a_seed_that_is_no_whole_number_is_wrong_usage(place: Place, seed: str) -> None:
    with pytest.raises(UsageError, match="untrained:SEED"):
        place.resolve(f"untrained:{seed}")


# A file


@pytest.mark.parametrize("name", ["mine.h5", "mine.weights.h5", "caf\udce9.h5"])
def test_a_file_is_known_by_its_hash(place: Place, tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, b"mine")
    assert place.resolve(str(path)) == Weights("file", identity(b"mine"), path)
    assert place.resolve(str(path)).label == name


def test_a_file_under_another_name_is_the_same_weights(place: Place, tmp_path: Path) -> None:
    first, second = put(tmp_path / "a.h5", b"mine"), put(tmp_path / "b.h5", b"mine")
    assert place.resolve(str(first)).identity == place.resolve(str(second)).identity


def test_a_tilde_is_home(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = put(tmp_path / "mine.h5", b"mine")
    assert place.resolve("~/mine.h5").path == path


@pytest.mark.parametrize("choice", ["gone.h5", "", "Imagenet", "."])
def test_a_missing_file_lists_what_may_be_given(place: Place, choice: str) -> None:
    with pytest.raises(WeightsError, match=r"auto, imagenet, untrained or the path"):
        place.resolve(choice)


def test_a_folder_is_no_file(place: Place, tmp_path: Path) -> None:
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(WeightsError, match="no weights file"):
        place.resolve(str(tmp_path / "folder.h5"))


@pytest.mark.parametrize("name", ["model.keras", "weights.npz", "weights", "weights.h5.part"])
def test_a_file_of_another_kind_is_refused(place: Place, tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name)
    with pytest.raises(WeightsError, match=r"does not end in .weights.h5 or .h5"):
        place.resolve(str(path))


# ImageNet at hand


@pytest.mark.parametrize("choice", ["auto", "imagenet"])
@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("folder", ["downloads", "keras_models"])
def test_the_published_file_is_found(place: Place, choice: str, offline: bool, folder: str) -> None:
    path = put(getattr(place, folder) / FILE)
    weights = place.resolve(choice, offline=offline)
    assert weights == Weights("imagenet", identity(PUBLISHED), path)
    assert weights.label == "imagenet"


def test_downloads_come_before_keras_own_folder(place: Place) -> None:
    put(place.keras_models / FILE)
    path = put(place.downloads / FILE)
    assert place.resolve("imagenet").path == path


def test_a_wrong_file_is_passed_over_for_a_right_one(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    wrong = put(place.downloads / FILE, WRONG)
    right = put(place.keras_models / FILE)
    assert place.resolve("imagenet").path == right
    assert f"{wrong} is not the published file" in caplog.text


@pytest.mark.parametrize("times", [1, 2])
def test_a_wrong_file_is_not_taken_for_imagenet(place: Place, times: int) -> None:
    put(place.downloads / FILE, WRONG)
    for _ in range(times):
        assert find_imagenet(row(), place.downloads) is None
        assert place.resolve("auto", offline=True).kind == "untrained"


def test_a_wrong_file_that_was_given_by_its_path_before_is_not_taken_for_imagenet(place: Place) -> None:
    path = put(place.downloads / FILE, WRONG)
    assert place.resolve(str(path)).identity == identity(WRONG)
    place.index.remember_digests({path: (file_stamp(path), hashlib.sha256(WRONG).digest())})  # as once it has settled
    assert find_imagenet(row(), place.downloads) is None


# ImageNet from the net


def test_the_file_is_downloaded_once(place: Place, server: Server) -> None:
    for _ in range(2):
        assert place.resolve("imagenet") == Weights("imagenet", identity(PUBLISHED), place.downloads / FILE)
    assert (place.downloads / FILE).read_bytes() == PUBLISHED
    assert place.downloaded == [FILE]
    assert server.request == [f"/{FILE}"]


def test_auto_downloads_when_it_may(place: Place, server: Server) -> None:
    assert place.resolve("auto").kind == "imagenet"
    assert len(server.request) == 1


def test_auto_never_touches_the_network_offline(place: Place, server: Server) -> None:
    assert place.resolve("auto", offline=True) == place.resolve("untrained")
    assert server.request == []
    assert place.downloaded == []


def assert_nothing_but_ways_out(place: Place, choice: str) -> None:
    with pytest.raises(WeightsError) as caught:
        place.resolve(choice)
    for way_out in ("--weights FILE", FILE, hashlib.md5(PUBLISHED).hexdigest(), "--weights untrained"):
        assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)
    assert place.downloaded == []


@pytest.mark.parametrize("choice", ["auto", "imagenet"])
def test_when_nobody_answers_the_ways_out_are_listed(place: Place, choice: str) -> None:
    assert_nothing_but_ways_out(place, choice)


def test_another_file_from_the_net_is_refused_and_not_kept(place: Place, server: Server) -> None:
    server.content = WRONG
    assert_nothing_but_ways_out(place, "imagenet")
    assert server.request


def test_half_a_download_is_refused_and_not_kept(place: Place, server: Server) -> None:
    server.cut_at = len(PUBLISHED) // 2
    assert_nothing_but_ways_out(place, "imagenet")
    assert server.request


def test_a_failed_download_leaves_a_wrong_file_as_it_is(place: Place) -> None:
    path = put(place.downloads / FILE, WRONG)
    with pytest.raises(WeightsError):
        place.resolve("imagenet")
    assert path.read_bytes() == WRONG
    assert place.downloaded == [FILE]


# ImageNet's file of a network of whose file Keras publishes no hash


def hdf5(seed: int = 0) -> bytes:
    """Return a weights file: plain HDF5 with numbers."""
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened["kernel"] = np.random.default_rng(seed).random((8, 8))
    return file.getvalue()


def noted(place: Place) -> str:
    return (place.downloads / NOTE).read_text()


def test_a_file_without_a_published_hash_is_noted_once_and_said(
    place: Place, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.content = hdf5()
    digest = hashlib.sha256(hdf5()).hexdigest()
    path = place.downloads / UNHASHED_FILE
    for _ in range(2):
        assert place.resolve("auto", backbone=UNHASHED) == Weights("imagenet", f"sha256:{digest}", path)
    assert place.downloaded == [UNHASHED_FILE, NOTE]
    assert noted(place) == f"{digest}  {UNHASHED_FILE}\n"  # as sha256sum --check reads it
    assert server.request == [f"/{UNHASHED_FILE}"]
    said = [record.message for record in caplog.records if "publishes no hash" in record.message]
    assert len(said) == 1
    assert digest in said[0]


@pytest.mark.parametrize("folder", ["downloads", "keras_models"])
def test_a_whole_file_at_hand_is_taken_as_it_is_and_noted(place: Place, server: Server, folder: str) -> None:
    path = put(getattr(place, folder) / UNHASHED_FILE, hdf5())
    assert find_imagenet(BACKBONES[UNHASHED], place.downloads) == path
    assert not (place.downloads / NOTE).exists()  # looking is not taking
    assert place.resolve("imagenet", backbone=UNHASHED).path == path
    assert noted(place).startswith(hashlib.sha256(hdf5()).hexdigest())
    assert server.request == []


def test_a_torn_file_at_hand_is_passed_over(place: Place, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    path = put(place.downloads / UNHASHED_FILE, hdf5()[:-100])
    assert place.resolve("auto", offline=True, backbone=UNHASHED).kind == "untrained"
    assert f"{path} cannot be read as HDF5: " in caplog.text
    server.content = hdf5()
    assert place.resolve("imagenet", backbone=UNHASHED).path == path
    assert path.read_bytes() == hdf5()


@pytest.mark.parametrize("torn", [True, False])
def test_half_a_download_without_a_hash_is_refused_and_not_kept(place: Place, server: Server, torn: bool) -> None:
    server.content = hdf5()[:-100] if torn else hdf5()  # what a server has itself, or where the line breaks
    server.cut_at = None if torn else len(hdf5()) // 2
    with pytest.raises(
        WeightsError, match=rf"of mobilenet_v2 cannot be downloaded .*{UNHASHED_FILE} \(Keras publishes"
    ):
        place.resolve("imagenet", backbone=UNHASHED)
    assert server.request
    assert place.downloaded == []


def test_another_file_than_the_noted_one_is_refused(
    place: Place, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.content = hdf5()
    path = place.resolve("imagenet", backbone=UNHASHED).path
    assert path is not None
    server.content = hdf5(1)
    path.write_bytes(hdf5(1))
    with pytest.raises(WeightsError, match=rf"{UNHASHED_FILE} \(SHA256 {noted(place).split()[0]}\) elsewhere"):
        place.resolve("imagenet", backbone=UNHASHED)
    assert f"{path} is not the file noted in {place.downloads / NOTE} (its SHA256 differs)" in caplog.text
    server.content = hdf5()
    assert place.resolve("imagenet", backbone=UNHASHED).path == path
    assert path.read_bytes() == hdf5()


def test_a_note_that_holds_no_digest_is_told(place: Place) -> None:
    put(place.downloads / UNHASHED_FILE, hdf5())
    note = put(place.downloads / NOTE, b"mine")
    with pytest.raises(WeightsError, match=f"{note} does not begin with a SHA-256; remove it"):
        place.resolve("imagenet", backbone=UNHASHED)


def test_a_download_gets_the_name_that_keras_gives_it(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(BACKBONES[DEFAULT_BACKBONE], weights_file="as-keras-calls-it.h5")
    monkeypatch.setitem(BACKBONES, DEFAULT_BACKBONE, row)
    assert place.resolve("imagenet").path == place.downloads / "as-keras-calls-it.h5"
    assert server.request == [f"/{FILE}"]


# The weights a feature space names


def test_untrained_weights_are_always_at_hand(place: Place) -> None:
    assert place.find("untrained:glorot:7") == Weights("untrained", "untrained:glorot:7", None)


def test_weights_nobody_has_seen_are_not_at_hand(place: Place) -> None:
    assert place.find(identity(b"never seen")) is None


def test_weights_just_downloaded_are_at_hand(place: Place, server: Server) -> None:
    weights = place.resolve("imagenet")
    found = place.find(weights.identity)
    assert found is not None
    assert (found.identity, found.path) == (identity(PUBLISHED), place.downloads / FILE)


def test_a_file_moved_away_is_not_at_hand_and_moved_back_it_is(place: Place, tmp_path: Path) -> None:
    path = put(tmp_path / "mine.h5", b"mine")
    name = place.resolve(str(path)).identity
    assert place.find(name) == Weights("file", name, path)
    path.rename(tmp_path / "elsewhere.h5")
    assert place.find(name) is None
    shutil.copy(tmp_path / "elsewhere.h5", path)
    assert place.find(name) == Weights("file", name, path)


def test_a_changed_file_is_refused(place: Place, tmp_path: Path) -> None:
    path = put(tmp_path / "mine.h5", b"mine")
    name = place.resolve(str(path)).identity
    before = path.stat()
    path.write_bytes(b"MINE")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert place.find(name) is None
    assert place.resolve(str(path)).identity == identity(b"MINE")


def test_one_of_two_copies_is_enough(place: Place, tmp_path: Path) -> None:
    first, second = put(tmp_path / "a.h5", b"mine"), put(tmp_path / "b.h5", b"mine")
    name = place.resolve(str(first)).identity
    place.resolve(str(second))
    first.write_bytes(b"other")
    found = place.find(name)
    assert found is not None
    assert found.path == second


def test_a_file_with_odd_bytes_in_its_name_is_found_again(place: Place, tmp_path: Path) -> None:
    path = put(tmp_path / os.fsdecode(b"\xff.h5"), b"mine")
    name = place.resolve(str(path)).identity
    assert place.find(name) == Weights("file", name, path)


def test_a_digest_names_a_file_that_was_seen(place: Place, tmp_path: Path) -> None:
    path = put(tmp_path / "mine.h5", b"mine")
    seen = place.resolve(str(path))
    assert place.resolve(seen.identity) == seen
    with pytest.raises(WeightsError, match="not on this machine any more; give the file"):
        place.resolve(f"sha256:{'ab' * 32}")
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        place.resolve("sha256:ab")


# What `weights` prints


def test_describe_says_where_weights_come_from(place: Place, tmp_path: Path) -> None:
    with open_workspace(tmp_path / "data") as workspace:
        said = describe(None, workspace)
        assert said["imagenet_md5"] == hashlib.md5(PUBLISHED).hexdigest()
        assert "not downloaded" in str(said["imagenet_file"])
        path = put(workspace.downloads / FILE)
        assert describe(None, workspace)["imagenet_file"] == str(path)
        assert describe("imagenet", workspace) == {
            "weights": "imagenet",
            "identity": identity(PUBLISHED),
            "path": str(path),
        }
        assert describe("untrained:3", workspace)["path"] is None


def test_describe_says_it_of_the_backbone_meant(place: Place, tmp_path: Path) -> None:
    with open_workspace(tmp_path / "data") as workspace:
        said = describe(None, workspace, UNHASHED)
        assert (said["backbone"], said["imagenet_md5"], said["imagenet_sha256"]) == (UNHASHED, None, None)
        assert "any Keras weights of MobileNetV2 without top" in str(said["file"])
        put(workspace.downloads / UNHASHED_FILE, hdf5())
        assert describe("imagenet", workspace, UNHASHED)["weights"] == "imagenet"
        digest = hashlib.sha256(hdf5()).hexdigest()
        assert describe(None, workspace, UNHASHED)["imagenet_sha256"] == digest
        published = BACKBONES["convnext_tiny"].weights_hash
        assert f"sha256:{describe(None, workspace, 'convnext_tiny')['imagenet_sha256']}" == published
        with pytest.raises(UsageError, match="did you mean vgg16"):
            describe(None, workspace, "vgg_16")


def test_a_downloaded_file_gets_the_permissions_that_the_umask_leaves(place: Place, server: Server) -> None:
    """pooch writes it to a temporary file, which is its owner's alone: others of the group could not read it."""
    before = os.umask(0o002)
    try:
        path = place.resolve("imagenet").path
    finally:
        os.umask(before)
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o664
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("digest", ["zz", "", "0" * 64])
def test_what_is_recorded_of_an_own_network_may_be_anything(tmp_path: Path, digest: str) -> None:
    source = dataclasses.replace(of_row(BACKBONES["inception_v3"]), name=f"own:{'0' * 64}")
    spec = ResolvedChoice(FeatureChoice(), source, None, None).new_spec(Weights("file", f"sha256:{'0' * 64}", None))
    with open_workspace(tmp_path) as workspace:
        assert find(spec, {"sha256": digest}, workspace) is None
        assert (
            find(dataclasses.replace(spec, weights="untrained:glorot_centred_1:0"), {"sha256": digest}, workspace)
            is None
        )


def test_a_network_that_this_version_does_not_have_is_refused(tmp_path: Path) -> None:
    of_ours = ResolvedChoice(FeatureChoice(), of_row(BACKBONES["inception_v3"]), None, None)
    spec = dataclasses.replace(of_ours.new_spec(Weights("file", f"sha256:{'0' * 64}", None)), backbone="resnext50")
    with (
        open_workspace(tmp_path) as workspace,
        pytest.raises(SpecError, match="made by another version of Icebox, its network 'resnext50'"),
    ):
        find(spec, None, workspace)
