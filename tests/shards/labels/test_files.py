"""Label files in four formats give the same rows, and bad ones are refused in one sentence with their place."""

from __future__ import annotations

import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_server import serve

from shards.errors import UserError
from shards.labels import files
from shards.labels.files import read_label_file
from shards.labels.table import identify

LINE = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=8) | st.sampled_from(
    ["NA", "007", "", "null", "1e5", "2024-01-31", "it's", 'say "hi"', '"', "a,b", " x ", "true", "é"]
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "key": LINE.filter(bool),
            "text": LINE,
            "note": LINE.map(lambda text: f"n{text}"),  # never a number in all rows
            "weight": st.floats(0.001, 10),
            "age": st.integers(-(2**63), 2**63 - 1),
            "snr": st.floats(allow_nan=False, allow_infinity=False),
        }
    ).map(lambda row: dict(sorted(row.items()))),  # hypothesis varies the order of the fields
    min_size=1,
    max_size=8,
    unique_by=lambda row: row["key"],
)


def write_table(path, rows, delimiter, **options) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, **options)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)


@given(ROWS, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_the_same_rows_have_one_id_in_every_format(tmp_path_factory, rows, quoting, ends, bom):
    folder = tmp_path_factory.mktemp("labels")
    write_table(folder / "a.csv", rows, ",", quoting=quoting, lineterminator=ends)
    if bom:
        (folder / "a.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "a.csv").read_bytes())
    tsv = "".join("\t".join(map(str, values)) + ends for values in [list(rows[0]), *(row.values() for row in rows)])
    (folder / "a.tsv.gz").write_bytes(gzip.compress(tsv.encode(), mtime=0))
    lines = "".join(json.dumps(row, ensure_ascii=row["age"] % 2 == 0) + ends for row in rows)
    (folder / "a.jsonl").write_text(lines, newline="")
    (folder / "a.ndjson.gz").write_bytes(gzip.compress(lines[:20].encode()) + gzip.compress(lines[20:].encode()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    tables = {path.name: read_label_file(path) for path in folder.iterdir()}
    assert tables["a.csv"].to_pylist() == rows
    assert {identify(table) for table in tables.values()} == {identify(pa.Table.from_pylist(rows))}


def read(tmp_path, data: bytes | str, name: str = "labels.csv") -> pa.Table:
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_label_file(tmp_path / name)


def test_texts_of_a_csv_file_stay_texts_and_columns_of_numbers_become_numbers(tmp_path):
    table = read(tmp_path, "key,text,zero,int,float,mixed,id\n1,NA,007,7,0.5,1,9\n2,,008,-8,1.0,x,8\n")
    assert {field.name: str(field.type) for field in table.schema} == {
        "key": "string", "text": "string", "zero": "string", "int": "int64", "float": "double", "mixed": "string",
        "id": "string"}  # fmt: skip
    assert table["text"].to_pylist() == ["NA", ""]
    assert table["zero"].to_pylist() == ["007", "008"]


@pytest.mark.parametrize(
    "text", ["0.50", "1e500", "nan", "inf", "+1", " 1", "0x10", "9223372036854775808.", "--1", "-0 "]
)
def test_a_column_stays_text_if_its_numbers_would_be_written_otherwise(tmp_path, text):
    assert read(tmp_path, f"key,x\na,1\nb,{text}\n")["x"].to_pylist() == ["1", text]


def test_quotation_marks_in_tsv_and_in_the_middle_of_csv_values_are_characters(tmp_path):
    tsv = 'key\ttext\na\t"it\'s\nb\tsay "hi\nc\t"q"\n'
    assert read(tmp_path, tsv, "a.tsv")["text"].to_pylist() == ["\"it's", 'say "hi', '"q"']
    assert read(tmp_path, 'key,text\na,say "hi" twice\nb,"x"\nc,5" tape\n')["text"].to_pylist() == [
        'say "hi" twice', "x", '5" tape']  # fmt: skip


def test_a_value_of_several_lines_is_read_and_semicolons_may_separate(tmp_path):
    assert read(tmp_path, 'key,text,x\na,"one\n\ntwo, three",1\nb,c,2\n')["text"].to_pylist() == [
        "one\n\ntwo, three",
        "c",
    ]
    assert read(tmp_path, "key;text\na;b, c\n").to_pylist() == [{"key": "a", "text": "b, c"}]


def test_texts_that_look_like_dates_stay_texts_in_json(tmp_path):
    lines = '{"key": "2024-01-31", "text": "2024-01-31T10:00:00Z", "day": "2024-01-31"}\n\n{"key": "x"}\n'
    assert read(tmp_path, lines, "a.jsonl").to_pylist() == [
        {"key": "2024-01-31", "text": "2024-01-31T10:00:00Z", "day": "2024-01-31"},
        {"key": "x", "text": None, "day": None},
    ]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "a.csv",
            "key,text\na,b\nc,d,e\n",
            "line 3 of .* has 3 fields, but line 1 has 2: quote values that contain ','",
        ),
        ("a.csv", "key,text\n\n\nc\n", "line 4 of .* has 1 fields"),
        ("a.tsv", "key\ttext\na\tb\tc\n", "line 2 of .* has 3 fields, but line 1 has 2: tabs separate"),
        ("a.csv", 'key,text\na,"b\nc,d\n', "line 2 of .* has a quotation mark that does not open and close"),
        ("a.csv", 'key,text\na,"b\nc,"d"\n', "line 2 of .* has a quotation mark that does not open and close"),
        ("a.csv", 'key,text\na,"b" c\nd,e\n', "line 2 of .* has a quotation mark that does not open and close"),
        ("a.csv", 'key,text\na,"b\nc,d\ne,f"\ng,h\n', "makes one value of several lines that look like rows"),
        ("a.csv", b"key,text\na,b\nc,\xff\n", "line 3 of .* is not UTF-8"),
        ("a.csv", "key,text\na,b\n".encode("utf-16"), "line 1 of .* is not UTF-8"),
        ("a.csv", "key,text\na,b\nc,x\0y\n", "column 'text' of .* has a NUL character in row 2"),
        ("a.csv", "key,weight\na,1\nb,heavy\n", "the weight 'heavy' in row 2 of .* is not a number"),
        ("a.csv", "key,text,text\na,b,c\n", "line 1 of .* has more than one column 'text'"),
        ("a.csv", "key,id,id\na,b,c\n", "line 1 of .* has more than one column 'id'"),
        ("a.csv", "key,audio\na,b\n", "line 1 of .* has a column 'audio', a name that the cache uses"),
        ("a.csv", "utt,text\na,b\n", "line 1 of .* has no column 'key' or 'id' .*'utt', 'text'"),
        ("a.csv", ",key\n0,a\n", "line 1 of .* has a column without a name"),
        ("a.csv", "", "is empty"),
        ("a.txt", "key\n", "has an unknown suffix"),
        ("a.parquet.gz", "key\n", "has an unknown suffix"),
        ("a.jsonl", '{"key": "a"}\n{"key": \n', "line 2 of .* is not a JSON object"),
        ("a.json", '[{"key": "a"}]\n', "line 1 of .* is not a JSON object .it is a list.: write one object a line"),
        (
            "a.jsonl",
            '{"key": "a", "n": 1}\n{"key": "b", "n": "x"}\n',
            "cannot be read as JSON lines .*changed from number",
        ),
        ("a.jsonl", '{"key": "a", "key": "b"}\n', "specified twice"),
        ("a.jsonl", b'{"key": "a"}\n{"key": "\xff"}\n', "line 2 of .* is not UTF-8"),
        ("a.jsonl", '{"key": "a\\u0000"}\n', "column 'key' of .* has a NUL character in row 1"),
        ("a.jsonl", '{"key": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", '{"text": "a"}\n', "has no column 'key' or 'id'"),
        ("a.parquet", "PAR1", "is not a readable parquet file"),
        ("a.csv.gz", "key,text\n", "is not gzip data"),
        ("a.csv.gz", gzip.compress(b"key,text\na,b\n" * 99, mtime=0)[:-9], "ends in the middle of its gzip data"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, data, reason):
    with pytest.raises(UserError, match=reason) as error:
        read(tmp_path, data, name)
    assert "\n" not in str(error.value)


TYPED = [
    {"key": 1, "text": "a", "speaker": 1089.0},
    {"key": 2, "text": None, "speaker": float("nan")},
    {"key": 3, "text": "b", "speaker": None},
]


def test_names_may_be_integers_and_bytes_are_text(tmp_path):
    expected = [{"key": "1", "text": "a", "speaker": "1089"}, {"key": "2", "text": None, "speaker": None},
                {"key": "3", "text": "b", "speaker": None}]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in TYPED)
    assert read(tmp_path, lines, "a.jsonl").to_pylist() == expected
    assert read(tmp_path, lines.replace("null", "NaN"), "a.jsonl").to_pylist() == expected
    assert read(tmp_path, lines.replace('"key": 3', '"key": "3"'), "a.jsonl").to_pylist() == expected
    table = pa.Table.from_pylist([{**row, "text": row["text"] and row["text"].encode()} for row in TYPED])
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_label_file(tmp_path / "a.parquet").to_pylist() == expected


@pytest.mark.parametrize("value", ["true", '["a", "b"]', '{"a": 1}', "7", "1.5"])
@pytest.mark.parametrize("others", ['"x"', "null", "true"])
def test_a_text_of_json_lines_that_is_no_text_is_refused_with_its_line(tmp_path, value, others):
    lines = f'{{"key": "a", "text": {others}}}\n\n{{"key": "b", "text": {value}}}\n'
    line = 1 if others == "true" else 3
    with pytest.raises(UserError, match=rf"text in line {line} of .*a\.jsonl' is .*, expected text"):
        read(tmp_path, lines, "a.jsonl")


def test_a_list_or_bytes_that_are_not_utf_8_in_parquet_are_refused_by_column_and_row(tmp_path):
    for values, reason in [
        (pa.array([["a"], ["b"]]), "column 'text' of .* has values of type list<"),
        (pa.array([b"a", b"\xff"]), "column 'text' in row 2 of .* is not UTF-8"),
        (pa.array([b"a", b"\xff"]).view(pa.string()), "column 'text' in row 2 of .* is not UTF-8"),
    ]:
        pq.write_table(pa.table({"key": ["a", "b"], "text": values}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=reason):
            read_label_file(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"x":' * 50_000 + "1" + "}" * 50_000,
        "null",
        "null {}",
        "{} null {}",
        '{"key": "a"} {"key": "b"}',
    ],
)
def test_lines_at_which_pyarrow_would_end_the_process_are_refused(tmp_path, line):
    with pytest.raises(UserError, match=r"line 1 of .* is not a JSON object"):
        read(tmp_path, f'{line}\n{{"key": "a"}}\n', "a.jsonl")
    with pytest.raises(UserError, match=r"line 2 of .* is not a JSON object"):
        read(tmp_path, f'{{"key": "a"}}\n{line}\n', "a.jsonl")


def test_quotes_are_checked_across_blocks(tmp_path, monkeypatch):
    rows = [{"key": f"k{i}", "text": f'"{i}", and ""'} for i in range(40)]
    write_table(tmp_path / "a.csv", rows, ",", quoting=csv.QUOTE_ALL)
    for block in range(1, 30):
        monkeypatch.setattr(files, "BLOCK", block)
        with open(tmp_path / "a.csv", "rb") as file:
            assert files._quotes_are_regular(file, ",")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("key,text\na,b\n")
    with pytest.raises(UserError, match="has 13 bytes, more than 12"):
        read_label_file(tmp_path / "a.csv", max_bytes=12)
    monkeypatch.setattr(files, "ROOM", 1 << 20)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"key,text\n" + b"\n" * (8 << 20), mtime=0))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_label_file(tmp_path / "a.csv.gz")


def test_a_parquet_file_that_declares_or_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOM", 0)
    pq.write_table(pa.table({"key": ["x" * 4000] * 5000}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="unpacks to more than"):
        read_label_file(tmp_path / "a.parquet")
    pq.write_table(pa.table({"key": pa.nulls(1_000_000, pa.string())}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="declares 1000000 rows"):
        read_label_file(tmp_path / "b.parquet")


def test_a_pipe_or_a_missing_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_label_file(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        read_label_file(tmp_path / "b.csv")


def test_a_url_is_read_like_a_file_and_resumes_where_it_was_cut(tmp_path):
    rows = [{"key": f"k{i}", "text": "x" * 50} for i in range(500)]
    write_table(tmp_path / "my labels.csv", rows, ",")
    (tmp_path / "z.tsv.gz").write_bytes(gzip.compress(b"key\ttext\na\tb\n"))
    with serve(tmp_path) as server:
        server.faults["my labels.csv"] = ["cut"]
        assert read_label_file(f"{server.url}/my labels.csv").to_pylist() == rows
        assert read_label_file(f"{server.url}/z.tsv.gz").to_pylist() == [{"key": "a", "text": "b"}]
        with pytest.raises(UserError, match="does not exist: pass the URL of a label file"):
            read_label_file(f"{server.url}/other.csv")
        with pytest.raises(UserError, match="more than 10"):
            read_label_file(f"{server.url}/z.tsv.gz", max_bytes=10)
        with pytest.raises(UserError, match=r"after '\?' or '#'"):
            read_label_file(f"{server.url}/z.csv?token=x")
