from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cache import make_spec
from tiny_faults import make_small_cache

from shards.commit.finalize import commit_record, finalize, is_complete, stray_files, write_plan
from shards.errors import UserError
from shards.format.layout import (
    FAILURE_SCHEMA,
    MANIFEST_SCHEMA,
    UTTERANCE_SCHEMA,
    Layout,
    parquet_bytes,
    read_parquet,
    read_plan,
)
from shards.format.records import RecordError, seal, unseal

SPEC = make_spec(4)
TREES = st.dictionaries(
    st.text(max_size=8).filter(lambda key: key != "sha256"),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    max_size=5,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_small_cache(tmp_path_factory.mktemp("manifest") / "cache")


@pytest.fixture
def cache(whole, tmp_path):
    return Layout(Path(shutil.copytree(whole, tmp_path / "cache")))


def plan_table(n: int, name: str = "utt") -> pa.Table:
    rows = [dict.fromkeys(("id", "audio", "text", "speaker", "split"), "x") for _ in range(n)]
    rows = [{**row, "key": f"{name}-{i}", "samples": 320, "shard": 0, "row": i} for i, row in enumerate(rows)]
    return pa.Table.from_pylist(rows, schema=UTTERANCE_SCHEMA)


@given(TREES)
def test_what_was_sealed_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "sealed.json"
    path.write_bytes(seal(tree))
    assert unseal(path) == tree


@settings(max_examples=30)
@given(TREES, st.data())
def test_a_seal_breaks_with_any_byte(tmp_path_factory, tree, data):
    path = tmp_path_factory.getbasetemp() / "broken.json"
    whole = seal(tree)
    at = data.draw(st.integers(0, len(whole) - 1))
    for broken in (
        whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :],
        whole[:at],
        whole[:at] + b" " + whole[at:],
    ):
        path.write_bytes(broken)
        with pytest.raises(RecordError):
            unseal(path)


def test_a_plan_that_exists_is_never_replaced(tmp_path):
    layout = Layout(tmp_path / "a" / "b")
    first = write_plan(layout, plan_table(3), "me")
    again = write_plan(layout, plan_table(5), "you")
    assert again.id == first.id
    assert len(again.table) == 3
    assert sorted(path.name for path in layout.path.iterdir()) == ["plan.parquet", "shards"]


def test_of_several_that_write_a_plan_at_once_all_get_the_same(tmp_path):
    layout, ids = Layout(tmp_path / "c"), []
    together = threading.Barrier(6)

    def run(number: int) -> None:
        together.wait()
        ids.append(write_plan(layout, plan_table(3, f"n{number}"), f"owner{number}").id)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1
    assert len(ids) == 6
    assert not list(stray_files(layout))


def test_a_plan_whose_shards_folder_is_gone_gets_it_back(tmp_path):
    layout = Layout(tmp_path / "c")
    write_plan(layout, plan_table(1), "me")
    layout.shards.rmdir()
    write_plan(layout, plan_table(1), "me")
    assert layout.shards.is_dir()


def test_a_plan_returns_the_utterances_of_a_shard_in_row_order(cache):
    plan = read_plan(cache)
    assert plan.num_shards == 3
    assert [row["key"] for row in plan.shard_rows(1)] == ["utt-0-3", "utt-0-4", "utt-0-5"]


def test_a_folder_without_a_plan_and_a_corrupt_plan_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"is not a cache: it has no plan.parquet"):
        read_plan(Layout(tmp_path))
    Layout(tmp_path).plan.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is corrupt"):
        read_plan(Layout(tmp_path))


def test_the_same_table_is_the_same_parquet_bytes():
    assert parquet_bytes(plan_table(50)) == parquet_bytes(plan_table(50))


def test_a_record_is_trusted_only_with_its_ids_its_number_and_files_of_its_sizes(cache):
    plan = read_plan(cache)
    record = commit_record(cache, 1, SPEC.feature_id, plan.id)
    assert record["rows"] == 2
    assert commit_record(cache, 1, "0" * 64, plan.id) is None
    assert commit_record(cache, 1, SPEC.feature_id, "0" * 64) is None
    assert commit_record(cache, 7, SPEC.feature_id, plan.id) is None
    cache.record(2).write_bytes(cache.record(1).read_bytes())
    assert commit_record(cache, 2, SPEC.feature_id, plan.id) is None
    os.truncate(cache.tar(1), 512)
    assert commit_record(cache, 1, SPEC.feature_id, plan.id) is None


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{}", b'"x"', seal({}), seal({"tar": 1, "feature_id": 2}), b"[" * 100_000]
)
def test_a_record_that_is_none_of_ours_is_not_trusted(cache, data):
    cache.record(1).write_bytes(data)
    assert commit_record(cache, 1, SPEC.feature_id, read_plan(cache).id) is None


def test_a_pipe_or_a_folder_in_the_place_of_a_record_is_not_waited_for(cache):
    plan = read_plan(cache)
    cache.record(1).unlink()
    os.mkfifo(cache.record(1))
    assert commit_record(cache, 1, SPEC.feature_id, plan.id) is None
    cache.record(1).unlink()
    cache.record(1).mkdir()
    assert commit_record(cache, 1, SPEC.feature_id, plan.id) is None


def test_finishing_twice_returns_the_same_files(cache):
    before = {path: path.read_bytes() for path in (cache.cache, cache.manifest, cache.failures)}
    finalize(cache, SPEC, read_plan(cache), "again", {"source": {"name": "small"}})
    assert {path: path.read_bytes() for path in before} == before


def test_the_cache_file_counts_what_the_shards_hold(cache):
    info = unseal(cache.cache)
    manifest = read_parquet(cache.manifest, MANIFEST_SCHEMA)
    failures = read_parquet(cache.failures, FAILURE_SCHEMA).to_pylist()
    assert [failure["key"] for failure in failures] == ["utt-0-1", "utt-0-4", "utt-0-7"]
    assert info["counts"] == {
        "planned": 9,
        "utterances": 6,
        "failures": 3,
        "shards": 3,
        "frames": sum(manifest["frames"].to_pylist()),
        "samples": sum(manifest["samples"].to_pylist()),
        "bytes": sum(cache.tar(shard).stat().st_size for shard in range(3)),
    }
    errors = manifest["error"].to_pylist()
    assert info["codec_error"] == {"mean": pytest.approx(sum(errors) / 6), "max": pytest.approx(max(errors))}
    assert info["seconds"] == 1.5


def test_a_cache_is_not_finished_while_a_shard_is_missing_or_its_rows_are_corrupt(cache):
    plan = read_plan(cache)
    cache.cache.unlink()
    data = cache.rows(1).read_bytes()
    cache.rows(1).write_bytes(data[:200] + bytes([data[200] ^ 4]) + data[201:])
    with pytest.raises(
        UserError, match=r"shard 000001 .* is corrupt: 000001\.parquet does not match its sha256; delete "
    ):
        finalize(cache, SPEC, plan, "me", {})
    cache.record(1).unlink()
    with pytest.raises(UserError, match=r"shard 000001 .* is not committed: rerun the same extraction"):
        finalize(cache, SPEC, plan, "me", {})
    assert not cache.cache.exists()


def test_complete_means_a_whole_cache_file_of_this_spec_and_plan(cache):
    plan = read_plan(cache)
    assert is_complete(cache, SPEC.feature_id)
    assert is_complete(cache, SPEC.feature_id, plan.id)
    assert not is_complete(cache, SPEC.feature_id, "0" * 64)
    assert not is_complete(cache, "0" * 64)
    os.truncate(cache.cache, 100)
    assert not is_complete(cache, SPEC.feature_id)
    cache.cache.unlink()
    assert not is_complete(cache, SPEC.feature_id)


def hostile_parquet(kind: str) -> pa.Table:
    table = plan_table(3)
    changed = {
        "wrong type": lambda: table.set_column(3, "samples", pa.array(["1", "2", "3"])),
        "wrong width": lambda: table.set_column(7, "shard", pa.array([0, 0, 0], pa.int64())),
        "missing column": lambda: table.drop_columns(["text"]),
        "extra column": lambda: table.append_column("extra", pa.array([1, 2, 3])),
        "other order": lambda: table.select(list(reversed(table.column_names))),
        "nulls": lambda: table.set_column(4, "text", pa.array(["a", None, "c"])),
        "nested": lambda: table.set_column(4, "text", pa.array([["a"], [], ["c"]])),
        "binary": lambda: table.set_column(4, "text", pa.array([b"\xff", b"", b""])),
    }
    return changed[kind]()


@pytest.mark.parametrize(
    "kind",
    ["wrong type", "wrong width", "missing column", "extra column", "other order", "nulls", "nested", "binary"],
)
def test_a_parquet_of_other_columns_is_refused_in_a_sentence(tmp_path, kind):
    path = tmp_path / "plan.parquet"
    pq.write_table(hostile_parquet(kind), path)
    with pytest.raises(RecordError, match=r"^plan\.parquet has (other columns|null values)"):
        read_parquet(path, UTTERANCE_SCHEMA)


def test_text_that_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "plan.parquet"
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"\xff", b"", b""]).buffers())
    pq.write_table(plan_table(3).set_column(4, "text", text), path)
    with pytest.raises(RecordError, match="not a readable parquet file"):
        read_parquet(path, UTTERANCE_SCHEMA)


def test_a_text_repeated_to_more_than_memory_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "plan.parquet"
    n, text = 200_000, "x" * 100_000  # 20 GB of text in a file of some hundred kB
    columns = {name: pa.array([""] * n) for name in ("key", "id", "audio", "speaker", "split")}
    columns |= {name: pa.array([0] * n, UTTERANCE_SCHEMA.field(name).type) for name in ("samples", "shard", "row")}
    columns["text"] = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), [text])
    pq.write_table(pa.table({name: columns[name] for name in UTTERANCE_SCHEMA.names}), path, store_schema=False)
    with pytest.raises(RecordError, match=r"in a file of|can hold"):
        read_parquet(path, UTTERANCE_SCHEMA)


def test_more_rows_than_bytes_are_refused_before_they_are_unpacked(tmp_path):
    path = tmp_path / "failures.parquet"
    n = 1_000_000
    columns = {
        name: pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), [""]) for name in ("key", "stage", "error")
    }
    pq.write_table(pa.table({**columns, "attempt": pa.array([0] * n, pa.int32())}), path, store_schema=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(RecordError, match="declares 1000000 rows"):
        read_parquet(path, FAILURE_SCHEMA)


def test_temporary_files_of_anyone_are_named(cache):
    for name in ("CACHE.json.tmp-1-x", "plan.parquet.tmp-2-y", "shards/000001.tar.tmp-3-z", "shards/000001.claim"):
        (cache.path / name).touch()
    assert [path.name for path in stray_files(cache)] == [
        "CACHE.json.tmp-1-x",
        "plan.parquet.tmp-2-y",
        "000001.tar.tmp-3-z",
    ]
