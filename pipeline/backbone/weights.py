"""Find the weights of a backbone, without TensorFlow: a weights file that was checked, or an untrained recipe.

A feature space is identified by the digest of the weights file, not by the file's name. `resolve` returns the weights
that `--weights` means, and downloads ImageNet's if needed. `find_by_identity` finds weights again by their digest.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.backbone import weights_file
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE, Backbone, find_backbone
from pipeline.backbone.untrained import recipe_of
from pipeline.cache.digests import remembered_digest
from pipeline.cache.index import Index
from pipeline.cache.workspace import Workspace
from pipeline.core import files, machine
from pipeline.core.download import cause, fetch
from pipeline.core.errors import UsageError, WeightsError
from pipeline.core.progress import Progress, silent

logger = logging.getLogger(__name__)

_SEED_DIGITS = 18  # the limit of a feature space's spec
_MOST_OF_NOTE = 4096  # bytes


@dataclass(frozen=True)
class Weights:
    """Weights of a backbone, and the file they are in.

    `identity` is part of the feature spec. `path` is None for untrained weights, and if the file is not available.
    """

    kind: Literal["imagenet", "file", "untrained"]
    identity: str
    path: Path | None
    network: Path | None = None  # the file with the architecture of an own network

    @property
    def label(self) -> str:
        """Return the name to show in a summary: "imagenet", "untrained", or the file's name."""
        return self.path.name if self.kind == "file" and self.path else self.kind

    def require(self) -> Weights:
        """Return these weights, ready to compute with. Raises WeightsError if their file is not available."""
        if self.kind == "file" and self.path is None:
            raise WeightsError(
                f"the weights {self.identity} are not on this machine any more; give the file by `--weights FILE`"
            )
        return self


def resolve(
    choice: str, backbone: str, downloads: Path, index: Index, *, offline: bool = False, progress: Progress = silent
) -> Weights:
    """Return the weights that `choice` names, ready to compute with.

    `choice` is "auto", "imagenet", "untrained", "untrained:SEED", "sha256:DIGEST" of a file that was used before, or
    a path. "auto" means "imagenet". With `offline`, "auto" means ImageNet's file if it is available, and untrained
    weights otherwise.

    Raises
    ------
    WeightsError
        If the file is not available; the message lists what to do.
    UsageError
        If the seed is not a number, or the digest is not a SHA-256.
    """
    if choice.startswith("sha256:"):
        return by_digest(choice, backbone, downloads, index).require()
    row = BACKBONES[backbone]
    if choice == "untrained" or choice.startswith("untrained:"):
        return _untrained(choice, backbone)
    if choice in ("auto", "imagenet"):
        path = find_imagenet(row, downloads)
        if path is None and choice == "auto" and offline:
            return _untrained("untrained", backbone)
        path = path or _download(row, downloads, progress)
        if row.weights_hash is None:
            _note_digest(path, row, downloads)
        return _from_file("imagenet", path, index)
    return from_file(choice, index)


def anchored(choice: str) -> str:
    """Return the same choice with an absolute path, so that it is valid in any working directory."""
    return str(machine.expand_home(choice).absolute()) if is_path(choice) else choice


def is_path(choice: str) -> bool:
    """Return whether the value `choice` of `--weights` is the path of a file."""
    return choice not in ("auto", "imagenet", "untrained") and not choice.startswith(("untrained:", "sha256:"))


def by_digest(choice: str, backbone: str, downloads: Path, index: Index) -> Weights:
    """Return the weights with the identity "sha256:DIGEST", without a path if their file is not available.

    Raises UsageError if `choice` does not have this form.
    """
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", choice):
        raise UsageError(f"--weights sha256:DIGEST takes 64 hexadecimal digits, found {choice!r:.80}")
    return find_by_identity(choice, backbone, downloads, index) or Weights("file", choice, None)


def find_by_identity(identity: str, backbone: str, downloads: Path, index: Index) -> Weights | None:
    """Return the weights with the `identity` in a feature spec, or None if their file is not on this machine."""
    if identity.startswith("untrained:"):
        return Weights("untrained", identity, None)
    wanted = bytes.fromhex(identity.removeprefix("sha256:"))
    for path in (*index.files_with_digest(wanted), *_imagenet_places(BACKBONES[backbone], downloads)):
        if path.is_file() and remembered_digest(path, index) == wanted:
            return Weights("file", identity, path)
    return None


def find_imagenet(backbone: Backbone, downloads: Path) -> Path | None:
    """Return the path of ImageNet's weights file if it is valid and in `downloads` or in Keras' own folder, else None.

    A file is valid if it has the published hash. Where Keras publishes no hash, it must have the digest recorded in
    `downloads`. If no digest has been recorded yet, it must be an undamaged weights file.
    """
    for path in _imagenet_places(backbone, downloads):
        if not path.is_file():
            continue
        if (fault := _fault(path, backbone, downloads)) is None:
            return path
        logger.warning("%s; it is passed over", fault)
    return None


def imagenet_place(backbone: Backbone, downloads: Path) -> Path | None:
    """Return the path of a file named like ImageNet's weights, or None, without checking the file.

    Hashing a large file takes seconds.
    """
    return next((path for path in _imagenet_places(backbone, downloads) if path.is_file()), None)


def _imagenet_places(backbone: Backbone, downloads: Path) -> tuple[Path, Path]:
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    return downloads / backbone.weights_file, keras_home / "models" / backbone.weights_file


def _fault(path: Path, backbone: Backbone, downloads: Path) -> str | None:
    """Return why the file at `path` cannot be ImageNet's weights of `backbone`, or None if every check passes."""
    import pooch

    known = backbone.weights_hash or _noted(backbone, downloads)
    if known is None:
        try:
            weights_file.check(path)
        except WeightsError as error:
            return str(error)
        return None
    algorithm, _, digest = known.partition(":")
    # Hash the file again: a remembered digest is no proof, because every file given by --weights FILE has one.
    if pooch.file_hash(path, algorithm) == digest:
        return None
    right = "published file" if backbone.weights_hash else f"file noted in {_note(backbone, downloads)}"
    return f"{path} is not the {right} (its {algorithm.upper()} differs)"


def _note(backbone: Backbone, downloads: Path) -> Path:
    """Return the path of the note with the SHA-256 of a weights file whose hash Keras does not publish.

    The note has the format of `sha256sum`.
    """
    return downloads / f"{backbone.weights_file}.sha256"


def _noted(backbone: Backbone, downloads: Path) -> str | None:
    """Return the digest in the note as "sha256:…", None without a note. Raises WeightsError if it is not a SHA-256."""
    note = _note(backbone, downloads)
    try:
        text = files.read_small(note, _MOST_OF_NOTE).decode(errors="replace")
    except FileNotFoundError:
        return None
    if not (found := re.match(r"[0-9a-f]{64}\b", text)):
        raise WeightsError(f"{note} does not begin with a SHA-256; remove it, and the file is taken as it is now")
    return f"sha256:{found[0]}"


def _note_digest(path: Path, backbone: Backbone, downloads: Path) -> None:
    """Write the digest of the file at `path` to the note, and log it, unless the note exists.

    From then on, the weights file must have this digest. Raises WeightsError if the note cannot be written.
    """
    note = _note(backbone, downloads)
    if note.exists():
        return
    digest = files.sha256_file(path)
    try:
        files.make_folder(downloads)
        files.write_whole(note, f"{digest}  {backbone.weights_file}\n".encode())
    except OSError as error:
        raise WeightsError(f"{note} cannot be written ({error}); make its folder writable") from error
    logger.warning(
        "Keras publishes no hash of %s: %s is taken as it is; its SHA-256, %s, is noted in %s and must stay the same",
        backbone.weights_file,
        path,
        digest,
        note,
    )


def _download(backbone: Backbone, downloads: Path, progress: Progress) -> Path:
    known = backbone.weights_hash or _noted(backbone, downloads)
    try:
        if known is not None:
            return fetch(backbone.weights_url, known, downloads, progress, backbone.weights_file)
        return _download_unhashed(backbone, downloads, progress)
    except (OSError, ValueError) as error:
        algorithm, _, digest = (known or "").partition(":")
        right = f"{algorithm.upper()} {digest}" if known else "Keras publishes no hash"
        raise WeightsError(
            f"ImageNet weights of {backbone.name} cannot be downloaded ({cause(error)}); get {backbone.weights_url} "
            f"({right}) elsewhere and put it into {downloads} as {backbone.weights_file}, give another Keras weights "
            "file by `--weights FILE`, or take `--weights untrained` for a trial"
        ) from error


def _download_unhashed(backbone: Backbone, downloads: Path, progress: Progress) -> Path:
    """Download ImageNet's weights without a known hash, and return the path of the file.

    The file is downloaded to a temporary folder, checked to be plain HDF5 with numbers only, and moved to `downloads`.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=files.PARTIAL_PREFIX, dir=downloads) as aside:
        path = fetch(backbone.weights_url, None, Path(aside), progress, backbone.weights_file)
        weights_file.check(path)
        return path.replace(downloads / backbone.weights_file)


def from_file(choice: str, index: Index) -> Weights:
    """Return the weights in the Keras weights file at the path `choice`.

    Raises WeightsError if there is no such file, or if its name does not end in ".h5".
    """
    return _from_file("file", machine.expand_home(choice), index)


def _from_file(kind: Literal["imagenet", "file"], path: Path, index: Index) -> Weights:
    if not path.is_file():
        raise WeightsError(
            f"no weights file {path}; --weights takes auto, imagenet, untrained or the path of a Keras weights "
            "file (.weights.h5 or .h5)"
        )
    if path.suffix != ".h5":
        raise WeightsError(f"{path} does not end in .weights.h5 or .h5, as Keras weights files do")
    return Weights(kind, f"sha256:{remembered_digest(path, index).hex()}", path)


def _untrained(choice: str, backbone: str) -> Weights:
    _, _, seed = choice.partition(":")
    if not (seed or "0").isdecimal() or len(seed) > _SEED_DIGITS:
        raise UsageError(
            f"--weights untrained:SEED takes a whole number of at most {_SEED_DIGITS} digits, found {seed!r:.60}"
        )
    return Weights("untrained", f"untrained:{recipe_of(backbone)}:{int(seed or 0)}", None)


def describe(choice: str | None, workspace: Workspace, backbone: str = DEFAULT_BACKBONE) -> dict[str, str | None]:
    """Return where the weights of `backbone` come from.

    A `choice` means the same as in `resolve`. With it, the weights are made available (downloaded if needed), and the
    result is their name, identity and path.

    Raises
    ------
    UsageError
        If there is no such backbone; with a `choice`, also as in `resolve`.
    WeightsError
        If the note of a digest is not a SHA-256; with a `choice`, also as in `resolve`.
    """
    row, index = find_backbone(backbone), workspace.cache.index
    if choice is not None:
        found = resolve(choice, row.name, workspace.downloads, index, progress=workspace.progress)
        return {"weights": found.label, "identity": found.identity, "path": str(found.path) if found.path else None}
    at_hand = find_imagenet(row, workspace.downloads)
    known = row.weights_hash or _noted(row, workspace.downloads) or ""
    return {
        "backbone": row.name,
        "imagenet": row.weights_url,
        "imagenet_md5": known.removeprefix("md5:") if known.startswith("md5:") else None,
        "imagenet_sha256": known.removeprefix("sha256:") if known.startswith("sha256:") else None,
        "imagenet_file": str(at_hand)
        if at_hand
        else f"not downloaded; `weights --backbone {row.name} --weights imagenet` does it",
        "untrained": f"drawn from a seed by the recipe {recipe_of(row.name)}: --weights untrained or untrained:SEED",
        "file": f"any Keras weights of {row.application} without top: --weights FILE (.weights.h5 or .h5)",
        "auto": "imagenet; for the embedded `digits`, without a download, untrained unless ImageNet's file is there",
    }
