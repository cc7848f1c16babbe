"""`cache ls`, `explain`, `quarantine`, `verify --recompute`, and what `features` does with bad images."""

from __future__ import annotations

import os
import re
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import SPEC, icebox, mark, write_picture
from made import made, spoil
from own_networks import tiny_options

from pipeline.cache.digests import identify
from pipeline.cache.shard import Rows
from pipeline.cache.space import Cache
from pipeline.core.hashing import image_key
from pipeline.core.spec import FeatureSpec
from pipeline.dataset import limit, open_dataset

UNTRAINED = ("--weights", "untrained", "--precision", "float32")


def fill(data: Path, paths: list[Path], spec: FeatureSpec = SPEC) -> None:
    """Give these images made-up rows, a shard for each two."""
    rows = made(list(range(len(paths))), spec)
    keys = np.stack([np.frombuffer(image_key(path.read_bytes()), np.uint8) for path in paths])
    with closing(Cache(data / "cache")) as cache:
        space = cache.create(spec, {"created": "2026-01-02T03:04:05+00:00", "weights": "untrained"})
        for at in range(0, len(paths), 2):
            part = Rows(rows.features, rows.pooled, keys, rows.views).take(slice(at, at + 2))
            space.register(space.write(part))


@pytest.fixture
def images(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def states(data: Path, photos: Path, *options: str) -> dict[str, tuple[str, str]]:
    done = icebox(data, "cache", "explain", "--dataset", photos, *options, "--json")
    assert done.code == 0, done.err
    return {image["path"]: (image["state"], image["why"]) for image in done.json["images"]}


# ls


def test_ls_tells_rows_bytes_compression_and_ages(data: Path, images: list[Path]) -> None:
    fill(data, images)
    other = replace(SPEC, layer="mixed8")
    fill(data, images[:4], other)
    listed = {space["space"]: space for space in icebox(data, "cache", "ls", "--json").json["spaces"]}
    assert listed.keys() == {SPEC.directory, other.directory}
    first = listed[SPEC.directory]
    assert (first["rows"], first["shards"]) == (12, 6)
    files = [path.stat().st_size for path in data.glob(f"cache/{SPEC.directory}/shards/*.h5")]
    assert first["bytes"] == sum(files)
    in_memory = 12 * (2 * 3 * 8 * 2 + 8 * 4)
    assert first["compression_ratio"] == pytest.approx(in_memory / sum(files), abs=0.01)
    assert first["created"] == "2026-01-02T03:04:05+00:00"
    last = datetime.fromisoformat(first["last_added"])
    assert 0 <= (datetime.now(UTC) - last).total_seconds() < 120
    shown = icebox(data, "cache", "ls").err
    assert re.search(rf"{SPEC.directory} +12 +6 .* days ago +just now +untrained +float32", shown)


# explain


def test_explain_tells_each_state_apart(data: Path, photos: Path, images: list[Path]) -> None:
    fill(data, images[:6])
    (photos / "cats" / "copy.png").write_bytes(images[0].read_bytes())
    (photos / "cats" / "bad.png").write_text("no image")
    fill(data, images[6:8], replace(SPEC, layer="mixed8"))
    found = states(data, photos, *UNTRAINED)
    names = [str(path.relative_to(photos)) for path in images]
    assert {found[name][0] for name in names[1:6]} == {"cached"}
    assert sorted([found[names[0]][0], found["cats/copy.png"][0]]) == ["cached", "copy"]
    for name in names[6:8]:
        assert found[name] == ("other space", f"it has a row in {replace(SPEC, layer='mixed8').directory}")
    assert {found[name] for name in names[8:]} == {("new", "its bytes have not been computed before")}


def test_explain_names_the_fields_in_which_a_space_differs(data: Path, photos: Path, images: list[Path]) -> None:
    fill(data, images)
    options = ("--dataset", photos, *UNTRAINED, "--layer", "mixed8")
    done = icebox(data, "cache", "explain", *options, "--fit", "pad", "--json")
    (space,) = done.json["spaces"]
    assert (space["space"], space["rows"], space["chosen"]) == (SPEC.directory, 12, False)
    assert space["differs"] == {
        "layer": {"asked": "mixed8", "found": "mixed10"},
        "fit": {"asked": "pad", "found": "squash"},
    }
    assert done.json["counts"] == {"other space": 12}
    shown = icebox(data, "cache", "explain", *options).err
    assert "layer is mixed10, asked for mixed8" in shown
    digest = "sha256:" + "0a" * 32
    shown = icebox(data, "cache", "explain", "--dataset", photos, "--weights", digest).err
    assert f"weights is {SPEC.weights}, asked for sha256:0a0a0a0a…" in shown


def test_explain_calls_an_own_network_by_its_file(data: Path, photos: Path) -> None:
    own = replace(SPEC, backbone="own:" + "1" * 64, weights="sha256:" + "2" * 64)
    with closing(Cache(data / "cache")) as cache:
        cache.create(own, {"network": {"file": "mine.keras", "sha256": "3" * 64}})
    done = icebox(data, "cache", "explain", "--dataset", photos, *UNTRAINED, "--json")
    assert (done.json["backbone"], done.json["spaces"][0]["backbone"]) == ("inception_v3", "mine.keras")
    assert done.json["spaces"][0]["differs"]["backbone"] == {"asked": "inception_v3", "found": own.backbone}
    shown = icebox(data, "cache", "explain", "--dataset", photos, *UNTRAINED).err
    assert "backbone is mine.keras, asked for inception_v3" in shown


def test_explain_names_the_bad_shard(data: Path, photos: Path, images: list[Path]) -> None:
    fill(data, images)
    shards = sorted(data.glob("cache/*/shards/*.h5"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    found = states(data, photos, *UNTRAINED)
    bad = [why for state, why in found.values() if state == "bad shard"]
    assert len(bad) == 2
    assert all(shards[0].stem[:12] in why for why in bad)
    assert sum(state == "cached" for state, _ in found.values()) == 10


def test_explain_sees_that_a_file_changed(data: Path, photos: Path, images: list[Path]) -> None:
    fill(data, images)
    with closing(Cache(data / "cache")) as cache:
        dataset = open_dataset(str(photos), downloads=data)
        # As of files that were there for some time.
        from pipeline.cache.digests import file_stamp

        cache.index.remember_digests({path: (file_stamp(path), image_key(path.read_bytes())) for path in images})
        identify(dataset, cache.index, lambda n: None)
    write_picture(images[3], 77)
    found = states(data, photos, *UNTRAINED)
    changed = str(images[3].relative_to(photos))
    assert found[changed] == ("changed", "the bytes of the file are others than before")
    assert states(data, photos, *UNTRAINED) == found, "explaining changes nothing"


def test_explain_takes_single_images_by_either_name(data: Path, photos: Path, images: list[Path]) -> None:
    fill(data, images[:1])
    name = str(images[0].relative_to(photos))
    for given in (name, str(images[0])):
        done = icebox(data, "cache", "explain", given, "--dataset", photos, *UNTRAINED, "--json")
        assert [(image["path"], image["state"]) for image in done.json["images"]] == [(name, "cached")]
    done = icebox(data, "cache", "explain", "cats/nobody.png", "--dataset", photos, *UNTRAINED)
    assert done.code == 2
    assert "cats/nobody.png is not an image of photos" in done.err


# Bad images


def test_quarantine_lists_reason_date_and_place(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad" / "class" / "text.png"
    bad.parent.mkdir(parents=True)
    bad.write_text("no image")
    os.utime(bad, (0, 0))
    options = ("--dataset", tmp_path / "bad", *tiny_options())
    done = icebox(data, "features", *options, "--json")
    assert done.code == 3
    (listed,) = icebox(data, "cache", "quarantine", "--json").json["contents"]
    assert "not an image" in listed["reason"]
    assert listed["key"] == image_key(b"no image").hex()
    assert 0 <= (datetime.now(UTC) - datetime.fromisoformat(listed["since"])).total_seconds() < 300
    assert done.json["quarantined_images"] == [
        {"path": "class/text.png", "reason": listed["reason"], "since": listed["since"]}
    ]
    assert re.search(r"just now +not an image", icebox(data, "cache", "quarantine").err)
    assert icebox(data, "cache", "ls", "--json").json["quarantined"] == 1
    # Derived again as the file is met, once the index that remembered it is gone.
    (data / "cache" / "cache.db").unlink()
    assert icebox(data, "cache", "quarantine", "--json").json["quarantined"] == 0
    assert icebox(data, "features", *options).code == 3
    assert icebox(data, "cache", "quarantine", "--json").json["quarantined"] == 1


def test_a_failure_to_read_is_never_remembered(data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\nmissing.png,a\n")
    done = icebox(data, "features", "--dataset", tmp_path / "list.csv", *tiny_options(), "--json")
    assert done.code == 3
    (bad,) = done.json["quarantined_images"]
    assert bad == {"path": "missing.png", "reason": "cannot be read: No such file or directory", "since": None}
    assert icebox(data, "cache", "quarantine", "--json").json["quarantined"] == 0


def test_on_error_fail_ends_at_the_first_bad_image_and_keeps_what_was_computed(
    data: Path, photos: Path, images: list[Path], dangerous: Path
) -> None:
    """Ten good images come before the bad one: all of them are computed and kept."""
    mark(images[10], b"LUCK")
    options = ("--dataset", photos, *tiny_options(), "--batch-size", "4", "--on-error", "fail")
    done = icebox(data, "features", *options)
    assert done.code == 1
    name = str(images[10].relative_to(photos))
    (error,) = re.findall("^error: (.*)", done.err, re.MULTILINE)
    assert error.startswith(f"{name}: PNG that OpenCV cannot decode")
    assert error.endswith("mend or remove it, or leave out --on-error fail")
    rows = icebox(data, "cache", "ls", "--json").json["rows"]
    assert rows == 10
    again = icebox(data, "features", *options)
    assert (again.code, re.findall("^error: (.*)", again.err, re.MULTILINE)) == (1, [error]), "known from before"
    images[10].unlink()
    mended = icebox(data, "features", *options, "--json")
    assert (mended.code, mended.json["rows"], mended.json["reused"]) == (0, 11, 10)


# verify, as a command


def test_verify_names_what_is_wrong_and_mends_it(data: Path, images: list[Path], photos: Path) -> None:
    fill(data, images)
    shards = sorted(data.glob("cache/*/shards/*.h5"))
    assert icebox(data, "cache", "verify", "--read-data", "--json").json["problems"] == []
    spoil(shards[2])
    done = icebox(data, "cache", "verify", "--read-data", "--json")
    assert done.code == 1
    (problem,) = done.json["problems"]
    assert (problem["path"], problem["rows"], problem["repaired"]) == (str(shards[2]), 2, False)
    assert str(shards[2]) in done.json["error"]
    assert "run `cache verify --read-data --repair`, then `features`" in done.err
    assert icebox(data, "cache", "verify", "--sample", "1").code == 1
    assert icebox(data, "cache", "verify", "--repair", "--read-data").code == 0
    assert icebox(data, "cache", "verify", "--read-data").code == 0
    assert (data / "cache" / SPEC.directory / "aside" / shards[2].name).exists()
    counted = icebox(data, "cache", "explain", "--dataset", photos, *UNTRAINED, "--json").json["counts"]
    assert counted == {"cached": 10, "bad shard": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--read-data", "--sample", "0.5"), "--read-data reads all, --sample a share"),
        (("--dataset", "digits"), "go with --recompute N only"),
        (("--sample", "1.5"), "Invalid value"),
    ],
)
def test_verify_refuses_options_that_contradict(options: tuple[str, ...], message: str, data: Path) -> None:
    done = icebox(data, "cache", "verify", *options)
    assert done.code == 2
    assert message in done.err


def test_a_space_that_is_not_there_is_told(data: Path) -> None:
    for command in ("verify", "gc"):
        done = icebox(data, "cache", command, "--space", "nothing")
        assert done.code == 1
        assert "no feature space named 'nothing'" in done.err


# The canary


def tiny_space(data: Path, *options: str | Path) -> FeatureSpec:
    """Compute features by the tiny network; return what the one space in `data` is."""
    done = icebox(data, "features", *options, *tiny_options())
    assert done.code == 0, done.err
    with closing(Cache(data / "cache")) as cache:
        (space,) = cache.spaces()
        return space.spec


@pytest.mark.parametrize("network", [pytest.param("inception_v3", marks=pytest.mark.long), "tiny"])
def test_rows_computed_afresh_are_those_in_the_cache(network: str, data: Path, photos: Path) -> None:
    named = UNTRAINED if network == "inception_v3" else tiny_options()
    options = ("--dataset", photos, *named, "--batch-size", "4")
    space = icebox(data, "features", *options, "--limit", "6", "--json").json["space"]
    done = icebox(data, "cache", "verify", "--recompute", "5", "--dataset", photos, "--json")
    assert done.code == 0, done.err
    (drift,) = done.json["recomputed"]
    assert (drift["space"], drift["rows"], drift["identical"]) == (space, 5, 5)
    assert (space == SPEC.directory) == (network == "inception_v3")
    assert (drift["max_difference"], drift["max_relative"]) == (0, 0)


def test_rows_of_another_making_are_noticed(data: Path, tmp_path: Path) -> None:
    digits = limit(open_dataset("digits", downloads=tmp_path), 3)
    keys = np.stack([np.frombuffer(image_key(digits.read(i)), np.uint8) for i in range(3)])
    spec = tiny_space(data, "--limit", "3")
    rows = made([0, 1, 2], spec, (4, 4, 64))
    with closing(Cache(data / "cache")) as cache:
        space = cache.open(spec.directory)
        (shard,) = space.shards.glob("*.h5")
        space.index.forget_shards(space.name, [shard.stem])
        shard.unlink()
        space.register(space.write(Rows(rows.features, rows.pooled, keys, rows.views)))
    done = icebox(data, "cache", "verify", "--recompute", "2")
    assert done.code == 1
    assert re.search(r"0 of 2 rows computed afresh are identical, greatest difference \d", done.err)
    assert f"the features of {spec.directory} are not what this machine computes now" in done.err


def test_images_that_are_not_at_hand_are_asked_for(data: Path, images: list[Path]) -> None:
    fill(data, images)
    done = icebox(data, "cache", "verify", "--recompute", "2")
    assert done.code == 1
    assert f"none of the images of {SPEC.directory} is at hand; name the dataset they are of by `--dataset`" in done.err


def test_with_several_spaces_those_whose_images_are_at_hand_are_compared(
    data: Path, photos: Path, images: list[Path]
) -> None:
    computed = tiny_space(data, "--dataset", photos, "--limit", "4")
    other = replace(computed, fit="pad")
    with closing(Cache(data / "cache")) as cache:
        space = cache.create(other, {})
        space.register(space.write(made([1, 2, 3], other)))
    done = icebox(data, "cache", "verify", "--recompute", "2", "--dataset", photos, "--json")
    assert done.code == 0, done.err
    assert [drift["space"] for drift in done.json["recomputed"]] == [computed.directory]
    assert f"none of the images of {other.directory} is at hand" in done.err


def test_explain_tells_of_the_bad_shard_though_it_was_the_only_one(
    data: Path, photos: Path, images: list[Path]
) -> None:
    fill(data, images[:2])
    (shard,) = data.glob("cache/*/shards/*.h5")
    shard.write_bytes(shard.read_bytes()[:-100])
    states_found = [state for state, _ in states(data, photos, *UNTRAINED).values()]
    assert states_found.count("bad shard") == 2
    assert states_found.count("new") == 10
