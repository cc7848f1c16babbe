"""Build the command lines that reproduce a run, and the options of a new run like it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from pipeline.backbone.table import BACKBONES, DEFAULT_BACKBONE
from pipeline.backbone.weights import is_path
from pipeline.core.errors import UsageError
from pipeline.core.spec import OWN, SHAPE, HeadSpec
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images.decoding import DEFAULT_MAX_PIXELS, FULL_DEPTH, depth_of
from pipeline.runs.request import FinetuneRequest, TrainRequest
from pipeline.training.open_run import TrainedRun

Option = tuple[str, Any]  # name and value: an option with None is left out, one with True is a flag
_SPACE = (
    "--weights",
    "--space",
    "--backbone",
    "--input-size",
    "--scaling",
    "--layer",
    "--precision",
    "--fit",
    "--depth",
    "--storage",
)


def reproduction_commands(run: TrainedRun, program: Sequence[str], bad: float) -> list[str]:
    """Return the command lines that reproduce a run, in order: first the features, then the training.

    The list is empty if the run stores no request. Each line begins with `program`. `bad` is the share of the images
    that were quarantined, for `--max-bad`.
    """
    allowed: Option = ("--max-bad", math.ceil(bad * 1e4) / 1e4 if bad else None)
    lines = []
    for command, options in _steps(run):
        if command == "train-head":
            options = _in_space(options, run.spec.directory)
        lines.append(_line(program, command, [*options, allowed]))
    return lines


def options_like(run: TrainedRun, command: str) -> dict[str, Any]:
    """Return the options with which `command` repeats its part of `run`: names without dashes, and their values.

    Raises
    ------
    UsageError
        If `command` is not one of the commands that made such a run.
    """
    steps = dict(_steps(run))
    if command not in steps:
        made_by = f"goes with {' or '.join(steps)}" if steps else "cannot be had: it does not say what it was asked for"
        raise UsageError(f"--like {run.name} {made_by}")
    given = {name: value for name, value in steps[command] if value is not None}
    negated = {name.replace("--no-", "--", 1): False for name in given if name.startswith("--no-")}
    said = {**{name: value for name, value in given.items() if not name.startswith("--no-")}, **negated}
    own_file = run.base.backbone.startswith(OWN) and "--backbone" in said
    if own_file or is_path(said.get("--weights", "auto")):  # the file at that path may have changed since
        said["--weights"] = run.base.weights
    return {name.removeprefix("--"): value for name, value in said.items()}


def _steps(run: TrainedRun) -> list[tuple[str, list[Option]]]:
    """Return the commands that reproduce a run, with their options, in order; empty without a stored request."""
    request = run.request
    if request is None:
        return []
    images = request.images
    dataset = [("--dataset", images.dataset), ("--archive", images.archive), ("--image-root", images.image_root)]
    dataset.append(("--limit", images.limit))
    rest: list[Option] = [("--max-pixels", request.max_pixels if request.max_pixels != DEFAULT_MAX_PIXELS else None)]
    if request.views.count > 1:
        rest = [("--views", request.views.count), ("--augment", str(request.views.recipe) or None), *rest]
    if isinstance(request, FinetuneRequest):
        return [(request.stage, [*dataset, *_full(run, request), *rest])]
    of_space = _of_space(run, request, storage=True)
    head = [("--head", run.kind), ("--folds", request.folds or None), *_settings(request.head, ())]
    return [("features", [*dataset, *of_space, *rest]), ("train-head", [*dataset, *of_space, *head, *rest])]


def _in_space(options: Sequence[Option], name: str) -> list[Option]:
    """Return the options with `--space name` instead of the options that choose a space.

    Those options may choose another space once the cache has more spaces.
    """
    first = ("--space", name)
    return [first if option[0] == "--weights" else option for option in options if option[0] not in _SPACE[1:]]


def _of_space(run: TrainedRun, request: TrainRequest | FinetuneRequest, *, storage: bool) -> list[Option]:
    """Return the options that choose the run's features, with the values used: `auto` may mean other values later."""
    base, weights = run.base, request.features.weights
    if weights == "auto" and base.backbone.startswith(OWN):
        pass  # the weights are in the network's own file
    elif weights == "auto":
        _, _, seed = base.weights.rpartition(":")
        weights = f"untrained:{seed}" if base.untrained else "imagenet" if run.weights == "imagenet" else base.weights
    found: list[Option] = [("--weights", weights), *_backbone(run), ("--layer", base.layer)]
    depth = depth_of(base.decode)
    found += [("--precision", base.precision), ("--fit", base.fit)]
    found.append(("--depth", depth if depth != FULL_DEPTH else None))
    return [*found, ("--storage", base.storage)] if storage else found


def _backbone(run: TrainedRun) -> list[Option]:
    """Return the options that choose the backbone, its input size and its scaling, except defaults."""
    base, choice = run.base, run.request.features if run.request else FeatureChoice()
    row = BACKBONES.get(base.backbone)
    if row is None and choice.backbone is None:  # a user's own network without a known file
        return [("--space", base.directory)]
    name = base.backbone if row else choice.backbone
    size = base.input_size if row is None or base.input_size != row.input_size else None
    scaling = base.scaling if row is None or base.scaling != row.scaling else None
    default = name == DEFAULT_BACKBONE
    return [("--backbone", None if default else name), ("--input-size", size), ("--scaling", scaling)]


def _full(run: TrainedRun, request: FinetuneRequest) -> list[Option]:
    tuned: list[Option] = [("--augment", request.augment and (str(request.augment) or "default"))]
    if request.stage == "finetune":
        tuned += [("--freeze-until", request.freeze_until), ("--batch-norm", request.batch_norm)]
        tuned += [("--init", request.init), ("--from-cache", request.from_cache or None)]
    if request.init is None:
        new = [("--head", request.head.head)] if request.stage == "finetune" else []
        return [*tuned, *new, *_of_space(run, request, storage=request.from_cache), *_settings(request.head, ())]
    return [*tuned, ("--weights", request.features.weights), *_settings(request.head, SHAPE)]  # --init sets the rest


def _settings(head: HeadSpec, but: Sequence[str]) -> list[Option]:
    """Return all settings as options, also defaults, because these depend on the command."""
    return [_setting(name, value) for name, value in head.settings.items() if name not in but]


def _setting(name: str, value: Any) -> Option:
    option = "--C" if name == "C" else f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return (option if value else option.replace("--", "--no-", 1)), True
    if isinstance(value, tuple):
        return option, ",".join(map(str, value)) or "none"
    return option, value


def _line(program: Sequence[str], command: str, options: Sequence[Option]) -> str:
    words = [*program, command]
    for name, value in options:
        if value is not None:
            words += [name] if value is True else [name, str(value)]
    return shlex.join(words)
