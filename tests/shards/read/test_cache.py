from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_cache import append, flip, grow, make_cache, make_spec, original, plan_row

from shards.commit.folder import add_labels
from shards.errors import UserError
from shards.format import schemas as tables
from shards.format.codec import relative_rms
from shards.format.layout import Layout
from shards.format.records import seal, unseal
from shards.format.schemas import parquet_bytes
from shards.inspect.info import describe_cache
from shards.inspect.verify import verify
from shards.labels.table import LabelSet, canonical_labels, label_id
from shards.read import features as reader
from shards.read import index
from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig


def rewrite_manifest(path: Path, **columns) -> None:
    """Put other columns into the manifest and sign it as the writer would."""
    layout = Layout(path)
    table = pq.read_table(layout.manifest(0))
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    sign(layout, parquet_bytes(table))


def sign(layout: Layout, data: bytes) -> None:
    layout.manifest(0).write_bytes(data)
    info = unseal(layout.cache)
    files = info["generations"][0]["files"]
    files["manifest"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    layout.cache.write_bytes(seal(info))


@pytest.fixture
def path(tmp_path):
    return make_cache(tmp_path / "cache", n=12, seed=4, shards=3)


def test_float16_features_are_a_read_only_view_of_the_shard(path):
    cache = Cache.open(path)
    for i in range(len(cache)):
        features = cache.features(i)
        assert features.dtype == np.float16
        assert not features.flags.owndata
        assert not features.flags.writeable
        assert np.array_equal(features, original(4, i, len(features)).astype(np.float16))


@pytest.mark.parametrize(("codec", "error"), [("f16", 1e-3), ("bf16", 5e-3), ("int8", 1e-2), ("fp8", 5e-2)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_codec_is_read_into_either_dtype(tmp_path, codec, error, dtype):
    cache = Cache.open(make_cache(tmp_path / "cache", n=4, seed=1, codec=codec))
    for i in range(4):
        out = np.full((cache.frames[i], 8), np.nan, dtype=dtype)
        cache.read_into(i, out)
        assert relative_rms(out, original(1, i, len(out))) < error
        assert cache.features(i).dtype == (np.float16 if codec == "f16" else np.float32)


def test_read_into_refuses_a_buffer_of_another_shape(path):
    cache = Cache.open(path)
    with pytest.raises(ValueError, match="shape"):
        cache.read_into(0, np.empty((cache.frames[0] + 1, 8), np.float16))


def test_rows_strings_and_bounds_agree_with_the_manifest(path):
    cache = Cache.open(path)
    assert len(cache) == cache.manifest.num_rows == 12
    assert cache.bounds.tolist() == [0, 4, 8, 12]
    assert cache.row(5)["key"] == "utt-00005"
    assert cache.row(-1)["key"] == "utt-00011"
    assert cache.strings("key", [7, 0]) == ["utt-00007", "utt-00000"]
    assert cache.strings("text", range(12)) == cache.manifest["text"].to_pylist()
    assert cache.info.counts["utterances"] == 12
    for call in (cache.row, cache.features):
        with pytest.raises(IndexError):
            call(12)


def test_strings_are_found_in_a_manifest_of_many_row_groups(path, monkeypatch):
    monkeypatch.setattr(index, "MAX_ROW_GROUP_BYTES", 500)
    table = pq.read_table(path / "manifests" / "000.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=5, store_schema=False)
    sign(Layout(path), sink.getvalue().to_pybytes())
    cache = Cache.open(path)
    order = [11, 0, 6, 4, 5, 10, 0]
    assert cache.strings("key", order) == [f"utt-{i:05d}" for i in order]
    assert 1 <= len(cache.features_table._index._groups) < 3


def test_a_cache_survives_pickling_by_opening_itself_again(path):
    cache = Cache.open(path, verify=False)
    cache.features(3)
    again = pickle.loads(pickle.dumps(cache))
    assert again.manifest_id == cache.manifest_id
    assert np.array_equal(again.features(3), cache.features(3))
    assert again.features_table.verify is False


def test_mappings_and_descriptors_are_bounded_while_views_stay_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_MAPPED_SHARDS", 4)
    cache = Cache.open(make_cache(tmp_path / "cache", n=30, shards=30))
    kept = cache.features(0)
    before = kept.copy()
    for i in range(30):
        cache.features(i)
    assert len(cache.features_table._mmap_pool) == 4
    mapped = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
    assert (
        sum(name.startswith(str(tmp_path)) and name.endswith(".tar") for name in mapped) <= 10
    )  # two each: four mapped, one kept alive by its view
    assert np.array_equal(kept, before)


def _is_link(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_flipped_bit_is_reported_with_cache_shard_key_and_command(path):
    offset = Cache.open(path).row(6)["offset"]
    flip(path / "shards" / "000001.tar", offset + 140)
    cache = Cache.open(path)
    cache.features(5)
    with pytest.raises(UserError) as told:
        cache.features(6)
    for part in (str(path), "'utt-00006'", "shards/000001.tar", "checksum", "python -m shards verify"):
        assert part in str(told.value)
    Cache.open(path, verify=False).features(6)


def test_a_flipped_bit_in_a_scale_is_found(tmp_path):
    path = make_cache(tmp_path / "cache", n=2, codec="int8", shards=1)
    row = Cache.open(path).row(1)
    flip(path / "shards" / "000000.tar", row["scale_offset"] + row["scale_length"] - 3)
    with pytest.raises(UserError, match=r"'utt-00001' in shards/000000.tar does not match its checksum"):
        Cache.open(path).features(1)


def test_a_shard_that_is_short_empty_or_gone_is_reported(path):
    tars = [path / "shards" / f"{shard:06d}.tar" for shard in range(3)]
    cache = Cache.open(path)
    os.truncate(tars[0], cache.row(3)["offset"] + 10)
    os.truncate(tars[1], 0)
    tars[2].unlink()
    cache.features(0)
    with pytest.raises(UserError, match=r"'utt-00003' in shards/000000.tar ends at byte \d+ of a file of \d+"):
        cache.features(3)
    with pytest.raises(UserError, match=r"shards/000001.tar cannot be read"):
        cache.features(4)
    with pytest.raises(UserError, match=r"shards/000002.tar cannot be read"):
        cache.features(8)


@pytest.mark.parametrize("columns", [{"frames": [0, *[5] * 11]}, {"shard": [1, 0, *[2] * 10]}])
def test_a_manifest_out_of_order_is_refused_at_opening(path, columns):
    rewrite_manifest(path, **columns)
    with pytest.raises(UserError, match=r"manifests/000.parquet has rows without frames or out of order"):
        Cache.open(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"frames": [1 << 30, *[1] * 11]},
        {"offset": [-512, *range(11)]},
        {"length": [1 << 60, *[1 << 20] * 11]},
        {"scale_offset": [1 << 50, *[-1] * 11]},
    ],
)
def test_a_manifest_that_declares_the_impossible_is_refused_before_anything_is_read(path, columns):
    rewrite_manifest(path, **columns)
    with pytest.raises(UserError, match=r"manifests/000.parquet: row 0 is out of bounds"):
        Cache.open(path).features(3)


def test_an_offset_beyond_the_shard_is_refused_before_anything_is_read(path):
    rewrite_manifest(path, offset=[1 << 40, *[512] * 11])
    with pytest.raises(UserError, match=r"'utt-00000' in shards/000000.tar ends at byte"):
        Cache.open(path).features(0)


def test_a_corrupt_or_swapped_manifest_is_refused(path):
    manifest = path / "manifests" / "000.parquet"
    whole = manifest.read_bytes()
    flip(manifest, len(whole) // 2)
    with pytest.raises(UserError, match="does not match its sha256"):
        Cache.open(path)
    manifest.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="bytes, not"):
        Cache.open(path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"a table cannot be read"):
        Cache.open(path)
    sign(Layout(path), b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match=r"a table cannot be read"):
        Cache.open(path)
    sign(Layout(path), parquet_bytes(pa.table({"key": ["a"]})))
    with pytest.raises(UserError, match="other columns"):
        Cache.open(path)


def test_a_folder_without_a_complete_cache_says_how_to_get_one(path, tmp_path):
    with pytest.raises(UserError, match="does not exist: run `make extract`"):
        Cache.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a cache"):
        Cache.open(tmp_path / "empty")
    (path / "CACHE.json").rename(tmp_path / "CACHE.json")
    with pytest.raises(UserError, match=r"not complete .* rerun the same extraction"):
        Cache.open(path)


def test_a_cache_file_that_lies_about_its_features_is_refused(path):
    layout = Layout(path)
    info = unseal(layout.cache)
    layout.cache.write_bytes(seal({**info, "spec": {**info["spec"], "layer": 5}}))
    with pytest.raises(UserError, match="feature id"):
        Cache.open(path)
    layout.cache.write_bytes(seal({name: value for name, value in info.items() if name != "generations"}))
    with pytest.raises(UserError, match=r"has missing or invalid fields \("):
        Cache.open(path)
    counts = {**info["counts"], "utterances": 13}
    layout.cache.write_bytes(seal({**info, "counts": counts}))
    with pytest.raises(UserError, match="do not add up"):
        Cache.open(path)
    layout.cache.write_bytes(seal({**info, "schema_version": 3}))
    with pytest.raises(UserError, match="does not match its spec"):
        Cache.open(path)
    layout.cache.write_text(json.dumps(info))
    with pytest.raises(UserError, match="sha256"):
        Cache.open(path)


def test_a_manifest_that_unpacks_without_end_is_refused(path, monkeypatch):
    monkeypatch.setattr(tables, "TEXT_ROOM", 100)
    monkeypatch.setattr(tables, "TEXT_GROWTH", 0)
    with pytest.raises(UserError, match="decompresses to more than a file of"):
        Cache.open(path)
    monkeypatch.setattr(index, "MAX_ROWS_PER_BYTE", 0.001)
    with pytest.raises(UserError, match=r"has 12 rows in \d+ bytes"):
        Cache.open(path)


def bytes_of(cache: Cache) -> list[tuple[str, bytes]]:
    rows = range(len(cache))
    return [(key, cache.features(i).tobytes()) for i, key in zip(rows, cache.strings("key", rows), strict=True)]


def label_rows(*rows: tuple[str, str, str]) -> pa.Table:
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(("key", "text", "task"))})


def test_a_reader_of_generation_0_sees_the_same_frames_order_and_bytes_after_growth(path):
    before = Cache.open(path)
    manifest, features = before.manifest, bytes_of(before)
    grow(path, utt_00003="other audio")
    again = Cache.open(path, before.labels.id, generation=0)
    assert (again.generation, again.manifest_id, again.labels.id) == (0, before.manifest_id, before.labels.id)
    assert again.manifest.equals(manifest)
    assert again.frames.tolist() == before.frames.tolist()
    assert bytes_of(again) == bytes_of(before) == features


def test_the_newest_generation_has_the_new_rows_last_and_no_superseded_one(path):
    cache = grow(path, 2, utt_00003="other audio")
    keys = [f"utt-{i:05d}" for i in range(12) if i != 3]
    assert cache.strings("key", range(len(cache))) == [*keys, "new-00000", "new-00001", "utt-00003"]
    assert cache.generation == 1
    assert cache.bounds.tolist() == [0, 3, 7, 11, 14]
    assert [cache.shard_of(i) for i in (0, 3, 13)] == [0, 1, 3]
    assert np.array_equal(cache.features(13), original(1, 3, 9).astype(np.float16))
    assert cache.row(13)["samples"] == 9 * 320


def test_a_failed_encoding_of_changed_audio_leaves_no_features_for_its_key(path):
    old = Cache.open(path)
    rows = [plan_row("utt-00003", 960, 3, 0, "broken")]
    append(
        path, make_spec(), rows, old.labels.table.to_pylist(), lambda key, n: original(0, 0, n), failed={"utt-00003"}
    )
    cache = Cache.open(path)
    assert "utt-00003" not in cache.strings("key", range(len(cache)))
    assert (len(cache), cache.num_missing, cache.info.counts["superseded"]) == (11, 1, 1)


def test_an_unfinished_second_generation_does_not_disturb_readers(path, tmp_path):
    before = bytes_of(Cache.open(path))
    old = (path / "CACHE.json").read_bytes(), (path / "labels" / "LABELS.json").read_bytes()
    grow(path)
    (path / "CACHE.json").write_bytes(old[0])
    (path / "labels" / "LABELS.json").write_bytes(old[1])
    (path / "shards" / "000003.parquet.tmp-1-x").touch()
    assert bytes_of(Cache.open(path)) == before


@pytest.mark.parametrize("generation", [-1, 1])
def test_a_generation_that_does_not_exist_is_refused(path, generation):
    with pytest.raises(UserError, match=rf"has no generation {generation}: it has 0 to 0"):
        Cache.open(path, generation=generation)


@pytest.mark.parametrize("kind", ["manifests", "failures"])
def test_a_corrupt_table_of_a_later_generation_is_refused_and_earlier_ones_are_read(path, kind):
    grow(path)
    flip(path / kind / "001.parquet", 30)
    with pytest.raises(UserError, match=rf"{kind}/001.parquet does not match its sha256"):
        Cache.open(path)
    assert len(Cache.open(path, generation=0)) == 12


def test_a_manifest_that_names_shards_of_another_generation_is_refused(path):
    rewrite_manifest(path, shard=[0] * 4 + [1] * 4 + [3] * 4)
    with pytest.raises(UserError, match=r"manifests/000.parquet names shards of another generation"):
        Cache.open(path)


def test_items_are_the_label_rows_with_features_in_the_order_of_the_features(path):
    rows = [
        ("utt-00007", "sieben", "translate"),
        ("utt-00002", "two", "transcribe"),
        ("utt-00007", "seven", "transcribe"),
    ]
    add_labels(Layout(path), label_rows(*rows, ("unknown", "x", "transcribe")), "german", "here")
    cache = Cache.open(path, "german")
    items = range(len(cache))
    assert cache.strings("key", items) == ["utt-00002", "utt-00007", "utt-00007"]
    assert cache.strings("text", items) == cache.manifest["text"].to_pylist() == ["two", "seven", "sieben"]
    assert cache.strings("task", items) == ["transcribe", "transcribe", "translate"]
    assert cache.strings("speaker", items) == ["", "", ""]
    assert cache.feature_rows.tolist() == [2, 7, 7]
    assert cache.bounds.tolist() == [0, 1, 3]
    assert cache.features(1).tobytes() == cache.features(2).tobytes()
    assert [stored.text for stored in cache.read_stored(np.array([2, 0]))] == ["sieben", "two"]
    assert (cache.num_missing, cache.num_unlabeled) == (1, 10)
    assert cache.label_rows([1]).to_pylist() == [{"key": "utt-00007", "text": "seven", "task": "transcribe"}]


def test_labels_are_named_by_name_id_prefix_file_or_are_given(path, tmp_path):
    table = label_rows(("utt-00001", "one", ""), ("utt-00004", "four", ""))
    entry = add_labels(Layout(path), table, "mine", "here")
    file = tmp_path / "mine.csv"
    file.write_text("key,text,task\nutt-00004,four,\nutt-00001,one,\n")
    given = canonical_labels(table, "test")
    for labels in ("mine", entry.id, entry.id[:8], str(file), file, LabelSet(given, label_id(given), "given")):
        cache = Cache.open(path, labels)
        assert cache.labels.id == entry.id
        assert cache.strings("text", range(len(cache))) == ["one", "four"]
    assert Cache.open(path).labels.name == "source"
    with pytest.raises(UserError, match=r"has no label set 'yours': choose one of 'source', 'mine'"):
        Cache.open(path, "yours")


def test_a_label_file_with_too_many_problems_is_refused(path, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("key,text\nutt-00004,four\nunknown,one\n")
    with pytest.raises(UserError, match="max_label_problems"):
        Cache.open(path, file)
    assert len(Cache.open(path, file, max_label_problems=1)) == 1


def test_the_newest_set_of_a_name_is_its_current_one_and_older_ones_are_found_by_id(path):
    first = add_labels(Layout(path), label_rows(("utt-00001", "one", "")), "mine", "here")
    add_labels(Layout(path), label_rows(("utt-00001", "uno", "")), "mine", "here")
    assert Cache.open(path, "mine").strings("text", [0]) == ["uno"]
    assert Cache.open(path, first.id).strings("text", [0]) == ["one"]


def test_pickling_keeps_generation_and_labels_though_both_have_changed_since(path, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("key,text\nutt-00004,four\n")
    data = [pickle.dumps(Cache.open(path)), pickle.dumps(Cache.open(path, file))]
    grow(path, utt_00004="other audio")
    file.unlink()
    both = [pickle.loads(each) for each in data]
    assert [(cache.generation, len(cache)) for cache in both] == [(0, 12), (0, 1)]
    assert both[1].strings("text", [0]) == ["four"]


def test_a_corrupt_label_set_is_refused(path):
    (file,) = (path / "labels").glob("source-*.parquet")
    flip(file, 40)
    with pytest.raises(UserError, match=r"is not the file that LABELS.json describes"):
        Cache.open(path)


def test_a_single_column_is_the_one_of_the_whole_table(tmp_path):
    make_cache(tmp_path / "c")
    cache = grow(tmp_path / "c", **{"utt-00003": "other"})
    for name in cache.manifest.column_names:
        assert cache.column(name).to_pylist() == cache.manifest[name].to_pylist()


def test_a_shard_that_is_truncated_under_its_reader_is_an_error_and_no_bus_error(path):
    program = (
        "import os, sys\nimport numpy as np\nfrom shards.errors import UserError\nfrom shards.read.cache import Cache\n"
        "cache = Cache.open(sys.argv[1])\nrows = np.arange(len(cache))\ncache.read_stored(rows[:1])\n"
        "os.truncate(sys.argv[2], 4096)\n"
        "for read in (lambda: [x.payload.sum() for x in cache.read_stored(rows)], lambda: cache.features(1).sum()):\n"
        "    try:\n        read()\n    except UserError as error:\n        print(error)\n"
    )
    words = [sys.executable, "-c", program, path, Layout(path).tar(0)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert done.stdout.count("shards/000000.tar was truncated while it was read") == 2


@pytest.mark.slow
def test_a_cache_of_many_shards_is_read_and_verified_in_bounded_memory_and_descriptors(tmp_path):
    path = make_cache(tmp_path / "many", n=4000, shards=2000)

    def used() -> tuple[int, int]:
        resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(resident.split()[1]) >> 10, len(os.listdir("/proc/self/fd"))

    memory, descriptors = used()
    cache = Cache.open(path)
    assert sum(len(batch.keys) for batch in FeatureStream([cache], SamplerConfig(batch_size=16), 0, epochs=1)) == 4000
    for row in np.random.default_rng(0).permutation(len(cache)):
        cache.features(int(row))
    assert describe_cache(path)["counts"]["shards"] == 2000
    assert verify(path, deep=True) == []
    now = used()
    assert now[0] - memory < 200
    assert now[1] - descriptors < 200
