from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_cache import grow, make_cache
from tiny_server import serve

from shards.__main__ import main
from shards.commit.folder import add_labels
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


@pytest.mark.parametrize("command", ["info", "ls", "head", "verify", "labels", "label", "compact", "push"])
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
    info = unseal(layout.cache)
    (recorded,) = info["generations"]
    for part, line in (
        ({"encode_seconds": 900.0}, "1,000.0 s of extraction, of which 900.0 s in the encoder"),
        ({}, "n\n"),
    ):
        recorded.pop("encode_seconds", None)
        layout.cache.write_bytes(seal({**info, "generations": [{**recorded, "seconds": 1000.0, **part}]}))
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


@pytest.mark.parametrize("command", ["info", "ls", "head", "verify", "labels"])
def test_a_folder_that_is_no_cache_ends_with_2_and_one_sentence(command, tmp_path, capsys):
    for path in (tmp_path / "none", tmp_path):
        assert run_command(main, [command, str(path)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ")
        assert len(told.err.splitlines()) == 1


def test_a_text_cannot_steer_the_terminal(cache, capsys):
    (Layout(cache).shards / "\x1b[2Jevil.tar").touch()
    assert run_command(main, ["verify", str(cache)]) == 1
    add_labels(Layout(cache), pa.table({"key": ["utt-00000"], "text": ["\x1b[2J"]}), "mine", "test")
    assert run_command(main, ["ls", str(cache), "--labels", "mine"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        *(["ls", "x", "--limit", "-1"], ["head", "x", "--n", "many"], ["list"], []),
        *(["label", "x", "f.csv"], ["label", "x", "f.csv", "--name", "n", "--max-problems", "-1"]),
        ["ls", "x", "--generation", "-1"],
    ],
)
def test_bad_words_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["push", "https://host/cache", "s3://bucket/cache"], "'https://host/cache' is a URL: download it with"),
    ],
)
def test_a_push_of_a_url_is_reported(words, sentence, capsys):
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


@pytest.fixture
def file(tmp_path) -> Path:
    """Labels of 11 of 12 utterances, with a second task for one."""
    path = tmp_path / "mine.csv"
    rows = [f"utt-{i:05d},spoken {i},transcribe" for i in range(11)]
    path.write_text("\n".join(["key,text,task", *rows, "utt-00003,drei,translate"]) + "\n")
    return path


def test_ls_and_head_show_the_labels_and_the_generation_that_they_are_given(cache, file, capsys):
    grow(cache, 2)
    assert run_command(main, ["ls", str(cache), "--labels", str(file), "--generation", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[4] for line in lines[3:5]] == ["spoken 3", "drei"]
    assert len(lines) == 12
    assert run_command(main, ["head", str(cache), "--labels", "source", "--n", "1"]) == 0
    assert capsys.readouterr().out.startswith("utt-00000  ")
    assert run_command(main, ["ls", str(cache), "--generation", "2"]) == 2
    assert "has no generation 2: it has 0 to 1" in capsys.readouterr().err


def test_label_adds_a_set_and_tells_what_it_covers(cache, file, capsys):
    assert run_command(main, ["label", str(cache), str(file), "--name", "mine"]) == 0
    told = capsys.readouterr().out.splitlines()
    opened = Cache.open(cache, "mine")
    assert told[0] == f"label set 'mine' {opened.labels.id[:8]}: 12 rows with key, text, task"
    assert told[1] == "11 of 12 utterances have labels (joined by key)"
    assert told[2] == "1 utterance without labels: 'utt-00011'"
    assert len(opened) == 12


def test_label_refuses_more_problems_than_allowed_with_their_counts_and_examples(cache, file, capsys):
    with open(file, "a") as more:
        more.write("nobody,who,transcribe\nutt-00001,again,transcribe\nutt-00011,,transcribe\n")
    words = ["label", str(cache), str(file), "--name", "mine"]
    assert run_command(main, words) == 2
    error = capsys.readouterr().err
    for part in ("has 3 unusable rows among 15", "'nobody'", "'utt-00001'", "'utt-00011'", "--max-problems (now 0.01)"):
        assert part in error
    assert run_command(main, [*words, "--max-problems", "3"]) == 0
    assert "1 row with an empty text: 'utt-00011'" in capsys.readouterr().out


def test_label_of_a_url_or_a_folder_that_cannot_be_written_names_the_setting_that_works(
    cache, file, capsys, monkeypatch
):
    words = [str(file), "--name", "mine"]
    assert run_command(main, ["label", "https://host/cache", *words]) == 2
    assert f"is a URL, and label sets are added to folders only: pass `labels={file}` to training instead" in (
        capsys.readouterr().err
    )

    def refuse(*args, **more):
        raise OSError(errno.EROFS, "Read-only file system")

    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *a, **m: (refuse if flags & os.O_CREAT else real)(path, flags, *a, **m)
    )
    assert run_command(main, ["label", str(cache), *words]) == 2
    told = capsys.readouterr().err
    assert (
        told
        == f"error: '{cache}' cannot be written (Read-only file system): pass `labels={file}` to training instead\n"
    )


@pytest.mark.parametrize("name", ["source", "a/b", ""])
def test_label_refuses_a_name_before_it_reads_the_file(cache, name, capsys):
    assert run_command(main, ["label", str(cache), "no-such-file.csv", "--name", name]) == 2
    assert "name" in capsys.readouterr().err


def test_labels_lists_each_set_with_its_coverage_and_what_it_changed(cache, file, capsys):
    run_command(main, ["label", str(cache), str(file), "--name", "mine"])
    file.write_text(file.read_text().replace("spoken 1,", "said 1,").replace("utt-00010,spoken 10,transcribe\n", ""))
    run_command(main, ["label", str(cache), str(file), "--name", "mine"])
    capsys.readouterr()
    assert run_command(main, ["labels", str(cache)]) == 0
    header, *lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [cell.strip() for cell in header if cell.strip()][:4] == ["name", "id", "rows", "utterances"]
    assert [row[0] for row in rows] == ["source*", "mine", "mine*"]
    assert [row[3] for row in rows] == ["12 of 12", "11 of 12", "10 of 12"]
    assert rows[2][5:] == ["key text task", str(file), "1 text changed, 1 row removed"]
    assert rows[1][-1] == "-"
    assert rows[2][1] == Cache.open(cache, "mine").labels.id[:8]


def test_labels_of_a_url_are_listed_too(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    with serve(cache) as server:
        assert run_command(main, ["labels", server.url]) == 0
    assert "source*" in capsys.readouterr().out


def test_compact_tells_what_it_left_out(cache, tmp_path, capsys):
    grow(cache, 2, utt_00003="other")
    assert run_command(main, ["compact", str(cache), str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        f"compacted: {tmp_path / 'new'} (14 utterances; left out 1 superseded and 0 unlabeled rows; "
    )
    assert len(Cache.open(tmp_path / "new")) == 14
    assert run_command(main, ["compact", "https://host/cache", str(tmp_path / "new")]) == 2
    assert "is a URL: download it with `python -m shards pull`" in capsys.readouterr().err
