"""Read the archive that Keras saves a model in (.keras) as untrusted input.

The archive must be a zip file of exactly config.json, metadata.json and model.weights.h5. Nothing in it is unpickled or
imported, and no member is written under a name chosen by the archive. `read_config` returns the architecture,
`extracted_weights` the weights as a file, and `identity_of_weights` their hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from pipeline.backbone import weights_file
from pipeline.core import files
from pipeline.core.errors import SpecError, WeightsError
from pipeline.core.spec import canonical_json

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_MOST = {CONFIG: 2**23, METADATA: 2**16, WEIGHTS: 2**32}  # bytes unpacked; NASNetLarge's config has 1.3 MB
_MOST_TIMES = 200  # largest ratio of unpacked to packed size; it is about 30 for a config of JSON
_SMALL = 2**20  # bytes unpacked, up to which the ratio is not checked
_END = struct.Struct("<4sHHHHLLH")  # the end record of a zip file without a comment
_SAVE_ANEW = "save the model anew with Keras 3: model.save('name.keras')"

# Exceptions that `zipfile` raises for a damaged or manipulated file.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError, KeyError)


def is_archive(path: Path) -> bool:
    """Return whether the file at `path` begins like a zip archive. Raises OSError if it cannot be read."""
    with files.open_regular(path, os.O_RDONLY) as file:
        return file.read(4) == b"PK\x03\x04"


def read_config(path: Path) -> bytes:
    """Return the bytes of config.json in the archive at `path`.

    Raises
    ------
    SpecError
        If the file is not a whole model saved by Keras 3. The message, one line, says what the file is instead.
    """
    with _opened(path) as archive:
        _require_keras_3(_read(archive, path, METADATA), path)
        return _read(archive, path, CONFIG)


@contextmanager
def extracted_weights(path: Path) -> Iterator[Path]:
    """Extract the weights in the archive at `path` to a temporary HDF5 file, and yield its path.

    The file was checked to contain numbers only. It is removed at the end of the `with` block.

    Raises
    ------
    SpecError
        If the file is not a whole model saved by Keras 3.
    WeightsError
        If the weights are damaged, or contain anything other than numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / WEIGHTS
        with _opened(path) as archive:
            _extract(archive, path, plain)
        try:
            weights_file.check(plain)
            _require_stored(plain)
        except WeightsError as error:
            raise WeightsError(str(error).replace(str(plain), f"{WEIGHTS} in {path}")) from error
        yield plain


def variables(plain: Path) -> dict[str, tuple[int, ...]]:
    """Return path in the HDF5 file `plain` → shape of each variable of the model, sorted by path.

    Variables that only training uses are left out: the optimizer's state, and the counters of random generators.
    """
    found: dict[str, tuple[int, ...]] = {}

    def look(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and not _serves_training(name):
            found[name] = item.shape

    with h5py.File(plain, "r", locking=False) as file:
        file.visititems(look)
    return dict(sorted(found.items()))


def identity_of_weights(plain: Path) -> str:
    """Return the identity "sha256:…" of the weights in the HDF5 file `plain`.

    The hash covers, for each path in the order of `variables`: the canonical JSON of its path, shape and dtype, a line
    break, and the values in row-major order, little-endian. HDF5's layout and attributes, and variables that only
    training uses, are not part of the hash.
    """
    digest = hashlib.sha256()
    with h5py.File(plain, "r", locking=False) as file:
        for name in variables(plain):
            values = np.asarray(file[name])  # pyright: ignore[reportArgumentType]
            values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
            about = {"path": name, "shape": list(values.shape), "dtype": values.dtype.str}
            digest.update(canonical_json(about).encode() + b"\n" + values.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _serves_training(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "optimizer" or "seed_generator" in parts


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive at `path` after checking its members. Raises SpecError if a check fails."""
    try:
        if path.is_dir():
            raise SpecError(f"{path} {_folder(path)}")
        file = files.open_regular(path, os.O_RDONLY)
    except OSError as error:
        raise SpecError(f"{path} cannot be read ({error.strerror or error}); expected a .keras file") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if what := _no_archive(file.read(512), size):
            raise SpecError(f"{path} {what}")
        with _damage_explained(path):
            file.seek(max(0, size - _END.size))
            _require_end(file.read(), size, path)
            archive = zipfile.ZipFile(file)
            _check_members(archive.infolist(), path)
        with archive:
            yield archive


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SpecError, WeightsError):
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpecError(f"{path} is a damaged .keras file ({reason}); copy it again, or {_SAVE_ANEW}") from error


def _no_archive(beginning: bytes, size: int) -> str:
    """Return a message on what a file is if it is not a zip archive; "" if it begins like one.

    `beginning` is the first 512 bytes of the file, `size` its size in bytes.
    """
    if not size:
        return f"is empty; {_SAVE_ANEW}"
    if beginning.startswith(b"PK\x03\x04"):
        return ""
    if beginning.startswith(b"\x89HDF\r\n\x1a\n"):
        return (
            "is an HDF5 file: weights alone, or a model in the format before .keras; an own network is given as a "
            f".keras file: load it in Keras and {_SAVE_ANEW}"
        )
    if beginning.startswith(b"\x80"):
        return f"is a Python pickle, which may hold code; it is not opened: {_SAVE_ANEW}"
    return f"is not a .keras file; {_SAVE_ANEW}"


def _folder(path: Path) -> str:
    kind = "a SavedModel folder" if (path / "saved_model.pb").exists() else "a folder"
    return f"is {kind}, not a .keras file; {_SAVE_ANEW}"


def _require_end(end: bytes, size: int, path: Path) -> None:
    """Raise SpecError unless the file ends with the zip directory and its end record, without a comment.

    Keras writes nothing after them. `end` is the last 22 bytes of the file, `size` the size of the file in bytes.
    """
    mark, *_, length, start, comment = _END.unpack(end)
    if mark != b"PK\x05\x06" or comment or start + length + _END.size != size:
        raise SpecError(f"{path} is torn, or something follows after the archive; copy it again, or {_SAVE_ANEW}")


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    names = [member.filename for member in members]
    for member in members:
        if fault := _fault(member) or ("twice" if names.count(member.filename) > 1 else ""):
            raise SpecError(f"{path} holds {member.filename!r:.100} {fault}, which Keras does not write; {_SAVE_ANEW}")
    if missing := [name for name in _MOST if name not in names]:
        others = ", ".join(names)[:100] or "nothing"
        raise SpecError(f"{path} lacks {' and '.join(missing)} (found: {others}), so is no .keras file; {_SAVE_ANEW}")


def _fault(member: zipfile.ZipInfo) -> str:
    """Return what is wrong with a member, or "" if nothing is wrong."""
    name, packed, unpacked = member.filename, member.compress_size, member.file_size
    kind = stat.S_IFMT(member.external_attr >> 16)
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        return "with a name that leaves the archive"
    if member.flag_bits & 0x1:
        return "encrypted"
    if kind and not stat.S_ISREG(kind) and not (stat.S_ISDIR(kind) and name == "assets/"):
        return "as a link or another special file"
    if name == "assets/" and not unpacked:
        return ""
    if name.startswith("assets/"):
        return "(files that a layer such as StringLookup reads)"
    if name not in _MOST:
        return "besides the architecture and its weights"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "packed in an unusual way"
    if unpacked > _MOST[name] or (unpacked > _SMALL and unpacked > _MOST_TIMES * packed):
        return f"of {unpacked:,} bytes unpacked, {packed:,} packed"
    return ""


def _require_keras_3(metadata: bytes, path: Path) -> None:
    try:
        version = json.loads(metadata)["keras_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError(f"{path}: its metadata.json does not name a version of Keras; {_SAVE_ANEW}") from error
    if not isinstance(version, str) or not version.startswith("3."):
        raise SpecError(f"{path} was saved by Keras {version!r:.30}, expected Keras 3; load it there and {_SAVE_ANEW}")


def _read(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    with _damage_explained(path), archive.open(name) as member:
        data = member.read(_MOST[name] + 1)
        if len(data) != archive.getinfo(name).file_size:
            raise zipfile.BadZipFile(f"{name} is not as long as the archive says")
        return data


def _extract(archive: zipfile.ZipFile, path: Path, plain: Path) -> None:
    with plain.open("wb") as file, _damage_explained(path), archive.open(WEIGHTS) as member:
        shutil.copyfileobj(member, file, 2**20)  # reads at most the size that `_fault` checked
    if plain.stat().st_size != archive.getinfo(WEIGHTS).file_size:
        raise SpecError(f"{path} is torn: {WEIGHTS} ends early; copy it again, or {_SAVE_ANEW}")


def _require_stored(plain: Path) -> None:
    """Raise WeightsError if the variables claim over four times the file's size: Keras stores them uncompressed."""
    claimed = 0

    def look(name: str, item: h5py.Group | h5py.Dataset) -> None:
        nonlocal claimed
        claimed += item.nbytes if isinstance(item, h5py.Dataset) else 0

    with h5py.File(plain, "r", locking=False) as file:
        file.visititems(look)
    if claimed > 4 * plain.stat().st_size:
        raise WeightsError(f"{plain} claims {claimed:,} bytes in a file of {plain.stat().st_size:,}")
