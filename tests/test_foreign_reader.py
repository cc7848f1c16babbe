"""docs/cache-format.md is enough: a reader made from that page alone finds the same rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed import Deployed
from foreign_reader import read_features

from pipeline import open_features
from pipeline.core.spec import view_number


@pytest.mark.parametrize("what", ["features", "pooled"])
def test_its_rows_are_ours(what: Any, deployed_inception: Deployed) -> None:
    with open_features(
        str(deployed_inception.photos), what=what, data_dir=deployed_inception.data, layer="mixed10"
    ) as features:
        ours, _ = features.arrays("train")
        files = [deployed_inception.photos / name for name in features.names("train")]
        theirs = read_features(deployed_inception.data / "cache" / features.space, files, what)
    np.testing.assert_array_equal(theirs, ours)
    assert theirs.dtype == ours.dtype


def test_it_refuses_what_the_page_says_to_refuse(deployed_inception: Deployed, tmp_path: Path) -> None:
    space = next(path.parent for path in (deployed_inception.data / "cache").glob("*mixed10*/space.json"))
    copy = tmp_path / space.name
    shutil.copytree(space, copy)
    with pytest.raises(KeyError):
        read_features(copy, [Path(__file__)])
    shard = next((copy / "shards").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="its sha256 is not its name"):
        read_features(copy, deployed_inception.files[:1])


def test_the_view_number_on_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cache-format.md").read_text()
    shifts = dict.fromkeys(("width_shift", "height_shift", "shear"), 0.2)
    flips = {"horizontal_flip": True, "vertical_flip": False}
    recipe = {"policy": "affine-linear-1", "rotation": 15.0, **shifts, "zoom": 0.1, **flips, "fill": "nearest"}
    assert f"The number of the recipe above is {view_number({**recipe, 'index': 1})}" in page
