"""Tables whose columns have other names than the default ones."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny_corpus import flac, wav

from pipeline.config import ExtractConfig
from pipeline.sources import Source, SourceConfig, open_source
from shards.config.base import load_config
from shards.errors import UserError

ROWS = [
    {"path": "a.wav", "sentence": "one", "client_id": "anna", "name": "k1", "part": "train", "from": "0", "for": "0.1"},
    {"path": "b.wav", "sentence": "two", "client_id": "ben", "name": "k2", "part": "test", "from": "0", "for": "0.1"},
]
COLUMNS = {
    "audio": "path",
    "text": "sentence",
    "speaker": "client_id",
    "key": "name",
    "split": "part",
    "offset": "from",
    "duration": "for",
}


def opened(path: Path, **settings) -> Source:
    kind = "parquet" if path.suffix == ".parquet" else "manifest"
    return open_source(SourceConfig(kind=kind, path=str(path), **settings))


def write_manifest(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def clips(tmp_path) -> Path:
    (tmp_path / "a.wav").write_bytes(wav(3200, 0))
    (tmp_path / "b.wav").write_bytes(wav(3200, 1))
    return tmp_path


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [{"clip": {"bytes": flac(1600 + n, n), "path": f"{n}.flac"}, "said": f"t{n}", "who": n} for n in range(3)]
    return write_parquet(tmp_path / "train.parquet", rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_every_field_of_a_manifest_is_read_from_the_column_that_it_is_mapped_to(clips, suffix):
    source = opened(write_manifest(clips / f"list{suffix}", ROWS), columns=COLUMNS)
    made = list(source.utterances())
    assert [(u.key, u.text, u.speaker, u.split, u.samples) for u in made] == [
        ("k1", "one", "anna", "train", 1600),
        ("k2", "two", "ben", "test", 1600),
    ]
    assert [u.audio for u in made] == ["a.wav#t=0,0.1", "b.wav#t=0,0.1"]
    assert all(isinstance(data, bytes) for _, data in source.read([u.audio for u in made]))


def test_every_field_of_parquet_files_is_read_from_the_column_that_it_is_mapped_to(table):
    source = opened(table, columns={"audio": "clip", "text": "said", "speaker": "who"})
    made = list(source.utterances())
    assert [(u.key, u.text, u.speaker, u.samples) for u in made] == [
        (str(n), f"t{n}", str(n), 1600 + n) for n in range(3)
    ]
    assert [data for _, data in source.read([u.audio for u in made])] == [flac(1600 + n, n) for n in range(3)]


def test_an_unmapped_field_keeps_its_default_names_and_an_empty_name_leaves_it_out(clips):
    rows = [{"audio": "a.wav", "words": "one", "id": "k1", "speaker": "anna"}]
    path = write_manifest(clips / "list.csv", rows)
    (made,) = opened(path, columns={"text": "words"}).utterances()
    assert (made.key, made.text, made.speaker) == ("k1", "one", "anna")
    (made,) = opened(path, columns={"text": "words", "key": "", "speaker": ""}).utterances()
    assert (made.key, made.text, made.speaker) == ("a", "one", "")


def test_a_mapped_table_has_the_same_plan_as_one_with_the_default_names(clips):
    default = {new: old for old, new in COLUMNS.items()}
    mapped = opened(write_manifest(clips / "list.csv", ROWS), columns=COLUMNS)
    plain = opened(write_manifest(clips / "plain.csv", [{default[k]: v for k, v in row.items()} for row in ROWS]))
    assert list(mapped.utterances()) == list(plain.utterances())
    assert list(mapped.utterances()) == list(plain.utterances())


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "train.parquet"])
def test_the_error_for_a_missing_mapped_column_names_the_present_ones(clips, name):
    rows = [
        {"audio": "a.wav", "text": "x", "speaker_name": "anna"},
        {"audio": "b.wav", "text": "x", "speaker_name": ""},
    ]
    path = clips / name
    if path.suffix == ".parquet":
        write_parquet(path, [{**row, "audio": flac()} for row in rows])
    else:
        write_manifest(path, rows)
    message = (
        f"no column 'speakername' in '{path}', which has audio, text, speaker_name: "
        "correct source.columns.speaker, did you mean 'speaker_name'?"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        next(opened(path, columns={"speaker": "speakername"}).utterances())


def test_a_mapped_column_that_only_some_rows_of_a_jsonl_have_is_accepted(clips):
    path = write_manifest(
        clips / "list.jsonl", [{"audio": "a.wav", "text": "x"}, {"audio": "b.wav", "text": "x", "who": "b"}]
    )
    assert [u.speaker for u in opened(path, columns={"speaker": "who"}).utterances()] == ["", "b"]


def test_one_column_may_be_audio_and_key(clips):
    path = write_manifest(clips / "list.csv", [{"path": "a.wav", "text": "x"}])
    (made,) = opened(path, columns={"audio": "path", "key": "path"}).utterances()
    assert (made.id, made.audio) == ("a.wav", "a.wav")


def test_an_audio_column_of_paths_is_refused_in_parquet_files(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [{"audio": "a.wav", "text": "x"}])
    with pytest.raises(
        UserError, match=r"column 'audio' of .* has values of type string, .*list the paths .* source\.kind=manifest"
    ):
        list(opened(path).utterances())


def test_columns_of_lhotse_manifests_cannot_be_mapped(tmp_path):
    for name in ("recordings.jsonl", "supervisions.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="whose fields have fixed names: remove"):
        list(opened(tmp_path, columns={"text": "words"}).utterances())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kind=manifest", "columns={speeker: x}"], "unknown key 'source.columns.speeker'"),
        (["kind=manifest", "columns={speeker: x}"], "did you mean 'source.columns.speaker'?"),
        (["kind=manifest", "columns={text: ''}"], "key 'source.columns.text'"),
        (
            ["kind=manifest", "columns={text: a, speaker: a}"],
            "column 'a' is set for text and speaker: only audio and key may share a column",
        ),
        (["kind=parquet", "columns={audio: a, key: a}"], "columns.key is 'a', which contains the recordings"),
        (["kind=parquet", "columns={key: audio}"], "columns.key is 'audio', which contains the recordings"),
        (["kind=parquet", "columns.offset=a"], "columns.offset is only for kind manifest, not for parquet"),
        (
            ["kind=librispeech", "columns.text=a"],
            "columns are only for kinds manifest and parquet, not for librispeech",
        ),
    ],
)
def test_an_invalid_mapping_is_a_one_sentence_error(words, message):
    words = ["source.path=x", *(f"source.{word}" for word in words)]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(ExtractConfig, None, words)
    assert "\n" not in str(caught.value)
