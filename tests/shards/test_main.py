from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import make_cache
from tiny_faults import make_small_cache

from shards.__main__ import main
from shards.errors import run_command
from shards.format.layout import Layout
from shards.format.records import seal, unseal
from shards.read.cache import Cache


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("main") / "cache", n=12, channels=8, shards=2)


@pytest.fixture
def cache(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def test_help_comes_at_once_and_loads_no_heavy_library():
    program = (
        "import sys, shards.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'pyarrow', 'numpy', 'pydantic') if n in sys.modules], file=sys.stderr)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert time.perf_counter() - started < 5  # half a second on a machine with nothing else to do
    assert all(name in done.stdout for name in ("info", "ls", "head", "verify", "python -m shards verify CACHE --deep"))


@pytest.mark.parametrize("command", ["info", "ls", "head", "verify"])
def test_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"example:\n  python -m shards {command} caches/" in capsys.readouterr().out


def test_info_as_json_tells_identity_size_and_exactness(cache, capsys):
    assert run_command(main, ["info", str(cache), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    opened = Cache.open(cache)
    frames, size = int(opened.frames.sum()), sum(path.stat().st_size for path in cache.rglob("*.tar"))
    assert about["feature_id"] == opened.feature_id
    assert about["manifest_id"] == opened.manifest_id
    assert about["counts"]["utterances"] == 12
    assert about["counts"]["failures"] == 0
    assert about["hours"] == pytest.approx(frames * 320 / 16000 / 3600)
    assert about["bytes_per_audio_hour"] == pytest.approx(size / about["hours"])
    assert about["bits_per_value"] == pytest.approx(8 * size / (8 * frames))
    assert 0 < about["codec_error"]["mean"] <= about["codec_error"]["max"] < 5e-4
    assert about["provenance"]["source"]["name"] == "utt"


def test_info_tells_people_the_same(cache, capsys):
    assert run_command(main, ["info", str(cache)]) == 0
    text = capsys.readouterr().out
    assert Cache.open(cache).feature_id in text
    assert "12 of 12 planned, 0 failed, in 2 shards" in text
    assert "MB/h of audio" in text


def test_info_tells_the_time_of_the_extraction_and_the_encoders_part_where_it_is_recorded(cache, capsys):
    layout = Layout(cache)
    recorded = {**unseal(layout.cache), "seconds": 1000.0}
    for part, line in (
        ({"encode_seconds": 900.0}, "1,000.0 s of extraction, of which 900.0 s in the encoder"),
        ({}, "n\n"),
    ):
        recorded.pop("encode_seconds", None)
        layout.cache.write_bytes(seal({**recorded, **part}))
        assert run_command(main, ["info", str(cache)]) == 0
        assert line in capsys.readouterr().out


def test_info_of_an_unfinished_cache_shows_its_progress(cache, capsys):
    layout = Layout(cache)
    layout.cache.unlink()
    layout.record(1).unlink()
    assert run_command(main, ["info", str(cache)]) == 0
    text = capsys.readouterr().out
    assert "not complete: 1 of 2 shards committed" in text
    assert "6 of 12 utterances" in text


def test_ls_prints_one_line_an_utterance_up_to_its_limit(cache, capsys):
    assert run_command(main, ["ls", str(cache)]) == 0
    lines = capsys.readouterr().out.splitlines()
    opened = Cache.open(cache)
    assert [line.split("\t")[0] for line in lines] == opened.strings("key", range(12))
    assert [line.split("\t")[4] for line in lines] == opened.strings("text", range(12))
    assert int(lines[3].split("\t")[1]) == opened.frames[3]
    assert run_command(main, ["ls", str(cache), "--limit", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_head_shows_the_statistics_of_the_stored_features(cache, capsys):
    assert run_command(main, ["head", str(cache), "--n", "1"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    x = Cache.open(cache).features(0).astype(np.float64)
    assert first.startswith("utt-00000  ")
    assert f"RMS {np.sqrt((x * x).mean()):.4f}" in second
    assert f"min {x.min():+.4f}" in second


def test_verify_of_a_sound_cache_says_so(cache, capsys):
    assert run_command(main, ["verify", str(cache), "--deep"]) == 0
    assert "valid" in capsys.readouterr().out


def test_verify_prints_a_table_of_what_is_wrong_and_ends_with_1(cache, capsys):
    os.truncate(Layout(cache).tar(1), 512)
    assert run_command(main, ["verify", str(cache)]) == 1
    told = capsys.readouterr()
    header, line = told.out.splitlines()
    assert header.split() == ["shard", "file", "utterance", "problem"]
    assert line.split(maxsplit=3) == ["000001", "shards/000001.tar", "-", "has 512 bytes, not 20480"]
    assert told.err.startswith(f"failed: '{cache}' is not valid: 1 problem")


def test_verify_prints_many_problems_only_when_asked(tmp_path, capsys):
    cache = make_cache(tmp_path / "many", n=120, shards=1)
    os.truncate(Layout(cache).tar(0), 512)
    assert run_command(main, ["verify", str(cache), "--deep"]) == 1
    assert "… and 82 more (show them with --all)" in capsys.readouterr().out
    assert run_command(main, ["verify", str(cache), "--deep", "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 + 122


def test_verify_of_an_incomplete_cache_ends_with_1(cache, capsys):
    Layout(cache).cache.unlink()
    assert run_command(main, ["verify", str(cache)]) == 1
    assert "the extraction is not complete" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "ls", "head", "verify"])
def test_a_folder_that_is_no_cache_ends_with_2_and_one_sentence(command, tmp_path, capsys):
    for path in (tmp_path / "none", tmp_path):
        assert run_command(main, [command, str(path)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ")
        assert len(told.err.splitlines()) == 1


def test_a_text_cannot_steer_the_terminal(tmp_path, capsys):
    cache = make_small_cache(tmp_path / "cache")
    layout = Layout(cache)
    (layout.shards / "\x1b[2Jevil.tar").touch()
    assert run_command(main, ["verify", str(cache)]) == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["ls", "x", "--limit", "-1"], ["head", "x", "--n", "many"], ["list"], []])
def test_bad_words_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["push", "https://host/cache", "s3://bucket/cache"], "'https://host/cache' is a URL: download it with"),
        (["pull", "some/folder", "other/folder"], "'some/folder' is not a URL: pass one such as hf://"),
    ],
)
def test_push_and_pull_the_wrong_way_round_are_reported(words, sentence, capsys):
    assert run_command(main, words) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_info_of_a_corrupt_cache_names_the_command_that_shows_more(cache, capsys):
    (cache / "CACHE.json").write_text("{}")
    assert run_command(main, ["info", str(cache)]) == 2
    assert f"is corrupt (CACHE.json does not match its own sha256): run `python -m shards verify {cache}`" in (
        capsys.readouterr().err
    )


def test_the_module_runs_as_a_program(cache):
    done = subprocess.run([sys.executable, "-m", "shards", "verify", cache], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(":")[1].split()[0]) == (0, "valid")
