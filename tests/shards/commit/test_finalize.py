from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cache import append, make_spec, original, plan_row

from shards.commit import finalize as module
from shards.commit.finalize import commit_record, finalize, lists_plan, read_info, stray_files, write_plan
from shards.errors import UserError
from shards.format.layout import Layout, read_plan
from shards.format.records import RecordError, seal, unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, PLAN_SCHEMA, parquet_bytes, read_parquet
from shards.read.cache import Cache

SPEC = make_spec(4)
TREES = st.dictionaries(
    st.text(max_size=8).filter(lambda key: key != "sha256"),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    max_size=5,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three shards of three utterances; the middle one of each is a failure."""
    rows = [plan_row(f"utt-{i}", 640 * (1 + i % 3), i // 3, i % 3) for i in range(9)]
    failed = {"utt-1", "utt-4", "utt-7"}
    return grow(tmp_path_factory.mktemp("manifest") / "cache", rows, failed, {"source": {"name": "small"}}).path


@pytest.fixture
def cache(whole, tmp_path):
    return Layout(Path(shutil.copytree(whole, tmp_path / "cache")))


def grow(path: Path, rows: list, failed=(), provenance=None) -> Layout:
    """Append a generation of the planned ``rows``; the label set names every utterance so far."""
    keys = {row["key"] for row in rows}
    if (path / "CACHE.json").exists():
        keys |= set(Cache.open(path).labels.table["key"].to_pylist())
    labels = [{"key": key, "text": f"text of {key}"} for key in sorted(keys)]
    return append(path, SPEC, rows, labels, features, failed=failed, provenance=provenance)


def features(key: str, frames: int) -> np.ndarray:
    return original(frames, int(key[-1]), frames, 4)


def plan_table(n: int, name: str = "utt") -> pa.Table:
    return pa.Table.from_pylist([plan_row(f"{name}-{i}", 320, 0, i) for i in range(n)], schema=PLAN_SCHEMA)


def plan_of(layout: Layout):
    return read_plan(layout.plan(0))


def files(layout: Layout) -> dict[str, bytes]:
    paths = [path for path in layout.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(layout.path)): path.read_bytes() for path in sorted(paths)}


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
    first = write_plan(layout, 0, [plan_table(3)], "me")
    again = write_plan(layout, 0, [plan_table(5)], "you")
    assert again.id == first.id
    assert len(again) == 3
    assert [*files(layout)] == ["plans/000.parquet"]


def test_of_several_that_write_a_plan_at_once_all_get_the_same(tmp_path):
    layout, ids = Layout(tmp_path / "c"), []
    together = threading.Barrier(6)

    def run(number: int) -> None:
        together.wait()
        ids.append(write_plan(layout, 1, [plan_table(3, f"n{number}")], f"owner{number}").id)

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
    write_plan(layout, 0, [plan_table(1)], "me")
    layout.shards.rmdir()
    write_plan(layout, 0, [plan_table(1)], "me")
    assert layout.shards.is_dir()


def test_a_plan_returns_the_utterances_of_a_shard_in_row_order(cache):
    plan = plan_of(cache)
    assert (plan.num_shards, plan.shards, plan.sizes) == (3, range(3), {0: 3, 1: 3, 2: 3})
    assert [row["key"] for row in plan.shard_rows(1)] == ["utt-3", "utt-4", "utt-5"]


def test_a_shard_is_found_in_a_plan_of_many_row_groups(tmp_path):
    rows = [plan_row(f"utt-{i}", 320, 5 + i // 7, i % 7) for i in range(40)]
    path = tmp_path / "plans" / "001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), path, row_group_size=4, store_schema=False)
    plan = read_plan(path)
    assert plan.shards == range(5, 11)
    for shard in plan.shards:
        assert plan.shard_rows(shard) == [row for row in rows if row["shard"] == shard]
    assert plan.shard_rows(11) == []


def test_a_corrupt_plan_is_reported(tmp_path):
    path = tmp_path / "000.parquet"
    with pytest.raises(FileNotFoundError):
        read_plan(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is corrupt"):
        read_plan(path, "the cache")
    for shards in ([0, 2], [1, 0], [-1, 0]):
        path.write_bytes(parquet_bytes(plan_table(2).set_column(5, "shard", pa.array(shards, pa.int32()))))
        with pytest.raises(UserError, match="its shards are not in order"):
            read_plan(path, "the cache")


def test_the_same_table_is_the_same_parquet_bytes():
    assert parquet_bytes(plan_table(50)) == parquet_bytes(plan_table(50))


def test_a_record_is_trusted_only_with_its_ids_its_number_and_files_of_its_sizes(cache):
    plan = plan_of(cache)
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
    assert commit_record(cache, 1, SPEC.feature_id, plan_of(cache).id) is None


def test_a_pipe_or_a_folder_in_the_place_of_a_record_is_not_waited_for(cache):
    plan = plan_of(cache)
    cache.record(1).unlink()
    os.mkfifo(cache.record(1))
    assert commit_record(cache, 1, SPEC.feature_id, plan.id) is None
    cache.record(1).unlink()
    cache.record(1).mkdir()
    assert commit_record(cache, 1, SPEC.feature_id, plan.id) is None


def test_finishing_twice_returns_the_same_files(cache):
    before = files(cache)
    finalize(cache, SPEC, 0, plan_of(cache), "again", {"source": {"name": "small"}})
    assert files(cache) == before


def test_the_cache_file_counts_what_the_shards_hold(cache):
    info = unseal(cache.cache)
    manifest = read_parquet(cache.manifest(0), MANIFEST_SCHEMA)
    failures = read_parquet(cache.failures(0), FAILURE_SCHEMA).to_pylist()
    assert [failure["key"] for failure in failures] == ["utt-1", "utt-4", "utt-7"]
    counts = {
        "planned": 9,
        "utterances": 6,
        "failures": 3,
        "shards": 3,
        "frames": sum(manifest["frames"].to_pylist()),
        "samples": sum(manifest["samples"].to_pylist()),
        "bytes": sum(cache.tar(shard).stat().st_size for shard in range(3)),
    }
    assert info["counts"] == {**counts, "superseded": 0}
    (generation,) = info["generations"]
    assert generation["counts"] == counts
    errors = manifest["error"].to_pylist()
    assert generation["codec_error"] == {"mean": pytest.approx(sum(errors) / 6), "max": pytest.approx(max(errors))}
    assert (generation["seconds"], generation["provenance"]["source"]) == (0.0, {"name": "small"})


def test_a_cache_is_not_finished_while_a_shard_is_missing_or_its_rows_are_corrupt(cache):
    plan = plan_of(cache)
    cache.cache.unlink()
    data = cache.rows(1).read_bytes()
    cache.rows(1).write_bytes(data[:200] + bytes([data[200] ^ 4]) + data[201:])
    with pytest.raises(
        UserError, match=r"shard 000001 .* is corrupt: 000001\.parquet does not match its sha256; delete "
    ):
        finalize(cache, SPEC, 0, plan, "me", {})
    cache.record(1).unlink()
    with pytest.raises(UserError, match=r"shard 000001 .* is not committed: rerun the same extraction"):
        finalize(cache, SPEC, 0, plan, "me", {})
    assert not cache.cache.exists()


def test_complete_means_a_whole_cache_file_of_this_spec_and_plan(cache):
    plan, info = plan_of(cache), read_info(cache)
    assert lists_plan(info, SPEC.feature_id, plan.id)
    assert not lists_plan(info, SPEC.feature_id, "0" * 64)
    assert not lists_plan(info, "0" * 64, plan.id)
    assert not lists_plan(None, SPEC.feature_id, plan.id)
    os.truncate(cache.cache, 100)
    assert read_info(cache) is None
    cache.cache.unlink()
    assert read_info(cache) is None


def hostile_parquet(kind: str) -> pa.Table:
    table = plan_table(3)
    changed = {
        "wrong type": lambda: table.set_column(3, "samples", pa.array(["1", "2", "3"])),
        "wrong width": lambda: table.set_column(5, "shard", pa.array([0, 0, 0], pa.int64())),
        "missing column": lambda: table.drop_columns(["audio"]),
        "extra column": lambda: table.append_column("extra", pa.array([1, 2, 3])),
        "other order": lambda: table.select(list(reversed(table.column_names))),
        "nulls": lambda: table.set_column(2, "audio", pa.array(["a", None, "c"])),
        "nested": lambda: table.set_column(2, "audio", pa.array([["a"], [], ["c"]])),
        "binary": lambda: table.set_column(2, "audio", pa.array([b"\xff", b"", b""])),
        "short audio id": lambda: table.set_column(4, "audio_id", pa.array([b"1234"] * 3, pa.binary(4))),
    }
    return changed[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        *("wrong type", "wrong width", "missing column", "extra column", "other order", "nulls", "nested", "binary"),
        "short audio id",
    ],
)
def test_a_parquet_of_other_columns_is_refused_in_a_sentence(tmp_path, kind):
    path = tmp_path / "plan.parquet"
    pq.write_table(hostile_parquet(kind), path)
    with pytest.raises(RecordError, match=r"^plan\.parquet has (other columns|null values)"):
        read_parquet(path, PLAN_SCHEMA)


def test_text_that_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "plan.parquet"
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"\xff", b"", b""]).buffers())
    pq.write_table(plan_table(3).set_column(2, "audio", text), path)
    with pytest.raises(RecordError, match="not a readable parquet file"):
        read_parquet(path, PLAN_SCHEMA)


def test_a_text_repeated_to_more_than_memory_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "plan.parquet"
    n, text = 200_000, "x" * 100_000  # 20 GB of text in a file of some hundred kB
    columns = {name: pa.array([""] * n) for name in ("key", "id")}
    columns |= {name: pa.array([0] * n, PLAN_SCHEMA.field(name).type) for name in ("samples", "shard", "row")}
    columns["audio"] = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), [text])
    columns["audio_id"] = pa.array([bytes(32)] * n, pa.binary(32))
    pq.write_table(pa.table({name: columns[name] for name in PLAN_SCHEMA.names}), path, store_schema=False)
    with pytest.raises(RecordError, match=r"in a file of|can hold"):
        read_parquet(path, PLAN_SCHEMA)


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
    left = [
        "CACHE.json.tmp-1-x",
        "plans/001.parquet.tmp-2-y",
        "manifests/001.parquet.tmp-2-y",
        "shards/000001.tar.tmp-3-z",
    ]
    for name in (*left, "shards/000001.claim", "labels/mine.parquet.tmp-4-a"):  # a label set is being written
        (cache.path / name).touch()
    assert [str(path.relative_to(cache.path)) for path in stray_files(cache)] == left


def second(layout: Layout) -> Layout:
    """Append two shards: utt-3 and utt-5 with other audio, utt-1 that failed, and new ones; utt-5 and utt-b fail."""
    rows = [plan_row("utt-3", 320, 3, 0, "other"), plan_row("utt-5", 320, 3, 1, "other"), plan_row("utt-1", 640, 3, 2)]
    rows += [plan_row("new-8", 960, 4, 0), plan_row("new-9", 960, 4, 1)]
    return grow(layout.path, rows, {"utt-5", "new-9"}, {"source": {"name": "second"}})


def test_a_second_generation_appends_shards_and_changes_no_byte_of_the_first(cache):
    before = files(cache)
    second(cache)
    after = files(cache)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"CACHE.json", "labels/LABELS.json"}
    shards = [f"shards/{i:06d}.{kind}" for i in (3, 4) for kind in ("json", "parquet", "tar")]
    tables = [f"{kind}/001.parquet" for kind in ("failures", "manifests", "plans")]
    assert {name for name in set(after) - set(before) if not name.startswith("labels/")} == {*shards, *tables}


def test_the_cache_file_lists_generations_and_counts_superseded_rows(cache):
    old = read_info(cache)
    info = read_info(second(cache))
    first, new = info["generations"]
    assert first == old["generations"][0]
    assert (new["first_shard"], new["shards"]) == (3, 2)
    assert new["counts"]["planned"] == 5
    assert new["counts"]["failures"] == 2
    assert new["manifest_id"] != first["manifest_id"]
    assert info["counts"]["planned"] == 14
    assert info["counts"]["utterances"] == 9
    assert info["counts"]["superseded"] == 2  # utt-3, and utt-5 although its new encoding failed


def test_a_key_that_is_planned_again_supersedes_its_row_even_if_it_fails(cache):
    keys = Cache.open(second(cache).path).strings("key", range(7))
    assert keys == ["utt-0", "utt-2", "utt-6", "utt-8", "utt-3", "utt-1", "new-8"]


def test_the_manifest_id_covers_the_plan_and_the_tars_of_all_generations_before(cache, tmp_path):
    other = Layout(Path(shutil.copytree(cache.path, tmp_path / "other")))
    second(cache)
    rows = [plan_row("utt-3", 640, 3, 0, "third")]
    grow(other.path, rows)
    ids = [entry["manifest_id"] for layout in (cache, other) for entry in read_info(layout)["generations"]]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    again = read_info(grow(cache.path, [plan_row("utt-3", 640, 5, 0, "third")]))
    assert again["generations"][2]["manifest_id"] not in ids


def test_the_cache_file_is_complete_before_and_after_a_generation_and_replaced_in_one_step(cache, monkeypatch):
    """Every rename onto CACHE.json goes from one whole file to another."""
    seen, real = [], os.replace

    def replace(source, target):
        if Path(target).name == "CACHE.json":
            seen.append(len(unseal(Path(target))["generations"]))
            seen.append(len(unseal(Path(source))["generations"]))
            assert len(Cache.open(cache.path)) == 6
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    second(cache)
    assert seen == [1, 2]


def test_a_generation_is_not_finished_before_the_one_before_it(cache, tmp_path):
    layout = Layout(tmp_path / "new")
    plan = write_plan(layout, 1, [plan_table(1)], "me")
    with pytest.raises(UserError, match=r"generation 0 of .* is not complete: rerun the same extraction"):
        finalize(layout, SPEC, 1, plan, "me", {})


def test_a_plan_whose_shards_do_not_follow_those_before_is_refused(cache):
    plan = write_plan(cache, 1, [plan_table(1)], "me")
    with pytest.raises(UserError, match=r"the plan of generation 1 of .* begins at shard 0, not at 3"):
        finalize(cache, SPEC, 1, plan, "me", {})


def test_a_late_process_does_not_take_back_what_others_finished_meanwhile(cache, monkeypatch):
    """It merges generation 1, stands still before the last step, and others finish generations 1 and 2."""
    second(cache)
    newest, plan = cache.cache.read_bytes(), read_plan(cache.plan(1))
    first = unseal(cache.cache)["generations"][:1]
    reads = [{**unseal(cache.cache), "generations": first}]
    real = read_info
    monkeypatch.setattr(module, "read_info", lambda layout: reads.pop() if reads else real(layout))
    finalize(cache, SPEC, 1, plan, "late", {"source": {"name": "late"}})
    assert cache.cache.read_bytes() == newest
