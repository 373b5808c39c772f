"""Rows of CSV, TSV and JSON lines: nothing swallowed, and the line of what is wrong."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.labels.rows import delimited_rows, json_object, text_lines

VALUE = st.text(st.sampled_from("ab,\" ;\t'é"), max_size=6)


def rows(text: str | bytes, delimiter: str = ",") -> list[tuple[int, list[str]]]:
    data = text if isinstance(text, bytes) else text.encode()
    return list(delimited_rows(text_lines(io.BytesIO(data), "F"), "F", delimiter))


def test_a_quotation_mark_in_tsv_is_a_letter():
    text = 'audio\ttext\na\t"open\nb\tx"y"\nc\t"closed"\nd\t""\n'
    assert rows(text, "\t") == [
        (1, ["audio", "text"]),
        (2, ["a", '"open']),
        (3, ["b", 'x"y"']),
        (4, ["c", '"closed"']),
        (5, ["d", '""']),
    ]


@given(st.lists(st.lists(VALUE, min_size=2, max_size=2), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n", "\r"]))
def test_what_a_csv_writer_writes_is_read_again_with_the_line_of_each_row(table, ends):
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=ends).writerows([["audio", "text"], *table])
    numbers, fields = zip(*rows(file.getvalue()), strict=True)
    assert list(fields) == [["audio", "text"], *table]
    assert ends == "\r" or numbers == tuple(range(1, len(table) + 2))


def test_a_value_of_several_lines_counts_as_one_row_and_blank_lines_as_none():
    assert rows('a,b,c\n\n1,"two\n\nlines",3\n4,5,6\n') == [
        (1, ["a", "b", "c"]),
        (3, ["1", "two\n\nlines", "3"]),
        (6, ["4", "5", "6"]),
    ]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('a,b\n1,x\n2,"open\n3,y\n4,z\n', 3, "does not open and close"),
        ('a,b\n1,"two\nlines of","open\n3,y\n', 3, "does not open and close"),
        ('a,b\n1,"x" y\n', 2, "does not open and close"),
        ('a,b\n1,"x ""y"\n2,"z\n', 3, "does not open and close"),
        ('a,b\n1,"x\n2,y"\n3,z\n', 2, "several lines that look like rows"),
        ("a,b\n1,x\n2\n", 3, "has 1 fields, but line 1 has 2: quote values"),
        ("a,b\n1,x\n\n2,y,z\n", 4, "has 3 fields, but line 1 has 2: quote values"),
        (b"a,b\n1,x\n2,\xff\n", 3, "is not UTF-8"),
    ],
)
def test_csv_is_strict_and_the_line_is_named(text, line, reason):
    with pytest.raises(UserError, match=rf"^line {line} of F .*{reason}") as error:
        rows(text)
    assert "\n" not in str(error.value)


def test_a_tsv_row_of_another_number_of_fields_is_refused():
    with pytest.raises(UserError, match="line 3 of F has 3 fields, but line 1 has 2: tabs separate"):
        rows("a\tb\n1\t2\n1\t2\t3\n", "\t")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": ', "is not a JSON object"),
        ("[1]", "it is a list"),
        ('{"a": 1, "a": 2}', "'a' is specified twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is specified twice"),
        ('{"a": "\\ud83d"}', r"half of a surrogate pair .a cut emoji, .ud83d."),
        ('{"\\uDE00": 1}', "half of a surrogate pair"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is not a JSON object"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused(line, reason):
    with pytest.raises(UserError, match=f"^line 7 {reason}|^line 7 .*{reason}") as error:
        json_object(line, "line 7")
    assert str(error.value).isascii()


def test_a_whole_surrogate_pair_is_one_character():
    assert json_object('{"a": "\\ud83d\\ude00"}', "F") == {"a": "😀"}
