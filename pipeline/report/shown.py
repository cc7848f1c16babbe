"""The images on a page: which they are, their small pictures, what their features say, what was said of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import IceboxError, MissingRowsError
from pipeline.extract import FeatureChoice
from pipeline.gather import SPLITS, Material, Sorted, gather, gather_images
from pipeline.images import depth_of
from pipeline.report import findings, page
from pipeline.report.findings import Findings
from pipeline.report.kept import Answers
from pipeline.report.tiles import Tiles, tiles
from pipeline.rows import Wanted, open_rows
from pipeline.trained import TrainedRun
from pipeline.workspace import Workspace

MOST_IMAGES = 10_000
_MOST_LISTED = 200  # doubtful labels, and near copies
_NO_FEATURES = "there is no map, and no look for doubtful labels and near copies"


@dataclass(frozen=True, eq=False)
class Shown:
    """n images, test first: positions in `images.keys`, and what stands on them.

    `predicted` (n,) int is -1 for images of which nothing was said, `confidence` (n,) float is how sure it was.
    """

    images: Sorted
    positions: np.ndarray
    tiles: Tiles
    predicted: np.ndarray
    confidence: np.ndarray
    found: Findings | None

    @property
    def names(self) -> list[str]:
        """What people call them."""
        return self.images.names(self.positions)

    @property
    def labels(self) -> np.ndarray:
        """Their labels, (n,) int."""
        return self.images.labels(self.positions)

    @property
    def sides(self) -> np.ndarray:
        """Which side of the split each is on, (n,) str."""
        return self.images.sides(self.positions)


def gather_shown(
    run: TrainedRun, said: Answers, workspace: Workspace, max_pixels: int, method: str | None, notes: list[str]
) -> Shown | None:
    """Return the images of the run with pictures and findings; what cannot be had is noted."""
    images = _images(run, workspace, max_pixels, notes)
    if images is None:
        return None
    positions = np.concatenate([images.members(side) for side in reversed(SPLITS)])
    predicted, confidence = _answers(images, positions, said)
    tested = sum(len(answers) for (side, _), answers in said.items() if side == "test")
    known = int((predicted[: len(images.members("test"))] >= 0).sum())
    if known < tested:
        notes.append(f"{tested - known:,} of {tested:,} tested images are gone, or have another label or split by now.")
    elif run.content not in (None, images.content):
        notes.append("The dataset changed since: under the same names there may be other images than the run saw.")
    if len(positions) > MOST_IMAGES:
        notes.append(f"{MOST_IMAGES:,} of {len(positions):,} images are on this page, those first that were tested.")
        some = _most_telling(images, positions, predicted)
        positions, predicted, confidence = positions[some], predicted[some], confidence[some]
    small = tiles(
        images.dataset,
        images.usable[positions].tolist(),
        max_pixels,
        workspace.progress,
        depth_of(run.base.decode),
    )
    if unseen := int((~small.seen).sum()):
        notes.append(
            f"{unseen:,} of {len(positions):,} images cannot be read now: they are grey, and without near copies."
        )
    found = None
    if isinstance(images, Material):
        with images.space.reading():
            (rows,) = open_rows(images.space, images.keys, "pooled", [Wanted(positions)])
            pooled = np.asarray(rows[np.arange(len(positions))])
        labels, groups = images.labels(positions), images.groups[positions]
        found = findings.find(pooled, labels, groups, small, len(run.classes), method, workspace.progress)
        sides = images.sides(positions)
        within = sides[found.near[:, 0]] == sides[found.near[:, 1]]
        found = replace(found, near=found.near[np.argsort(within, kind="stable")])  # those across the split first
    return Shown(images, positions, small, predicted, confidence, found)


def _images(run: TrainedRun, workspace: Workspace, max_pixels: int, notes: list[str]) -> Sorted | None:
    """Return the run's images, with their rows if the cache has them."""
    if run.asked is None:
        notes.append("The run does not say what it was trained on, so that its images are not shown.")
        return None
    try:
        dataset = run.matched(run.asked.images.open(workspace))
        if run.base.directory in workspace.cache.names():
            try:
                return gather(dataset, workspace, FeatureChoice(space=run.base.directory), max_pixels, "features")
            except MissingRowsError as error:
                notes.append(f"Features are missing, so that {_NO_FEATURES}: {error}")
        else:
            notes.append(f"The features of its backbone are not in the cache: {_NO_FEATURES}.")
        return gather_images(dataset, workspace, max_pixels, run.base.fit, depth_of(run.base.decode))
    except IceboxError as error:
        notes.append(f"Its images cannot be shown: {error}")
        return None


def _answers(images: Sorted, positions: np.ndarray, said: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return what was said of these images, (n,) int, and how surely, (n,) float.

    -1 where nothing was, or where the image has another label by now, or lies in another split.
    """
    left = {name: list(answers) for name, answers in said.items()}
    predicted, confidence = np.full(len(positions), -1), np.zeros(len(positions))
    sides = images.sides(positions).tolist()
    named = zip(sides, images.names(positions), images.labels(positions).tolist(), strict=True)
    for at, (side, name, label) in enumerate(named):
        answers = left.get((side, page.printable(name)), [])
        same = next((number for number, (then, _, _) in enumerate(answers) if then == label), None)
        if same is not None:
            _, predicted[at], confidence[at] = answers.pop(same)
    return predicted, confidence


def _most_telling(images: Sorted, positions: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return which images to show, (10,000,): tested ones before others, mistakes before the rest, else by chance."""
    sides = images.sides(positions)
    rank = np.array([SPLITS[::-1].index(side) for side in sides.tolist()])
    right = predicted == images.labels(positions)
    chance = np.random.default_rng(0).random(len(positions))
    return np.sort(np.lexsort((chance, right, rank))[:MOST_IMAGES])


def script_data(shown: Shown) -> dict[str, Any]:
    """Return what the page's script draws of the images."""
    found, columns = shown.found, shown.tiles.columns
    on_sheet = columns**2
    counts = [min(on_sheet, len(shown.positions) - start) for start in range(0, len(shown.positions), on_sheet)]
    places = np.round(found.places * 1000).astype(int) if found else np.zeros((0, 2), int)
    return {
        "images": {
            "name": page.printable(shown.names),
            "split": [SPLITS.index(side) for side in shown.sides.tolist()],
            "label": shown.labels.tolist(),
            "predicted": shown.predicted.tolist(),
            "confidence": np.round(shown.confidence, 3).tolist(),
            "x": places[:, 0].tolist(),
            "y": places[:, 1].tolist(),
        },
        "tiles": {"columns": columns, "sheet": on_sheet, "rows": [-(-count // columns) for count in counts]},
        "suspects": _suspects(found)[:_MOST_LISTED] if found else [],
        "near": found.near[:_MOST_LISTED].tolist() if found else [],
    }


def _suspects(found: Findings) -> list[dict[str, Any]]:
    return [
        {"i": i, "suggested": int(found.suggested[i]), "own": round(float(found.own_probability[i]), 3)}
        for i in found.likely_wrong.tolist()
    ]


def crossing(shown: Shown) -> np.ndarray:
    """Return which of the near copies lie on two sides of the split, (m,) bool."""
    pairs = shown.found.near if shown.found else np.zeros((0, 2), np.int64)
    return shown.sides[pairs[:, 0]] != shown.sides[pairs[:, 1]]


def named(shown: Shown, found: Findings) -> dict[str, Any]:
    """Return what was found image by image, for scripts."""
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
