"""Match the class names of a dataset with those of a run, in any Unicode form and order."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pipeline.core.errors import DatasetError
from pipeline.dataset import Dataset

_MOST_NAMED = 5  # classes in a message


def normalised(name: str) -> str:
    """Return a class name in Unicode form NFC, in which equal-looking forms of a name are equal."""
    return unicodedata.normalize("NFC", name)


def missing(known: Iterable[str], classes: Iterable[str]) -> list[str]:
    """Return the names of `known` that are not in `classes`, in their order."""
    there = {normalised(name) for name in classes}
    return [name for name in known if normalised(name) not in there]


def listed(names: Sequence[str]) -> str:
    """Return the first five class names as text for a message, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED:,} more" * (len(names) > _MOST_NAMED)
    return f"{', '.join(names[:_MOST_NAMED])}{more}"


def other_classes(run: str, known: Sequence[str], classes: Sequence[str]) -> DatasetError:
    """Return the error for a dataset whose `classes` differ from the classes `known` to the run named `run`."""
    parts = {"it has no": missing(known, classes), "the run does not know": missing(classes, known)}
    found = [f"{what} {listed(names)}" for what, names in parts.items() if names]
    return DatasetError(f"the classes are not those of the run {run}: {' and '.join(found) or 'another order'}")


def with_classes(dataset: Dataset, run: str, known: Sequence[str]) -> Dataset:
    """Return `dataset` with the classes `known` of a run, in their order; its labels become indices into `known`.

    Raises
    ------
    DatasetError
        If a class of the dataset is not in `known`, or could be either of two classes there that look alike.
    """
    if dataset.classes == tuple(known):
        return dataset
    if missing(dataset.classes, known):
        raise other_classes(run, known, dataset.classes)
    places = np.array([_place(name, known, dataset.classes, run) for name in dataset.classes], np.int32)
    return replace(dataset, classes=tuple(known), labels=places[dataset.labels])


def _place(name: str, known: Sequence[str], classes: Sequence[str], run: str) -> int:
    """Return the index of class `name` in `known`.

    Raises DatasetError if two known classes differ in Unicode form only, and the dataset now has one of that name.
    """
    alike = [i for i, each in enumerate(known) if normalised(each) == normalised(name)]
    possible = [i for i in alike if known[i] == name or known[i] not in classes]
    if len(possible) != 1:
        raise DatasetError(
            f"the run {run} tells {len(possible)} classes apart that are called {name!r}, in other Unicode forms, "
            "and the dataset has one; train anew"
        )
    return possible[0]
