"""Who trains, who validates, who tests: kept if brought, else drawn from content and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import Dataset, Split, assign, few_groups
from pipeline.dataset.base import FileSource


def key(text: object) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()


def share(root: bytes) -> float:
    """Return what the law says a side is drawn from."""
    return int.from_bytes(hashlib.sha256(b"icebox split" + root).digest()[:8], "big") / 2**64


def drawn(root: bytes) -> str:
    u = share(root)
    return "test" if u < 0.1 else "val" if u < 0.2 else "train"


def dataset(
    count: int,
    *,
    splits: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> Dataset:
    names = [f"image {i}" for i in range(count)]
    indices = np.zeros(count, np.int32) if labels is None else np.array(labels, np.int32)
    return Dataset("made", ("a", "b"), names, indices, splits, groups, FileSource(Path(), names))


def counts(split: Split) -> tuple[int, int, int]:
    return split.crossing, split.crossing_groups, split.conflicting


def text_with_side(side: str, start: str) -> str:
    """Return a text whose key is drawn to `side`."""
    return next(f"{start}{i}" for i in range(1000) if drawn(key(f"{start}{i}")) == side)


def test_sides_follow_the_content_in_the_stated_shares() -> None:
    keys = [key(i) for i in range(5000)]
    split = assign(dataset(5000), keys)
    assert split.sides.dtype == np.dtype("<U5") and split.origin == "80/10/10 by content hash"
    assert split.sides.tolist() == [drawn(k) for k in keys]
    assert 0.08 < np.mean(split.sides == "test") < 0.12 and 0.08 < np.mean(split.sides == "val") < 0.12
    assert counts(split) == (0, 0, 0)


def test_sides_stay_when_images_are_added_or_reordered() -> None:
    keys = [key(i) for i in range(400)]
    before = dict(zip(keys[:300], assign(dataset(300), keys[:300]).sides, strict=True))
    after = dict(zip(keys[::-1], assign(dataset(400), keys[::-1]).sides, strict=True))
    assert {k: after[k] for k in before} == before


def test_copies_share_a_side_and_their_labels_are_compared() -> None:
    keys = [key(i % 100) for i in range(300)]
    labels = [1 if i in (7, 250) else 0 for i in range(300)]  # copies of 7 and of 50 disagree
    split = assign(dataset(300, labels=labels), keys)
    assert split.sides[:100].tolist() == split.sides[100:200].tolist() == split.sides[200:].tolist()
    assert counts(split) == (0, 0, 6)


def test_members_of_a_group_share_the_side_of_its_name() -> None:
    groups = [f"g{i // 5}" for i in range(500)]
    split = assign(dataset(500, groups=groups), [key(i) for i in range(500)])
    assert split.sides.tolist() == [drawn(key(group)) for group in groups]
    assert counts(split) == (0, 0, 0)


def test_an_empty_group_is_a_group_of_its_own() -> None:
    keys = [key(i) for i in range(300)]
    split = assign(dataset(300, groups=[""] * 299 + ["g"]), keys)
    assert split.sides[:299].tolist() == [drawn(k) for k in keys[:299]]
    assert split.sides[299] == drawn(key("g"))


def test_groups_that_share_an_image_become_one_through_any_chain() -> None:
    # g9 - g1 share "x", g1 - g5 share "y"; the ungrouped copy of "y" follows.
    groups = ["g9", "g1", "g1", "g5", "", "g5", ""]
    texts = ["x", "x", "y", "y", "y", "z", "w"]
    for order in (range(7), range(6, -1, -1)):
        split = assign(dataset(7, groups=[groups[i] for i in order]), [key(texts[i]) for i in order])
        expected = [drawn(key("w")) if texts[i] == "w" else drawn(key("g1")) for i in order]
        assert split.sides.tolist() == expected
        assert counts(split) == (0, 0, 0)


def test_groups_are_named_as_the_cause_of_an_empty_side() -> None:
    few = dataset(20, groups=["g"] * 12 + ["h"] * 7 + [""])
    assert (few_groups(few) or "").startswith("19 of 20 images belong to 2 groups, each of which stays on one side")
    assert few_groups(dataset(20, groups=["g"] * 20, splits=["train"] * 15 + ["test"] * 5))  # val is drawn from train
    assert few_groups(dataset(20, groups=["g"] * 20, splits=["val"] * 15 + ["test"] * 5)) is None
    assert few_groups(dataset(20)) is None and few_groups(dataset(2, groups=["a", "b"])) is None


def test_random_groups_and_copies_never_cross() -> None:
    rng = np.random.default_rng(1)
    keys = [key(i) for i in rng.integers(0, 1500, 2000)]
    groups = [f"g{i}" if i < 1200 else "" for i in rng.integers(0, 2400, 2000)]
    split = assign(dataset(2000, groups=groups), keys)
    assert len(set(split.sides)) == 3
    for identities in (keys, groups):
        pairs = {(k, side) for k, side in zip(identities, split.sides, strict=True) if k}
        assert len(pairs) == len({k for k in identities if k})
    assert counts(split)[:2] == (0, 0)


def test_an_unreadable_image_is_drawn_by_its_name() -> None:
    split = assign(dataset(200), [None] * 200)
    assert split.sides.tolist() == [drawn(key(f"image {i}")) for i in range(200)]


def test_a_brought_split_is_kept_and_its_leaks_are_counted() -> None:
    splits = ["train", "train", "val", "test", "test", "train"]
    groups = ["p", "q", "q", "p", "r", ""]
    texts = ["a", "b", "c", "a", "d", "a"]
    split = assign(dataset(6, splits=splits, groups=groups, labels=[0, 0, 0, 1, 0, 0]), [key(t) for t in texts])
    assert split.sides.tolist() == splits and split.origin == "brought by the dataset"
    assert counts(split) == (3, 2, 3)  # "a" thrice; p and q


def test_val_is_lent_from_train_by_the_same_draw() -> None:
    splits = ["train"] * 900 + ["test"] * 100
    keys = [key(i) for i in range(1000)]
    split = assign(dataset(1000, splits=splits), keys)
    lent = ["val" if 0.1 <= share(k) < 0.2 else "train" for k in keys[:900]]
    assert split.sides.tolist() == lent + ["test"] * 100 and "val" in lent
    assert split.origin == "brought; val lent from train"


def test_with_train_and_val_only_val_is_the_test() -> None:
    splits = ["val"] * 100 + ["train"] * 900
    keys = [key(i) for i in range(1000)]
    split = assign(dataset(1000, splits=splits), keys)
    lent = ["val" if 0.1 <= share(k) < 0.2 else "train" for k in keys[100:]]
    assert split.sides.tolist() == ["test"] * 100 + lent
    assert split.origin == "brought; val serves as test, val lent from train"


def test_lending_moves_copies_and_groups_together() -> None:
    lent = text_with_side("val", "g")
    groups = [lent, lent, lent, ""]
    texts = [text_with_side("train", "a"), text_with_side("train", "b"), "c", text_with_side("train", "a")]
    split = assign(dataset(4, splits=["train", "train", "test", "train"], groups=groups), [key(t) for t in texts])
    assert split.sides.tolist() == ["val", "val", "test", "val"]
    assert counts(split) == (0, 1, 0)


@pytest.mark.parametrize("splits", [["test"] * 300, ["val"] * 150 + ["test"] * 150])
def test_a_brought_split_without_train_is_kept(splits: list[str]) -> None:
    split = assign(dataset(300, splits=splits), [key(i) for i in range(300)])
    assert split.sides.tolist() == splits and split.origin == "brought by the dataset"


def test_the_brought_splits_themselves_are_not_changed() -> None:
    splits = ["train"] * 100 + ["val"] * 10
    assign(dataset(110, splits=splits), [key(i) for i in range(110)])
    assert splits == ["train"] * 100 + ["val"] * 10


def test_as_many_keys_as_images_are_needed() -> None:
    with pytest.raises(ValueError, match="argument"):
        assign(dataset(3), [key(0)])


def test_no_images_have_no_sides() -> None:
    split = assign(dataset(0, groups=[]), [])
    assert split.sides.shape == (0,) and counts(split) == (0, 0, 0)
