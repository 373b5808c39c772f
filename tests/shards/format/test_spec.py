from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import make_spec

from shards.errors import UserError
from shards.format.spec import FeatureSpec, canonical_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_canonical_json_is_one_text_for_one_value(tree):
    text = canonical_json(tree)
    assert json.loads(text) == tree
    assert canonical_json(json.loads(text)) == text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_canonical_json_has_no_text_for_what_is_no_number(bad):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": bad})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "wavlm"),
        ("tensors", "0" * 64),
        ("frontend", {"n_mels": 128}),
        ("layer", 3),
        ("channels", 9),
        ("hop", 160),
        ("sampling_rate", 8000),
        ("window", "tight"),
        ("overlap", 1.0),
        ("trim", "none"),
        ("dtype", "bfloat16"),
        ("codec", "int8"),
    ],
)
def test_every_field_changes_the_feature_id_and_is_reported_as_the_difference(field, value):
    mine = make_spec()
    other = FeatureSpec.model_validate({**mine.model_dump(), field: value})
    assert other.feature_id != mine.feature_id
    (difference,) = mine.differences(other)
    assert difference.startswith(f"{field}: ")


def test_the_margin_of_a_tight_window_is_part_of_the_identity_and_belongs_to_no_other():
    bare = FeatureSpec.model_validate({**make_spec().model_dump(), "window": "tight"})
    wide = FeatureSpec.model_validate({**bare.model_dump(), "margin": 2})
    assert wide.feature_id != bare.feature_id
    assert bare.differences(wide) == ["margin: 0.0, not 2.0"]
    assert FeatureSpec.parse(json.loads(wide.canonical()), "here") == wide
    with pytest.raises(UserError, match="margin"):
        FeatureSpec.parse({**make_spec().model_dump(), "margin": 2}, "here")


def test_the_feature_id_of_a_known_spec_never_changes():
    assert make_spec().feature_id == "cca126af54672bc2dacec43bcbe8ca9cc3a069ff3825da32bed7455a521d0d98"


def test_the_feature_id_survives_json_and_another_process():
    spec = make_spec()
    program = "import sys, shards.format.spec as s; print(s.FeatureSpec.model_validate_json(sys.argv[1]).feature_id)"
    found = subprocess.run(
        [sys.executable, "-c", program, spec.model_dump_json()], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == spec.feature_id


def test_parsing_returns_the_spec_that_was_written():
    spec = make_spec(codec="fp8")
    assert FeatureSpec.parse(json.loads(spec.canonical()), "here") == spec


@pytest.mark.parametrize(("version", "mend"), [(3, "update earshard"), (1, "extract again")])
def test_another_format_version_is_refused_with_what_to_do(version, mend):
    with pytest.raises(UserError, match=f"cache format {version}.*{mend}"):
        FeatureSpec.parse({**make_spec().model_dump(), "schema_version": version}, "CACHE.json")


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        "spec",
        {},
        {"schema_version": "x"},
        {**make_spec().model_dump(), "channels": 10**12},
        {**make_spec().model_dump(), "channels": -1},
        {**make_spec().model_dump(), "extra": 1},
        {**make_spec().model_dump(), "tensors": "0" * 63},
        {**make_spec().model_dump(), "tensors": "0" * 64 + "\n"},
        {**make_spec().model_dump(), "frontend": {"a": [1]}},
        {**make_spec().model_dump(), "overlap": float("nan")},
        {**make_spec().model_dump(), "codec": "pickle"},
    ],
)
def test_what_is_no_spec_is_refused_in_one_sentence(tree):
    with pytest.raises(UserError, match=r"^CACHE\.json does not contain a valid feature spec: "):
        FeatureSpec.parse(tree, "CACHE.json")


def test_a_complaint_about_a_foreign_spec_is_one_short_line():
    tree = {**make_spec().model_dump(), "frontend": {"\n" * 3 + "x" * 5000: []}}
    with pytest.raises(UserError) as refused:
        FeatureSpec.parse(tree, "CACHE.json")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
