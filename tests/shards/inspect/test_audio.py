"""The audio of a cache against what it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_cache import make_cache
from tiny_faults import reseal

from shards.__main__ import main
from shards.errors import UserError, run_command
from shards.format.layout import Layout
from shards.inspect.audio import compare_audio
from shards.read.cache import Cache


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A cache of six utterances, and the folder of the files that its hashes are of."""
    path, audio = make_cache(tmp_path / "cache", n=6, shards=2), tmp_path / "audio"
    cache = Cache.open(path)
    for uri, key in zip(cache.manifest["audio"].to_pylist(), cache.strings("key", range(6)), strict=True):
        (audio / uri).parent.mkdir(parents=True, exist_ok=True)
        (audio / uri).write_text(key)
    return path, audio


def record_source(cache: Path, **source: object) -> None:
    reseal(Layout(cache).cache, lambda tree: tree["provenance"].update(source=source))


def test_every_file_that_is_not_what_it_was_is_named_and_no_other(made):
    cache, audio = made
    steps: list[tuple[int, int]] = []
    assert compare_audio(cache, audio, lambda *step: steps.append(step)) == []
    assert steps == [(i, 6) for i in range(1, 7)]
    names = [audio / "utt" / f"0000{i}.wav" for i in (1, 3, 5)]
    names[0].write_text("another recording")
    names[1].unlink()
    names[2].unlink()
    names[2].mkdir()
    found = [(problem.shard, problem.key, problem.what) for problem in compare_audio(cache, audio)]
    assert found == [
        (0, "utt-00001", "is not the audio that the features were made from"),
        (1, "utt-00003", f"is missing in '{audio}'"),
        (1, "utt-00005", "cannot be read: Is a directory"),
    ]


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
