"""Which weights the backbone gets, settled without TensorFlow: a checked file, or an untrained recipe.

The digest of the file, not its name, is what a feature space is known by.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline import machine
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE, Backbone
from pipeline.backbone.untrained import recipe_of
from pipeline.cache.digests import remembered_digest
from pipeline.cache.index import Index
from pipeline.download import cause, fetch
from pipeline.errors import UsageError, WeightsError
from pipeline.progress import Progress, silent
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

_SEED_DIGITS = 18  # as many as a feature space's spec takes


@dataclass(frozen=True)
class Weights:
    """Weights. `identity` goes into the feature spec; `path` is None when untrained, or when the file is gone."""

    kind: Literal["imagenet", "file", "untrained"]
    identity: str
    path: Path | None

    @property
    def label(self) -> str:
        """What to call them in a summary: imagenet, untrained, or the file's name."""
        return self.path.name if self.kind == "file" and self.path else self.kind

    def require(self) -> Weights:
        """Return these, to compute with. Raises WeightsError if their file is gone."""
        if self.kind == "file" and self.path is None:
            raise WeightsError(
                f"the weights {self.identity} are not on this machine any more; give the file by `--weights FILE`"
            )
        return self


def resolve(
    choice: str, backbone: str, downloads: Path, index: Index, *, offline: bool = False, progress: Progress = silent
) -> Weights:
    """Return the weights that `choice` names, to compute with.

    `choice` is "auto", "imagenet", "untrained", "untrained:SEED", "sha256:DIGEST" of a file that was used before, or
    a path. With `offline`, "auto" takes ImageNet's file if it is at hand and untrained weights else; without, it is
    "imagenet".

    Raises
    ------
    WeightsError
        If the file cannot be had; the text lists the ways out.
    UsageError
        If the seed is not a number, or the digest none.
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
        return _from_file("imagenet", path or _download(row, downloads, progress), index)
    return _from_file("file", machine.at_home(choice), index)


def anchored(choice: str) -> str:
    """Return the same choice with an absolute path, so that it means the same from anywhere."""
    return str(machine.at_home(choice).absolute()) if is_path(choice) else choice


def is_path(choice: str) -> bool:
    """Return whether a choice of weights is a file's path."""
    return choice not in ("auto", "imagenet", "untrained") and not choice.startswith(("untrained:", "sha256:"))


def by_digest(choice: str, backbone: str, downloads: Path, index: Index) -> Weights:
    """Return the weights "sha256:DIGEST", without a path if their file is gone. Raises UsageError on what is none."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", choice):
        raise UsageError(f"--weights sha256:DIGEST takes 64 hexadecimal digits, found {choice!r:.80}")
    return find_by_identity(choice, backbone, downloads, index) or Weights("file", choice, None)


def find_by_identity(identity: str, backbone: str, downloads: Path, index: Index) -> Weights | None:
    """Return the weights a feature space names, if they are still at hand on this machine."""
    if identity.startswith("untrained:"):
        return Weights("untrained", identity, None)
    wanted = bytes.fromhex(identity.removeprefix("sha256:"))
    for path in (*index.files_with_digest(wanted), *_imagenet_places(BACKBONES[backbone], downloads)):
        if path.is_file() and remembered_digest(path, index) == wanted:
            return Weights("file", identity, path)
    return None


def require_by_identity(identity: str, label: object, of: str, backbone: str, workspace: Workspace) -> Weights:
    """Return the weights that `of`, a space or a run, was computed with. Raises WeightsError if they are not here."""
    found = find_by_identity(identity, backbone, workspace.downloads, workspace.cache.index)
    if found is None:
        raise WeightsError(
            f"{of} was computed with {label} ({identity}), which are not on this machine; give the file by "
            "`--weights FILE`"
        )
    return found


def find_imagenet(backbone: Backbone, downloads: Path) -> Path | None:
    """Return ImageNet's weights file if it is in `downloads` or in Keras' own folder, and is the published one."""
    import pooch

    for path in _imagenet_places(backbone, downloads):
        if not path.is_file():
            continue
        # A remembered digest would prove nothing: any file given by --weights FILE has one.
        if pooch.file_hash(path, "md5") == backbone.weights_md5:
            return path
        logger.warning("%s is not the published file (its MD5 differs); it is passed over", path)
    return None


def _imagenet_places(backbone: Backbone, downloads: Path) -> tuple[Path, Path]:
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    return downloads / backbone.weights_file, keras_home / "models" / backbone.weights_file


def _download(backbone: Backbone, downloads: Path, progress: Progress) -> Path:
    try:
        return fetch(backbone.weights_url, f"md5:{backbone.weights_md5}", downloads, progress)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"ImageNet weights cannot be downloaded ({cause(error)}); give a Keras weights file by "
            f"`--weights FILE`, or put {backbone.weights_file} (MD5 {backbone.weights_md5}) into {downloads}, "
            "or take `--weights untrained` for a trial"
        ) from error


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


def describe(choice: str | None, workspace: Workspace) -> dict[str, str | None]:
    """Return where weights come from; with a `choice`, get those ready and return who they are."""
    row, index = BACKBONES[DEFAULT_BACKBONE], workspace.cache.index
    if choice is not None:
        found = resolve(choice, row.name, workspace.downloads, index, progress=workspace.progress)
        return {"weights": found.label, "identity": found.identity, "path": str(found.path) if found.path else None}
    at_hand = find_imagenet(row, workspace.downloads)
    return {
        "imagenet": row.weights_url,
        "imagenet_md5": row.weights_md5,
        "imagenet_file": str(at_hand) if at_hand else "not downloaded; `weights --weights imagenet` does it",
        "untrained": f"drawn from a seed by the recipe {recipe_of(row.name)}: --weights untrained or untrained:SEED",
        "file": "any Keras weights of InceptionV3 without top: --weights FILE (.weights.h5 or .h5)",
        "auto": "imagenet; for the embedded `digits`, without a download, untrained unless ImageNet's file is there",
    }
