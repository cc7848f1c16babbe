"""docs/security.md line by line: what comes from elsewhere is refused with that message and that exit code."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cached
import conftest
import cv2
import h5py
import made
import numpy as np
import pytest
from conftest import (
    DANGEROUS_DECODER,
    ROOT,
    command_line,
    environment,
    finished,
    icebox,
    picture,
    unseal,
    write_picture,
)
from own_networks import tiny_options

from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.spec import FeatureSpec, HeadSpec
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import decoding
from pipeline.runs.request import DatasetChoice, TrainRequest
from pipeline.training.train_head import train_head

Files = Callable[[Path], "list[str | Path]"]  # makes the hostile input in a folder, returns more arguments
CASES: dict[str, Files] = {}


def case(line: str) -> Callable[[Files], Files]:
    def add(files: Files) -> Files:
        assert line not in CASES
        CASES[line] = files
        return files

    return add


def table_lines() -> dict[str, tuple[str, str, int]]:
    """Return input → (command, message, exit code) of every table in docs/security.md."""
    found = {}
    for line in (ROOT / "docs" / "security.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 4 and cells[3].isdecimal():
            found[cells[0]] = (cells[1], cells[2], int(cells[3]))
    return found


LINES = table_lines()


def test_every_line_of_the_tables_has_its_test() -> None:
    assert LINES.keys() == CASES.keys()


@pytest.mark.parametrize("line", LINES)
def test_what_comes_from_elsewhere_is_refused_as_the_table_says(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, message, code = LINES[line]
    trap = tmp_path / "trap"  # what code in a file makes if it is ever run
    monkeypatch.setenv("TRAP", str(trap))
    given = CASES[line](tmp_path)
    # Where sitecustomize.py lies if a case makes one.
    index = [str(part).partition("=")[2] for part in given if str(part).startswith("ICEBOX_INDEX=")]
    given = [part for part in given if not str(part).startswith("ICEBOX_INDEX=")]
    variables = {"PYTHONPATH": str(tmp_path)} | ({"ICEBOX_INDEX": index[0]} if index else {})
    typed = command_line(tmp_path / "data", *shlex.split(command), *given)
    done = finished(typed[2:], env=environment(**variables))
    said = " ".join((done.err + done.out).split())
    wanted = ".*".join(re.escape(part.strip()) for part in message.replace(r"\|", "|").split("…"))
    assert re.search(wanted, said), said
    assert done.code == code
    assert "Traceback" not in said
    assert not trap.exists()
    precious = tmp_path / "precious"
    assert not precious.exists() or (precious / "thesis.txt").read_text() == "years of work"
    if code == 1:
        assert len(re.findall("^error: ", done.err, re.MULTILINE)) == 1


# Images


def evil(folder: Path, name: str, content: bytes) -> list[str | Path]:
    path = folder / "images" / "evil" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return ["--dataset", folder / "images", *tiny_options()]


def encoded(ending: str) -> bytes:
    done, data = cv2.imencode(ending, picture(1))
    assert done
    return data.tobytes()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


@case("a PNG of 400 bytes that says 50,000 x 50,000 pixels")
def _(folder: Path) -> list[str | Path]:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(300_000))) + png_chunk(b"IEND", b"")
    return evil(folder, "bomb.png", b"\x89PNG\r\n\x1a\n" + chunks)


@case("a JPEG cut in half")
def _(folder: Path) -> list[str | Path]:
    data = encoded(".jpg")
    return evil(folder, "half.jpg", data[: len(data) // 2])


@case("text under the name of a JPEG")
def _(folder: Path) -> list[str | Path]:
    return evil(folder, "text.jpg", b"no image at all")


@case("an empty file")
def _empty(folder: Path) -> list[str | Path]:
    return evil(folder, "empty.png", b"")


CASES["any of these, with --on-error fail"] = lambda folder: [*_empty(folder), "--on-error", "fail"]


@case("an image that crashes the decoder")
def _(folder: Path) -> list[str | Path]:
    (folder / "sitecustomize.py").write_text(DANGEROUS_DECODER)
    return evil(folder, "crash.png", encoded(".png") + b"SEGV")


@case("a named pipe")
def _(folder: Path) -> list[str | Path]:
    os.mkfifo(folder / "pipe.png")
    return [*manifest(folder, "path,label\npipe.png,a\n")[:2], *tiny_options()]


@case("a file name with terminal escapes")
def _(folder: Path) -> list[str | Path]:
    return evil(folder, "\x1b[31m.png", b"")


# Manifests


def manifest(folder: Path, text: str, name: str = "list.csv") -> list[str | Path]:
    (folder / name).write_bytes(text.encode())
    return ["--dataset", folder / name, "--weights", "untrained"]


@case("the path ../../etc/passwd")
def _(folder: Path) -> list[str | Path]:
    return manifest(folder, "path,label\n../../etc/passwd,a\n")


@case("the path /etc/passwd")
def _(folder: Path) -> list[str | Path]:
    return manifest(folder, "path,label\n/etc/passwd,a\n")


@case("the path ../secret.png under --image-root")
def _(folder: Path) -> list[str | Path]:
    write_picture(folder / "secret.png", 1)
    (folder / "root").mkdir()
    return [*manifest(folder, "path,label\n../secret.png,a\n"), "--image-root", folder / "root"]


@case("--image-root with a folder")
def _(folder: Path) -> list[str | Path]:
    return [*evil(folder, "empty.png", b""), "--image-root", folder]


_ADDRESSES = (
    "file:///etc/passwd",
    "memory://a.png",
    "github://owner:name@main/a.png",
    "simplecache::s3://bucket/a.png",
    "zip://a.png::/etc/x.zip",
    "zip://a.png::file:///etc/x.zip",
    "zip://a.png::zip://b.zip::https://host/c.zip",
)
for _address in _ADDRESSES:
    case(f"the address {_address}")(functools.partial(manifest, text=f"path,label\n{_address},a\n"))


@case("text under the name of an archive")
def _(folder: Path) -> list[str | Path]:
    (folder / "x.zip").write_text("no archive at all")
    return manifest(folder, "path,label\nzip://a.png::x.zip,a\n")


@case("a path with a null character")
def _(folder: Path) -> list[str | Path]:
    return manifest(folder, "path,label\na\0b.png,a\n")


@case("a quote that is never closed")
def _(folder: Path) -> list[str | Path]:
    return manifest(folder, 'path,label\n"a.png,a\nb.png,b\n')


@case("a named pipe in the place of a manifest")
def _(folder: Path) -> list[str | Path]:
    os.mkfifo(folder / "list.csv")
    return ["--dataset", folder / "list.csv"]


@case("text under the name of a Parquet file")
def _(folder: Path) -> list[str | Path]:
    return manifest(folder, "path,label\n", "list.parquet")


# Archives


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('touch "$TRAP"',)


@case("a CIFAR-10 archive whose pickle runs a command")
def _(folder: Path) -> list[str | Path]:
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as tar:
        for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
            content = pickle.dumps(Code())
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return ["--dataset", "cifar10", "--archive", folder / "cifar.tar.gz"]


# Weights


def weights(folder: Path, fill: Callable[[h5py.File], object]) -> list[str | Path]:
    path = folder / "evil.weights.h5"
    with h5py.File(path, "w") as file:
        fill(file)
    return weights_at(folder, path)


def weights_at(folder: Path, path: Path) -> list[str | Path]:
    write_picture(folder / "images" / "good" / "a.png", 1)
    return ["--dataset", folder / "images", "--weights", path]


LAMBDA = json.dumps({"class_name": "Sequential", "config": {"layers": [{"class_name": "Lambda", "config": {}}]}})


def keras_archive(folder: Path, name: str) -> list[str | Path]:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("config.json", LAMBDA)
    return weights_at(folder, folder / name)


@case("a .keras file with a Lambda layer")
def _(folder: Path) -> list[str | Path]:
    return keras_archive(folder, "evil.keras")


@case("the same, renamed to .weights.h5")
def _(folder: Path) -> list[str | Path]:
    return keras_archive(folder, "evil.weights.h5")


@case("a whole model with a Lambda layer, as .h5")
def _(folder: Path) -> list[str | Path]:
    return weights(folder, lambda file: file.attrs.update({"model_config": LAMBDA}))


@case("a pickle, renamed to .h5")
def _(folder: Path) -> list[str | Path]:
    (folder / "evil.h5").write_bytes(pickle.dumps(Code()))
    return weights_at(folder, folder / "evil.h5")


@case("text, renamed to .h5")
def _(folder: Path) -> list[str | Path]:
    (folder / "evil.h5").write_text("no weights")
    return weights_at(folder, folder / "evil.h5")


@case("weights with an external link")
def _(folder: Path) -> list[str | Path]:
    return weights(folder, lambda file: file.update({"kernel": h5py.ExternalLink("other.h5", "/kernel")}))


@case("weights with a soft link")
def _(folder: Path) -> list[str | Path]:
    return weights(folder, lambda file: file.update({"kernel": h5py.SoftLink("/kernel")}))


@case("weights kept in external storage")
def _(folder: Path) -> list[str | Path]:
    external = [("/etc/passwd", 0, 8)]
    return weights(folder, lambda file: file.create_dataset("kernel", (2,), "f4", external=external))


@case("weights that are a virtual dataset")
def _(folder: Path) -> list[str | Path]:
    return weights(folder, lambda file: file.create_virtual_dataset("kernel", virtual((2,), "f4")))


@case("weights of 4 TB in a file of 2 KB")
def _(folder: Path) -> list[str | Path]:
    return weights(folder, lambda file: file.create_dataset("kernel", (10**12,), "f4", chunks=(10**6,)))


@case("weights that are text")
def _(folder: Path) -> list[str | Path]:
    return weights(folder, lambda file: file.create_dataset("kernel", data=["text"]))


@case("a weights file cut in half")
def _(folder: Path) -> list[str | Path]:
    given = weights(folder, lambda file: file.create_dataset("kernel", data=np.ones(10_000, "f4")))
    path = Path(given[-1])
    os.truncate(path, path.stat().st_size // 2)
    return given


def virtual(shape: tuple[int, ...], dtype: str) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource("/etc/other.h5", "secret", shape)
    return layout


# Own networks

NETWORK: dict[str, Any] = {
    "class_name": "Sequential", "module": "keras", "registered_name": None,
    "config": {"name": "sequential", "layers": [
        {"class_name": "InputLayer", "module": "keras.layers", "registered_name": None,
         "config": {"batch_shape": [None, 8, 8, 3], "dtype": "float32", "name": "input_layer"}},
        {"class_name": "Flatten", "module": "keras.layers", "registered_name": None,
         "config": {"name": "flatten", "data_format": "channels_last"}},
    ]},
}  # fmt: skip


def own_network(
    folder: Path, layer: dict[str, Any] | None = None, members: dict[str, bytes] | None = None, keep: float = 1
) -> list[str | Path]:
    """Write a `.keras` file of a network without weights, changed, or cut after a part of it."""
    with h5py.File(folder / "weights.h5", "w") as file:
        file.create_group("layers")
    config = json.loads(json.dumps(NETWORK))
    config["config"]["layers"] += [layer] if layer else []
    content = {
        "metadata.json": b'{"keras_version": "3.10.0", "date_saved": "2025-01-01"}',
        "config.json": json.dumps(config).encode(),
        "model.weights.h5": (folder / "weights.h5").read_bytes(),
        **(members or {}),
    }
    path = folder / "evil.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return network_at(folder, path)


def network_at(folder: Path, path: Path) -> list[str | Path]:
    write_picture(folder / "images" / "good" / "a.png", 1)
    return ["--dataset", folder / "images", "--backbone", path, "--scaling", "none"]


@case("a network with a Lambda layer")
def _(folder: Path) -> list[str | Path]:
    config = {"name": "evil", "function": {"class_name": "__lambda__", "config": {"code": "4wEA"}}}
    return own_network(folder, {"class_name": "Lambda", "module": "keras.layers", "config": config})


@case("a network with a custom class")
def _(folder: Path) -> list[str | Path]:
    named = {"class_name": "Evil", "module": "antigravity", "registered_name": "my>Evil"}
    return own_network(folder, {**named, "config": {"name": "evil"}})


@case("a network with two outputs")
def _(folder: Path) -> list[str | Path]:
    layers = json.loads(json.dumps(NETWORK["config"]["layers"]))
    tensor = {"class_name": "__keras_tensor__", "config": {"shape": [None, 8, 8, 3], "dtype": "float32"}}
    tensor["config"] |= {"keras_history": ["input_layer", 0, 0]}
    for layer, calls in zip(layers, ([], [{"args": [tensor], "kwargs": {}}]), strict=True):
        layer |= {"name": layer["config"]["name"], "inbound_nodes": calls}
    ends = {"input_layers": [["input_layer", 0, 0]], "output_layers": [["flatten", 0, 0], ["input_layer", 0, 0]]}
    config = {**NETWORK, "class_name": "Functional", "config": {"name": "functional", "layers": layers, **ends}}
    return own_network(folder, members={"config.json": json.dumps(config).encode()})


@case("a network with a name that leaves the archive")
def _(folder: Path) -> list[str | Path]:
    return own_network(folder, members={"../evil.py": b"import os"})


@case("a network that unpacks to 9 MB of blanks")
def _(folder: Path) -> list[str | Path]:
    return own_network(folder, members={"config.json": b" " * 9_000_000})


@case("a network whose weights are a pickle")
def _(folder: Path) -> list[str | Path]:
    return own_network(folder, members={"model.weights.h5": pickle.dumps(Code())})


@case("a network whose weights lie elsewhere")
def _(folder: Path) -> list[str | Path]:
    with h5py.File(folder / "linked.h5", "w") as file:
        file["layers/kernel"] = h5py.ExternalLink("/etc/passwd", "/")
    return own_network(folder, members={"model.weights.h5": (folder / "linked.h5").read_bytes()})


@case("a network that was cut in half")
def _(folder: Path) -> list[str | Path]:
    return own_network(folder, keep=0.5)


@case("a pickle under the name of a network")
def _(folder: Path) -> list[str | Path]:
    (folder / "evil.keras").write_bytes(pickle.dumps(Code()))
    return network_at(folder, folder / "evil.keras")


# Shards


def cache_with(folder: Path, work: Callable[[FeatureSpace], object]) -> list[str | Path]:
    """Make a cache with one space and a sound shard of eight rows, do something to it, forget the index."""
    with closing(Cache(folder / "data" / "cache")) as cache:
        space = cache.create(made.SPEC, {})
        space.write(made.made(list(range(8))))
        work(space)
    (folder / "data" / "cache" / "cache.db").unlink(missing_ok=True)
    return []


def forged(folder: Path, forge: Callable[[h5py.File], object]) -> list[str | Path]:
    """Alter the shard by HDF5's own means and name it by the hash of what it is then."""

    def work(space: FeatureSpace) -> None:
        (path,) = space.shards.iterdir()
        with h5py.File(path, "r+") as file:
            forge(file)
        path.rename(space.shards / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.h5")

    return cache_with(folder, work)


def instead(name: str, make: Callable[[h5py.File], object]) -> Callable[[h5py.File], None]:
    def forge(file: h5py.File) -> None:
        del file[name]
        make(file)

    return forge


@case("a dataset that is an external link")
@case("a shard with an external link, met by a command that reads")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, instead("features", lambda file: file.update({"features": h5py.ExternalLink("x.h5", "/x")})))


@case("a dataset that is a soft link")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, instead("features", lambda file: file.update({"features": h5py.SoftLink("/pooled")})))


@case("a dataset in external storage")
def _(folder: Path) -> list[str | Path]:
    shape, external = (8, 2, 3, 8), [("/etc/passwd", 0, 8 * 2 * 3 * 8 * 2)]
    make = instead("features", lambda file: file.create_dataset("features", shape, "f2", external=external))
    return forged(folder, make)


@case("a virtual dataset")
def _(folder: Path) -> list[str | Path]:
    make = instead("features", lambda file: file.create_virtual_dataset("features", virtual((8, 2, 3, 8), "f2")))
    return forged(folder, make)


def features(
    shape: tuple[int, ...], dtype: str = "f2", *, filled: bool = True, **options: Any
) -> Callable[[h5py.File], None]:
    chunks = (1, *shape[1:]) if max(shape[1:]) < 10**6 else (1, 1, 1, 1)
    options = {"chunks": chunks, "fletcher32": True, **options}
    if filled and math.prod(shape) < 10**6:
        options["data"] = np.zeros(shape, dtype)
    return instead("features", lambda file: file.create_dataset("features", shape, dtype, **options))


@case("a dataset without checksums")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, features((8, 2, 3, 8), fletcher32=False))


@case("rows of 4 TB in a file of 4 KB")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, features((8, 10**6, 10**5, 8)))


@case("a million million rows")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, features((10**12, 2, 3, 8)))


@case("features that are integers")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, features((8, 2, 3, 8), "i2"))


@case("rows that are claimed but not there")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, features((8, 2, 3, 8), filled=False))


@case("rows of another shape than those beside them")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: space.write(made.made([9], made.SPEC, (3, 3, 8))))


@case("a folder among the shards")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: (space.shards / "folder").mkdir())


@case("keys that are text")
def _(folder: Path) -> list[str | Path]:
    text = h5py.string_dtype(length=1)
    options = {"chunks": (8, 32), "fletcher32": True}
    return forged(folder, instead("key", lambda file: file.create_dataset("key", (8, 32), text, **options)))


@case("rows of another feature space")
def _(folder: Path) -> list[str | Path]:
    other = replace(made.SPEC, layer="mixed8")

    def work(space: FeatureSpace) -> None:
        FeatureSpace(space.path, other, {}, space.index).write(made.made([9], other))

    return cache_with(folder, work)


@case("HDF5 that is no shard")
def _(folder: Path) -> list[str | Path]:
    return forged(folder, lambda file: file.attrs.modify("format", "something else"))


@case("text under the name of a shard")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: (space.shards / f"{'0' * 64}.h5").write_text("no shard"))


@case("a sound shard under another hash")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: next(space.shards.iterdir()).rename(space.shards / f"{'0' * 64}.h5"))


@case("a file of another name")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: (space.shards / "run-me.sh").write_text("touch $TRAP"))


@case("a chunk of 4 GB in a file of 4 KB")
def _(folder: Path) -> list[str | Path]:
    options: dict[str, Any] = {"maxshape": (None, 32), "chunks": (2**27 - 1, 32), "fletcher32": True}
    return forged(folder, instead("key", lambda file: file.create_dataset("key", (8, 32), "u1", **options)))


@case("views that the shard does not describe")
def _(folder: Path) -> list[str | Path]:
    views = {"data": np.full(8, 7), "chunks": (8,), "fletcher32": True}
    return forged(folder, instead("view", lambda file: file.create_dataset("view", **views)))


def thesis(folder: Path) -> Path:
    """Somebody's file outside the cache; it must be what it was when all is done."""
    path = folder / "precious" / "thesis.txt"
    path.parent.mkdir()
    path.write_text("years of work")
    return path


@case("a link to itself among the shards")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: (space.shards / "loop.h5").symlink_to("loop.h5"))


@case("a link in the place of the lock")
def _(folder: Path) -> list[str | Path]:
    def work(space: FeatureSpace) -> None:
        (space.path / ".lock").unlink(missing_ok=True)
        (space.path / ".lock").symlink_to(thesis(folder))

    return cache_with(folder, work)


@case("a link to another folder in the place of aside/")
def _(folder: Path) -> list[str | Path]:
    return cache_with(folder, lambda space: (space.path / "aside").symlink_to(thesis(folder).parent))


# Descriptions


def described(folder: Path, text: str) -> list[str | Path]:
    return cache_with(folder, lambda space: (space.path / "space.json").write_text(text))


def with_spec(**changes: object) -> str:
    return json.dumps({"spec": {**made.SPEC.to_dict(), **changes}, "made_by": {}})


@case("a space.json that is not JSON")
def _(folder: Path) -> list[str | Path]:
    return described(folder, "{")


@case("a space.json nested 100,000 deep")
def _(folder: Path) -> list[str | Path]:
    return described(folder, "[" * 100_000 + "]" * 100_000)


@case("a space.json of 2 MB")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec() + " " * 2_000_000)


@case("a space.json that is a named pipe")
def _(folder: Path) -> list[str | Path]:
    def work(space: FeatureSpace) -> None:
        (space.path / "space.json").unlink()
        os.mkfifo(space.path / "space.json")

    return cache_with(folder, work)


@case("a space.json with NaN")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec().replace('"made_by": {}', '"made_by": {"created": NaN}'))


@case("a space.json with a number beyond all bounds")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec().replace('"made_by": {}', '"made_by": {"created": 1e999}'))


@case("a space.json with a field too many")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec(colour="red"))


@case("a space.json with a number for a name")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec(layer=3))


@case("a space.json with images of 1,000,000 pixels a side")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec(input_size=1_000_000))


@case("a space.json whose backbone is ../../elsewhere")
def _(folder: Path) -> list[str | Path]:
    return described(folder, with_spec(backbone="../../elsewhere"))


# The index


def index(folder: Path, make: Callable[[Path], object]) -> list[str | Path]:
    cache_with(folder, lambda space: None)
    make(folder / "data" / "cache" / "cache.db")
    return []


def altered(*statements: str) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        with closing(Cache(path.parent)) as cache:
            cache.spaces()
        with closing(sqlite3.connect(path)) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()

    return alter


@case("a cache.db of noise")
def _(folder: Path) -> list[str | Path]:
    return index(folder, lambda path: path.write_bytes(np.random.default_rng(1).bytes(8192)))


@case("a cache.db with a trigger")
def _(folder: Path) -> list[str | Path]:
    trigger = "CREATE TRIGGER evil AFTER INSERT ON rows BEGIN DELETE FROM rows; END"
    return index(folder, altered(trigger))


@case("a cache.db with text for numbers")
def _(folder: Path) -> list[str | Path]:
    return index(folder, altered("UPDATE shards SET bytes = 'many'"))


@case("an ICEBOX_INDEX that names somebody's text")
def _(folder: Path) -> list[str | Path]:
    return [*cache_with(folder, lambda space: None), f"ICEBOX_INDEX={thesis(folder)}"]


@case("a cache.db of a later version")
def _(folder: Path) -> list[str | Path]:
    return index(folder, altered("PRAGMA user_version = 99"))


# Runs


def run(folder: Path, text: str) -> list[str | Path]:
    path = folder / "data" / "runs" / "evil"
    path.mkdir(parents=True)
    (path / "run.json").write_text(text)
    return []


@case("a run.json nested 100,000 deep")
def _(folder: Path) -> list[str | Path]:
    return run(folder, "[" * 100_000 + "]" * 100_000)


@case("a run.json of 70 MB")
def _(folder: Path) -> list[str | Path]:
    return run(folder, " " * 70_000_000)


@case("a run.json that is a list")
def _(folder: Path) -> list[str | Path]:
    return run(folder, "[]")


# Trained runs


@functools.cache
def trained() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the data directory of a regression trained on made-up rows, and its images."""
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    cached.write_images(folder / "photos", 12)
    photos = cached.listed(folder / "photos")
    with closing(Cache(folder / "data" / "cache")) as cache:
        workspace = Workspace(folder / "data", cache)
        cached.fill(workspace, photos)
        chosen = DatasetChoice(str(folder / "photos"))
        request = TrainRequest(chosen, FeatureChoice(), HeadSpec.make("logreg", C="0.1"), decoding.DEFAULT_MAX_PIXELS)
        train_head(photos, workspace, request)
    return made


def trained_run(folder: Path, change: Callable[[Path], object]) -> list[str | Path]:
    """Copy a trained run and the rows it reads, change its folder, and return an image that has a row."""
    shutil.copytree(trained().name, folder, dirs_exist_ok=True)
    (run,) = (folder / "data" / "runs").iterdir()
    change(run)
    return [folder / "photos" / "ant" / "000.png"]


def changed_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def made_up(run: Path, head: bytes) -> None:
    """As somebody does who knows how a run is laid out: with digests to match, and as one of the first version."""
    (run / "head.skops").write_bytes(head)
    changed_json(run / "head.json", sha256=hashlib.sha256(head).hexdigest())
    unseal(run)


@case("a run whose list of classes was changed")
def _(folder: Path) -> list[str | Path]:
    return trained_run(folder, lambda run: changed_json(run / "run.json", classes=["bee", "ant", "cow"]))


@case("a run with the head of another")
def _(folder: Path) -> list[str | Path]:
    def change(run: Path) -> None:
        import skops.io

        other = skops.io.load(run / "head.skops", trusted=[])
        other[-1].coef_ = -other[-1].coef_
        skops.io.dump(other, run / "head.skops")
        changed_json(run / "head.json", sha256=hashlib.sha256((run / "head.skops").read_bytes()).hexdigest())

    return trained_run(folder, change)


@case("a run whose checksums are gone")
def _(folder: Path) -> list[str | Path]:
    return trained_run(folder, lambda run: (run / "SHA256SUMS").unlink())


@case("a run whose head is a pickle")
def _(folder: Path) -> list[str | Path]:
    return trained_run(folder, lambda run: (run / "head.skops").write_bytes(pickle.dumps(Code())))


@case("a run made up around a head that is a pickle")
def _(folder: Path) -> list[str | Path]:
    return trained_run(folder, lambda run: made_up(run, pickle.dumps(Code())))


@case("a run made up around a skops file that would run a command")
def _(folder: Path) -> list[str | Path]:
    import skops.io

    return trained_run(folder, lambda run: made_up(run, skops.io.dumps(functools.partial(os.system, 'touch "$TRAP"'))))


# What the tables do not show


@pytest.mark.parametrize(
    "summary",
    [
        [],
        "text",
        {"accuracy": "high", "accuracy_interval": [0, 1], "val_accuracy": 1, "seconds": 1},
        {"accuracy": 1, "accuracy_interval": 3, "val_accuracy": 1, "seconds": 1},
        {"accuracy": 1, "accuracy_interval": [None, 1], "val_accuracy": 1, "seconds": 1},
    ],
)
def test_a_run_of_other_types_is_passed_over(summary: object, tmp_path: Path) -> None:
    if isinstance(summary, dict):
        summary = {"run": "a", "head": "gap", "weights": "imagenet", **summary}
    about = {"format": "icebox-run", "version": 1, "dataset": {"name": "a"}, "summary": summary}
    run(tmp_path, json.dumps(about))
    done = icebox(tmp_path / "data", "runs", "ls")
    assert done.code == 0
    assert "is not an icebox-run of version 1" in done.err


def test_a_damaged_shard_from_elsewhere_does_not_stop_features(tmp_path: Path) -> None:
    """Not even one that claims to be the very space that is to be filled."""
    spec: FeatureSpec = conftest.SPEC
    write_picture(tmp_path / "images" / "good" / "a.png", 1)
    with closing(Cache(tmp_path / "data" / "cache")) as cache:
        space = cache.create(spec, {})
        (space.shards / f"{'0' * 64}.h5").write_text("no shard")
    options = ("--dataset", tmp_path / "images", "--weights", "untrained", "--precision", "float32", "--json")
    done = icebox(tmp_path / "data", "features", *options)
    assert (done.code, done.json["computed"], done.json["space"]) == (0, 1, space.name)
    assert "passed over" in done.err or "count as missing" in done.err
    assert icebox(tmp_path / "data", "features", *options).json["computed"] == 0


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    given = weights(tmp_path, lambda file: file.create_dataset("layers/dense/vars/0", data=np.ones((3, 4), "f4")))
    done = icebox(tmp_path / "data", "features", *given)
    assert done.code == 1
    assert "does not hold weights of inception_v3 without top" in done.err
    assert not list((tmp_path / "data" / "cache").glob("*/space.json"))


def test_a_manifest_may_lead_out_of_its_folder_when_told_so(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", 1)
    (tmp_path / "lists").mkdir()
    inside = manifest(tmp_path / "lists", "path,label\nimages/a.png,x\n")
    outside = manifest(tmp_path / "lists", f"path,label\n{tmp_path}/images/a.png,x\n", "absolute.csv")
    for given in (inside, outside):
        done = icebox(tmp_path / "data", "cache", "explain", *given, "--image-root", tmp_path, "--json")
        assert done.json["counts"] == {"new": 1}, done.err
