from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_cache import flip, make_cache, original

from shards.errors import UserError
from shards.format import schemas as tables
from shards.format.codec import relative_rms
from shards.format.layout import Layout, parquet_bytes
from shards.format.records import seal, unseal
from shards.read import cache as reader
from shards.read import index
from shards.read.cache import Cache


def rewrite_manifest(path: Path, **columns) -> None:
    """Put other columns into the manifest and sign it as the writer would."""
    layout = Layout(path)
    table = pq.read_table(layout.manifest)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    sign(layout, parquet_bytes(table))


def sign(layout: Layout, data: bytes) -> None:
    layout.manifest.write_bytes(data)
    info = unseal(layout.cache)
    info["files"]["manifest.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
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
    assert cache.info["counts"]["utterances"] == 12
    for call in (cache.row, cache.features):
        with pytest.raises(IndexError):
            call(12)


def test_strings_are_found_in_a_manifest_of_many_row_groups(path, monkeypatch):
    monkeypatch.setattr(index, "MAX_ROW_GROUP_BYTES", 800)
    table = pq.read_table(path / "manifest.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=5, store_schema=False)
    sign(Layout(path), sink.getvalue().to_pybytes())
    cache = Cache.open(path)
    order = [11, 0, 6, 4, 5, 10, 0]
    assert cache.strings("key", order) == [f"utt-{i:05d}" for i in order]
    assert 1 <= len(cache._index._groups) < 3


def test_a_cache_survives_pickling_by_opening_itself_again(path):
    cache = Cache.open(path, verify=False)
    cache.features(3)
    again = pickle.loads(pickle.dumps(cache))
    assert again.manifest_id == cache.manifest_id
    assert np.array_equal(again.features(3), cache.features(3))
    assert again._verify is False


def test_mappings_and_descriptors_are_bounded_while_views_stay_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_MAPPED_SHARDS", 4)
    cache = Cache.open(make_cache(tmp_path / "cache", n=30, shards=30))
    kept = cache.features(0)
    before = kept.copy()
    for i in range(30):
        cache.features(i)
    assert len(cache._mmap_pool) == 4
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
    with pytest.raises(UserError, match=r"manifest.parquet has rows without frames or out of order"):
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
    with pytest.raises(UserError, match=r"manifest.parquet: row 0 is out of bounds"):
        Cache.open(path).features(3)


def test_an_offset_beyond_the_shard_is_refused_before_anything_is_read(path):
    rewrite_manifest(path, offset=[1 << 40, *[512] * 11])
    with pytest.raises(UserError, match=r"'utt-00000' in shards/000000.tar ends at byte"):
        Cache.open(path).features(0)


def test_a_corrupt_or_swapped_manifest_is_refused(path):
    manifest = path / "manifest.parquet"
    whole = manifest.read_bytes()
    flip(manifest, len(whole) // 2)
    with pytest.raises(UserError, match="does not match its sha256"):
        Cache.open(path)
    manifest.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="bytes, not"):
        Cache.open(path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest.parquet cannot be read"):
        Cache.open(path)
    sign(Layout(path), b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match=r"manifest.parquet cannot be read"):
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
    layout.cache.write_bytes(seal({name: value for name, value in info.items() if name != "manifest_id"}))
    with pytest.raises(UserError, match=r"has missing or invalid fields \('manifest_id'\)"):
        Cache.open(path)
    layout.cache.write_text(json.dumps(info))
    with pytest.raises(UserError, match="sha256"):
        Cache.open(path)


def test_a_manifest_that_unpacks_without_end_is_refused(path, monkeypatch):
    monkeypatch.setattr(tables, "TEXT_ROOM", 100)
    monkeypatch.setattr(tables, "TEXT_GROWTH", 0)
    with pytest.raises(UserError, match="decompresses to more than a file of"):
        Cache.open(path).strings("text", [0])
    monkeypatch.setattr(index, "MAX_ROWS_PER_BYTE", 0.001)
    with pytest.raises(UserError, match=r"has 12 rows in \d+ bytes"):
        Cache.open(path)
