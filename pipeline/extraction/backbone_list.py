"""List the available networks, those of the table and own ones, with what is known of them on this machine.

Listing loads no TensorFlow and hashes no weights file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.backbone import keras_config, own
from pipeline.backbone import source as networks
from pipeline.backbone.frozen import ENGINE
from pipeline.backbone.source import Architecture
from pipeline.backbone.table import BACKBONES, Backbone
from pipeline.backbone.weights import imagenet_place
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import SpecError
from pipeline.core.spec import OWN
from pipeline.extraction import measured_rates

_FLOAT16 = 2  # bytes
_FLOAT32 = 4
_OWN_DIGITS, _WEIGHTS_DIGITS = len(OWN) + 8, len("sha256:") + 8  # of hashes that distinguish networks of one name

Rate = Mapping[str, Any]  # as `measured_rates.known` returns it


@dataclass(frozen=True)
class BackboneInfo:
    """A network and what is known of it on this machine; unknown values are None.

    `row` is the shape (h, w, c) of a row. `bytes_per_row` are its bytes on disk in the largest feature space of that
    layer and size; `uncompressed` are its bytes in memory, in float16. `images_per_second` is the rate at the requested
    precision; `rates` is precision → images/s. `weights` is "yes" if the ImageNet weights are on this machine, "file"
    if the file of an own network is, else "no".
    """

    name: str
    own: bool
    input_size: int | None
    scaling: str | None
    layer: str
    row: tuple[int, ...] | None
    parameters: int | None
    multiplications: int | None
    bytes_per_row: int | None
    uncompressed: int | None
    images_per_second: float | None
    rates: dict[str, float]
    weights: str
    weights_file: str | None


def list_backbones(names: Sequence[str], workspace: Workspace, precision: str) -> list[BackboneInfo]:
    """Return the named networks, or all if `names` is empty: first those of the table, the cheapest first.

    Raises
    ------
    UsageError
        If there is no such network.
    SpecError
        If the file of an own network cannot be used.
    """
    wanted = [networks.architecture(name) for name in names]
    spaces, known = workspace.cache.spaces(), measured_rates.known(workspace)
    rows = [BACKBONES[each.name] for each in wanted if each.file is None] if names else list(BACKBONES.values())
    files = {(each.name, str(each.weights)): each for each in wanted if each.file is not None}
    listed = [_named(row, spaces, known, precision, workspace) for row in rows]
    of_own = _largest_of_own(spaces)
    identities = list(dict.fromkeys([*files, *(() if names else of_own)]))
    found = [
        _own(files.get(each) or _of_space(of_own[each], workspace), spaces, known, precision) for each in identities
    ]
    marks = [f"{name[:_OWN_DIGITS]}, {weights[:_WEIGHTS_DIGITS]}" for name, weights in identities]
    apart = networks.distinct_labels([each.name for each in found], marks)
    listed += [replace(each, name=name) for each, name in zip(found, apart, strict=True)]
    return sorted(listed, key=lambda each: (each.own, each.multiplications or 0, each.name))


def with_size(network: Architecture, spaces: Iterable[FeatureSpace]) -> Architecture:
    """Return the network with an input size, if its file fixes none and it has features.

    The size is that of the feature space with most rows, preferably of a space of the network's default layer. Other
    networks are returned unchanged.
    """
    if network.input_size is not None:
        return network
    some = _of_network(network, spaces)
    found = next((each for each in some if each.spec.layer == network.default_layer), some[0] if some else None)
    return replace(network, input_size=found.spec.input_size) if found else network


def _named(
    row: Backbone, spaces: Iterable[FeatureSpace], known: Iterable[Rate], precision: str, workspace: Workspace
) -> BackboneInfo:
    of_default = row.name, row.default_layer, row.input_size
    same = [each for each in spaces if (each.spec.backbone, each.spec.layer, each.spec.input_size) == of_default]
    speeds, weights = _rates_of(known, *of_default), imagenet_place(row, workspace.downloads)
    return BackboneInfo(
        name=row.name,
        own=False,
        input_size=row.input_size,
        scaling=row.scaling,
        layer=row.default_layer,
        row=row.row,
        parameters=row.parameters,
        multiplications=row.multiplications,
        bytes_per_row=_bytes_per_row(same),
        uncompressed=_uncompressed(row.row),
        images_per_second=speeds.get(precision),
        rates=speeds,
        weights="yes" if weights else "no",
        weights_file=str(weights) if weights else None,
    )


def _own(network: Architecture, spaces: Iterable[FeatureSpace], known: Iterable[Rate], precision: str) -> BackboneInfo:
    """Return what is known of an own network, for its default layer and size, as for a network of the table."""
    all_of_it = _of_network(network, spaces)
    network = with_size(network, all_of_it)
    of_default = network.default_layer, network.input_size
    same = [each for each in all_of_it if (each.spec.layer, each.spec.input_size) == of_default]
    space = same[0] if same else None
    row = tuple(space.provenance.get("row_shape") or ()) or None if space else None
    speeds, path = _rates_of(known, network.name, *of_default), network.file
    stored = next((dict(found) for each in all_of_it if (found := each.provenance.get("network"))), {})
    return BackboneInfo(
        name=str(stored.get("file") or network.label),
        own=True,
        input_size=network.input_size,
        scaling=space.spec.scaling if space else network.scaling,
        layer=network.default_layer,
        row=row,
        parameters=stored.get("parameters") or (own.count_parameters(path) if path else None),
        multiplications=None,
        bytes_per_row=_bytes_per_row(same),
        uncompressed=_uncompressed(row) if row else None,
        images_per_second=speeds.get(precision),
        rates=speeds,
        weights="file" if path else "no",
        weights_file=str(path) if path else None,
    )


def _of_space(space: FeatureSpace, workspace: Workspace) -> Architecture:
    """Return the own network of a space.

    Default layer and input size come from its file, or from the space if the file is not on this machine.
    """
    spec, path = space.spec, networks.network_file(space.provenance.get("network"), workspace.cache.index)
    layer, size = spec.layer, spec.input_size
    try:
        if path is not None:
            config = own.checked_architecture(path)
            layer, size = keras_config.output_layer(config), keras_config.input_size(config)
    except SpecError:  # for example, this version cannot use the file
        path = None
    return Architecture(spec.backbone, size, spec.scaling, layer, path, spec.weights)


def _largest_of_own(spaces: Iterable[FeatureSpace]) -> dict[tuple[str, str], FeatureSpace]:
    """Return for each own network, (architecture, weights), the space with most rows."""
    found: dict[tuple[str, str], FeatureSpace] = {}
    for space in sorted(spaces, key=lambda each: each.totals().rows):
        if space.spec.backbone.startswith(OWN):
            found[space.spec.backbone, space.spec.weights] = space
    return found


def _of_network(network: Architecture, spaces: Iterable[FeatureSpace]) -> list[FeatureSpace]:
    """Return the spaces of an own network, the one with most rows first."""
    some = [each for each in spaces if (each.spec.backbone, each.spec.weights) == (network.name, network.weights)]
    return sorted(some, key=lambda each: each.totals().rows, reverse=True)


def _rates_of(known: Iterable[Rate], backbone: str, layer: str, size: int | None) -> dict[str, float]:
    """Return precision → images/s of a network on this machine, from the last measurement at each precision."""
    key = {"backbone": backbone, "layer": layer, "input_size": size, "engine": ENGINE}
    same = [each for each in known if all(each.get(name) == value for name, value in key.items())]
    return {str(each.get("precision")): each["images_per_second"] for each in same}


def _bytes_per_row(spaces: Iterable[FeatureSpace]) -> int | None:
    """Return the bytes on disk of a row in the space with most rows; None if no space has rows."""
    largest = max((space.totals() for space in spaces), key=lambda each: each.rows, default=None)
    return largest.bytes_per_row if largest else None


def _uncompressed(row: Sequence[int]) -> int:
    """Return the bytes of a row in memory: features in float16, and their means in float32."""
    return _FLOAT16 * math.prod(row) + _FLOAT32 * row[-1]
