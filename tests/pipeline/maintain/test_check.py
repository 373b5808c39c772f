"""Checks that stored features come from the encoder and the audio that the cache records."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from extraction import only_cache, run, words, write_corpus
from tiny_whisper import write_tiny_whisper

from pipeline.__main__ import main
from pipeline.maintain.check import check, recorded_config, tolerance
from shards.__main__ import main as shards_main
from shards.commit.finalize import finalize
from shards.commit.writer import ShardWriter
from shards.errors import run_command
from shards.format.layout import Layout, read_plan
from shards.inspect.verify import verify
from shards.read.cache import Cache


@pytest.fixture(scope="module")
def whispers(tmp_path_factory) -> list[Path]:
    """Two Whispers of the same shape with different weights."""
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_whisper(folder / f"whisper {seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("some audio")
    write_corpus(folder, 6)
    return folder


def extract(root: Path, corpus: Path, whisper: Path, *more: str) -> Path:
    assert run(words(root, corpus, whisper, *more)) == 0
    return only_cache(root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus, whispers) -> Path:
    return extract(tmp_path_factory.mktemp("whole"), corpus, whispers[0])


def rewrite(cache: Path, change) -> None:
    """Replace the stored features by ``change(key, features)``, with matching records, so that verify passes."""
    old, layout = Cache.open(cache), Layout(cache)
    features = {old.row(i)["key"]: (old.features(i).astype(np.float32), old.row(i)) for i in range(len(old))}
    plan = read_plan(layout.plan(0))
    for shard in plan.shards:
        with ShardWriter(layout, shard, old.spec, plan.id, "rewriter") as writer:
            for row in plan.shard_rows(shard):
                stored, old_row = features[row["key"]]
                writer.add(
                    row,
                    change(row["key"], stored),
                    samples=old_row["samples"],
                    audio_id=old_row["audio_id"],
                    labels=old_row,
                )
            writer.commit({"seconds": 0.0})
    layout.cache.unlink()
    finalize(layout, old.spec, 0, plan, "rewriter", old.provenance)
    assert verify(cache, deep=True) == []


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_features_of_every_codec_pass_within_its_tolerance(codec, tmp_path, corpus, whispers):
    made = Cache.open(extract(tmp_path, corpus, whispers[0], f"codec={codec}"))
    found = list(check(made, 6))
    assert len(found) == 6
    assert [row.problem for row in found] == [""] * 6
    worst = max(row.relative_error for row in found)
    assert 0 < worst <= tolerance(made)
    assert min(row.cosine for row in found) > 0.998
    stored = made.manifest["error"].to_numpy()
    assert worst == pytest.approx(stored.max(), rel=0.05)  # on the same machine only the codec adds an error


def test_a_valid_cache_passes_with_exit_status_0(cache, capsys):
    assert main(["check", str(cache), "--n", "3"]) == 0
    assert "3 utterances compared, 0 above the tolerance" in capsys.readouterr().out


def test_features_of_another_encoder_fail_although_every_record_matches(cache, tmp_path, corpus, whispers, capsys):
    other = Cache.open(extract(tmp_path / "other", corpus, whispers[1]))
    foreign = {other.row(i)["key"]: other.features(i).astype(np.float32) for i in range(len(other))}
    forged = Path(shutil.copytree(cache, tmp_path / "forged" / cache.parent.name / cache.name))
    rewrite(forged, lambda key, stored: foreign[key])
    assert main(["check", str(forged)]) == 1
    assert "6 utterances compared, 6 above the tolerance" in capsys.readouterr().out


def test_one_utterance_with_noisy_values_fails_and_is_named(cache, tmp_path, capsys):
    noisy = Path(shutil.copytree(cache, tmp_path / cache.parent.name / cache.name))
    victim = Cache.open(cache).row(2)["key"]
    noise = np.random.default_rng(0)

    def change(key, stored):
        return stored + (0.02 * stored.std() * noise.standard_normal(stored.shape)).astype(np.float32) * (key == victim)

    rewrite(noisy, change)
    assert main(["check", str(noisy)]) == 1
    output = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in output if "relative error above" in line] == [victim]
    assert output[-1].startswith("6 utterances compared, 1 above")


def test_an_encoder_with_other_weights_is_refused_before_anything_is_compared(cache, whispers, capsys):
    assert main(["check", str(cache), "--encoder", f"path:{whispers[1]}"]) == 2
    assert "did not make these features (expected weights" in capsys.readouterr().err


@pytest.fixture
def moved(corpus, tmp_path) -> Path:
    """A copy of the corpus with one recording replaced and one removed."""
    folder = Path(shutil.copytree(corpus, tmp_path / "moved"))
    (folder / "clip 01.flac").unlink()
    shutil.copy(folder / "clip 02.flac", folder / "clip 03.flac")
    return folder


def test_missing_or_changed_audio_fails_the_check(cache, moved, capsys):
    assert main(["check", str(cache), "--source", f"{moved}/clips.csv"]) == 1
    output = capsys.readouterr().out
    assert "no audio: the file does not exist" in output
    assert " frames now" in output
    assert "6 utterances compared, 2 above" in output


def shards_verify(*argv: object) -> int:
    return run_command(shards_main, ["verify", *map(str, argv)])


def test_verify_with_source_compares_the_files_where_the_cache_says_or_where_told(cache, moved, capsys):
    assert shards_verify(cache, "--source") == 0
    assert "every audio file" in capsys.readouterr().out
    assert shards_verify(cache, "--source", moved) == 1
    output = capsys.readouterr().out
    lines = {line.split("  ")[1]: line for line in output.splitlines() if line.startswith("0")}
    assert set(lines) == {"clip 01.flac", "clip 03.flac"}
    assert "is missing in" in lines["clip 01.flac"]
    assert "is not the audio that the features were made from" in lines["clip 03.flac"]


def test_verify_with_source_names_the_command_for_audio_that_is_not_in_files(tmp_path, whispers, capsys):
    root = tmp_path / "tones"
    assert run(["extract", f"root={root}", "source.kind=tones", "limit=5", f"encoder.model=path:{whispers[0]}"]) == 0
    made = only_cache(root)
    assert shards_verify(made, "--source") == 2
    assert f"`python -m pipeline check {made}`" in capsys.readouterr().err
    assert main(["check", str(made), "--n", "2"]) == 0


def test_verify_with_source_needs_a_folder_that_exists(cache, tmp_path, capsys):
    assert shards_verify(cache, "--source", tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_configuration_that_a_cache_recorded_with_old_names_of_keys_is_read(tmp_path):
    source = {"kind": "speech", "n": 3, "config": None}
    info = {"config": {"source": source, "workers": 2, "lease": 9.0}}
    config = recorded_config(info, tmp_path / "corpus" / "cache")
    assert (config.source.num_sentences, config.decode_workers, config.lease_seconds) == (3, 2, 9.0)
