"""Reads image features from an Icebox space, by nothing but cache-format.md."""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (the latter registers Zstandard and Blosc2)
import numpy as np

FIELDS = {
    "backbone", "layer", "weights", "input_size", "decode", "resize", "fit", "scaling", "precision", "engine",
    "storage",
}  # fmt: skip


def sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_features(space: Path, images: Sequence[Path], dataset: str = "features") -> np.ndarray:
    """The rows of the plain view of these image files, in their order; KeyError names an image without a row."""
    about = json.loads((space / "space.json").read_text())
    if unknown := about["spec"].keys() ^ FIELDS:
        raise ValueError(f"{space}: fields of the spec unknown or missing: {sorted(unknown)}")
    shape, kind = about["made_by"]["row_shape"], about["spec"]["storage"]
    if dataset == "pooled":
        shape, kind = shape[-1:], "float32"
    places: dict[bytes, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(sha256(image), []).append(place)
    while True:
        rows, found = np.empty((len(images), *shape), kind), set[bytes]()
        shards = sorted(p for p in (space / "shards").iterdir() if re.fullmatch(r"[0-9a-f]{64}\.h5", p.name))
        try:
            for path in shards:
                if sha256(path).hex() != path.stem:
                    raise ValueError(f"{path} is damaged: its sha256 is not its name")
                with h5py.File(path, "r", locking=False) as shard:
                    file: Any = shard
                    if file.attrs["format"] != b"icebox-shard" or file.attrs["version"] != 1:
                        raise ValueError(f"{path} is no shard of format version 1")
                    plain = np.flatnonzero(file["view"][:] == 0)
                    row_of = {
                        key.tobytes(): row for key, row in zip(file["key"][:][plain], plain.tolist(), strict=True)
                    }
                    wanted = sorted(row_of.keys() & places.keys() - found, key=row_of.__getitem__)  # none read twice
                    for key, values in zip(wanted, file[dataset][[row_of[key] for key in wanted]], strict=True):
                        rows[places[key]] = values
                    found |= row_of.keys()
        except FileNotFoundError:
            continue  # a shard was replaced meanwhile: begin again
        if lost := [at[0] for key, at in places.items() if key not in found]:
            raise KeyError(str(images[lost[0]]))
        return rows


def main(space: str, *images: str) -> None:
    for dataset in ("features", "pooled"):
        rows = read_features(Path(space), [Path(image) for image in images], dataset)
        print(dataset, rows.shape, rows.dtype, *(f"{row.mean(dtype=float):.6f}" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
