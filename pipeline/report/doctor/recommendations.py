"""Turn the results of a dataset check into recommendations, each of one or two sentences, the most urgent first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pipeline.core.spec import HeadSpec
from pipeline.core.units import counted, duration, size_text
from pipeline.dataset import few_groups
from pipeline.dataset.split import SPLITS
from pipeline.images.decoding import FULL_DEPTH, depth_advice
from pipeline.report.doctor.checks import DatasetCheck
from pipeline.training import heads

_FEW = 20  # training images of a class; with fewer, a class is hard to learn and even harder to measure
_UNEVEN = 10  # ratio of the largest to the smallest class from which on the imbalance is reported
_LITTLE = 0.25  # share of the network's input size below which an image is small
_LONG = 2.0  # ratio of the longer to the shorter side from which on an image is narrow
_MANY = 0.1  # share of the images above which small or narrow images are reported
_HOURS = 3600.0  # seconds of computing above which advice on speed is given


def recommend(found: DatasetCheck) -> list[str]:
    """Return recommendations for a dataset before anything is computed; an empty list if there are no problems."""
    if len(found.quarantined) == len(found.dataset):
        return ["none of the images can be read or decoded; look at the reasons"]
    return [*_wrong(found), *_sides(found), *_classes(found), *_pictures(found), *_machine(found)]


def _images(count: int) -> str:
    return counted(count, "image")


def _groups_lie(count: int, of: str) -> str:
    return counted(count, f"group of {of} lies", f"groups of {of} lie")


def _wrong(found: DatasetCheck) -> Iterator[str]:
    if bad := len(found.quarantined):
        share = bad / len(found.dataset)
        yield (
            f"{_images(bad)} ({share:.1%}) cannot be read or decoded; mend or remove them, or let `features` pass over "
            f"them by --max-bad {found.allowed_bad:g}"
        )
    if conflicting := sum(map(len, found.conflicting)):
        yield f"{_images(conflicting)} are copies under several labels; an answer can be right about one of them only"


def _sides(found: DatasetCheck) -> Iterator[str]:
    if found.equal.crossing:
        yield (
            f"{_groups_lie(found.equal.crossing, 'exact copies')} on several sides of the split: the test then asks "
            "for what was seen in training; remove them, or leave the splits to Icebox, which keeps copies together"
        )
    if found.near.crossing:
        yield (
            f"{_groups_lie(found.near.crossing, 'nearly equal images')} on several sides of the split: accuracy will "
            "look better than it is; name what belongs together in the `group` column of a manifest"
        )
    if found.split.crossing_groups:
        yield f"{_groups_lie(found.split.crossing_groups, 'the manifest')} on several sides of the split"
    counts = found.counts
    for side, of_side in zip(SPLITS, counts.T, strict=True):
        if lacking := int((of_side == 0).sum()):
            cause = few_groups(found.dataset) if not of_side.any() else None
            yield f"classes without an image in {side}: {lacking:,} of {len(counts):,}; {cause or _MISSING[side]}"


_MISSING = {
    "train": "they cannot be learned",
    "val": "choices are made without them; more images help, or --folds",
    "test": "nothing will be known of how well they are told apart; put some images there",
}


def _classes(found: DatasetCheck) -> Iterator[str]:
    names, of_train = found.dataset.classes, found.counts[:, 0]
    if len(names) < 2:
        yield "there is one class only; a classifier needs at least two"
        return
    few = np.flatnonzero((of_train > 0) & (of_train < _FEW))
    if len(few):
        listed = ", ".join(names[i] for i in few[:3]) + (" and others" if len(few) > 3 else "")
        those = f"{len(few):,} ({listed})"
        yield f"classes with fewer than {_FEW} images to train on: {those}; --views 4 makes more of them"
    present = of_train[of_train > 0]
    if len(present) and present.max() >= _UNEVEN * present.min():
        yield (
            f"the largest class has {present.max() / present.min():,.0f} times the images of the smallest; try "
            "--class-weight balanced, and look at the accuracy of each class"
        )


def _pictures(found: DatasetCheck) -> Iterator[str]:
    seen = found.looks[found.looks["kind"] != ""]
    if not len(seen):
        return
    short, long = np.minimum(seen["width"], seen["height"]), np.maximum(seen["width"], seen["height"])
    least = round(_LITTLE * found.input_size)
    if (little := np.mean(short < least)) > _MANY:
        yield (
            f"{little:.0%} of the images are smaller than {least} pixels; the network is given "
            f"{found.input_size}, so that fine-tuning (`finetune --from-cache`) may gain more than usual"
        )
    if (narrow := np.mean(long >= _LONG * short)) > _MANY:
        yield (
            f"{narrow:.0%} of the images are twice as long as wide, or more; compare --fit pad or crop with the "
            "default, which squeezes them"
        )
    if deep := int(seen["deep"].sum()):
        advice = depth_advice(int(seen["peak"].max()), found.depth)
        used = "their upper 8 are used" if found.depth == FULL_DEPTH else f"taken for {found.depth} (--depth)"
        yield f"{_images(deep)} with 16 bits a channel; {advice or used}"
    if alpha := int(seen["alpha"].sum()):
        yield f"{_images(alpha)} with transparency; white is put behind"


def _machine(found: DatasetCheck) -> Iterator[str]:
    if (cost := found.cost) is not None:
        if cost.bytes > found.free_bytes:
            yield (
                f"the features take {size_text(cost.bytes)} and {size_text(found.free_bytes)} are free; make room, put "
                "--data-dir elsewhere, or take --limit"
            )
        if cost.seconds > _HOURS:
            yield (
                f"computing takes {duration(cost.seconds)} here: try --limit first; a GPU or more machines divide it "
                "(--scheduler), and it may be stopped at any time"
            )
    if not found.row_shape:  # no row exists, and no image could be measured
        return
    places, channels = math.prod(found.row_shape[:-1]), found.row_shape[-1]
    rows = found.plan.rows * 2 * places * channels  # bytes of float16
    if rows > found.available_memory / 2:
        yield (
            f"as arrays the features take {size_text(rows)} of memory: `flatten` streams them from disk, slower; `gap` "
            f"and `logreg` need {_share(2 / places)} of it"
        )
    head = heads.memory_needed(HeadSpec.make("flatten"), found.row_shape, len(found.counts))
    if head > found.available_memory:
        rows = "x".join(map(str, found.row_shape))
        yield f"a `flatten` head over rows of {rows} takes {size_text(head)} of memory to train: take `gap` or `logreg`"


def _share(part: float) -> str:
    """Return a share as text: "1/32", for example, or "all" for 1."""
    return f"1/{1 / part:.0f}" if part < 1 else "all"
