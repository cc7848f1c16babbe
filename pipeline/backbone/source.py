"""Find the network and the weights that the options mean, without TensorFlow.

A network is a row of the table or an own `.keras` file. `open_source` resolves `--backbone`, `--input-size` and
`--scaling`, `resolve` resolves `--weights`, and `find` finds both again for a stored feature spec and its `record`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.backbone import keras_archive, own, weights
from pipeline.backbone.scaling import CHOICES, canonical
from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE, Backbone, find_backbone
from pipeline.backbone.weights import Weights
from pipeline.cache.digests import remembered_digest
from pipeline.cache.index import Index
from pipeline.cache.workspace import Workspace
from pipeline.core import files, machine
from pipeline.core.errors import SpecError, UsageError, WeightsError
from pipeline.core.spec import OWN, FeatureSpec


@dataclass(frozen=True)
class Architecture:
    """A network as described by the table or by its file; None for values that are not given there."""

    name: str  # the value of `FeatureSpec.backbone`
    input_size: int | None
    scaling: str | None
    default_layer: str
    file: Path | None = None  # the file with the architecture of an own network
    weights: str | None = None  # the identity of the weights in that file

    @property
    def label(self) -> str:
        """Return the name to show: that of the row or of the file."""
        return self.file.name if self.file else self.name


@dataclass(frozen=True)
class Source(Architecture):
    """A network with a known input size in pixels and a known scaling of the pixels."""

    input_size: int
    scaling: str


def of_row(row: Backbone) -> Source:
    """Return the network of a row of the table, with the row's input size and scaling."""
    return Source(row.name, row.input_size, row.scaling, row.default_layer)


def is_file(choice: str) -> bool:
    """Return whether the value `choice` of `--backbone` means the file of an own network."""
    # As a path, an empty string would be the current folder.
    return choice not in ("", *BACKBONES) and (choice.endswith(".keras") or machine.expand_home(choice).exists())


def anchored(choice: str | None) -> str | None:
    """Return the same choice with an absolute path, so that it is valid in any working directory."""
    return str(machine.expand_home(choice).absolute()) if choice is not None and is_file(choice) else choice


def architecture(choice: str | None) -> Architecture:
    """Return the network that the value `choice` of `--backbone` means; None means the default backbone.

    Raises
    ------
    UsageError
        If there is no such network.
    SpecError
        If the file is refused.
    """
    choice = DEFAULT_BACKBONE if choice is None else choice
    if not is_file(choice):
        return of_row(find_backbone(choice))
    found = own.read_network(machine.expand_home(choice).absolute())
    return Architecture(found.name, found.input_size, None, found.default_layer, found.path, found.weights)


def open_source(choice: str | None, input_size: int | None, scaling: str | None, workspace: Workspace) -> Source:
    """Return the network that `--backbone`, `--input-size` and `--scaling` mean.

    For an own network, options that are not given are taken from its feature spaces on disk and from published runs.

    Raises
    ------
    UsageError
        If there is no such network, or if the size or scaling of an own network is neither given nor known.
    SpecError
        If the file is refused, or if several sizes or scalings are known.
    """
    scaling = None if scaling is None else canonical(scaling)
    found = architecture(choice)
    input_size, scaling = input_size or found.input_size, scaling or found.scaling
    if input_size is None or scaling is None:
        known = _known(found, workspace)
        values = {
            "--input-size": {str(spec.input_size) for spec in known} if input_size is None else {str(input_size)},
            "--scaling": {spec.scaling for spec in known} if scaling is None else {scaling},
        }
        size, scaling = _only(found, values)
        input_size = int(size)
    return Source(found.name, input_size, scaling, found.default_layer, found.file, found.weights)


def lacks_scaling(choice: str, workspace: Workspace) -> bool:
    """Return whether `--scaling` is required for an own network: no scaling or several of them are known."""
    return len({spec.scaling for spec in _known(architecture(choice), workspace)}) != 1


def _known(found: Architecture, workspace: Workspace) -> list[FeatureSpec]:
    """Return the specs of an own network's feature spaces on disk, and those of published runs of the network."""
    specs = [*(each.spec for each in workspace.cache.spaces()), *_of_runs(workspace.runs)]
    return [spec for spec in specs if (spec.backbone, spec.weights) == (found.name, found.weights)]


def _of_runs(root: Path) -> Iterator[FeatureSpec]:
    """Yield the feature spec that each published run was started from; runs without a readable spec are skipped."""
    for path in sorted(root.glob("[!.]*/run.json")):
        try:
            about = json.loads(files.read_small(path, own.MOST_STORED))
            yield FeatureSpec.from_dict((about.get("base") or about)["features"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SpecError):
            continue


_MEANING = {
    "--scaling": f"how its pixels were scaled in training ({CHOICES})",
    "--input-size": "how many pixels a side it is given",
}


def _only(found: Architecture, values: Mapping[str, set[str]]) -> list[str]:
    """Return the one value of each option.

    Raises
    ------
    SpecError
        If an option has several known values.
    UsageError
        If options have no value. The message names all of them.
    """
    if several := [f"{option} {' and '.join(sorted(each))}" for option, each in values.items() if len(each) > 1]:
        raise SpecError(f"{found.label} is known with {', and with '.join(several)}; say which")
    if lacking := [f"by {option} {_MEANING[option]}" for option, each in values.items() if not each]:
        raise UsageError(f"{found.label} is not known from before: say {', and '.join(lacking)}")
    return [value for each in values.values() for value in each]


def resolve(source: Source, choice: str, workspace: Workspace, *, offline: bool = False) -> Weights:
    """Return the weights that the value `choice` of `--weights` means, ready to compute with.

    Raises
    ------
    UsageError, WeightsError
        In the same cases as in `weights.resolve`; UsageError also if the file of an own network is not given, or if
        `choice` names other weights for it.
    SpecError
        If the file of an own network holds weights with another digest than `choice`.
    """
    index, progress = workspace.cache.index, workspace.progress
    if source.file is None:
        if source.name.startswith(OWN):
            raise UsageError(
                f"--weights {choice!r:.80}: an own network brings its weights; name its file by --backbone FILE"
            )
        return weights.resolve(choice, source.name, workspace.downloads, index, offline=offline, progress=progress)
    remembered_digest(source.file, index)  # `find` looks the file up by this digest
    if weights.is_path(choice):  # other weights for this network, such as those of a fine-tuned run
        return replace(weights.from_file(choice, index), network=source.file)
    _refuse_other_weights(source, choice)
    return Weights("file", str(source.weights), source.file, source.file)


def _refuse_other_weights(network: Architecture, choice: str) -> None:
    if choice.startswith("sha256:") and choice != network.weights:
        raise SpecError(
            f"{network.label} holds the weights {network.weights}, not {choice:.80}; give the file with those"
        )
    if choice not in ("auto", network.weights):
        raise UsageError(f"{network.label} brings its weights; leave out --weights {choice!r:.80}")


def stated(source: Source, choice: str, workspace: Workspace) -> Weights | None:
    """Return the weights that the user chose; None for "auto", where the feature spaces on disk decide.

    For "sha256:DIGEST" of a named network, the weights file itself need not be available.
    """
    if source.file is not None:
        return resolve(source, choice, workspace)
    if choice == "auto":
        return None
    if choice.startswith("sha256:") and not source.name.startswith(OWN):
        return weights.by_digest(choice, source.name, workspace.downloads, workspace.cache.index)
    return resolve(source, choice, workspace)


def backbone_text(spec: FeatureSpec, choice: str, workspace: Workspace) -> Weights | None:
    """Return the weights that the user names for features of `spec`; None if `spec` has other weights.

    `choice` is a value of `--weights`; for an own network, the path of its file.
    """
    if not spec.backbone.startswith(OWN):
        found = weights.resolve(
            choice, spec.backbone, workspace.downloads, workspace.cache.index, progress=workspace.progress
        )
        return found if found.identity == spec.weights else None
    source = open_source(choice, spec.input_size, spec.scaling, workspace)
    if (source.name, source.weights) != (spec.backbone, spec.weights):
        return None
    return resolve(source, "auto", workspace)


def record(found: Weights, index: Index) -> dict[str, Any] | None:
    """Return the record of an own network's file that is stored with features and runs; None for a named network.

    The record holds the file's name and SHA-256, by which `find` finds the file, and for a `.keras` file the number of
    parameters.
    """
    if found.network is None:
        return None
    path = found.network
    stored = {"file": path.name, "sha256": remembered_digest(path, index).hex()}
    return {**stored, "parameters": own.count_parameters(path)} if keras_archive.is_archive(path) else stored


def network_file(recorded: Mapping[str, Any] | None, index: Index) -> Path | None:
    """Return the file of an own network from its `record`, without opening it; None if it is not on this machine."""
    return next(_at_hand(str((recorded or {}).get("sha256", "")), index), None)


def file_of(recorded: Mapping[str, Any] | None) -> str:
    """Return a text that identifies the file of an own network, from its `record`: its name and its SHA-256."""
    about = recorded or {}
    return f"{about.get('file', 'a file')} (sha256 {about.get('sha256', '?')})"


def label(spec: FeatureSpec, recorded: Mapping[str, Any] | None) -> str:
    """Return the name to show for the network of `spec`: that of a row or of the file."""
    return str((recorded or {}).get("file", spec.backbone))


def distinct_labels(labels: Sequence[str], marks: Sequence[str]) -> list[str]:
    """Return `labels`, adding the corresponding mark in parentheses to each label that occurs more than once.

    Two files of own networks may have the same name.
    """
    return [f"{each} ({mark})" if labels.count(each) > 1 else each for each, mark in zip(labels, marks, strict=True)]


def find(spec: FeatureSpec, recorded: Mapping[str, Any] | None, workspace: Workspace) -> Weights | None:
    """Return the weights of `spec`, or None if they are not on this machine; an own network is found by its `record`.

    Raises
    ------
    SpecError
        If this version has no such network.
    """
    index = workspace.cache.index
    if not spec.backbone.startswith(OWN):
        if spec.backbone not in BACKBONES:
            raise SpecError(f"these features were made by another version of Icebox, its network {spec.backbone!r:.60}")
        return weights.find_by_identity(spec.weights, spec.backbone, workspace.downloads, index)
    for network in _at_hand(str((recorded or {}).get("sha256", "")), index):
        if keras_archive.is_archive(network) and own.read_network(network).weights == spec.weights:
            return Weights("file", spec.weights, network, network)
        for path in _at_hand(spec.weights.removeprefix("sha256:"), index):
            return Weights("file", spec.weights, path, network)
    return None


def describe(choice: str | None, stated: str | None, workspace: Workspace) -> dict[str, str | None]:
    """Return where the weights of a backbone come from, as `weights.describe` does.

    For an own network, the weights are those in its file, or the weights file at the path `stated`.

    Raises
    ------
    UsageError
        If there is no such network, or if `stated` does not fit an own network.
    SpecError
        If the file is refused, or holds weights with another digest than `stated`.
    """
    found = architecture(choice)
    if found.file is None:
        return weights.describe(stated, workspace, found.name)
    if stated is not None and weights.is_path(stated):
        other = weights.from_file(stated, workspace.cache.index)
        return {"weights": other.label, "identity": other.identity, "path": str(other.path)}
    _refuse_other_weights(found, stated or "auto")
    own_weights = {"weights": found.label, "identity": found.weights, "path": str(found.file)}
    return own_weights if stated else {"backbone": found.name, **own_weights}


def _at_hand(digest: str, index: Index) -> Iterator[Path]:
    """Yield the files on this machine that the index lists under the SHA-256 `digest` and that still have it."""
    if not re.fullmatch("[0-9a-f]{64}", digest):  # the digest may come from a file made on another machine
        return
    for path in index.files_with_digest(bytes.fromhex(digest)):
        if path.is_file() and remembered_digest(path, index).hex() == digest:
            yield path


def require(
    spec: FeatureSpec, recorded: Mapping[str, Any] | None, label: object, of: str, workspace: Workspace
) -> Weights:
    """Return the weights of `spec`, which `of` was computed with.

    `label` names the weights and `of` the feature space or run, both for the message.

    Raises
    ------
    WeightsError
        If the weights are not on this machine.
    SpecError
        If this version has no such network.
    """
    if found := find(spec, recorded, workspace):
        return found
    if spec.backbone.startswith(OWN):
        raise WeightsError(
            f"{of} was computed with an own network, {file_of(recorded)}, which is not on this machine; give the file "
            "by `--backbone FILE`"
        )
    raise WeightsError(
        f"{of} was computed with {label} ({spec.weights}), which are not on this machine; give the file by "
        "`--weights FILE`"
    )
