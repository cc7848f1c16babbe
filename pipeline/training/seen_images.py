"""Find which images a run was trained, selected and tested on.

The run's own record lists them. For an older run without a record, they follow from its dataset, if unchanged.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import IceboxError, RunError
from pipeline.core.files import MOST_JSON_BYTES
from pipeline.dataset.class_names import with_classes
from pipeline.runs.request import FinetuneRequest
from pipeline.runs.run_images import RunImages
from pipeline.training.labelled_features import LabelledImages, list_images
from pipeline.training.open_run import TrainedRun, open_run

logger = logging.getLogger(__name__)

_MOST_INITIAL = 20  # longest chain of runs that each have the previous one as initial run


def seen_images(run: TrainedRun, workspace: Workspace, at_hand: LabelledImages | None = None) -> RunImages | None:
    """Return the images that `run` was trained, selected and tested on; None if they are unknown.

    A warning is logged if all are unknown, or those of its initial model.
    For a run made before runs stored this record, the images are known only if its dataset is unchanged. If `at_hand`
    are the images of the run's dataset, they are not listed again.

    Raises
    ------
    RunError
        If the record of the run is damaged.
    """
    found = _seen(run, workspace, at_hand)
    if found is None:
        logger.warning(
            "nobody knows which images the run %s was trained on, as it was made before runs kept that, and its "
            "dataset is not at hand as it was: what is measured may be too good",
            run.name,
        )
    elif not found.complete:
        logger.warning("nobody knows which images the model was trained on that the run %s began with", run.name)
    return found


def initial_images(init: Path, workspace: Workspace, depth: int = _MOST_INITIAL) -> RunImages:
    """Return the images of the initial run in the folder `init`; log a warning if they are unknown."""
    try:
        found = _seen(open_run(workspace.runs, str(init)), workspace, None, depth - 1) if depth else None
    except RunError as error:
        logger.warning("%s", error)
        found = None
    if found is None:
        logger.warning("nobody knows which images %s was trained on: what begins with it may be measured on them", init)
    return found or RunImages.unknown()


def _seen(
    run: TrainedRun, workspace: Workspace, at_hand: LabelledImages | None, depth: int = _MOST_INITIAL
) -> RunImages | None:
    if (kept := RunImages.read(run.path)) is not None:
        return kept
    unchanged = at_hand is not None and at_hand.content == run.content
    images = at_hand if unchanged else _unchanged(run, workspace)
    if images is not None and isinstance(run.request, FinetuneRequest) and run.request.init is not None:
        images = replace(images, initial=initial_images(Path(run.request.init), workspace, depth))
    return images and images.run_images(joined=run.saw_validation)


def _unchanged(run: TrainedRun, workspace: Workspace) -> LabelledImages | None:
    """Return the images of a run's dataset if images, labels and splits are unchanged, else None."""
    if run.request is None or run.content is None:
        return None
    try:
        dataset = with_classes(run.request.images.open(workspace), run.name, run.classes)
        found = list_images(dataset, workspace, _quarantined(run))
    except IceboxError as error:
        logger.warning("the dataset of the run %s cannot be looked at: %s", run.name, error)
        return None
    return found if found.content == run.content else None


def _quarantined(run: TrainedRun) -> set[str]:
    """Return the names of the images that the run left out as undecodable; a newer decoder may accept them now."""
    path = run.path / "quarantined.json"
    try:
        return {str(bad["path"]) for bad in json.loads(files.read_small(path, MOST_JSON_BYTES))}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
