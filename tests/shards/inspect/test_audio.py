"""The audio of a cache against what it was made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import append, make_spec, plan_row
from tiny_faults import reseal

from shards.__main__ import main
from shards.errors import UserError, run_command
from shards.format.audio_id import audio_id
from shards.format.layout import Layout
from shards.inspect import audio as audio_module
from shards.inspect.audio import compare_audio

SEGMENTS = ("t=0,1.5", "t=1.5,3.25&c=1", "t=2,")


def extract(cache: Path, audio: Path, uris: list[str], first_shard: int) -> None:
    """Append a generation of one utterance for each URI, a file in ``audio`` or a segment of one."""
    rows = []
    for row, uri in enumerate(uris):
        file, _, fragment = (uri, "", "") if (audio / uri).exists() else uri.partition("#")
        key = uri.translate({ord(c): "-" for c in "/.#=,& "})
        about = plan_row(key, 640, first_shard, row, uri)
        rows.append(about | {"audio_id": audio_id(hashlib.sha256((audio / file).read_bytes()).digest(), fragment)})
    labels = [{"key": row["key"], "text": "x"} for row in rows]
    append(cache, make_spec(), rows, labels, lambda key, frames: np.ones((frames, 8), np.float32))


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A cache of three files and of three segments of a fourth; the folder of the files."""
    path, audio = tmp_path / "cache", tmp_path / "audio"
    (audio / "talks").mkdir(parents=True)
    names = ["0.wav", "1.wav", "2.wav", "talks/a.wav"]
    for name in names:
        (audio / name).write_text(f"the sound of {name}")
    extract(path, audio, names[:3] + [f"talks/a.wav#{segment}" for segment in SEGMENTS], 0)
    return path, audio


def record_source(cache: Path, **source: object) -> None:
    reseal(Layout(cache).cache, lambda tree: tree["generations"][-1]["provenance"].update(source=source))


def told(problems) -> list[tuple]:
    return [(problem.key, problem.what) for problem in problems]


CHANGED = "is not the audio that the features were made from"


def test_every_file_that_is_not_what_it_was_is_named_and_no_other(made):
    cache, audio = made
    steps: list[tuple[int, int]] = []
    assert compare_audio(cache, audio, lambda *step: steps.append(step)) == []
    assert steps == [(i, 4) for i in range(1, 5)]
    (audio / "0.wav").write_text("another recording")
    (audio / "1.wav").unlink()
    (audio / "2.wav").unlink()
    (audio / "2.wav").mkdir()
    assert told(compare_audio(cache, audio)) == [
        ("0-wav", CHANGED),
        ("1-wav", f"is missing in '{audio}'"),
        ("2-wav", "cannot be read: Is a directory"),
    ]


def test_each_segment_of_a_changed_file_is_named_and_the_file_is_read_once(made, monkeypatch):
    cache, audio = made
    real, read = audio_module.file_sha256, []
    monkeypatch.setattr(audio_module, "file_sha256", lambda path: read.append(path) or real(path))
    (audio / "talks" / "a.wav").write_text("another talk")
    assert told(compare_audio(cache, audio)) == [
        (f"talks-a-wav-{key}", CHANGED) for key in ("t-0-1-5", "t-1-5-3-25-c-1", "t-2-")
    ]
    assert sorted(read) == sorted(path for path in audio.rglob("*.wav"))


def test_only_the_audio_of_the_newest_features_of_a_key_is_compared(made):
    cache, audio = made
    (audio / "0.wav").write_text("a better recording")
    assert told(compare_audio(cache, audio)) == [("0-wav", CHANGED)]
    extract(cache, audio, ["0.wav"], 1)
    assert compare_audio(cache, audio) == []


def test_the_recorded_folder_is_where_the_audio_is_looked_for(made, capsys):
    cache, audio = made
    record_source(cache, kind="manifest", root=str(audio))
    assert run_command(main, ["verify", str(cache), "--source"]) == 0
    assert "every audio file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "folder", "sentence"),
    [
        ({"kind": "manifest"}, None, "does not record its audio folder: pass the folder to --source"),
        ({"kind": "manifest"}, "nowhere", r"audio folder 'nowhere' of .* does not exist: .* to --source"),
        (
            {"kind": "parquet", "root": "/data"},
            None,
            r"is not stored as plain files: encode a sample of it again with .* check ",
        ),
    ],
)
def test_audio_that_cannot_be_compared_is_reported_with_what_to_do(made, source, folder, sentence):
    record_source(made[0], **source)
    with pytest.raises(UserError, match=sentence):
        compare_audio(made[0], Path(folder) if folder else None)


def test_a_hash_sign_in_the_name_of_a_file_makes_no_segment_and_audio_in_an_archive_is_refused(made):
    cache, audio = made
    for name in ("take #2.wav", "take#t=1,2", "all.tar"):
        (audio / name).write_text(name)
    extract(cache, audio, ["take #2.wav", "take#t=1,2"], 1)
    assert compare_audio(cache, audio) == []
    extract(cache, audio, ["all.tar#in.wav"], 2)
    with pytest.raises(UserError, match="is not stored as plain files"):
        compare_audio(cache, audio)
