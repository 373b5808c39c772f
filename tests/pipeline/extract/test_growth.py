"""A corpus that changes: what is encoded again, what is copied, and what only gets new labels."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from extraction import Kill, run, snapshot, start, words, write_corpus

from shards.commit.finalize import stray_files
from shards.commit.folder import FolderStore
from shards.format.layout import Layout
from shards.inspect.verify import verify
from shards.read.cache import Cache

CLIPS = 8


@pytest.fixture(scope="module")
def grown(tmp_path_factory, whisper) -> tuple[Path, int]:
    """A root whose cache was extracted from 6 of 8 clips, then from all; and the file operations of the second run."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, CLIPS)
    root = tmp_path_factory.mktemp("grown")
    assert run(words(root, folder, whisper, "limit=6")) == 0
    assert run(words(root, folder, whisper), count=root / "operations") == 0
    operations = int((root / "operations").read_text())
    (root / "operations").unlink()
    return root, operations


@pytest.fixture
def world(tmp_path, whisper) -> Any:
    """An own corpus of 8 clips, extracted; ``extract(*more)`` runs again and returns what ``--json`` wrote."""

    class World:
        corpus, root = tmp_path / "corpus", tmp_path / "root"

        def extract(self, *more: str, code: int = 0) -> dict[str, Any]:
            out, log = tmp_path / "result.json", tmp_path / "log"
            out.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            assert run([*words(self.root, self.corpus, whisper), "--json", str(out), *more], log=log) == code
            self.log = log.read_text()
            self.results = [json.loads(line) for line in out.read_text().splitlines()] if code == 0 else []
            return self.results[0] if self.results else {}

        def cache(self, **options: Any) -> Cache:
            (path,) = self.root.glob("clips/*")
            return Cache.open(path, **options)

        def edit(self, old: str, new: str) -> None:
            manifest = self.corpus / "clips.csv"
            manifest.write_text(manifest.read_text().replace(old, new))

    world = World()
    world.corpus.mkdir()
    write_corpus(world.corpus, CLIPS)
    assert world.extract() | {"seconds": 0, "labels": "", "cache": ""} == {
        "cache": "", "generation": 0, "labels": "", "planned": CLIPS, "encoded": CLIPS, "reused": 0,
        "relabelled": True, "failed": 0, "seconds": 0,
    }  # fmt: skip
    return world


def numbers(result: dict[str, Any]) -> tuple[int, int, int, bool]:
    return result["generation"], result["encoded"], result["reused"], result["relabelled"]


def shard_files(cache: Cache) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (cache.path / "shards").iterdir()}


def test_without_a_change_nothing_is_written(world):
    assert numbers(world.extract()) == (0, 0, 0, False)
    assert "nothing to do, complete:" in world.log


def test_an_edited_text_writes_labels_and_encodes_nothing(world):
    before = shard_files(world.cache())
    world.edit("text number 3", "corrected")
    assert numbers(world.extract()) == (0, 0, 0, True)
    cache = world.cache()
    assert "corrected" in cache.manifest["text"].to_pylist()
    assert shard_files(cache) == before
    assert verify(cache.path, deep=True) == []


def test_another_val_fraction_writes_labels_only(world):
    assert numbers(world.extract("source.val_fraction=0.3")) == (0, 0, 0, True)
    assert set(world.cache().manifest["split"].to_pylist()) == {"train", "val"}


def test_a_raised_limit_encodes_the_new_ones_and_old_shards_keep_every_byte(tmp_path, whisper, world):
    world.root = tmp_path / "limited"
    assert numbers(world.extract("limit=5")) == (0, 5, 0, True)
    before = shard_files(world.cache())
    assert numbers(world.extract()) == (1, 3, 0, True)
    after = shard_files(world.cache())
    assert {name: after[name] for name in before} == before
    assert len(world.cache()) == CLIPS
    assert len(world.cache(generation=0)) == 5


def test_removed_clips_leave_the_labels_and_their_features_stay(world):
    manifest = world.corpus / "clips.csv"
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:5]) + "\n")
    assert numbers(world.extract()) == (0, 0, 0, True)
    assert (len(world.cache()), world.cache().num_unlabeled) == (4, 4)


def test_changed_audio_under_an_unchanged_key_and_length_is_encoded_again_and_told(world):
    clip = world.corpus / "clip 02.flac"
    samples, rate = soundfile.read(clip, dtype="float32")
    before = {row["key"]: row["audio_id"] for row in world.cache().manifest.to_pylist()}
    soundfile.write(clip, samples[::-1] / 2, rate)
    assert numbers(world.extract()) == (1, 1, 0, False)
    assert "note: 1 utterance has other audio than before under the same key" in world.log
    cache = world.cache()
    after = {row["key"]: row["audio_id"] for row in cache.manifest.to_pylist()}
    assert {key for key in after if after[key] != before[key]} == {"clip-x20-02"}
    assert (len(cache), cache.info.counts["superseded"]) == (CLIPS, 1)
    assert verify(cache.path, deep=True) == []


def test_another_source_over_the_same_audio_is_copied_byte_for_byte(world):
    assert numbers(world.extract("source.name=other")) == (0, 0, CLIPS, True)
    assert f"{CLIPS} of {CLIPS} utterances reused from {world.root}/clips/" in world.log
    first = world.cache()
    (path,) = world.root.glob("other/*")
    second = Cache.open(path)
    rows = {row["key"]: row for row in first.manifest.to_pylist()}
    names = ("audio_id", "frames", "samples", "crc32", "error", "length")
    for row in second.manifest.to_pylist():
        assert [row[name] for name in names] == [rows[row["key"]][name] for name in names]
    assert verify(path, deep=True) == []


@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_features_of_a_cache_elsewhere_are_copied_if_they_are_intact(tmp_path, world, codec):
    assert numbers(world.extract(f"codec={codec}", "source.name=donor"))[1] == (0 if codec == "f16" else CLIPS)
    (donor,) = world.root.glob(f"donor/*-{codec}-*")
    layout = Layout(donor)
    data = bytearray(layout.tar(0).read_bytes())
    data[700] ^= 1
    layout.tar(0).write_bytes(data)
    world.root = tmp_path / "elsewhere"
    _, encoded, reused, _ = numbers(world.extract(f"codec={codec}", f"reuse=[{donor}]"))
    assert (encoded, reused) == (1, CLIPS - 1)
    (path,) = world.root.glob("clips/*")
    assert verify(path, deep=True) == []


@pytest.mark.parametrize("damage", ["manifest", "shard"])
def test_a_damaged_cache_below_the_root_stops_no_other_extraction(world, damage):
    layout = Layout(world.cache().path)
    (layout.manifest(0) if damage == "manifest" else layout.tar(0)).write_bytes(b"")
    _, encoded, reused, _ = numbers(world.extract("source.name=other"))
    assert encoded + reused == CLIPS
    assert encoded > 0
    assert ("note: nothing is copied from" in world.log) == (damage == "manifest")
    (path,) = world.root.glob("other/*")
    assert verify(path, deep=True) == []


def test_a_cache_of_other_features_in_reuse_is_refused_with_the_difference(world):
    path = world.cache().path
    world.extract("codec=int8", f"reuse=[{path}]", code=2)
    assert "which holds other features (codec: int8, not f16): remove it from reuse" in world.log


def test_a_layer_that_joins_later_gets_its_own_generations(world):
    world.extract("limit=5", "source.name=layers", "encoder.layers=[2]")
    world.extract("source.name=layers", "encoder.layers=[1,2]")
    assert [numbers(result)[:2] for result in world.results] == [(0, CLIPS), (1, 0)]
    assert all(verify(path, deep=True) == [] for path in world.root.glob("layers/*"))


def test_audio_whose_bytes_change_while_size_and_time_stay_is_found_by_rehash(world):
    clip = world.corpus / "clip 01.flac"
    os.utime(clip, (1, 1))
    assert numbers(world.extract())[1] == 0
    data, kept = bytearray(clip.read_bytes()), clip.stat()
    data[-5] ^= 1
    clip.write_bytes(data)
    os.utime(clip, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert numbers(world.extract())[1] == 0  # the stat cache is deceived
    result = world.extract("--rehash", "max_failures=2")
    assert (result["generation"], result["encoded"] + result["failed"]) == (1, 1)


def test_another_kind_of_source_or_another_folder_of_the_same_name_is_refused(tmp_path, world):
    world.extract("source.kind=tones", "source.path=null", "source.name=clips", "limit=3", code=2)
    assert "was made from a source of kind manifest: set source.name" in world.log
    other = tmp_path / "other"
    other.mkdir()
    write_corpus(other, 2)
    for clip in other.glob("*.flac"):
        clip.rename(other / f"another {clip.name}")
    (other / "clips.csv").write_text((other / "clips.csv").read_text().replace("clip 0", "another clip 0"))
    world.corpus = other
    world.extract(code=2)
    assert "was made from another source" in world.log


def test_an_unfinished_generation_of_another_corpus_is_not_filled_with_failures(tmp_path, world, whisper):
    layout = Layout(world.cache().path)
    write_corpus(world.corpus, CLIPS + 3)
    process = start(words(world.root, world.corpus, whisper))
    while not layout.plan(1).exists():
        assert process.is_alive()
    process.kill()
    process.join()
    if (world.cache().generation) == 0:  # it may have been fast
        write_corpus(world.corpus, CLIPS)
        for number in range(CLIPS, CLIPS + 3):
            (world.corpus / f"clip {number:02d}.flac").unlink()
        world.extract(code=2)
        assert "has an unfinished generation of 3 utterances, and this source does not have 3 of them" in world.log
        write_corpus(world.corpus, CLIPS + 3)
    assert world.extract()["generation"] == 1
    assert len(world.cache()) == CLIPS + 3


def test_two_extractions_that_grow_one_cache_at_once_encode_each_utterance_once(tmp_path, world, whisper):
    write_corpus(world.corpus, CLIPS + 6)
    logs = [tmp_path / f"log{i}" for i in range(2)]
    more = [["limit=11"], []]  # the plan that wins may have recordings that the other does not list
    argv = words(world.root, world.corpus, whisper)
    running = [start([*argv, *own], log=log) for own, log in zip(more, logs, strict=True)]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0], [log.read_text() for log in logs]
    world.extract()
    cache = world.cache()
    assert len(cache) == CLIPS + 6
    assert cache.info.counts["superseded"] == 0
    assert verify(cache.path, deep=True) == []


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_over_a_growing_cache_leave_the_same_bytes(tmp_path, grown, whisper, kills):
    wanted, operations = grown
    rng, struck, sequence = random.Random(kills), 0, 0
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus", CLIPS)
    while struck < kills:
        root = tmp_path / f"killed {sequence}"
        for more in (["limit=6"], []):
            argv = words(root, tmp_path / "corpus", whisper, *more)
            for _ in range(3):
                kill = Kill(rng.randrange(1, max(2, operations)), rng.choice(["before", "inside", "after"]))
                code = run(argv, kill)
                assert code in (0, -signal.SIGKILL)
                struck += code != 0
            assert run(argv) == 0
        left, right = snapshot(root), snapshot(wanted)
        for tree in (left, right):
            for name in tree:
                if name.endswith("CACHE.json"):
                    for generation in tree[name]["generations"]:
                        del generation["provenance"]["source"]["root"]
        assert left == right
        (path,) = root.glob("clips/*")
        assert list(stray_files(Layout(path))) == []
        assert not list(root.rglob("*.claim*"))
        shutil.rmtree(root)
        sequence += 1
    print(f"{struck} kills, 0 differences")


@pytest.mark.parametrize("how", ["verify", "repair"])
def test_a_corrupt_shard_of_a_later_generation_is_extracted_again_and_everything_else_stays(
    tmp_path, grown, whisper, how
):
    root = tmp_path / "root"
    shutil.copytree(grown[0], root)
    (path,) = root.glob("clips/*")
    layout = Layout(path)
    last = layout.tar(Cache.open(path).info.counts["shards"] - 1)
    data = bytearray(last.read_bytes())
    data[700] ^= 1
    last.write_bytes(data)
    corpus = Path(Cache.open(path).provenance["source"]["root"])
    argv = [*words(root, corpus, whisper), "--verify"] if how == "verify" else ["repair", str(path)]
    assert run(argv) == 0
    assert snapshot(root) == snapshot(grown[0])
    assert verify(path, deep=True) == []


def test_a_finished_extraction_leaves_the_files_of_one_that_grows_the_cache(tmp_path, grown):
    root = tmp_path / "root"
    shutil.copytree(grown[0], root)
    (path,) = root.glob("clips/*")
    layout = Layout(path)
    writing = layout.tar(9).with_name("000009.tar.tmp-another")
    writing.write_bytes(b"half a shard")
    shutil.copy(layout.plan(1), layout.plan(2))
    store = FolderStore(path)
    with store.hold_leases("me"):
        store.cleanup()
        assert writing.exists()
        layout.plan(2).unlink()
        store.cleanup()
    assert not writing.exists()


def test_a_reader_of_the_old_generation_sees_the_same_features_after_growth(grown):
    (path,) = grown[0].glob("clips/*")
    old, new = Cache.open(path, generation=0), Cache.open(path)
    rows = {key: index for index, key in enumerate(new.strings("key", range(len(new))))}
    assert (len(old), len(new)) == (6, CLIPS)
    for index, key in enumerate(old.strings("key", range(len(old)))):
        assert np.array_equal(old.features(index), new.features(rows[key]))


def test_recordings_that_are_hashed_while_they_are_encoded_are_known_to_the_next_run(tmp_path, whisper):
    argv = ["extract", f"root={tmp_path}", "source.kind=tones", "limit=3", f"encoder.model=path:{whisper}"]
    assert run(argv) == 0
    assert run([*argv, "limit=4"], log=tmp_path / "log") == 0
    assert "1 new utterance " in (tmp_path / "log").read_text()
