"""Save and load Keras weights files, and check them first as untrusted input.

Keras weights are HDF5 files with named arrays of numbers. HDF5 files can also refer to other files, or claim sizes much
larger than their content. A whole model saved by Keras may contain code. `check` refuses all of this.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from pipeline.backbone.keras_start import KerasModel
from pipeline.core.errors import WeightsError

_MOST_BYTES = 2**31  # uncompressed; InceptionV3 has 87 MB, and three times as much with an optimizer's state
_MOST_OBJECTS = 100_000
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def check(path: Path) -> None:
    """Check every name, link, size and dtype in the weights file at `path`, without reading its numbers.

    Raises
    ------
    WeightsError
        If the file is not HDF5, or contains anything other than numbers.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(4)
        if not h5py.is_hdf5(path):
            raise WeightsError(f"{path} {_kind(beginning)}")
        with h5py.File(path, "r", locking=False) as file:
            _check_code(file, path)
            _check_content(file, path)
    except WeightsError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # raised by h5py for a damaged file
        raise WeightsError(f"{path} cannot be read as HDF5: {' '.join(str(error).split())[:200]}") from error


def save(model: KerasModel, path: Path) -> None:
    """Save the weights of `model` to `path` with Keras. Raises WeightsError if the file cannot be locked."""
    with _locks_explained(path):
        model.save_weights(path)


def load(model: KerasModel, path: Path) -> None:
    """Load the weights file at `path` into `model` with Keras, whatever the file's name ends in.

    Raises
    ------
    WeightsError
        If the file cannot be locked.
    UserWarning
        If layers are missing in the file, which Keras would leave at random values, or if it has other layers.
    """
    with _locks_explained(path), warnings.catch_warnings(), named_for_keras(path) as named:
        warnings.simplefilter("error", UserWarning)
        model.load_weights(named)


@contextmanager
def _locks_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if "unable to lock file" not in str(error):
            raise
        raise WeightsError(
            f"{path} cannot be locked ({os.strerror(error.errno or 0)}): another program has it open, or its file "
            "system has no locks; ICEBOX_LOCKS=off goes on without"
        ) from error


@contextmanager
def named_for_keras(path: Path) -> Iterator[Path]:
    """Yield a path to the weights file whose ending fits its format, because Keras chooses its reader by the ending.

    The path is `path` itself, or a temporary symbolic link to it.

    Raises
    ------
    OSError
        If the file is not HDF5.
    """
    with h5py.File(path, "r", locking=False) as file:
        ending = ".h5" if "layer_names" in file.attrs or "model_weights" in file else ".weights.h5"
    if path.name.endswith(".weights.h5") == (ending == ".weights.h5"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"renamed{ending}"
        link.symlink_to(path.absolute())
        yield link


def _kind(beginning: bytes) -> str:
    if beginning == _ZIP:
        return (
            "is a zip archive, as .keras files are; these may hold code, so save the weights alone: "
            "model.save_weights('name.weights.h5')"
        )
    if beginning[:1] == _PICKLE:
        return "is a Python pickle, which may hold code; it is not opened. Expected a Keras weights file (HDF5)"
    return "is not a Keras weights file (HDF5)"


def _check_code(file: h5py.File, path: Path) -> None:
    config = file.attrs.get("model_config")
    text = config.decode(errors="replace") if isinstance(config, bytes) else str(config)
    if '"Lambda"' in text:
        raise WeightsError(f"{path} holds a model with Lambda layers, which are code; save the weights of one without")


def _check_content(file: h5py.File, path: Path) -> None:
    count = total = 0

    def look(name: str, link: object) -> str | None:
        nonlocal count, total
        count += 1
        if count > _MOST_OBJECTS:
            return f"holds more than {_MOST_OBJECTS:,} objects"
        if not isinstance(link, h5py.HardLink):
            return f"links {name!r} to elsewhere"
        found = file[name]
        if not isinstance(found, h5py.Dataset):
            return None
        total += found.nbytes
        return _fault(found, total)

    # A result of `look` other than None ends the walk; an exception would pass through HDF5, with a second traceback.
    if fault := file.visititems_links(look):
        raise WeightsError(f"{path} {fault}, which weights do not")


def _fault(dataset: h5py.Dataset, total: int) -> str | None:
    if dataset.external or dataset.is_virtual:
        return f"keeps {dataset.name!r} in other files"
    # Keras writes bfloat16 as "V2"; integers are counters of optimizers, and seeds.
    if dataset.dtype.kind not in "fiub" and dataset.dtype.str != "|V2":
        return f"has {dataset.dtype} at {dataset.name!r}"
    if total > _MOST_BYTES:
        return f"claims more than {_MOST_BYTES / 1e9:.1f} GB"
    return None
