"""What is text in a table, in single values and in Arrow columns alike."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest

from shards.errors import UserError
from shards.labels.text import text_column, text_value

KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", [*KINDS, pa.dictionary(pa.int32(), pa.string())])
def test_strings_and_bytes_of_every_type_are_text(kind):
    values = ["one", None, "zwei äö"]
    encoded = [value.encode() if value and "binary" in str(kind) else value for value in values]
    assert text_column(pa.chunked_array([pa.array(encoded, kind)]), "text", "F").to_pylist() == values
    assert [text_value(value, "text", "F") for value in encoded] == values


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1089, None], pa.int32()), ([1089.0, math.nan], pa.float64()), ([1089.0, None], pa.float32())],
)
def test_speakers_may_be_integers_or_floats_that_are_integers(values, kind):
    column = pa.chunked_array([pa.array(values, kind)])
    assert text_column(column, "speaker", "F", is_name=True).to_pylist() == ["1089", None]
    assert [text_value(value, "speaker", "F", is_name=True) for value in values] == ["1089", None]
    with pytest.raises(UserError, match=r"column 'text' of F has values of type \w+: it can have only strings"):
        text_column(column, "text", "F")
    with pytest.raises(UserError, match=r"text in F is 1089(\.0)?, expected text"):
        text_value(values[0], "text", "F")


@pytest.mark.parametrize("value", [True, [1], ["a", "b"], {"a": 1}])
def test_booleans_lists_and_structs_are_no_text(value):
    column = pa.chunked_array([pa.array([value])])
    for is_name in (True, False):
        with pytest.raises(UserError, match="column 'x' of F has values of type"):
            text_column(column, "x", "F", is_name=is_name)
        with pytest.raises(UserError, match=r"x in F is .*expected text"):
            text_value(value, "x", "F", is_name=is_name)


@pytest.mark.parametrize("value", [1089.5, math.inf, 2.0**60])
def test_a_float_that_may_be_no_integer_is_no_name(value):
    with pytest.raises(UserError, match=r"column 'speaker' in row 2 of F is .*expected text"):
        text_column(pa.chunked_array([[1.0, value]]), "speaker", "F", is_name=True)
    with pytest.raises(UserError, match=r"speaker in F is .*expected text"):
        text_value(value, "speaker", "F", is_name=True)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary_view()])
def test_invalid_utf_8_is_refused_with_its_row(kind):
    wide = "large" in str(kind)
    data = pa.array([b"a", b"b\xff", b"c"], pa.large_binary() if wide else pa.binary())
    column = data.view(kind) if "string" in str(kind) else data.cast(kind)  # a view as strings is not checked
    with pytest.raises(UserError, match="column 'text' in row 2 of F is not UTF-8"):
        text_column(pa.chunked_array([column]), "text", "F")


@pytest.mark.parametrize(
    ("value", "reason"), [("a\0b", "NUL"), ("a\ud83d", "half of a surrogate pair"), (b"\xff", "not UTF-8")]
)
def test_characters_that_cannot_be_stored_are_refused(value, reason):
    with pytest.raises(UserError, match=reason) as error:
        text_value(value, "text", "F")
    assert str(error.value).isascii()
