"""What the user chose: one JSON text, one fingerprint, and nothing taken that cannot be meant."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import conftest
import pytest

from pipeline.core.errors import SpecError, UsageError
from pipeline.core.spec import HEAD_DEFAULTS, HEADS, FeatureRequest, FeatureSpec, HeadSpec, canonical_json

SPEC = replace(conftest.SPEC, weights="untrained:glorot:0", decode="decode-1", resize="resize-1")
# Another legal value of every field.
OTHER: dict[str, Any] = {
    "backbone": "another_net",
    "weights": "untrained:glorot:1",
    "layer": "mixed8",
    "input_size": 224,
    "decode": "decode-2",
    "resize": "resize-2",
    "fit": "crop",
    "scaling": "x/255",
    "precision": "bfloat16",
    "engine": "openvino",
    "storage": "float32",
}
FIELDS = [field.name for field in dataclasses.fields(FeatureSpec)]
REQUEST = FeatureRequest("inception_v3", "mixed10", "squash", "decode-1", "resize-1", 299, "x/127.5-1", "folded")


def test_canonical_json_is_one_text_whatever_the_order() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"\\u00e9","b":1}'


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_canonical_json_refuses_what_is_not_json(number: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"a": number})


def test_the_fingerprint_is_the_hash_of_the_canonical_json_and_never_changes() -> None:
    text = (
        '{"backbone":"inception_v3","decode":"decode-1","engine":"folded","fit":"squash","input_size":299,'
        '"layer":"mixed10","precision":"float32","resize":"resize-1","scaling":"x/127.5-1",'
        '"storage":"float16","weights":"untrained:glorot:0"}'
    )
    assert canonical_json(SPEC.to_dict()) == text
    assert SPEC.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_a_space_is_named_by_backbone_layer_and_fingerprint() -> None:
    assert SPEC.directory == f"inception_v3-mixed10-{SPEC.fingerprint()[:8]}"


def test_every_field_is_tested_below() -> None:
    assert sorted(OTHER) == sorted(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_every_single_field_changes_the_fingerprint(name: str) -> None:
    other = dataclasses.replace(SPEC, **{name: OTHER[name]})
    assert other.fingerprint() != SPEC.fingerprint()
    assert other.directory != SPEC.directory


def test_a_field_may_be_asked_for_as_any_of_several() -> None:
    either = dataclasses.replace(REQUEST, engine=("keras", "folded"))
    assert not either.differences(SPEC)
    assert not either.differences(dataclasses.replace(SPEC, engine="keras"))
    assert either.differences(dataclasses.replace(SPEC, engine="openvino")) == ["engine"]


def test_a_spec_survives_json() -> None:
    assert FeatureSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    value = SPEC.to_dict()
    del value[name]
    with pytest.raises(SpecError, match=name):
        FeatureSpec.from_dict(value)


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="colour"):
        FeatureSpec.from_dict({**SPEC.to_dict(), "colour": "rgb"})


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [None, 1.5, True, ["a"]])
def test_a_field_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=name):
        FeatureSpec.from_dict({**SPEC.to_dict(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "float64"),
        ("storage", "bfloat16"),
        ("weights", "imagenet"),
        ("weights", ""),
        ("weights", "sha256:no digest"),
        ("weights", "untrained:glorot:seed"),
        ("input_size", 0),
        ("input_size", 10**9),
    ],
)
def test_a_value_no_space_can_have_is_refused(name: str, value: str | int) -> None:
    with pytest.raises(SpecError, match=name):
        dataclasses.replace(SPEC, **{name: value})


def test_untrained_is_told_from_the_weights() -> None:
    assert SPEC.untrained
    assert not dataclasses.replace(SPEC, weights="sha256:" + "0" * 64).untrained


def test_a_request_that_states_nothing_optional_agrees() -> None:
    assert REQUEST.differences(SPEC) == []


@pytest.mark.parametrize("name", ["weights", "precision", "storage"])
def test_what_a_request_leaves_open_agrees_with_anything(name: str) -> None:
    assert REQUEST.differences(dataclasses.replace(SPEC, **{name: OTHER[name]})) == []


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(FeatureRequest)])
def test_a_stated_field_is_named_when_it_differs(name: str) -> None:
    request = dataclasses.replace(REQUEST, **{name: OTHER[name]})
    assert request.differences(SPEC) == [name]
    assert request.differences(dataclasses.replace(SPEC, **{name: OTHER[name]})) == []


def test_all_differences_are_named() -> None:
    request = dataclasses.replace(REQUEST, layer="mixed8", storage="float32", precision="float32")
    assert sorted(request.differences(SPEC)) == ["layer", "storage"]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("flatten", {"epochs": 50, "batch_size": 64, "learning_rate": 1e-3, "hidden": (256,), "dropout": 0.5}),
        ("gap", {"epochs": 50, "batch_size": 64, "learning_rate": 1e-3, "hidden": (64,), "dropout": 0.0}),
        ("logreg", {"C": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), "select": "val"}),
    ],
)
def test_a_head_has_the_documented_defaults(head: str, expected: dict[str, Any]) -> None:
    settings = HeadSpec.make(head).settings
    assert {name: settings[name] for name in expected} == expected
    assert settings == HEAD_DEFAULTS[head]


def test_there_are_three_heads() -> None:
    assert sorted(HEADS) == ["flatten", "gap", "logreg"]


def test_none_means_not_given() -> None:
    assert HeadSpec.make("gap", epochs=None, C=None) == HeadSpec.make("gap")


def test_false_and_zero_are_given() -> None:
    settings = HeadSpec.make("gap", normalize=False, seed=0, patience=0).settings
    assert settings["normalize"] is False


def test_what_is_given_wins_and_leaves_the_defaults_alone() -> None:
    before = {head: dict(settings) for head, settings in HEAD_DEFAULTS.items()}
    made = HeadSpec.make("flatten", epochs=3, dropout=0.0)
    assert (made.settings["epochs"], made.settings["dropout"], made.settings["hidden"]) == (3, 0.0, (256,))
    made.settings["epochs"] = 9  # pyright: ignore[reportIndexIssue]
    assert before == HEAD_DEFAULTS


def test_a_head_spec_becomes_plain_json() -> None:
    value = HeadSpec.make("logreg", C=0.5).to_dict()
    rest = {"max_iter": 1000, "select": "val", "class_weight": "none", "calibrate": True}
    assert json.loads(canonical_json(value)) == {"head": "logreg", "C": [0.5], **rest}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_spec_survives_json(head: str) -> None:
    spec = HeadSpec.make(head)
    stored = json.loads(json.dumps(spec.to_dict()))
    assert HeadSpec.make(stored.pop("head"), **stored) == spec


@pytest.mark.parametrize(
    ("head", "name", "given", "meant"),
    [
        ("flatten", "hidden", "256,128", (256, 128)),
        ("flatten", "hidden", 64, (64,)),  # how it was written before there could be several
        ("gap", "hidden", "none", ()),
        ("logreg", "C", "1,0.1,1e-3,1", (1e-3, 0.1, 1.0)),
        ("logreg", "C", 1, (1.0,)),
        ("gap", "epochs", "7", 7),
        ("gap", "learning_rate", "1e-2", 0.01),
        ("gap", "normalize", "false", False),
        ("gap", "optimizer", "sgd", "sgd"),
    ],
)
def test_a_setting_may_be_given_as_it_is_typed(head: str, name: str, given: Any, meant: Any) -> None:
    found = HeadSpec.make(head, **{name: given}).settings[name]
    assert found == meant
    assert type(found) is type(meant)


def test_an_unknown_head_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(UsageError, match=r"'svm'.*flatten, gap, logreg"):
        HeadSpec.make("svm")


@pytest.mark.parametrize(
    ("head", "foreign"),
    [("logreg", "epochs"), ("logreg", "hidden"), ("gap", "C"), ("flatten", "max_iter"), ("gap", "colour")],
)
def test_a_setting_of_another_head_is_refused_by_name(head: str, foreign: str) -> None:
    with pytest.raises(UsageError, match=f"the {head} head has no {foreign}"):
        HeadSpec.make(head, **{foreign: 1})


@pytest.mark.parametrize(
    ("head", "name", "value"),
    [
        ("gap", "epochs", 0),
        ("gap", "batch_size", 0),
        ("gap", "batch_size", 65_537),
        ("gap", "learning_rate", 0.0),
        ("gap", "learning_rate", math.nan),
        ("gap", "learning_rate", math.inf),
        ("gap", "patience", -1),
        ("gap", "seed", -1),
        ("gap", "seed", 2**32),
        ("gap", "hidden", 0),
        ("gap", "hidden", "64,"),
        ("gap", "hidden", ",".join(["8"] * 33)),
        ("gap", "epochs", 2.5),
        ("gap", "epochs", "many"),
        ("gap", "epochs", True),
        ("gap", "normalize", "perhaps"),
        ("gap", "optimizer", "adamant"),
        ("gap", "weight_decay", -1),
        ("gap", "label_smoothing", 1),
        ("logreg", "C", ""),
        ("logreg", "C", []),
        ("logreg", "select", "test"),
        ("flatten", "dropout", -0.1),
        ("flatten", "dropout", 1.0),
        ("logreg", "C", 0.0),
        ("logreg", "max_iter", 0),
    ],
)
def test_a_value_out_of_range_is_refused_under_the_option_name(head: str, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        HeadSpec.make(head, **{name: value})


@pytest.mark.parametrize(
    ("head", "name", "value"),
    [("gap", "epochs", 1), ("gap", "seed", 2**32 - 1), ("gap", "batch_size", 65_536), ("flatten", "dropout", 0.99)],
)
def test_the_bounds_themselves_are_legal(head: str, name: str, value: float) -> None:
    assert HeadSpec.make(head, **{name: value}).settings[name] == value
