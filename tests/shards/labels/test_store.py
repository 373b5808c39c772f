"""The label sets of a cache folder: found by name or id, never half written, refused when damaged."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.records import seal
from shards.labels import store
from shards.labels.store import (
    LabelIndex,
    add_set,
    check_set_name,
    find,
    open_set,
    parse_index,
    read_index,
    with_set,
)
from shards.labels.table import canonical_labels, label_id

TABLE = pa.table({"key": ["b", "a"], "text": ["two", "one"], "snr": [1.5, 2.5], "age": [3, 4], "noisy": [True, False]})
OTHER = TABLE.set_column(1, "text", pa.array(["2", "1"]))


def add(folder, table=TABLE, name="mine", **options):
    return add_set(folder, table, name, "a test", "me", **options)


def test_a_set_is_opened_as_it_was_added_by_name_id_or_prefix(tmp_path):
    assert read_index(tmp_path) == LabelIndex()
    entry = add(tmp_path)
    index = read_index(tmp_path)
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == [
        "LABELS.json",
        f"mine-{entry.id[:8]}.parquet",
    ]
    for reference in ("mine", entry.id, entry.id[:8]):
        opened = open_set(tmp_path, find(index, reference))
        assert opened.table.equals(canonical_labels(TABLE, "x"), check_metadata=True)
        assert (opened.id, opened.name) == (label_id(opened.table), "mine")


def test_the_index_is_sealed_json_of_the_documented_form(tmp_path):
    entry = add(tmp_path)
    tree = json.loads((tmp_path / "labels" / "LABELS.json").read_bytes())
    path = tmp_path / "labels" / f"mine-{entry.id[:8]}.parquet"
    del tree["sha256"]
    assert tree == {"schema_version": 2, "sets": [{
        "name": "mine", "id": entry.id, "rows": 2, "from": "a test", "made": entry.made,
        "columns": {"key": "string", "text": "string", "age": "int64", "noisy": "bool", "snr": "float64"},
        "file": {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}}]}  # fmt: skip


def test_the_same_labels_again_write_nothing(tmp_path):
    entry = add(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}
    assert add(tmp_path, TABLE.take([1, 0])) == entry
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}


def test_the_newest_set_of_a_name_is_current_older_ones_are_found_by_id_and_become_current_again(tmp_path):
    first, second = add(tmp_path), add(tmp_path, OTHER)
    assert find(read_index(tmp_path), "mine") == second
    assert open_set(tmp_path, find(read_index(tmp_path), first.id[:10])).id == first.id
    file = tmp_path / "labels" / first.file.name
    before = file.stat().st_mtime_ns
    again = add(tmp_path)
    assert [entry.id for entry in read_index(tmp_path).sets] == [second.id, first.id]
    assert (again.file, file.stat().st_mtime_ns) == (first.file, before)


def test_a_damaged_file_is_written_again_by_adding_the_same_labels(tmp_path):
    entry = add(tmp_path)
    (tmp_path / "labels" / entry.file.name).unlink()
    open_set(tmp_path, add(tmp_path))


def test_sets_whose_ids_begin_alike_have_different_files(tmp_path):
    entry = add(tmp_path)
    twin = entry.model_copy(update={"id": entry.id[:8] + "0" * 56})
    index = LabelIndex(sets=(twin,))
    made = store.new_entry(index, "mine", canonical_labels(TABLE, "x"), "", (entry.id, 2, entry.file))
    assert made.file.name == f"mine-{entry.id[:16]}.parquet"
    with pytest.raises(UserError, match="the beginning of 2 label ids"):
        find(LabelIndex(sets=(twin, entry)), entry.id[:8])


@pytest.mark.parametrize("failing", ["rename_durably", "atomic_write"])
def test_a_crash_between_file_and_index_leaves_the_earlier_sets(tmp_path, monkeypatch, failing):
    first = add(tmp_path)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, failing, crash)
        with pytest.raises(KeyboardInterrupt):
            add(tmp_path, OTHER)
    assert read_index(tmp_path).sets == (first,)
    assert not list((tmp_path / "labels").glob("*.tmp-*"))
    second = add(tmp_path, OTHER)
    assert open_set(tmp_path, second).table["text"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "-a", "a" * 65, "é", "0123456789abcdef", "a\n", "a b"])
def test_names_that_cannot_be_file_names_or_could_be_ids_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a label set"):
        add(tmp_path, name=name)
    assert not list(tmp_path.iterdir())


def test_the_name_of_the_extraction_is_reserved(tmp_path):
    with pytest.raises(UserError, match="belongs to the labels that `make extract` writes"):
        add(tmp_path, name="source")
    assert add(tmp_path, name="source", reserved=True).name == "source"
    check_set_name("0123456789abcde")


def test_an_absent_name_is_answered_with_the_names_there_are(tmp_path):
    add(tmp_path)
    add(tmp_path, name="other")
    for reference in ("mien", "0" * 8, "abc"):
        with pytest.raises(UserError, match=r"no label set '.*': choose one of 'mine', 'other', or pass a file"):
            find(read_index(tmp_path), reference)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../mine"}, {"id": "0"}, {"rows": -1}, {"rows": 1 << 50}, {"rows": "2"}, {"columns": {"key": "int32"}},
        {"columns": {"text": "string"}},
        {"columns": {"key": "string", "frames": "int64"}}, {"made": "a\nb"}, {"from": "\x1b[2J"}, {"more": 1},
        {"file": {"name": "../../a.parquet", "bytes": 1, "sha256": "0" * 64}},
        {"file": {"name": "a/b", "bytes": 1, "sha256": "0" * 64}},
        {"file": {"name": "a", "bytes": -1, "sha256": "0" * 64}},
    ],
)  # fmt: skip
def test_an_index_of_a_stranger_is_refused(tmp_path, change):
    tree = LabelIndex(sets=(add(tmp_path),)).model_dump(mode="json", by_alias=True)
    tree["sets"][0].update(change)
    with pytest.raises(UserError) as error:
        parse_index(seal(tree), "I")
    assert error.value.args[0].isprintable()


@pytest.mark.parametrize("tree", [{"schema_version": 2, "sets": 3}, {"schema_version": 2, "sets": [3]}, {"sets": []},
                                  {"schema_version": 3, "sets": []}, None, {}])  # fmt: skip
def test_bytes_that_are_no_index_are_refused(tree):
    data = b"[]" if tree is None else seal(tree)
    with pytest.raises(UserError, match=r"^I "):
        parse_index(data, "I")


def test_every_changed_byte_of_the_index_and_of_the_file_is_found(tmp_path):
    entry = add(tmp_path)
    index = tmp_path / "labels" / "LABELS.json"
    for path in (index, tmp_path / "labels" / entry.file.name):
        data = path.read_bytes()
        for at in range(0, len(data), 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(UserError):
                open_set(tmp_path, find(read_index(tmp_path), "mine"))
        path.write_bytes(data)
    open_set(tmp_path, find(read_index(tmp_path), "mine"))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (canonical_labels(OTHER, "x"), "another order or another id"),
        (canonical_labels(TABLE, "x").take([1, 0]), "another order or another id"),
        (canonical_labels(TABLE, "x").slice(1), "other rows or columns"),
        (canonical_labels(TABLE, "x").drop_columns("snr"), "other rows or columns"),
        (canonical_labels(TABLE, "x").select(["text", "key", "age", "noisy", "snr"]), "other rows or columns"),
        (canonical_labels(TABLE, "x").set_column(1, "text", pa.array(["one", None])), "null values"),
    ],
)
def test_a_file_that_matches_its_hash_but_not_its_entry_is_refused(tmp_path, table, reason):
    entry = add(tmp_path)
    path = tmp_path / "labels" / entry.file.name
    pq.write_table(table, path)
    file = entry.file.model_copy(update={"bytes": path.stat().st_size, "sha256": file_sha256(path)})
    with pytest.raises(UserError, match=reason):
        open_set(tmp_path, entry.model_copy(update={"file": file}))


def test_a_pipe_or_an_absent_file_is_refused(tmp_path):
    entry = add(tmp_path)
    path = tmp_path / "labels" / entry.file.name
    path.unlink()
    with pytest.raises(UserError, match="cannot be read from"):
        open_set(tmp_path, entry)
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot be read from"):
        open_set(tmp_path, entry)


def test_functions_of_bytes_serve_a_bucket(tmp_path):
    entry = add(tmp_path)
    data = with_set(LabelIndex(), entry)
    assert data == (tmp_path / "labels" / "LABELS.json").read_bytes()
    assert parse_index(data, "I") == read_index(tmp_path)


def test_a_stranger_s_set_with_other_types_or_weights_is_refused(tmp_path):
    path = tmp_path / "labels" / "x-00000000.parquet"
    path.parent.mkdir()
    for column, values, kind in (("text", [1], "int64"), ("weight", [-1.0], "float64")):
        pq.write_table(pa.table({"key": ["a"], column: values}), path)
        file = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        tree = {"name": "x", "id": "0" * 64, "rows": 1, "columns": {"key": "string", column: kind}, "file": file,
                "made": "", "from": ""}  # fmt: skip
        index = parse_index(seal({"schema_version": 2, "sets": [tree]}), "I")
        with pytest.raises(UserError, match=column):
            open_set(tmp_path, index.sets[0])
    path.write_text("no parquet")
    file = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    index = parse_index(seal({"schema_version": 2, "sets": [{**tree, "file": file}]}), "I")
    with pytest.raises(UserError, match="is not a readable parquet file"):
        open_set(tmp_path, index.sets[0])
