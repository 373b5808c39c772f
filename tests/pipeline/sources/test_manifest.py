from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_corpus import wav

from pipeline.audio import AudioError, decode
from pipeline.sources import Source, SourceConfig, open_source
from shards.errors import UserError


def opened(path: Path, **settings) -> Source:
    return open_source(SourceConfig(kind="manifest", path=str(path), **settings))


def write_json_lines(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        table = csv.DictWriter(
            file, list(rows[0]), delimiter=delimiter, quoting=quoting, quotechar='"' if delimiter != "\t" else None
        )
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def clips(tmp_path):
    for number, name in enumerate(("a.wav", "sub/b c.wav", "sub/größe 你好.wav")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(wav(1600 * (number + 1), number))
    return tmp_path


def test_a_csv_with_semicolons_is_read_as_spreadsheets_write_it(clips):
    rows = [{"audio": "a.wav", "text": "one, two; and three"}, {"audio": "sub/b c.wav", "text": "four"}]
    made = list(opened(write_table(clips / "list.csv", rows, ";")).utterances())
    assert [(u.audio, u.text) for u in made] == [("a.wav", "one, two; and three"), ("sub/b c.wav", "four")]


@pytest.mark.parametrize("column", ["audio", "file", "wav", "audio_filepath"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".csv", ".tsv"])
def test_every_form_gives_the_same_utterances_with_paths_relative_to_the_manifest(clips, column, suffix):
    rows = [
        {column: "a.wav", "text": "one, two", "speaker": "s1", "split": "train", "key": "k1"},
        {column: "sub/b c.wav", "text": 'three "four"', "speaker": "s2", "split": "test", "key": "k2"},
    ]
    path = clips / f"my list{suffix}"
    if suffix in (".csv", ".tsv"):
        write_table(path, rows, "," if suffix == ".csv" else "\t")
    else:
        write_json_lines(path, rows)
    source = opened(path)
    made = list(source.utterances())
    assert [(u.key, u.audio, u.text, u.speaker, u.split, u.samples) for u in made] == [
        ("k1", "a.wav", "one, two", "s1", "train", 1600),
        ("k2", "sub/b c.wav", 'three "four"', "s2", "test", 3200),
    ]
    assert source.name == "my-list"
    assert source.problems == []
    assert dict(source.read([u.audio for u in made])) == {u.audio: (clips / u.audio).read_bytes() for u in made}
    assert [u.key for u in opened(path, splits=["test"]).utterances()] == ["k2"]
    with pytest.raises(UserError, match=r"no split dev in .*which has test, train"):
        list(opened(path, splits=["dev"]).utterances())


def test_without_a_key_the_path_is_the_id_and_any_file_name_works(clips):
    path = write_json_lines(
        clips / "m.jsonl", [{"audio": name, "text": "x"} for name in ("sub/b c.wav", "sub/größe 你好.wav")]
    )
    source = opened(path)
    made = list(source.utterances())
    assert [u.id for u in made] == ["sub/b c", "sub/größe 你好"]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", u.key) for u in made)
    assert all(isinstance(data, bytes) for _, data in source.read([u.audio for u in made]))


def test_an_absolute_path_below_the_manifest_becomes_relative_and_one_elsewhere_stays(clips):
    (clips / "lists").mkdir()
    rows = [{"audio": str(clips / "a.wav"), "text": "x"}]
    assert [u.audio for u in opened(write_json_lines(clips / "m.jsonl", rows)).utterances()] == ["a.wav"]
    source = opened(write_json_lines(clips / "lists/m.jsonl", rows))
    made = list(source.utterances())
    assert [u.audio for u in made] == [str(clips / "a.wav")]
    assert dict(source.read([made[0].audio])) == {made[0].audio: (clips / "a.wav").read_bytes()}


def test_a_duration_in_the_manifest_counts_where_the_file_declares_none(clips):
    (clips / "a.wav").write_bytes(b"not opened")
    rows = [{"audio": "a.wav", "text": "x", "duration": 1.25}]
    assert next(opened(write_json_lines(clips / "m.jsonl", rows)).utterances()).samples == 20_000


def test_a_duration_without_an_offset_cuts_as_nemo_does(clips):
    samples = np.random.RandomState(0).uniform(-0.3, 0.3, 32_000).astype(np.float32)
    soundfile.write(clips / "long.wav", samples, 16_000, subtype="FLOAT")
    rows = [
        {"audio_filepath": "long.wav", "text": "x", "id": str(duration), "duration": duration}
        for duration in (1.0, 1.95, 2.0, 2.05, 9.0, 0, None)
    ]
    source = opened(write_json_lines(clips / "nemo.json", rows))
    made = list(source.utterances())
    assert [(u.audio, u.samples) for u in made] == [
        ("long.wav#t=0,1", 16_000),
        ("long.wav", 31_200),  # up to 0.1 s is rounding
        ("long.wav", 32_000),
        ("long.wav", 32_800),
        ("long.wav", 144_000),  # a failure when it is decoded
        ("long.wav", 32_000),
        ("long.wav", 32_000),
    ]
    np.testing.assert_array_equal(decode(dict(source.read(["long.wav#t=0,1"]))["long.wav#t=0,1"]), samples[:16_000])
    plain = [{"audio": "long.wav", "text": "x", "duration": 1.0}]
    assert next(opened(write_json_lines(clips / "m.jsonl", plain)).utterances()).id == "long"  # the id of the file


def test_a_recording_that_does_not_exist_is_reported_and_fails_later(clips):
    rows = [{"audio": name, "text": "x", "duration": 1} for name in ("gone.wav", "a.wav")]
    source = opened(write_json_lines(clips / "m.jsonl", rows))
    made = list(source.utterances())
    assert [(u.audio, u.samples) for u in made] == [("gone.wav", 0), ("a.wav", 16_000)]
    assert source.problems == ["1 recordings that do not exist (each becomes a failure): gone.wav"]
    answers = dict(source.read(["gone.wav", "a.wav"]))
    assert isinstance(answers["gone.wav"], AudioError)
    assert isinstance(answers["a.wav"], bytes)


def test_a_recording_without_a_readable_header_is_reported(clips):
    (clips / "a.wav").write_bytes(b"noise")
    source = opened(write_json_lines(clips / "m.jsonl", [{"audio": "a.wav", "text": "x"}]))
    assert next(source.utterances()).samples == 0
    assert source.problems == ["1 recordings with no readable header: a.wav"]


def test_nemo_offsets_are_segments_of_a_recording(clips):
    long = np.random.RandomState(0).uniform(-0.3, 0.3, 32_000).astype(np.float32)
    soundfile.write(clips / "long.wav", long, 16_000, subtype="FLOAT")
    rows = [
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 0.25, "text": "one"},
        {"audio_filepath": "long.wav", "offset": 1.5, "text": "two"},
        {"audio_filepath": "long.wav", "offset": 1.9, "duration": 9, "text": "three"},
    ]
    source = opened(write_json_lines(clips / "nemo.json", rows))
    made = list(source.utterances())
    assert [(u.audio, u.samples) for u in made[:2]] == [("long.wav#t=0.5,0.75", 4000), ("long.wav#t=1.5,", 8000)]
    assert [u.id for u in made[:2]] == ["long-500-750", "long-1500"]
    answers = [data for _, data in source.read([u.audio for u in made])]
    np.testing.assert_array_equal(decode(answers[0]), long[8000:12_000])
    np.testing.assert_array_equal(decode(answers[1]), long[24_000:])
    assert isinstance(answers[2], AudioError)


def lhotse_recording(identifier: str, source: str, seconds: float, channels: list[int]) -> dict:
    return {
        "id": identifier,
        "sources": [{"type": "file", "channels": channels, "source": source}],
        "sampling_rate": 16_000,
        "num_samples": round(seconds * 16_000),
        "duration": seconds,
    }


def lhotse_supervision(identifier: str, recording: str, start: float, duration: float, **more) -> dict:
    row = {"id": identifier, "recording_id": recording, "start": start, "duration": duration, "channel": 0}
    return {**row, "text": f"text of {identifier}", "language": "en", "speaker": "s", **more}


@pytest.fixture
def lhotse_folder(tmp_path):
    stereo = np.random.RandomState(1).uniform(-0.3, 0.3, (16_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", stereo, 16_000, subtype="FLOAT")
    (tmp_path / "mono.wav").write_bytes(wav(8000))
    recordings = [
        lhotse_recording("r1", "stereo.wav", 1.0, [0, 1]),
        lhotse_recording("r2", "mono.wav", 0.5, [0]),
        lhotse_recording("r3", "mono.wav", 0.5, [0]),
    ]
    supervisions = [
        lhotse_supervision("r1-a", "r1", 0.25, 0.5, channel=1),
        lhotse_supervision("r1-b", "r1", 0.0, 1.0, channel=0),
        lhotse_supervision("r2-whole", "r2", 0.0, 0.5),
        lhotse_supervision("lost", "r9", 0.0, 0.5),
    ]
    write_json_lines(tmp_path / "recordings.jsonl.gz", recordings)
    write_json_lines(tmp_path / "supervisions.jsonl.gz", supervisions)
    return tmp_path, stereo


@pytest.mark.parametrize("name", ["", "recordings.jsonl.gz", "supervisions.jsonl.gz"])
def test_lhotse_supervisions_are_segments_of_one_channel_of_their_recordings(lhotse_folder, name):
    folder, stereo = lhotse_folder
    source = opened(folder / name)
    made = {u.id: u for u in source.utterances()}
    assert {u.id: u.audio for u in made.values()} == {
        "r1-a": "stereo.wav#t=0.25,0.75&c=1",
        "r1-b": "stereo.wav#t=0,&c=0",
        "r2-whole": "mono.wav",
    }
    assert [u.samples for u in made.values()] == [8000, 16_000, 8000]
    assert made["r1-a"].speaker == "s"
    answers = dict(source.read([u.audio for u in made.values()]))
    np.testing.assert_array_equal(decode(answers[made["r1-a"].audio]), stereo[4000:12_000, 1])
    np.testing.assert_array_equal(decode(answers[made["r1-b"].audio]), stereo[:, 0])
    assert answers["mono.wav"] == (folder / "mono.wav").read_bytes()
    assert source.problems == ["1 supervisions without a recording: lost", "1 recordings without a supervision: r3"]


def test_lhotse_pairs_name_their_splits(lhotse_folder):
    folder, _ = lhotse_folder
    for kind in ("recordings", "supervisions"):
        (folder / f"{kind}.jsonl.gz").rename(folder / f"libri_{kind}_dev-clean.jsonl.gz")
    assert {u.split for u in opened(folder, splits=["dev-clean"]).utterances()} == {"dev-clean"}


def test_lhotse_files_that_do_not_match_are_refused(lhotse_folder):
    folder, _ = lhotse_folder
    write_json_lines(folder / "supervisions.jsonl.gz", [{"id": "x", "text": "y"}])
    with pytest.raises(UserError, match=r"line 1 of .*supervisions.*not a supervision"):
        list(opened(folder).utterances())
    (folder / "supervisions.jsonl.gz").unlink()
    with pytest.raises(UserError, match="no supervisions manifest in the same folder"):
        list(opened(folder).utterances())
    (folder / "recordings.jsonl.gz").unlink()
    with pytest.raises(UserError, match="no lhotse manifests"):
        list(opened(folder).utterances())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"audio": "a.wav", "text": "x"}\n{"audio": ', "line 2 of '{path}' is not a JSON object"),
        ("m.jsonl", "[1]\n", "line 1 of '{path}' is not a JSON object (it is a list)"),
        ("m.jsonl", '\n{"text": "x"}\n', "no audio in line 2 of '{path}', which has text"),
        ("m.jsonl", '{"audio": "a.wav"}\n', "no text in line 1 of '{path}'"),
        ("m.jsonl", '{"audio": "a.wav", "text": ["x"]}\n', "text in line 1 of '{path}' is ['x']"),
        (
            "m.jsonl",
            '{"audio": "a.wav", "text": "x", "duration": "long"}\n',
            "duration in line 1 of '{path}' is 'long'",
        ),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "offset": -1}\n', "offset in line 1 of '{path}' is -1"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "duration": Infinity}\n', "duration in line 1 of '{path}' is inf"),
        ("m.jsonl", b'{"audio": "a.wav", "text": "\xff"}\n', "line 1 of '{path}' is not UTF-8"),
        ("m.jsonl.gz", b"no gzip", "'{path}' cannot be read after line 0 (Not a gzipped file"),
        ("m.csv", "audio,words\na.wav,x\n", "line 1 of '{path}' has the columns audio, words: expected text"),
        ("m.csv", "", "line 1 of '{path}' has the columns none"),
        ("m.csv", "audio,text\na.wav,x\na.wav,x, y\n", "line 3 of '{path}' has 3 fields, but line 1 has 2"),
        ("m.csv", "audio,text\na.wav,x\na.wav\n", "line 3 of '{path}' has 1 fields, but line 1 has 2"),
        ("m.csv", 'audio,text\na.wav,x\na.wav,"open\na.wav,z\n', "line 3 of '{path}' has a quotation mark"),
        ("m.csv", 'audio,text\na.wav,"x" y\n', "line 2 of '{path}' has a quotation mark"),
        ("m.csv", 'audio,text\na.wav,"x\nb.wav,y"\n', "line 2 of '{path}' has a quotation mark that makes one value"),
        ("m.csv", b"audio,text\na.wav,x\na.wav,\xff\n", "line 3 of '{path}' is not UTF-8"),
        ("m.csv", "audio,text,text\na.wav,x,y\n", "line 1 of '{path}' has more than one column 'text'"),
        ("m.csv", "audio,text\na.wav,x\0y\n", "text in line 2 of '{path}' has a NUL character"),
        ("m.tsv", "audio\ttext\na.wav\tx\ty\n", "line 2 of '{path}' has 3 fields, but line 1 has 2: tabs separate"),
        ("m.jsonl", '{"audio": "a.wav", "text": true}\n', "text in line 1 of '{path}' is True, expected text"),
        ("m.jsonl", '{"audio": "a.wav", "text": 7}\n', "text in line 1 of '{path}' is 7, expected text"),
        ("m.jsonl", '{"audio": "a.wav", "text": NaN}\n', "no text in line 1 of '{path}'"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "speaker": 1.5}\n', "speaker in line 1 of '{path}' is 1.5"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x\\ud83d"}\n', "line 1 of '{path}' has half of a surrogate pair"),
        ("m.jsonl", '{"audio": "b\\ud83d.wav", "text": "x"}\n', "line 1 of '{path}' has half of a surrogate pair"),
        (
            "m.jsonl",
            '{"audio": "a.wav", "text": "x", "text": "y"}\n',
            "line 1 of '{path}' is not a JSON object",
        ),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "duration": 1e300}\n', "duration in line 1 of '{path}' is 1e+300"),
        (
            "m.jsonl",
            '{"audio": "a.wav", "text": "x", "shard_id": 0}\n',
            "line 1 of '{path}' is of a NeMo tarred",
        ),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "channel": "left"}\n', "channel in line 1 of '{path}' is 'left'"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "channel": [0, 1]}\n', "channel in line 1 of '{path}' is [0, 1]"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "channel": true}\n', "channel in line 1 of '{path}' is True"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "transforms": [{}]}\n', "line 1 of '{path}' has transforms"),
        ("m.jsonl", '{"audio": "a.wav", "text": "x", "start": 1}\n', "line 1 of '{path}' has the field 'start'"),
        ("m.csv", "audio,text,end\na.wav,x,2\n", "line 2 of '{path}' has the field 'end'"),
        ("m.jsonl", '{"id": "c", "type": "MonoCut", "features": {}}\n', "line 1 of '{path}' is a cut of lhotse"),
        (
            "m.jsonl",
            f'{{"audio": "a.wav", "text": "x", "offset": {"9" * 400}}}\n',
            "offset in line 1 of '{path}' is 999",
        ),
        (
            "m.jsonl",
            f'{{"audio": "a.wav", "text": "x", "channel": {"9" * 400}}}\n',
            "channel in line 1 of '{path}' is 9",
        ),
        ("m.txt", "a.wav x\n", "the manifest '{path}' has an unknown suffix"),
    ],
)
def test_an_invalid_manifest_is_reported_with_file_and_line(clips, name, content, message):
    path = clips / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(message.format(path=path))) as caught:
        list(opened(path).utterances())
    assert "\n" not in str(caught.value)


def test_a_quotation_mark_in_tsv_is_a_letter(clips):
    rows = [("a.wav", '"open and never closed'), ("sub/b c.wav", 'say "hi"'), ("sub/größe 你好.wav", '"')]
    path = clips / "m.tsv"
    path.write_text("audio\ttext\n" + "".join(f"{audio}\t{text}\n" for audio, text in rows))
    assert [(u.audio, u.text) for u in opened(path).utterances()] == rows


def test_names_may_be_integers_and_nan_is_absent(clips):
    rows = [{"audio": "a.wav", "text": "x", "id": 7, "speaker": 1089.0, "split": math.nan, "duration": math.nan},
            {"audio": "sub/b c.wav", "text": "y", "speaker": math.nan, "key": None}]  # fmt: skip
    made = list(opened(write_json_lines(clips / "m.jsonl", rows)).utterances())
    assert [(u.id, u.speaker, u.split, u.samples) for u in made] == [("7", "1089", "", 1600), ("sub/b c", "", "", 3200)]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_the_channel_of_a_row_is_read(clips, form):
    stereo = np.random.RandomState(1).uniform(-0.3, 0.3, (16_000, 2)).astype(np.float32)
    soundfile.write(clips / "stereo.wav", stereo, 16_000, subtype="FLOAT")
    selected = [("channel", 0), ("channel", "1"), ("channel_selector", [1] if form == "jsonl" else 1.0),
                ("channel_selector", "average"), ("channel", 2)]  # fmt: skip
    found = []
    for name, value in selected:
        rows = [{"audio": "stereo.wav", "text": "x", name: value}]
        path = clips / f"m.{form}"
        source = opened(write_json_lines(path, rows) if form == "jsonl" else write_table(path, rows))
        (uri,) = (u.audio for u in source.utterances())
        found += [data for _, data in source.read([uri])]
    for data, expected in zip(found, [stereo[:, 0], stereo[:, 1], stereo[:, 1], stereo.mean(axis=1)], strict=False):
        np.testing.assert_array_equal(decode(data), expected)
    assert str(found[4]) == "no channel 2 in a recording with 2"


def test_columns_that_look_like_segments_are_used_or_left_out_as_the_user_says(clips):
    rows = [{"audio": "sub/b c.wav", "text": "x", "start": 0.05, "end": 0.1, "len": 0.05}]
    path = write_json_lines(clips / "m.jsonl", rows)
    with pytest.raises(UserError, match=r"has the field 'start', .*set source\.columns\.offset to a column, or to ''"):
        list(opened(path).utterances())
    (whole,) = opened(path, columns={"offset": "", "duration": ""}).utterances()
    (segment,) = opened(path, columns={"offset": "start", "duration": "len"}).utterances()
    assert (whole.audio, segment.audio) == ("sub/b c.wav", "sub/b c.wav#t=0.05,0.1")


@pytest.mark.parametrize("audio", ["x" * 300 + ".wav", "/", "a.wav/b.wav", "sub"])
def test_a_path_that_cannot_be_a_file_is_a_failure(clips, audio):
    source = opened(write_json_lines(clips / "m.jsonl", [{"audio": audio, "text": "x", "key": "k", "offset": 0}]))
    (made,) = source.utterances()
    assert source.problems == [f"1 recordings that do not exist (each becomes a failure): {audio}"]
    assert source.tokens([made.audio, audio, "a\0"]) == ["", "", ""]
    assert all(isinstance(data, Exception) for _, data in source.read([made.audio, audio, "a\0"]))


@pytest.mark.parametrize("audio", ["a\0.wav", "", None, 5])
def test_a_value_that_is_no_path_is_refused_with_its_line(clips, audio):
    path = write_json_lines(clips / "m.jsonl", [{"audio": audio, "text": "x"}])
    with pytest.raises(UserError, match="audio in line 1 of"):
        list(opened(path).utterances())


@pytest.mark.parametrize("path", ["x" * 300, "m.jsonl/m.jsonl", "a\0b", "train_OP_0..63_CL_.json"])
@pytest.mark.parametrize("kind", ["manifest", "parquet", "librispeech"])
def test_a_source_path_that_cannot_exist_is_refused_in_a_sentence(clips, path, kind):
    write_json_lines(clips / "m.jsonl", [{"audio": "a.wav", "text": "x"}])
    with pytest.raises(UserError) as error:
        list(open_source(SourceConfig(kind=kind, path=f"{clips}/{path}")).utterances())
    assert "source.path" in str(error.value)
    assert "\n" not in str(error.value)
    assert kind != "manifest" or "_OP_" not in path or "tarred" in str(error.value)


def test_a_damaged_gzip_file_is_refused_wherever_it_is_cut_or_changed(clips):
    rows = [{"audio": "a.wav", "text": f"text {n}", "key": f"k{n}"} for n in range(200)]
    path = write_json_lines(clips / "m.jsonl.gz", rows)
    data = path.read_bytes()
    for position in range(10, len(data), 7):
        for damaged in (data[:position], data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"m\.jsonl\.gz'"):
                list(opened(path).utterances())


def test_files_of_a_mac_are_no_manifests(lhotse_folder):
    folder, _ = lhotse_folder
    (folder / "._recordings.jsonl.gz").write_bytes(b"\0\5\26\7")
    assert len(list(opened(folder).utterances())) == 3


def test_two_recordings_of_one_id_are_refused(lhotse_folder):
    folder, _ = lhotse_folder
    recordings = [lhotse_recording("r1", "stereo.wav", 1.0, [0, 1]), lhotse_recording("r1", "mono.wav", 0.5, [0])]
    write_json_lines(folder / "recordings.jsonl.gz", recordings)
    with pytest.raises(UserError, match=r"line 2 of .* has the id 'r1', as has line 1 of"):
        list(opened(folder).utterances())


def test_transforms_of_a_recording_are_refused_by_name(lhotse_folder):
    folder, _ = lhotse_folder
    speed = {"name": "Speed", "kwargs": {"factor": 1.1}}
    recordings = [lhotse_recording("r1", "stereo.wav", 1.0, [0, 1]), lhotse_recording("r2", "mono.wav", 0.5, [0])]
    write_json_lines(folder / "recordings.jsonl.gz", [recordings[0], {**recordings[1], "transforms": [speed]}])
    with pytest.raises(UserError, match=r"recording 'r2' in line 2 of .* has the transforms Speed, .*not applied"):
        list(opened(folder).utterances())
    write_json_lines(folder / "recordings.jsonl.gz", [{**each, "transforms": None} for each in recordings])
    assert len(list(opened(folder).utterances())) == 3


@pytest.mark.parametrize(
    ("channel", "sources", "result"),
    [
        (1, [[0, 1]], "stereo.wav#t=0,&c=1"),
        ([1], [[0, 1]], "stereo.wav#t=0,&c=1"),
        ([0, 1], [[0, 1]], "stereo.wav"),
        ([1, 0], [[0, 1]], "stereo.wav"),
        (3, [[2, 3]], "stereo.wav#t=0,&c=1"),
        (1, [[0], [1]], "mono.wav"),
        (1, [[0]], "has the channels .1., which no file of its recording"),
        (2, [[0, 1]], "has the channels .2., which no file of its recording"),
        ([0, 1], [[0], [1]], "has the channels .0, 1., which no file of its recording"),
        ([0, 2], [[0, 1, 2]], "names 2 of 3 channels: choose one channel, or all"),
        ("left", [[0, 1]], "the channels 'left' in line 1 of .* are not integers"),
        (0, ["left"], "the channels 'left' in line 1 of .* are not integers"),
        (True, [[0, 1]], "the channels True in line 1 of .* are not integers"),
    ],
)
def test_the_channel_of_a_supervision_is_read_or_refused(lhotse_folder, channel, sources, result):
    folder, _ = lhotse_folder
    files = [{"type": "file", "channels": channels, "source": name}
             for channels, name in zip(sources, ("stereo.wav", "mono.wav"), strict=False)]  # fmt: skip
    write_json_lines(folder / "recordings.jsonl.gz", [{**lhotse_recording("r", "", 1.0, []), "sources": files}])
    write_json_lines(folder / "supervisions.jsonl.gz", [lhotse_supervision("s", "r", 0.0, 1.0, channel=channel)])
    if ".wav" in result:
        assert [u.audio for u in opened(folder).utterances()] == [result]
    else:
        with pytest.raises(UserError, match=result):
            list(opened(folder).utterances())


def test_a_recording_listed_twice_is_refused(clips):
    path = write_json_lines(clips / "m.jsonl", [{"audio": "a.wav", "text": "x"}] * 2)
    with pytest.raises(UserError, match="duplicate key 'a'"):
        list(opened(path).utterances())


def test_a_segment_is_the_same_bytes_each_time(clips):
    soundfile.write(clips / "long.wav", np.zeros(16_000), 16_000)
    source = opened(
        write_json_lines(clips / "m.jsonl", [{"audio": "long.wav", "text": "x", "offset": 0.1, "duration": 0.2}])
    )
    uris = [u.audio for u in source.utterances()]
    assert list(source.read(uris)) == list(source.read(uris))
    assert soundfile.info(io.BytesIO(dict(source.read(uris))[uris[0]])).subtype == "FLOAT"
