"""Read CIFAR-10 and CIFAR-100 from the published tarballs: checked by sha256, streamed, never unpacked to disk."""

from __future__ import annotations

import pickle
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.core.download import cause, fetch
from pipeline.core.errors import DatasetError
from pipeline.core.progress import Progress, silent
from pipeline.dataset.base import ArraySource, Dataset, remap

_PIXELS = 3 * 32 * 32
_MAX_MEMBER = 256 << 20  # bytes; the largest published member, CIFAR-100's train, has 155 MB


@dataclass(frozen=True)
class Published:
    """A published tarball of pickled batches: its URL, its sha256 and the names of its members."""

    name: str
    url: str
    sha256: str
    batches: Mapping[str, str]  # member → split, in the order of the images
    meta: str
    labels_key: bytes
    names_key: bytes


# The hashes are those of keras 3.15, keras/src/datasets/cifar10.py and cifar100.py.
CIFAR10 = Published(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    batches={f"cifar-10-batches-py/data_batch_{i}": "train" for i in range(1, 6)}
    | {"cifar-10-batches-py/test_batch": "test"},
    meta="cifar-10-batches-py/batches.meta",
    labels_key=b"labels",
    names_key=b"label_names",
)
CIFAR100 = Published(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    batches={"cifar-100-python/train": "train", "cifar-100-python/test": "test"},
    meta="cifar-100-python/meta",
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
)


def open_cifar(
    published: Published, *, downloads: Path, archive: Path | None = None, progress: Progress = silent
) -> Dataset:
    """Return CIFAR-10 or CIFAR-100: images (32, 32, 3) uint8 RGB, with the published train and test splits.

    All pixels are held in memory (184 MB).

    Parameters
    ----------
    published
        The tarball to read, `CIFAR10` or `CIFAR100`. Its `sha256` is checked for a download and for `archive`.
    downloads
        The folder where the tarball is kept.
    archive
        The tarball, if it is already on this machine, in place of a download.

    Raises
    ------
    DatasetError
        If the tarball cannot be downloaded or read, has another sha256, or does not have the published content.
    """
    path = _download(published, downloads, progress) if archive is None else _checked(published, archive)
    members = _read_members(published, path)
    names = _class_names(published, members[published.meta])
    parts = [_batch(published, member, members.pop(member), len(names)) for member in published.batches]
    splits = [s for s, (pixels, _) in zip(published.batches.values(), parts, strict=True) for _ in pixels]
    labels = np.concatenate([labels for _, labels in parts])
    order = sorted(range(len(names)), key=names.__getitem__)
    return Dataset(
        name=published.name,
        classes=tuple(names[i] for i in order),
        names=_image_names(published.name, splits),
        labels=remap(order, labels),
        splits=splits,
        groups=None,
        source=ArraySource(np.concatenate([pixels for pixels, _ in parts])),
    )


def _image_names(dataset: str, splits: list[str]) -> list[str]:
    """Return names such as "cifar10/test/0", "cifar10/test/1", …, numbered within each split."""
    counts = dict.fromkeys(splits, 0)
    names = []
    for split in splits:
        names.append(f"{dataset}/{split}/{counts[split]}")
        counts[split] += 1
    return names


def _download(published: Published, downloads: Path, progress: Progress) -> Path:
    """Return the path of the tarball in `downloads`; download it if it is missing or damaged."""
    try:
        return fetch(published.url, f"sha256:{published.sha256}", downloads, progress)
    except (OSError, ValueError) as error:  # no network or no space, or the sha256 is wrong
        reason = cause(error)
        raise DatasetError(
            f"{published.name}: could not download {published.url} ({reason}); "
            "fetch that file by other means and pass it with --archive FILE"
        ) from error


def _checked(published: Published, archive: Path) -> Path:
    import pooch

    try:
        found = pooch.file_hash(str(archive), alg="sha256")
    except OSError as error:
        raise DatasetError(f"{published.name}: cannot read --archive {archive}: {error.strerror}") from error
    if found != published.sha256:
        raise DatasetError(
            f"{published.name}: {archive} is not the published archive: expected sha256 {published.sha256}, "
            f"found {found}; fetch {published.url} again"
        )
    return archive


def _read_members(published: Published, path: Path) -> dict[str, dict[bytes, Any]]:
    """Return the unpickled content of the batches and the class names, by member; skip all other members."""
    wanted = {published.meta, *published.batches}
    found: dict[str, dict[bytes, Any]] = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                if member.name in wanted:
                    found[member.name] = _member_content(tar, member)
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise DatasetError(f"{path}: expected a whole .tar.gz file, found: {error}") from error
    if missing := sorted(wanted - set(found)):
        raise DatasetError(f"{path}: expected the members {', '.join(missing)}, found none of that name")
    return found


def _member_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[bytes, Any]:
    stream = tar.extractfile(member) if member.isreg() else None
    if stream is None or member.size > _MAX_MEMBER:
        raise DatasetError(
            f"{member.name}: expected a file of at most {_MAX_MEMBER >> 20} MiB, "
            f"found {member.size >> 20} MiB of tar type {member.type!r}"
        )
    content = _unpickle(stream, member.name)
    if not isinstance(content, dict):
        raise DatasetError(f"{member.name}: expected a pickled dict, found {type(content).__name__}")
    return content


def _class_names(published: Published, meta: dict[bytes, Any]) -> list[str]:
    names = meta.get(published.names_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DatasetError(f"{published.meta}: expected a list of names under {published.names_key!r}")
    if not names or len(set(names)) != len(names):
        raise DatasetError(f"{published.meta}: expected distinct class names, found {names!r:.200}")
    return [name.decode("utf-8", "replace") for name in names]


def _batch(published: Published, member: str, content: dict[bytes, Any], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one batch as pixels, (n, 32, 32, 3) uint8 RGB, and labels, (n,) int32 in the published order."""
    data = content.get(b"data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DatasetError(f"{member}: expected uint8 pixels of shape (n, {_PIXELS}), found {found}")
    labels = content.get(published.labels_key)
    if not isinstance(labels, list) or not all(type(x) is int and 0 <= x < classes for x in labels):
        raise DatasetError(f"{member}: expected a list of labels from 0 to {classes - 1}")
    if len(labels) != len(data):
        raise DatasetError(f"{member}: expected {len(data)} labels, found {len(labels)}")
    pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # channels first to channels last
    return np.ascontiguousarray(pixels), np.array(labels, np.int32)


def _unpickle(stream: IO[bytes], member: str) -> Any:
    try:
        # The files were pickled by Python 2, whose strings are bytes.
        return _ArrayUnpickler(stream, encoding="bytes").load()
    except DatasetError as error:
        raise DatasetError(f"{member}: {error}") from error
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{member}: expected a pickled batch, found: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of arrays and plain values that refuses any other class or function, so that no code can run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DatasetError(
                f"expected arrays and plain values only, found a call of {module_name}.{global_name}"
            ) from None


def _empty_array(_kind: object, shape: tuple[int, ...], _code: bytes) -> np.ndarray:
    """Return an empty array, in place of numpy's `_reconstruct`: a pickle could request terabytes there."""
    if shape != (0,):
        raise DatasetError(f"expected arrays to be rebuilt from shape (0,), found {shape}")
    return np.empty(0, np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """Return `text` as latin1 bytes, in place of `_codecs.encode`, with which Python 3 writes bytes in protocol 2."""
    if encoding not in ("latin1", b"latin1"):
        raise DatasetError(f"expected bytes written as latin1, found {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): "ndarray",  # only an argument of `_reconstruct`; a str cannot be called
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
