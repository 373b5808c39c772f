"""Labels against the rows of a cache: joined, counted, refused above a limit, compared."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.labels.join import check_labels, differences, enforce, join
from shards.labels.table import LabelSet, canonical_labels, label_id

KEYS, IDS = pa.chunked_array([["c", "a"], ["b"]]), pa.array(["1/c", "1/a", "1/b"])


def label_set(name="x", **columns) -> LabelSet:
    table = canonical_labels(pa.table(columns), name)
    return LabelSet(table, label_id(table), name)


def test_rows_that_cannot_be_used_are_counted_with_their_first_keys_in_file_order():
    table = pa.table({"key": ["z", "a", "y", "a", "c", "a"], "text": ["1", "", " \n", "2", "3", ""]})
    report = check_labels(table, KEYS, IDS, "F")
    assert (report.unknown.count, report.unknown.examples) == (2, ("z", "y"))
    assert (report.doubled.count, report.doubled.examples) == (2, ("a", "a"))
    assert (report.empty.count, report.empty.examples) == (3, ("a", "y", "a"))
    assert (report.unlabelled.count, report.unlabelled.examples) == (1, ("b",))
    assert report.table["key"].to_pylist() == ["a", "c", "y", "z"]
    assert report.features.tolist() == [1, 0, -1, -1]
    assert report.problems() == (
        "2 rows without features (their key is not in the cache): 'z', 'y'",
        "2 rows with the key, task and prompt of an earlier row: 'a', 'a'",
        "3 rows with an empty text: 'a', 'y', 'a'",
        "1 utterance without labels: 'b'",
    )


def test_of_doubled_rows_the_first_in_file_order_is_kept():
    table = pa.table({"key": ["b", "a", "a", "b"], "task": ["", "t", "t", ""], "text": ["1", "2", "3", "4"]})
    assert check_labels(table, KEYS, IDS, "F").table["text"].to_pylist() == ["2", "1"]


def test_only_the_first_five_keys_are_kept_as_examples():
    report = check_labels(pa.table({"key": [f"k{i}" for i in range(9)]}), KEYS, IDS, "F")
    assert report.unknown.examples == ("k0", "k1", "k2", "k3", "k4")
    assert report.problems()[0].endswith("'k4', …")


def test_labels_without_a_key_or_with_ids_as_keys_are_joined_by_id():
    for column in ("id", "key"):
        report = check_labels(pa.table({"text": ["x", "y"], column: ["1/b", "1/a"]}), KEYS, IDS, "F")
        assert report.joined_by == "id"
        assert report.table.to_pylist() == [{"key": "a", "text": "y"}, {"key": "b", "text": "x"}]
    report = check_labels(pa.table({"id": ["1/b", "1/z"]}), KEYS, IDS, "F")
    assert (report.table["key"].to_pylist(), report.unknown.examples) == (["b"], ("1/z",))
    both = check_labels(pa.table({"id": ["1/b"], "key": ["a"]}), KEYS, IDS, "F")
    assert (both.joined_by, both.table.to_pylist()) == ("key", [{"key": "a"}])


def test_keys_are_not_taken_for_ids_unless_every_one_is_known():
    report = check_labels(pa.table({"key": ["1/a", "z"]}), KEYS, IDS, "F")
    assert (report.joined_by, report.unknown.count) == ("key", 2)


def test_a_join_by_ids_that_are_not_unique_is_refused():
    with pytest.raises(UserError, match="F is joined by id, but ids of the cache are not unique"):
        check_labels(pa.table({"id": ["1"]}), KEYS, pa.array(["1", "1", "2"]), "F")


@pytest.mark.parametrize(("limit", "passes"), [(0, False), (0.2, False), (0.25, True), (1, True), (2, True)])
def test_a_limit_below_one_is_a_fraction_and_from_one_a_number_of_rows(limit, passes):
    report = check_labels(pa.table({"key": ["a", "b", "c", "z"]}), KEYS, IDS, "F")
    if passes:
        enforce(report, limit, "F", "labels_limit")
        return
    with pytest.raises(UserError) as error:
        enforce(report, limit, "F", "labels_limit")
    assert str(error.value) == (
        "F has 1 unusable rows among 4 (1 row without features (their key is not in the cache): 'z'): "
        f"correct them, or raise labels_limit (now {limit:g})"
    )


def test_labels_of_another_corpus_are_refused_under_any_limit():
    report = check_labels(pa.table({"key": ["x", "y"]}), KEYS, IDS, "F")
    with pytest.raises(UserError, match="no row of F has features in the cache, by key"):
        enforce(report, 100, "F", "labels_limit")


@given(
    st.lists(st.tuples(st.text(max_size=2), st.sampled_from(["", "t", "u"])), max_size=12, unique=True),
    st.lists(st.text(max_size=2), max_size=12, unique=True),
)
def test_a_join_has_one_item_for_each_label_row_with_features_by_feature_row_then_label_row(labels, keys):
    table = pa.table({"key": pa.array([k for k, _ in labels], pa.string()),
                      "task": pa.array([t for _, t in labels], pa.string())})  # fmt: skip
    report = check_labels(table, pa.array(keys, pa.string()), pa.array(keys, pa.string()), "F")
    label_rows, feature_rows = join(report.table, pa.chunked_array([keys], pa.string()))
    ordered = sorted(labels, key=lambda row: (row[0].encode(), row[1].encode()))
    expected = [(row, f) for f, key in enumerate(keys) for row, (k, _) in enumerate(ordered) if k == key]
    assert list(zip(label_rows.tolist(), feature_rows.tolist(), strict=True)) == expected
    assert label_rows.dtype == feature_rows.dtype == np.int64
    assert all(np.array_equal(a, b) for a, b in zip(report.join(), (label_rows, feature_rows), strict=True))


def test_differences_count_changed_values_rows_and_columns():
    old = label_set(key=["a", "b", "c"], text=["1", "2", "3"], snr=[1.0, math.nan, 2.0], note=["", "", ""])
    assert differences(old, old) == "no differences"
    new = label_set(
        key=["a", "b", "d", "e"], text=["1", "x", "y", "z"], snr=[1.0, math.nan, 2.0, 3.0], age=[1, 2, 3, 4]
    )
    assert (
        differences(old, new)
        == "1 text changed, column 'age' added, column 'note' removed, 2 rows added, 1 row removed"
    )


def test_differences_match_rows_of_one_key_by_task_and_prompt():
    old = label_set(key=["a", "a"], task=["t", "u"], text=["1", "2"])
    new = label_set(key=["a", "a"], task=["u", "v"], text=["x", "1"])
    assert differences(old, new) == "1 text changed, 1 row added, 1 row removed"
    assert differences(label_set(key=["a"], text=["1"]), label_set(key=["a"], text=["1"], task=[""])) == (
        "column 'task' added")  # fmt: skip
    assert differences(label_set(key=["a"], n=[1]), label_set(key=["a"], n=["1"])) == (
        "column 'n' changed from int64 to string")  # fmt: skip
