"""Caches whose utterances have variants: what readers, label sets, verify and compact make of them."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
from tiny_cache import append, make_cache, make_spec, plan_row
from tiny_server import serve
from tiny_variants import make_varied, varied_features

import shards
from shards.__main__ import main
from shards.commit.compact import compact
from shards.commit.finalize import file_info
from shards.errors import UserError
from shards.format.layout import Layout
from shards.format.records import seal, unseal
from shards.format.schemas import MANIFEST_SCHEMA, parquet_bytes, read_parquet
from shards.format.variants import base_keys, split_key, variant_key, variant_numbers
from shards.inspect.info import describe_cache, format_info
from shards.inspect.verify import verify
from shards.read.cache import Cache
from shards.share.find import find_caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache.open(make_varied(tmp_path_factory.mktemp("varied") / "cache", 12, 3, val_every=4))


def column(cache, name) -> list:
    return cache.column(name).to_pylist()


@pytest.mark.parametrize(("base", "number", "key"), [("a-b", 0, "a-b"), ("a-b", 1, "a-b~1"), ("a", 99, "a~99")])
def test_the_key_tells_utterance_and_variant(base, number, key):
    assert variant_key(base, number) == key
    assert split_key(key) == (base, number)


def test_a_reader_sees_the_utterances(cache):
    assert column(cache, "key") == [f"utt-{i:05d}" for i in range(12)]
    assert (cache.num_unlabeled, cache.num_missing) == (0, 0)
    assert np.array_equal(cache.features(3), varied_features()("utt-00003", 14).astype(np.float16))
    assert cache.max_frames().tolist() == [frames + 6 for frames in cache.frames.tolist()]


def test_variants_are_items_on_request_with_labels_and_split_of_their_utterance(cache):
    every = Cache.open(cache.path, variants=True)
    assert len(every) == 36
    rows = every.manifest.to_pylist()
    assert [row["key"] for row in rows[:4]] == ["utt-00000", "utt-00000~1", "utt-00000~2", "utt-00001"]
    base = {row["key"]: row for row in cache.manifest.to_pylist()}
    for index, row in enumerate(rows):
        mine = base[split_key(row["key"])[0]]
        assert [row[name] for name in ("text", "speaker", "split")] == [mine[n] for n in ("text", "speaker", "split")]
        wanted = varied_features()(row["key"], row["frames"]).astype(np.float16)
        assert np.array_equal(every.features(index), wanted)
    again = pickle.loads(pickle.dumps(every))
    assert column(again, "key") == column(every, "key")


def test_two_label_rows_of_an_utterance_hold_for_each_of_its_variants(cache, tmp_path):
    file = tmp_path / "tasks.jsonl"
    rows = [{"key": "utt-00002", "text": task, "task": task} for task in ("transcribe", "translate")]
    file.write_text("\n".join(map(json.dumps, rows)))
    every = Cache.open(cache.path, file, variants=True)
    found = sorted(zip(column(every, "key"), column(every, "task"), strict=True))
    assert found == [(variant_key("utt-00002", n), t) for n in range(3) for t in ("transcribe", "translate")]


def test_map_style_and_webdataset_read_utterances_or_all(cache):
    for variants, count in ((False, 12), (True, 36)):
        data = shards.open(cache.path, variants=variants)
        samples = list(shards.as_webdataset(cache.path, variants=variants))
        assert len(data) == len(samples) == count
        items = {item["key"]: item for item in map(data.__getitem__, range(count))}
        for sample in samples:
            item = items.pop(sample["__key__"])
            assert sample["key"] == sample["__key__"]
            assert sample["text"] == item["text"]
            assert np.array_equal(sample["features"], item["features"])
    with pytest.raises(UserError, match=r"pass variants to Cache\.open"):
        shards.open(cache, variants=True)


def test_variants_are_read_over_http(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EARSHARD_HOME", str(tmp_path))
    with serve(cache.path.parent) as server:
        remote = Cache.open(f"{server.url}/cache")
        rules = shards.SamplerConfig(batch_size=4, window_shards=1)
        here, there = (shards.FeatureStream([each], rules, 3, epochs=2) for each in (cache, remote))
        for one, two in zip(here, there, strict=True):
            assert (one.keys, one.variants) == (two.keys, two.variants)
            assert np.array_equal(one.features, two.features)


def test_info_find_and_ls_tell_utterances_from_variants(cache, capsys):
    about = describe_cache(cache.path)
    assert (about["counts"]["utterances"], about["counts"]["variants"]) == (36, 24)
    assert "  variants      24 of these are variants (KEY~1, …) of the other 12" in list(format_info(about))
    assert next(find_caches(cache.path.parent)).utterances == 12
    main(["ls", str(cache.path)])
    assert "~" not in capsys.readouterr().out
    main(["ls", str(cache.path), "--variants"])
    assert capsys.readouterr().out.count("~") == 24
    main(["labels", str(cache.path)])
    assert "12 of 12" in capsys.readouterr().out


def test_a_cache_without_variants_counts_none(tmp_path):
    layout = Layout(make_cache(tmp_path / "cache"))
    assert "variants" not in json.dumps(unseal(layout.cache))
    assert Cache.open(layout.path).variants is None


def test_verify_accepts_variants_and_counts_them(cache, tmp_path):
    assert verify(cache.path, deep=True) == []
    path = shutil.copytree(cache.path, tmp_path / "cache")
    info = unseal(path / "CACHE.json")
    for counts in (info["counts"], info["generations"][0]["counts"]):
        counts["variants"] = 7
    (path / "CACHE.json").write_bytes(seal(info))
    assert [problem.what for problem in verify(path)] == [
        "counts 7 variants in generation 0, the shards have 24",
        "counts 7 variants, the generations have 24",
    ]
    with pytest.raises(UserError, match="7 variants in generation 0, found 24"):
        describe_cache(path)


def test_verify_finds_a_variant_of_an_utterance_that_was_never_planned(tmp_path):
    rows = [plan_row("utt-00000", 1600, 0, 0), plan_row("utt-00001~1", 1600, 0, 1)]
    append(tmp_path, make_spec(), rows, [{"key": "utt-00000", "text": "one"}], varied_features())
    (problem,) = verify(tmp_path)
    assert problem.key == "utt-00001~1"
    assert problem.what == "is a variant of an utterance that the cache does not have"
    assert len(Cache.open(tmp_path, variants=True)) == 1


@pytest.mark.parametrize("key", ["utt-00000~0", "utt-00000~01", "utt-00000~100", "utt-00000~", "~1"])
def test_a_key_with_another_number_is_no_key_of_a_shard(tmp_path, key):
    with pytest.raises(ValueError, match="is not valid in a shard"):
        append(tmp_path, make_spec(), [plan_row(key, 1600, 0, 0)], [{"key": "a", "text": ""}], lambda k, n: zeros(n))


def test_a_strangers_cache_with_such_a_key_is_refused(tmp_path):
    layout = Layout(make_varied(tmp_path / "cache", 4, 2))
    manifest = layout.manifest(0)
    table = read_parquet(manifest, MANIFEST_SCHEMA)
    keys = [key.replace("utt-00001~1", f"utt-00001~{'9' * 5000}") for key in table["key"].to_pylist()]
    manifest.write_bytes(parquet_bytes(table.set_column(0, "key", pa.array(keys))))
    info = unseal(layout.cache)
    info["generations"][0]["files"]["manifest"] = file_info(manifest).model_dump()
    layout.cache.write_bytes(seal(info))
    with pytest.raises(UserError, match="is corrupt: a manifest has the key 'utt-00001~9999"):
        Cache.open(layout.path)


def zeros(frames: int) -> np.ndarray:
    return np.zeros((frames, 8), np.float32)


def test_an_utterance_that_is_planned_again_supersedes_its_variants(tmp_path):
    path = make_varied(tmp_path / "cache", 4, 3, shards=1)
    labels = Cache.open(path).labels.table.to_pylist()
    append(path, make_spec(), [plan_row("utt-00001", 3200, 1, 0, "other")], labels, varied_features())
    grown = Cache.open(path, variants=True)
    assert [key for key in column(grown, "key") if key.startswith("utt-00001")] == ["utt-00001"]
    assert (grown.info.counts["variants"], grown.info.counts["superseded"]) == (6, 3)
    assert verify(path, deep=True) == []
    append(path, make_spec(), [plan_row("utt-00001~1", 3200, 2, 0, "x")], labels, varied_features())
    assert "utt-00001~1" in column(Cache.open(path, variants=True), "key")
    assert len(Cache.open(path)) == 4


def test_compact_keeps_the_variants_of_labelled_utterances(tmp_path):
    path = make_varied(tmp_path / "cache", 4, 3, shards=1)
    labels = [row for row in Cache.open(path).labels.table.to_pylist() if row["key"] != "utt-00003"]
    append(path, make_spec(), [plan_row("utt-00001~2", 3200, 1, 0, "other")], labels, varied_features())
    compact(path, tmp_path / "compacted")
    old, new = (Cache.open(each, variants=True) for each in (path, tmp_path / "compacted"))
    assert sorted(column(new, "key")) == sorted(column(old, "key"))
    assert new.info.counts["variants"] == 6
    for index in range(len(new)):
        text = json.loads(tar_member(new, index))["text"]
        assert text == new.row(index)["text"]
    assert verify(tmp_path / "compacted", deep=True) == []


def tar_member(cache: Cache, index: int) -> bytes:
    import tarfile

    row = cache.row(index)
    with tarfile.open(Layout(cache.path).tar(row["shard"])) as tar:
        return tar.extractfile(f"{row['key']}.json").read()


def test_base_keys_of_columns():
    keys = pa.chunked_array([["a", "b~1"], ["c-x7E-2~10"]])
    assert base_keys(keys).to_pylist() == ["a", "b", "c-x7E-2"]
    assert variant_numbers(keys.slice(1)).tolist() == [1, 10]
    wrong = ["a~", "a~0", "a~01", "a~100", "a~1~2", "~x", f"a~{'9' * 5000}"]
    assert variant_numbers(pa.array(wrong)).tolist() == [0] * 7
    assert [split_key(key) for key in wrong] == [(key, 0) for key in wrong]
