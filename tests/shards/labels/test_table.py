"""The canonical form of a label set and its id."""

from __future__ import annotations

import hashlib
import json
import math
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.labels.table import COLUMNS, ROW_GROUP, canonical_labels, identify, label_id, write_sorted

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "key": st.text(max_size=3),
            "text": st.text(max_size=8),
            "task": st.sampled_from(["", "asr", "é", "🎤"]),
            "weight": st.floats(0.001, 10),
            "snr": st.floats(allow_infinity=True),
            "noisy": st.booleans(),
            "age": st.integers(-(2**63), 2**63 - 1),
        }
    ),
    max_size=12,
    unique_by=lambda row: (row["key"], row["task"]),
)
TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
KINDS = dict(zip(("key", "text", "task", "weight", "snr", "noisy", "age"),
                 ("string", "string", "string", "float64", "float64", "bool", "int64"), strict=True))  # fmt: skip


def arrow(rows, names=tuple(KINDS)) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], TYPES[KINDS[name]]) for name in names})


def id_by_the_docstring(rows) -> str:
    rows = sorted(rows, key=lambda row: (row["key"].encode(), row["task"].encode()))
    columns = []
    for name in ("key", "text", "task", "weight", "age", "noisy", "snr"):
        kind, values = KINDS[name], [row[name] for row in rows]
        if kind == "string":
            lengths = b"".join(struct.pack("<I", len(value.encode())) for value in values)
            data = [lengths, "".join(values).encode()]
        else:
            code = {"float64": "<d", "int64": "<q", "bool": "?"}[kind]
            data = [b"".join(struct.pack(code, math.nan if value != value else value) for value in values)]
        columns.append([name, kind, *(hashlib.sha256(part).hexdigest() for part in data)])
    text = json.dumps({"columns": columns, "rows": len(rows)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@given(ROWS, st.randoms(use_true_random=False))
def test_the_id_depends_on_values_alone_not_on_row_order_column_order_or_chunks(rows, random):
    table = canonical_labels(arrow(rows), "x")
    names = random.sample(list(KINDS), len(KINDS))
    shuffled = arrow(random.sample(rows, len(rows)), names)
    cuts = sorted(random.choices(range(len(rows) + 1), k=3))
    parts = [shuffled.slice(a, z - a) for a, z in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    other = canonical_labels(pa.concat_tables(parts), "x")
    assert label_id(table) == label_id(other) == identify(shuffled) == id_by_the_docstring(rows)
    assert other.equals(table, check_metadata=True) or any(row["snr"] != row["snr"] for row in rows)


@given(ROWS, st.data())
def test_another_value_anywhere_is_another_id(rows, data):
    table = arrow(rows)
    if not rows:
        return
    row = data.draw(st.integers(0, len(rows) - 1))
    changes = {"text": lambda v: f"{v}x", "weight": lambda v: v * 2, "noisy": lambda v: not v, "age": lambda v: v ^ 1}
    name = data.draw(st.sampled_from(list(changes)))
    changed = {**rows[row], name: changes[name](rows[row][name])}
    assert identify(table) != identify(arrow([*rows[:row], changed, *rows[row + 1 :]]))


def test_a_character_that_moves_from_one_text_to_the_next_is_another_id():
    ids = {identify(pa.table({"key": ["a", "b"], "text": texts})) for texts in (["xy", "z"], ["x", "yz"])}
    assert len(ids) == 2


def test_rows_are_sorted_by_key_task_and_prompt_and_columns_have_one_order():
    table = pa.table({"zz": [1, 2, 3, 4], "Age": [1, 2, 3, 4], "prompt": ["q", "p", "", ""],
                      "task": ["t", "t", "u", "a"], "weight": [1, 1, 1, 1], "key": ["b", "b", "B", "é"],
                      "text": [""] * 4})  # fmt: skip
    canonical = canonical_labels(table, "x")
    assert canonical.column_names == ["key", "text", "prompt", "task", "weight", "Age", "zz"]
    assert canonical["zz"].to_pylist() == [3, 2, 1, 4]
    assert [name for name in canonical.column_names if name in COLUMNS] == canonical.column_names[:5]


def test_types_become_the_four_and_nulls_their_defaults():
    table = pa.table(
        {
            "key": pa.array(["a", "b"], pa.large_string()),
            "text": pa.array(["x", None]).dictionary_encode(),
            "speaker": pa.nulls(2),
            "weight": pa.array([2, None], pa.int8()),
            "n": pa.array([1, 2], pa.uint16()),
            "f": pa.array([0.5, None], pa.float32()),
            "note": pa.array([None, "n"]),
        }
    ).replace_schema_metadata({"by": "someone"})
    canonical = canonical_labels(table, "x")
    assert {field.name: str(field.type) for field in canonical.schema} == {
        "key": "string", "text": "string", "speaker": "string", "weight": "double", "f": "double", "n": "int64",
        "note": "string"}  # fmt: skip
    assert canonical.schema.metadata is None
    assert canonical.drop_columns("f").to_pylist()[1] == {
        "key": "b", "text": "", "speaker": "", "weight": 1.0, "n": 2, "note": "n"}  # fmt: skip
    assert math.isnan(canonical["f"][1].as_py())


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": ["x"]}, "has no column 'key' (it has 'text')"),
        ({"key": [None]}, "column 'key' of F does not|column 'key' of F has no value in row 1"),
        ({"key": ["a"], "text": [7]}, "column 'text' of F has values of type int64: it can have only strings"),
        ({"key": ["a"], "n": pa.array([None], pa.int64())}, "column 'n' of F has no value in row 1"),
        ({"key": ["a"], "x": [[1]]}, "type list<"),
        ({"key": ["a"], "x": pa.array([2**63], pa.uint64())}, "column 'x' of F does not fit int64"),
        ({"key": ["a", "b"], "weight": [1.0, 0.0]}, "the weight in row 2 of F is 0.0"),
        ({"key": ["a"], "weight": [float("inf")]}, "the weight in row 1 of F is inf"),
        ({"key": ["a"], "weight": [float("nan")]}, "the weight in row 1 of F is nan"),
        ({"key": ["a"], "weight": ["1"]}, "column 'weight' of F has values of type string"),
        ({"key": ["a"], "frames": [1]}, "F has a column 'frames', a name that the cache uses itself"),
        ({"key": ["a"], "id": ["a"]}, "F has a column 'id', a name that the cache uses itself"),
        ({"key": ["a"], "": ["a"]}, "F has a column without a name"),
        ({"key": ["a"], "b\n": ["a"]}, "F has a column named 'b\\n'"),
        (
            {"key": ["a", "b", "a"], "task": ["", "t", ""]},
            "F has several rows with the same key, task and prompt (key 'a')",
        ),
    ],
)
def test_what_a_label_set_cannot_hold_is_refused_by_name_and_row(columns, reason):
    with pytest.raises(UserError) as error:
        canonical_labels(pa.table(columns), "F")
    assert any(part in str(error.value) for part in reason.split("|"))


def test_a_column_that_occurs_twice_is_refused():
    with pytest.raises(UserError, match="more than one column 'text'"):
        canonical_labels(pa.table([["a"], ["b"], ["c"]], names=["key", "text", "text"]), "F")


def test_a_file_of_many_chunks_is_sorted_as_it_is_written_and_its_bytes_are_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.labels.table.BLOCK_BYTES", 1)  # blocks of one row group
    count = 2 * ROW_GROUP + 5
    keys = [f"{(i * 7919) % count:06d}" for i in range(count)]
    table = pa.table({"key": keys, "text": [f"text {key}" for key in keys]})
    chunks = pa.concat_tables([table.slice(i, 1000) for i in range(0, count, 1000)])
    first, second = (write_sorted(given, tmp_path / name, "x") for given, name in ((table, "a"), (chunks, "b")))
    canonical = canonical_labels(table, "x")
    assert first == second
    assert first[:2] == (label_id(canonical), count)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    written = pq.ParquetFile(tmp_path / "a")
    assert [written.metadata.row_group(i).num_rows for i in range(3)] == [ROW_GROUP, ROW_GROUP, 5]
    assert written.read().equals(canonical, check_metadata=True)
    assert canonical["key"].to_pylist() == sorted(keys)


def test_rows_that_are_doubled_across_two_blocks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.labels.table.BLOCK_BYTES", 1)
    keys = [f"{i:06d}" for i in range(ROW_GROUP)] + [f"{ROW_GROUP - 1:06d}"]
    with pytest.raises(UserError, match="same key, task and prompt"):
        write_sorted(pa.table({"key": keys}), tmp_path / "a", "x")


def test_a_memory_mapped_table_is_written_without_a_copy_of_its_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.labels.table.BLOCK_BYTES", 1)
    count, text = 200_000, "x" * 400
    schema = pa.schema([("key", pa.string()), ("text", pa.string())])
    with pa.OSFile(str(tmp_path / "ipc"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, count, 1000):
            keys = [f"{(i * 7919) % count:06d}" for i in range(start, start + 1000)]
            writer.write_batch(pa.record_batch([pa.array(keys), pa.array([text] * 1000)], schema=schema))
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "ipc"))).read_all()
    previous, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        rows = write_sorted(table, tmp_path / "a", "x")[1]
    finally:
        pa.set_memory_pool(previous)
    assert rows == count
    assert pool.max_memory() < 0.6 * table.nbytes
