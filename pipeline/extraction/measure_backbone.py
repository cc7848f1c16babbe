"""Measure how fast networks compute features on this machine, with untrained weights; store each result at once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace

from pipeline.backbone import source as networks
from pipeline.backbone.frozen import FrozenBackbone
from pipeline.backbone.keras_start import import_keras
from pipeline.backbone.scaling import NONE
from pipeline.backbone.source import Architecture, Source
from pipeline.backbone.table import BACKBONES
from pipeline.cache.shard import SHARD_BYTES
from pipeline.cache.workspace import Workspace
from pipeline.core import machine
from pipeline.core.errors import UsageError
from pipeline.core.units import counted, duration, size_text
from pipeline.extraction import measured_rates
from pipeline.extraction.backbone_list import with_size
from pipeline.extraction.compute import default_batch
from pipeline.extraction.feature_choice import FeatureChoice, ResolvedChoice

logger = logging.getLogger(__name__)

_COPIES = 3  # copies of a network's weights in memory, in float32, while it is built and compiled
_BESIDE = 1_500_000_000  # bytes of memory for TensorFlow and the batches
# The time of a measurement: the network is built and compiled, then some batches are computed.
_BUILDING_S = 12
_BATCHES = 6
_MULTIPLICATIONS = 25e9  # per second and core; with a GPU most of the time goes into compiling


def measure(names: Sequence[str], workspace: Workspace, precision: str) -> None:
    """Measure images/s of the named networks, or of all in the table, and store each rate as soon as it is known.

    A network that does not fit into memory is left out, with a warning.

    Raises
    ------
    UsageError
        If there is no such network, or if a network takes images of any size and has no features yet.
    SpecError
        If the file of an own network cannot be used.
    """
    spaces = workspace.cache.spaces()
    found = [with_size(networks.architecture(name), spaces) for name in names or _cheapest_first()]
    sources = [_source(each) for each in found if _fits(each)]
    seconds = [_expected_seconds(source) for source in sources]
    logger.info(
        "measuring %s takes about %s; each result is kept as soon as it is there",
        counted(len(sources), "network"),
        duration(sum(seconds)),
    )
    with workspace.progress("measuring", sum(seconds), "s expected") as advance:
        for source, expected in zip(sources, seconds, strict=True):
            advance(0, note=source.label)
            _measure(source, workspace, precision)
            advance(expected)


def _cheapest_first() -> list[str]:
    return sorted(BACKBONES, key=lambda name: BACKBONES[name].multiplications)


def _source(network: Architecture) -> Source:
    """Return a network that can be built. Its scaling may be a guess: scaling of pixels does not change the rate."""
    if network.input_size is None:
        raise UsageError(
            f"{network.label} takes images of any size; make features of one first: `features --input-size N`"
        )
    scaling = network.scaling or NONE
    return Source(network.name, network.input_size, scaling, network.default_layer, network.file, network.weights)


def _fits(network: Architecture) -> bool:
    if network.name not in BACKBONES:
        return True
    needed = 4 * _COPIES * BACKBONES[network.name].parameters + _BESIDE
    if (free := machine.available_memory()) >= needed:
        return True
    logger.warning(
        "%s is left out: it takes about %s of memory, and %s are free", network.name, size_text(needed), size_text(free)
    )
    return False


def _expected_seconds(source: Source) -> int:
    if machine.gpu_count() or source.name not in BACKBONES:
        return _BUILDING_S
    work = _BATCHES * default_batch() * BACKBONES[source.name].multiplications
    return _BUILDING_S + round(work / (_MULTIPLICATIONS * machine.usable_cores()))


def _measure(source: Source, workspace: Workspace, precision: str) -> None:
    """Measure one network, store its rate, and free its memory."""
    weights = networks.resolve(source, "auto" if source.file else "untrained", workspace)
    # Untrained features may be too large for float16; float32 is safe, and they are not stored.
    resolved = ResolvedChoice(FeatureChoice(precision=precision, storage="float32"), source, weights, None)
    spec = resolved.new_spec(weights)
    model = FrozenBackbone(spec, weights.path, default_batch(), machine.usable_cores(), weights.network)
    model.bound_batch(SHARD_BYTES)
    rate = model.rate()
    measured_rates.remember(workspace, replace(spec, storage="float16"), rate, model.batch_size)
    logger.info("%s: %.4g images/s at %s", source.label, rate, spec.precision)
    del model
    import_keras().backend.clear_session()
    gc.collect()
