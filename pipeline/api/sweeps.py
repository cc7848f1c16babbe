"""What a sweep is requested to try, made of the options of `Icebox.sweep`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.api import requests
from pipeline.core.errors import UsageError

if TYPE_CHECKING:
    from pipeline.cache.workspace import Workspace
    from pipeline.extraction.feature_choice import FeatureChoice
    from pipeline.runs.request import DatasetChoice, SweepRequest

_HEADS = ("flatten", "gap", "logreg")


def sweep_request(images: DatasetChoice, choices: Sequence[FeatureChoice], given: Mapping[str, Any]) -> SweepRequest:
    """Return what a sweep is requested to try. Raises UsageError."""
    from pipeline.runs.request import SweepRequest
    from pipeline.training.sweep.trials import make_trials

    specs = make_trials(given["head"] or _HEADS, given["settings"] or (), given["random"], given["seed"])
    return SweepRequest(
        images=images.anchored(),
        features=tuple(choice.anchored() for choice in choices),
        specs=tuple(specs),
        max_pixels=given["max_pixels"],
        memory=requests.memory_bytes(given["memory"]),
        views=requests.views_choice(given),
    )


def stopped_sweep(workspace: Workspace, name: str) -> tuple[str, SweepRequest]:
    """Return the name of a stopped sweep, of "latest" that of the last one, and its request. Raises RunError."""
    from pipeline.runs import store
    from pipeline.runs.request import SweepRequest

    root = workspace.sweeps
    name = store.latest_of(store.unfinished(root), root) if name == "latest" else name
    return name, SweepRequest.of_request(store.read_request(root, name))


def feature_choices(given: Mapping[str, Any]) -> tuple[FeatureChoice, ...]:
    """Return the features of each backbone that is to be compared. Raises UsageError."""
    from pipeline.backbone.source import is_file

    stated = given["backbone"] or ()
    texts = [stated] if isinstance(stated, str) else [str(each) for each in stated]
    names = _backbones(texts)
    if texts and not names:
        raise UsageError("--backbone takes names of the table or .keras files, with commas between them; found none")
    if len(names) < 2:
        return (requests.feature_choice({**given, "backbone": names[0] if names else None}),)
    own = [name for name in names if is_file(name)]
    _refuse_for_several(given, own)
    return tuple(
        requests.feature_choice(
            {
                **given,
                "backbone": name,
                "scaling": given["scaling"] if name in own else None,
                "weights": "auto" if name in own else given["weights"],
            }
        )
        for name in names
    )


def _backbones(texts: Iterable[str]) -> list[str]:
    """Return the names and files in lists with commas, each once; a text that is a file is one, whatever its name."""
    from pipeline.core import machine

    parts = [[text] if machine.expand_home(text).is_file() else text.split(",") for text in texts]
    return list(dict.fromkeys(name.strip() for some in parts for name in some if name.strip()))


def _refuse_for_several(given: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raise UsageError if an option can be meant for one backbone only."""
    for option, of in (("space", "features of one backbone"), ("layer", "a layer of one backbone")):
        if given[option] is not None:
            raise UsageError(f"--{option} names {of}, so it does not go with several --backbone; leave it out")
    if given["scaling"] is not None and not own:
        raise UsageError("--scaling is of a network of your own, found no file among --backbone; leave it out")
    weights = given["weights"]
    if weights not in ("auto", "imagenet") and weights.partition(":")[0] != "untrained":
        raise UsageError(
            f"--weights {weights!r:.80} are of one backbone; with several it takes auto, imagenet or untrained, and "
            "auto finds the features that were made by `features --weights FILE`"
        )


def with_scaling(choices: Sequence[FeatureChoice], workspace: Workspace) -> tuple[FeatureChoice, ...]:
    """Return the same; of several files only the one that is not known with one scaling is meant by --scaling."""
    from pipeline.backbone.source import lacks_scaling

    own = [str(choice.backbone) for choice in choices if choice.scaling is not None]
    if len(choices) == 1 or len(own) < 2:
        return tuple(choices)
    lacking = [name for name in own if lacks_scaling(name, workspace)]
    if not lacking:
        raise UsageError(f"--scaling: each of the {len(own)} files among --backbone is known with one; leave it out")
    if len(lacking) > 1:
        raise UsageError(
            f"--scaling is for one file, found {len(lacking)} that need it: {', '.join(lacking)}; a file that has "
            "features by one scaling needs none: `features --backbone FILE --scaling …` makes them"
        )
    return tuple(choice if choice.backbone in lacking else replace(choice, scaling=None) for choice in choices)
