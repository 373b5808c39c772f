"""Extractions with ``augment``: variants are rows of one cache, made once, whatever the order of the work."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from extraction import Kill, run, snapshot, words, write_corpus

from pipeline.config import ExtractConfig
from pipeline.decode import _read_once
from pipeline.extract import job as job_module
from pipeline.extract.summary import JobSummary
from pipeline.extract.variants import add_variants
from pipeline.maintain.repair import repair
from pipeline.sources.base import encode_key
from pipeline.variants import VariantsConfig
from shards.config.base import load_config
from shards.errors import UserError
from shards.format.variants import split_key
from shards.inspect.verify import verify
from shards.read.cache import Cache

CLIPS = 6
AUGMENT = "augment={variants: 3, speed: 0.1, noise: [10, 30], gain: 6}"


class World:
    """A corpus of clips; ``extract(*more)`` runs into ``root`` and returns what ``--json`` wrote."""

    def __init__(self, folder: Path, whisper: Path, template: World | None = None) -> None:
        self.folder, self.whisper, self.root = folder, whisper, folder / "root"
        self.corpus = folder / "corpus"
        if template is None:
            self.corpus.mkdir()
            write_corpus(self.corpus, CLIPS)
        else:
            for name in ("corpus", "root"):
                shutil.copytree(template.folder / name, folder / name)

    def extract(self, *more: str, root: str = "", code: int = 0, **options: Any) -> dict[str, Any]:
        out, log = self.folder / "result.json", self.folder / "log"
        for file in (out, log):
            file.unlink(missing_ok=True)
        where = self.folder / root if root else self.root
        argv = [*words(where, self.corpus, self.whisper, "source.val_fraction=0.3"), "--json", str(out), *more]
        assert run(argv, log=log, **options) == code, log.read_text()
        self.log = log.read_text()
        return json.loads(out.read_text()) if code == 0 else {}

    def path(self, root: str = "") -> Path:
        (path,) = (self.folder / root if root else self.root).glob("clips/*")
        return path

    def cache(self, root: str = "", **options: Any) -> Cache:
        return Cache.open(self.path(root), **options)


@pytest.fixture
def world(tmp_path, whisper) -> World:
    return World(tmp_path, whisper)


@pytest.fixture(scope="module")
def varied(tmp_path_factory, whisper) -> World:
    """A finished extraction with three variants; tests must not change it."""
    world = World(tmp_path_factory.mktemp("varied"), whisper)
    world.first = world.extract(AUGMENT, count=world.folder / "operations")
    world.operations = int((world.folder / "operations").read_text())
    return world


@pytest.fixture
def copy(tmp_path, whisper, varied) -> World:
    """The same, to be changed."""
    return World(tmp_path, whisper, varied)


def counts(result: dict[str, Any]) -> tuple[int, int, int]:
    return result["generation"], result["encoded"], result["reused"]


def stored(cache: Cache) -> dict[str, tuple[bytes, bytes]]:
    """Audio id and features of every item, by key."""
    ids = cache.column("audio_id").to_pylist()
    return {key: (ids[i], cache.features(i).tobytes()) for i, key in enumerate(cache.column("key").to_pylist())}


def test_every_utterance_has_its_variants_beside_it_and_the_plan_declares_their_length(varied):
    assert counts(varied.first) == (0, 3 * CLIPS, 0)
    cache = varied.cache(variants=True)
    assert verify(cache.path, deep=True) == []
    rows, plan = cache.manifest.to_pylist(), pa.parquet.read_table(cache.path / "plans" / "000.parquet").to_pylist()
    assert [row["samples"] for row in rows] == [row["samples"] for row in plan]
    assert [row["frames"] for row in rows] == [-(-row["samples"] // 320) for row in rows]
    for first in range(0, len(rows), 3):
        base, one, two = rows[first : first + 3]
        assert [one["key"], two["key"]] == [f"{base['key']}~1", f"{base['key']}~2"]
        assert base["shard"] == one["shard"] == two["shard"]
        assert (base["text"], base["split"], base["speaker"]) == (one["text"], one["split"], one["speaker"])
        assert {round(base["samples"] / each["samples"], 2) for each in (one, two)} != {1.0}
    assert {row["split"] for row in rows} == {"train", "val"}
    assert len({row["audio_id"] for row in rows}) == 3 * CLIPS


def test_a_reader_of_the_tars_finds_the_texts_of_variants_too(varied):
    texts = {row["key"]: row["text"] for row in varied.cache(variants=True).manifest.to_pylist()}
    for path in varied.path().glob("shards/*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    assert json.loads(tar.extractfile(name).read())["text"] == texts.pop(name.removesuffix(".json"))
    assert not texts


def test_the_announcement_says_what_the_variants_need(varied):
    assert f"{3 * CLIPS} rows of clips" in varied.log
    assert f"; {2 * CLIPS} of the rows are variants (0.00 h, about 0.0 MB on disk)" in varied.log
    many = JobSummary("clips", "e", [6], "cpu", "float32", 1, [], 0, {0: 9}, [0], {}, 10, 6, 12.5, 3_210_000_000)
    assert many.headline().endswith("; 6 of the rows are variants (12.50 h, about 3.2 GB on disk)")


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_shards_processes_and_interruptions(varied):
    expected = stored(varied.cache(variants=True))
    varied.extract(AUGMENT, "shard_mb=0.008", "processes=2", "reuse=[]", root="others", code=0)
    assert stored(varied.cache("others", variants=True)) == expected
    varied.extract(AUGMENT, root="killed", kill=Kill(varied.operations * 2 // 3, "before"), code=-9)
    varied.extract(AUGMENT, root="killed")
    assert snapshot(varied.folder / "killed") == snapshot(varied.root)


def test_an_extraction_with_augment_reuses_one_without_and_the_reverse(world):
    assert counts(world.extract()) == (0, CLIPS, 0)
    before = stored(world.cache())
    assert counts(world.extract(AUGMENT)) == (1, 2 * CLIPS, 0)
    assert stored(world.cache()) == before
    assert counts(world.extract(AUGMENT)) == (1, 0, 0)
    world.extract("source.name=other")
    assert f"{CLIPS} of {CLIPS} utterances reused" in world.log


def test_one_more_variant_encodes_only_that_one(copy):
    before = stored(copy.cache(variants=True))
    assert counts(copy.extract(AUGMENT.replace("3,", "4,", 1))) == (1, CLIPS, 0)
    after = stored(copy.cache(variants=True))
    assert {key: after[key] for key in before} == before
    assert {split_key(key)[1] for key in after} == {0, 1, 2, 3}
    assert verify(copy.path(), deep=True) == []


def test_a_cache_with_more_variants_than_configured_says_how_training_leaves_them_out(copy):
    copy.extract(AUGMENT.replace("3,", "2,", 1))
    assert "has 6 variants that augment no longer makes: set variants=2 in training to leave them out" in copy.log


@pytest.mark.slow
def test_another_recipe_encodes_the_variants_again_and_says_that_no_audio_changed(copy):
    before = stored(copy.cache(variants=True))
    assert counts(copy.extract(AUGMENT.replace("gain: 6", "gain: 3"))) == (1, 2 * CLIPS, 0)
    assert "other audio than before" not in copy.log
    after = stored(copy.cache(variants=True))
    assert {key for key in before if before[key][0] == after[key][0]} == {k for k in before if not split_key(k)[1]}
    assert counts(copy.extract(AUGMENT))[1:] == (0, 2 * CLIPS)  # the features of the old recipe are still there


def test_changed_audio_changes_its_variants(copy):
    before = stored(copy.cache(variants=True))
    noise = np.random.default_rng(3).normal(0, 0.1, 5000).astype(np.float32)
    soundfile.write(copy.corpus / "clip 02.flac", noise, 16000)
    assert counts(copy.extract(AUGMENT)) == (1, 3, 0)
    assert "note: 1 utterance has other audio than before" in copy.log
    after = stored(copy.cache(variants=True))
    changed = {key for key in before if before[key] != after[key]}
    assert {split_key(key)[1] for key in changed} == {0, 1, 2}
    assert len({split_key(key)[0] for key in changed}) == 1


@pytest.mark.slow
def test_without_augment_changed_audio_leaves_no_variant_of_the_old_audio(copy):
    noise = np.random.default_rng(3).normal(0, 0.1, 5000).astype(np.float32)
    soundfile.write(copy.corpus / "clip 02.flac", noise, 16000)
    assert counts(copy.extract()) == (1, 1, 0)
    assert len(copy.cache(variants=True)) == 3 * CLIPS - 2
    assert counts(copy.extract(AUGMENT)) == (2, 2, 0)
    assert len(copy.cache(variants=True)) == 3 * CLIPS


@pytest.mark.slow
@pytest.mark.parametrize("other", ["augment={}", AUGMENT.replace("0.1", "0.2")])
def test_an_unfinished_generation_is_not_finished_with_another_augment(world, varied, other):
    world.extract(AUGMENT, kill=Kill(varied.operations * 2 // 3, "before"), code=-9)
    assert list(world.root.glob("clips/*/plans/000.parquet"))
    world.extract(other, code=2)
    assert "is unfinished and has variants of another augment: finish it with the configuration" in world.log
    assert world.extract(AUGMENT)["encoded"] > 0


def test_audio_that_is_hashed_while_it_is_encoded_keeps_its_ids(tmp_path, whisper):
    """The ids of variants must not be remembered as those of their recordings."""
    settings = ["source.kind=tones", f"encoder.model=path:{whisper}", "encoder.dtype=float32", AUGMENT]
    argv = ["extract", f"root={tmp_path / 'root'}", *settings, "--json", str(tmp_path / "result")]
    found = []
    for _ in range(2):
        assert run(argv, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
        found.append(counts(json.loads((tmp_path / "result").read_text())))
    assert found == [(0, 15, 0), (0, 0, 0)]
    (path,) = tmp_path.glob("root/tones*/*")
    samples = [pa.parquet.read_table(path / name / "000.parquet")["samples"] for name in ("plans", "manifests")]
    assert samples[0].equals(samples[1])


def test_a_disk_without_room_for_the_variants_is_refused_before_the_first_is_encoded(world, monkeypatch):
    def plan(root: str, free: float, *more: str) -> int:
        monkeypatch.setattr(job_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        argv = words(world.folder / root, world.corpus, world.whisper, *more)
        (job,) = job_module.prepare(load_config(ExtractConfig, None, argv[1:])).jobs()
        return job_module.estimate_job_bytes(job, job.todo)

    without, needed = plan("a", 1e12), plan("b", 1e12, AUGMENT)
    assert needed == pytest.approx(3 * without, rel=0.1)
    plan("c", needed - 1)
    with pytest.raises(UserError, match="GB free: choose another root"):
        plan("d", needed - 1, AUGMENT)


@pytest.mark.slow
def test_a_damaged_cache_with_variants_is_repaired_as_it_was(copy, varied):
    path = copy.path()
    (path / "plans" / "000.parquet").unlink()
    tar = path / "shards" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert repair(path)
    assert snapshot(path) == snapshot(varied.path())


def test_a_source_key_cannot_look_like_a_variant():
    assert encode_key("clip~1") == "clip-x7E-1"


def listing(key: str) -> tuple[pa.Table, pa.Array]:
    row = {"key": [key], "id": [key], "audio": ["a.flac"], "samples": [16000]}
    return pa.table(row), pa.array([bytes(range(32))], pa.binary(32))


def test_a_key_without_room_for_the_number_is_refused(tmp_path):
    config = VariantsConfig(variants=11, gain=3)
    rows, _ = add_variants(*listing("k" * 90), config, "f16", tmp_path)
    assert rows["key"].to_pylist()[-1] == "k" * 90 + "~10"
    with pytest.raises(UserError, match="is too long a key for variants in codec int8: set codec=f16"):
        add_variants(*listing("k" * 88), config, "int8", tmp_path)
    assert len(add_variants(*listing("k" * 87), config, "int8", tmp_path)[0]) == 11


def test_the_recording_of_several_variants_is_read_once():
    class Counted:
        def read(self, uris):
            self.uris = uris
            return ((uri, uri.encode()) for uri in uris)

    source = Counted()
    found = list(_read_once(source, ["a", "a", "a", "b", "a"]))
    assert found == [("a", b"a")] * 3 + [("b", b"b"), ("a", b"a")]
    assert source.uris == ["a", "b", "a"]
