from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_cache import append, flip, grow, make_cache, make_spec, original, plan_row
from tiny_faults import reseal

from shards.commit import compact as module
from shards.commit.claims import Claims
from shards.commit.compact import compact
from shards.commit.finalize import finalize, write_plan
from shards.commit.folder import add_labels
from shards.commit.writer import ShardWriter
from shards.errors import UserError
from shards.format.layout import Layout
from shards.format.schemas import FAILURE_SCHEMA, PLAN_SCHEMA, read_parquet
from shards.inspect.verify import verify
from shards.read.cache import Cache


@pytest.fixture(params=["f16", "int8"])
def grown(request, tmp_path):
    """Three generations: utt-00003 and utt-00007 have other audio, utt-00001 failed, failed-00000 always did."""
    path = make_cache(tmp_path / "grown", n=12, shards=4, codec=request.param, min_frames=30)
    grow(path, 3, utt_00003="other", utt_00007="other")
    old = Cache.open(path)
    rows = [plan_row("utt-00001", 960, 5, 0, "broken"), plan_row("failed-00000", 960, 5, 1)]
    labels = [*old.labels.table.to_pylist(), {"key": "failed-00000", "text": "never"}]
    for row in labels:
        row.setdefault("speaker", "")
        row.setdefault("split", "train")
    append(path, old.spec, rows, labels, lambda key, n: original(0, 0, n), failed={"utt-00001", "failed-00000"})
    return path


def relabel(path: Path, leave_out: set[str], name: str = "source") -> None:
    """Replace a label set by one without some keys."""
    table = Cache.open(path).labels.table
    keep = pa.array([key not in leave_out for key in table["key"].to_pylist()])
    add_labels(Layout(path), table.filter(keep), name, "test", reserved=True)


def contents(cache: Cache) -> dict[str, tuple]:
    items = zip(cache.manifest.to_pylist(), range(len(cache)), strict=True)
    names = ("id", "audio", "samples", "audio_id", "crc32", "error", "text", "speaker", "split")
    return {row["key"]: (cache.features(i).tobytes(), *(row[name] for name in names)) for row, i in items}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_what_a_copy_has_freed_and_left_out_is_counted_and_not_taken_from_the_cache(grown, tmp_path):
    true = compact(grown, tmp_path / "true")
    reseal(Layout(grown).cache, lambda tree: tree["counts"].update(utterances=10**15, bytes=10**15, superseded=10**9))
    assert compact(grown, tmp_path / "new") == true


def test_a_compacted_cache_has_the_same_items_in_one_generation_and_is_valid(grown, tmp_path):
    relabel(grown, {"utt-00000", "utt-00005"})
    before = files(grown)
    done = compact(grown, tmp_path / "new")
    old, new = Cache.open(grown), Cache.open(tmp_path / "new")
    assert contents(new) == contents(old)
    assert new.strings("key", range(len(new))) == old.strings("key", range(len(old)))
    assert verify(new.path, deep=True) == []
    assert (len(new.info.generations), new.info.counts["superseded"], new.num_unlabeled) == (1, 0, 0)
    assert new.feature_id == old.feature_id
    assert new.provenance == {**old.provenance, "compacted_from": old.manifest_id}
    assert (done.utterances, done.superseded, done.unlabeled) == (12, 3, 2)
    assert done.freed == old.info.counts["bytes"] - new.info.counts["bytes"] > 0
    assert files(grown) == before


def test_failures_are_kept_with_their_reasons_so_that_an_extraction_does_not_try_them_again(grown, tmp_path):
    compact(grown, tmp_path / "new")
    failures = read_parquet(Layout(tmp_path / "new").failures(0), FAILURE_SCHEMA).to_pylist()
    assert [(row["key"], row["error"]) for row in failures] == [("utt-00001", "NaN"), ("failed-00000", "NaN")]


def test_an_utterance_stays_while_any_current_label_set_names_it_and_each_set_keeps_its_id(grown, tmp_path):
    relabel(grown, {"utt-00000", "utt-00005"})
    add_labels(Layout(grown), pa.table({"key": ["utt-00004", "utt-00005"], "text": ["x", "y"]}), "mine", "old")
    add_labels(Layout(grown), pa.table({"key": ["utt-00005"], "text": ["mine"]}), "mine", "here")
    compact(grown, tmp_path / "new")
    old, new = Cache.open(grown, "mine"), Cache.open(tmp_path / "new", "mine")
    assert (new.labels.id, new.strings("key", [0])) == (old.labels.id, ["utt-00005"])
    sets = [module.read_index(cache.path).sets for cache in (old, new)]
    assert sets[1] == tuple(entry for entry in sets[0] if entry.id in (old.labels.id, Cache.open(grown).labels.id))
    assert verify(new.path) == []


def test_shards_are_divided_by_the_size_of_the_largest_before(tmp_path):
    path = make_cache(tmp_path / "old", n=4, shards=1, min_frames=400, max_frames=400)
    for seed in range(4):
        grow(path, 8, shards=4, seed=seed, prefix=f"g{seed}")
    compact(path, tmp_path / "new")
    old, new = (sorted(tar.stat().st_size for tar in (p / "shards").glob("*.tar")) for p in (path, tmp_path / "new"))
    assert len(new) < len(old)
    assert new[-1] <= 1.5 * old[-1]


def test_texts_of_the_new_shards_are_those_of_the_current_labels(grown, tmp_path):
    table = Cache.open(grown).labels.table
    texts = pa.array([f"corrected {key}" for key in table["key"].to_pylist()])
    add_labels(Layout(grown), table.set_column(1, "text", texts), "source", "test", reserved=True)
    compact(grown, tmp_path / "new")
    for tar in sorted((tmp_path / "new" / "shards").glob("*.tar")):
        with tarfile.open(tar) as archive:
            for info in archive:
                if info.name.endswith(".json"):
                    about = json.load(archive.extractfile(info))
                    assert about["text"] == f"corrected {about['key']}"


def test_what_was_interrupted_is_continued_and_what_is_complete_stays_as_it_is(tmp_path, monkeypatch):
    path, new = make_cache(tmp_path / "old", n=12, shards=4), tmp_path / "new"
    grow(path, utt_00003="other")

    class Kill(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done > total // 2:
            raise Kill

    with pytest.raises(Kill):
        compact(path, new, kill)
    first = (new / "shards" / "000000.json").stat().st_mtime_ns
    assert not (new / "CACHE.json").exists()
    compact(path, new)
    assert (new / "shards" / "000000.json").stat().st_mtime_ns == first
    assert contents(Cache.open(new)) == contents(Cache.open(path))
    assert verify(new, deep=True) == []
    add_labels(Layout(new), pa.table({"key": ["utt-00000"], "text": ["mine"]}), "mine", "test")
    whole = files(new)
    compact(path, new)
    assert files(new) == whole


@pytest.mark.parametrize("step", ["write_plan", "commit_record", "_copy_labels", "finalize"])
def test_a_kill_before_any_step_is_continued(tmp_path, monkeypatch, step):
    path, new = make_cache(tmp_path / "old", n=6, shards=2), tmp_path / "new"

    class Kill(BaseException):
        pass

    def kill(*args, **more):
        raise Kill

    with monkeypatch.context() as broken:
        broken.setattr(module, step, kill)
        with pytest.raises(Kill):
            compact(path, new)
    (new / "plans").mkdir(exist_ok=True)
    (new / "plans" / "000.parquet.tmp-1-dead").touch()
    compact(path, new)
    assert contents(Cache.open(new)) == contents(Cache.open(path))
    assert not [file for file in files(new) if ".tmp-" in file or file.endswith(".claim")]


def test_a_folder_with_anything_else_is_refused(tmp_path):
    path, new = make_cache(tmp_path / "old", n=6, shards=2), tmp_path / "new"
    other = make_cache(tmp_path / "other", n=7, shards=2)
    new.mkdir()
    (new / "notes.txt").touch()
    whole = files(tmp_path)
    for folder in (new, other):
        with pytest.raises(UserError, match="is not empty, and it is not an interrupted copy of this cache"):
            compact(path, folder)
    for folder in (path, path / "new"):
        with pytest.raises(UserError, match="lies in the cache that is copied"):
            compact(path, folder)
    assert files(tmp_path) == whole


def test_a_cache_that_grew_since_the_interruption_is_not_mixed_with_the_copy(tmp_path):
    path, new = make_cache(tmp_path / "old", n=6, shards=2), tmp_path / "new"
    compact(path, new)
    grow(path)
    with pytest.raises(UserError, match="not an interrupted copy of this cache as it is now"):
        compact(path, new)


def test_corrupt_features_are_never_copied(tmp_path):
    path = make_cache(tmp_path / "old", n=6, shards=2)
    flip(path / "shards" / "000001.tar", Cache.open(path).row(4)["offset"] + 140)
    with pytest.raises(UserError, match=r"utterance 'utt-00004' in shards/000001.tar: .* checksum; run `python -m sh"):
        compact(path, tmp_path / "new")
    os.truncate(path / "shards" / "000001.tar", 2000)
    with pytest.raises(UserError, match=r"shards/000001.tar: the tar is shorter than its rows say"):
        compact(path, tmp_path / "new")


@pytest.mark.parametrize("name", ["plans/000.parquet", "manifests/000.parquet", "failures/000.parquet"])
def test_a_corrupt_table_is_reported(tmp_path, name):
    path = make_cache(tmp_path / "old", n=6, shards=2)
    flip(path / name, 30)
    with pytest.raises(UserError, match=f"is corrupt: {name} does not match its sha256; run"):
        compact(path, tmp_path / "new")


def test_what_is_no_complete_cache_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"is not a complete cache: it has no CACHE\.json"):
        compact(tmp_path / "none", tmp_path / "new")


def test_two_copies_into_one_folder_do_not_run_at_once(tmp_path):
    path, new = make_cache(tmp_path / "old", n=6, shards=2), tmp_path / "new"
    new.mkdir()
    with Claims("1-live") as live:
        assert live.acquire(Layout(new).finalize_claim)
        with pytest.raises(UserError, match="is being written by another process"):
            compact(path, new)


def test_a_plan_gets_the_audio_ids_and_lengths_that_its_extraction_found_out(tmp_path):
    layout, spec = Layout(tmp_path / "old"), make_spec()
    table = pa.Table.from_pylist([{**plan_row("utt-00000", 0, 0, 0), "audio_id": bytes(32)}], schema=PLAN_SCHEMA)
    plan = write_plan(layout, 0, [table], "me")
    with ShardWriter(layout, 0, spec, plan.id, "me") as writer:
        (row,) = plan.shard_rows(0)
        writer.add(row, original(0, 0, 5), samples=1600, audio_id=b"x" * 32)
        writer.commit({"seconds": 0.0})
    finalize(layout, spec, 0, plan, "me", {})
    compact(layout.path, tmp_path / "new")
    (planned,) = module.read_plan(Layout(tmp_path / "new").plan(0)).shard_rows(0)
    assert (planned["samples"], planned["audio_id"]) == (1600, b"x" * 32)
