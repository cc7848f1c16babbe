"""Select the images shown on a run's report page, with thumbnails, predictions, dataset issues and a map.

`select_images` collects all of it in an `ImageSelection`; `script_data` and `named` turn that into JSON values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.cache.workspace import Workspace
from pipeline.core.errors import IceboxError, MissingFeaturesError
from pipeline.core.utf8 import to_utf8
from pipeline.dataset.split import SPLITS
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images.decoding import depth_of
from pipeline.report import issues, page
from pipeline.report.issues import DatasetIssues
from pipeline.report.thumbnails import ImageLooks, ThumbnailSheets, make_thumbnails, pack_sheets
from pipeline.runs.predictions import Answers
from pipeline.training.labelled_features import LabelledFeatures, LabelledImages, join_features, join_images
from pipeline.training.open_run import TrainedRun
from pipeline.training.rows import RowSelection, open_rows

MOST_IMAGES = 10_000  # images with a thumbnail on a page
MOST_LISTED = 200  # doubtful labels, and pairs of near-duplicates, listed on a page
_MOST_ROWS = 2**29  # bytes of features in memory; the others are read from disk when needed
_NO_FEATURES = "there is no map, and no look for doubtful labels and near copies"


@dataclass(frozen=True, eq=False)
class ImageSelection:
    """The n images of a run, test images first, and the m of them that the page shows.

    `positions` (n,) are indices into `images.keys`. `predicted` (n,) int is the predicted class, -1 for images without
    a prediction; `confidence` (n,) float is its probability. `found` are the dataset's issues, None without features.
    `selected` (m,) are the indices of the images on the page, in ascending order. `tiles` are their thumbnails,
    `places` (m, 2) their positions on a map made by `method` ("tsne", "pca", or None without a map).
    """

    images: LabelledImages
    positions: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    found: DatasetIssues | None
    selected: np.ndarray
    tiles: ThumbnailSheets
    places: np.ndarray
    method: str | None

    @property
    def names(self) -> list[str]:
        """The names of the n images."""
        return self.images.names(self.positions)

    @property
    def labels(self) -> np.ndarray:
        """The labels of the n images, (n,) int."""
        return self.images.labels(self.positions)

    @property
    def sides(self) -> np.ndarray:
        """The split of each image, (n,) str: "train", "val" or "test"."""
        return self.images.sides(self.positions)


def select_images(
    run: TrainedRun, said: Answers, workspace: Workspace, max_pixels: int, method: str | None, notes: list[str]
) -> ImageSelection | None:
    """Return the images of a run with their issues and the thumbnails of a selection; None if they cannot be opened.

    `said` are the run's stored predictions. What is missing on the page is added to `notes`, one sentence each.
    """
    images = _images(run, workspace, max_pixels, notes)
    if images is None:
        return None
    positions = np.concatenate([images.members(side) for side in reversed(SPLITS)])
    predicted, confidence = _answers(images, positions, said)
    _note_changes(run, images, said, predicted, notes)
    all_fit = len(positions) <= MOST_IMAGES
    found, looks, depth = None, None, depth_of(run.base.decode)
    if isinstance(images, LabelledFeatures):
        looks = make_thumbnails(images, positions, max_pixels, workspace.progress, depth, pictures=all_fit)
        found = _found(images, positions, looks, len(run.classes), workspace)
    selected = np.arange(len(positions)) if all_fit else _select(images, positions, predicted, found)
    if looks is None or not all_fit:
        pictures = make_thumbnails(images, positions[selected], max_pixels, workspace.progress, depth, pictures=True)
    else:
        pictures = looks
    _note_left_out(len(positions), len(selected), looks or pictures, notes)
    places, how = issues.project(found.components[selected], method) if found else (np.zeros((0, 2)), None)
    return ImageSelection(
        images, positions, predicted, confidence, found, selected, pack_sheets(pictures.pictures), places, how
    )


def _note_changes(
    run: TrainedRun, images: LabelledImages, said: Answers, predicted: np.ndarray, notes: list[str]
) -> None:
    tested = sum(len(answers) for (side, _), answers in said.items() if side == "test")
    known = int((predicted[: len(images.members("test"))] >= 0).sum())
    if known < tested:
        notes.append(f"{tested - known:,} of {tested:,} tested images are gone, or have another label or split by now.")
    elif run.content not in (None, images.content):
        notes.append("The dataset changed since: under the same names there may be other images than the run saw.")


def _note_left_out(count: int, selected: int, looks: ImageLooks, notes: list[str]) -> None:
    if selected < count:
        notes.append(f"{selected:,} of {count:,} images are on this page, those first that are named or were tested.")
    if unseen := int((~looks.seen).sum()):
        notes.append(
            f"{unseen:,} of {len(looks.seen):,} images cannot be read now: they are grey, and without near copies."
        )


def _found(
    images: LabelledFeatures, positions: np.ndarray, looks: ImageLooks, classes: int, workspace: Workspace
) -> DatasetIssues:
    """Return the issues of these images; pairs of near-duplicates in two different splits come first."""
    with images.space.reading():
        (rows,) = open_rows(images.space, images.keys, "pooled", [RowSelection(positions)], memory=_MOST_ROWS)
        labels, groups = images.labels(positions), images.groups[positions]
        found = issues.find_issues(rows, labels, groups, looks, classes, workspace.progress)
    sides = images.sides(positions)
    within = sides[found.near[:, 0]] == sides[found.near[:, 1]]
    return replace(found, near=found.near[np.argsort(within, kind="stable")])


def _images(run: TrainedRun, workspace: Workspace, max_pixels: int, notes: list[str]) -> LabelledImages | None:
    """Return the run's images, with their rows if the cache has them; None with a note if they cannot be opened."""
    if run.request is None:
        notes.append("The run does not say what it was trained on, so that its images are not shown.")
        return None
    try:
        dataset = run.matched(run.request.images.open(workspace))
        if run.base.directory in workspace.cache.names():
            try:
                return join_features(dataset, workspace, FeatureChoice(space=run.base.directory), max_pixels)
            except MissingFeaturesError as error:
                notes.append(f"Features are missing, so that {_NO_FEATURES}: {error.problem}")
        else:
            notes.append(f"The features of its backbone are not in the cache: {_NO_FEATURES}.")
        return join_images(dataset, workspace, max_pixels, run.base.fit, depth_of(run.base.decode))
    except IceboxError as error:
        notes.append(f"Its images cannot be shown: {error}")
        return None


def _answers(images: LabelledImages, positions: np.ndarray, said: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted class of each image, (n,) int, and its probability, (n,) float.

    The class is -1 where there is no prediction, or where the image's label or split has changed since.
    """
    left = {name: list(answers) for name, answers in said.items()}
    predicted, confidence = np.full(len(positions), -1), np.zeros(len(positions))
    sides = images.sides(positions).tolist()
    named = zip(sides, images.names(positions), images.labels(positions).tolist(), strict=True)
    for at, (side, name, label) in enumerate(named):
        answers = left.get((side, to_utf8(name)), [])
        same = next((number for number, (then, _, _) in enumerate(answers) if then == label), None)
        if same is not None:
            _, predicted[at], confidence[at] = answers.pop(same)
    return predicted, confidence


def _select(
    images: LabelledImages, positions: np.ndarray, predicted: np.ndarray, found: DatasetIssues | None
) -> np.ndarray:
    """Return the sorted indices of the images to show, (10,000,).

    Images of listed issues have priority, then test images; within a split, wrong predictions come first.
    """
    listed = np.zeros(len(positions), bool)
    if found is not None:
        listed[found.likely_wrong[:MOST_LISTED]] = True
        listed[found.near[:MOST_LISTED].ravel()] = True
    sides = images.sides(positions)
    rank = np.array([SPLITS[::-1].index(side) for side in sides.tolist()])
    right = predicted == images.labels(positions)
    chance = np.random.default_rng(0).random(len(positions))
    return np.sort(np.lexsort((chance, right, rank, ~listed))[:MOST_IMAGES])


def script_data(shown: ImageSelection) -> dict[str, Any]:
    """Return the data of the images on the page for its script, as JSON values."""
    found, columns, some = shown.found, shown.tiles.columns, shown.selected
    on_sheet = columns**2
    counts = [min(on_sheet, len(some) - start) for start in range(0, len(some), on_sheet)]
    places = np.round(shown.places * 1000).astype(int)
    place = {i: at for at, i in enumerate(some.tolist())}
    return {
        "images": {
            "name": page.printable(shown.images.names(shown.positions[some])),
            "split": [SPLITS.index(side) for side in shown.sides[some].tolist()],
            "label": shown.labels[some].tolist(),
            "predicted": shown.predicted[some].tolist(),
            "confidence": np.round(shown.confidence[some], 3).tolist(),
            "x": places[:, 0].tolist(),
            "y": places[:, 1].tolist(),
        },
        "tiles": {"columns": columns, "sheet": on_sheet, "rows": [-(-count // columns) for count in counts]},
        "suspects": [{**each, "i": place[each["i"]]} for each in _suspects(found)[:MOST_LISTED]] if found else [],
        "near": [[place[i] for i in pair] for pair in found.near[:MOST_LISTED].tolist()] if found else [],
    }


def _suspects(found: DatasetIssues) -> list[dict[str, Any]]:
    return [
        {"i": i, "suggested": int(found.suggested[i]), "own": round(float(found.own_probability[i]), 3)}
        for i in found.likely_wrong.tolist()
    ]


def crossing(shown: ImageSelection) -> np.ndarray:
    """Return which pairs of near-duplicates are in two different splits, (m,) bool."""
    pairs = shown.found.near if shown.found else np.zeros((0, 2), np.int64)
    return shown.sides[pairs[:, 0]] != shown.sides[pairs[:, 1]]


def named(shown: ImageSelection, found: DatasetIssues) -> dict[str, Any]:
    """Return the issues with image names, as JSON values for the output of `report`."""
    names, labels, sides, classes = shown.names, shown.labels, shown.sides.tolist(), shown.images.dataset.classes
    return {
        "out_of_sample_accuracy": found.accuracy,
        "likely_wrong": [
            {"image": names[each["i"]], "split": sides[each["i"]], "label": classes[labels[each["i"]]],
             "suggested": classes[each["suggested"]], "probability": each["own"]}
            for each in _suspects(found)
        ],
        "near": [
            {"images": [names[a], names[b]], "splits": [sides[a], sides[b]], "crossing": sides[a] != sides[b]}
            for a, b in found.near.tolist()
        ],
    }  # fmt: skip
