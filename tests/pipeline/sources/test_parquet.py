from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny_corpus import flac

from pipeline.audio import AudioError
from pipeline.sources import Source, SourceConfig, open_source
from shards.errors import UserError


def opened(path: Path | str, **settings) -> Source:
    return open_source(SourceConfig(kind="parquet", path=str(path), **settings))


def rows(first: int, count: int) -> list[dict]:
    return [
        {
            "file": f"/somewhere/1-2-{n:04d}.flac",
            "audio": {"bytes": flac(1600 + n, n), "path": f"1-2-{n:04d}.flac"},
            "text": f"TEXT {n}",
            "speaker_id": n // 2,
            "chapter_id": 7,
            "id": f"1-2-{n:04d}",
        }
        for n in range(first, first + count)
    ]


def write(path: Path, table_rows: list[dict], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(table_rows), path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "clean/train.100/0000.parquet", rows(0, 10))
    write(tmp_path / "clean/train.100/0001.parquet", rows(10, 6))
    write(tmp_path / "clean/test/0000.parquet", rows(100, 3))
    return tmp_path / "clean"


def test_a_folder_yields_every_row_with_text_speaker_split_and_length(folder):
    made = list(opened(folder, splits=["train.100"]).utterances())
    assert [u.key for u in made] == [f"1-2-{n:04d}" for n in range(16)]
    assert [u.audio for u in made[9:11]] == ["train.100/0000.parquet#9", "train.100/0001.parquet#0"]
    assert [(u.text, u.speaker, u.split, u.samples) for u in made[:1]] == [("TEXT 0", "0", "train.100", 1600)]
    assert {u.split for u in opened(folder).utterances()} == {"test", "train.100"}


def test_a_file_and_a_glob_yield_the_same_rows(folder, tmp_path):
    for path in (folder / "train.100/0001.parquet", folder / "train.100/*1.parquet", tmp_path / "**/0001.parquet"):
        source = opened(path)
        made = list(source.utterances())
        assert [u.key for u in made] == [f"1-2-{n:04d}" for n in range(10, 16)]
        assert all(isinstance(data, bytes) for _, data in source.read([u.audio for u in made]))


@pytest.mark.parametrize("name", ["train-00000-of-00002.parquet", "train.parquet", "train/0000.parquet"])
def test_the_split_is_in_the_name(tmp_path, name):
    write(tmp_path / name, rows(0, 1))
    assert [u.split for u in opened(tmp_path).utterances()] == ["train"]


def test_read_yields_the_requested_order_and_reads_a_row_group_once(folder, monkeypatch):
    source = opened(folder)
    made = list(source.utterances())
    asked = [u.audio for u in made[::3] + made[::-2]]
    read = []
    real = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group, **more: read.append((id(self), group)) or real(self, group, **more),
    )
    answers = list(source.read(asked))
    assert [uri for uri, _ in answers] == asked
    number = {u.audio: int(u.key[-4:]) for u in made}
    assert all(data == flac(1600 + number[uri], number[uri]) for uri, data in answers)
    assert len(read) == 3 + 2 + 1


def test_missing_rows_and_rows_without_audio_are_exceptions(tmp_path):
    table = rows(0, 3)
    table[1]["audio"]["bytes"] = None
    path = write(tmp_path / "train.parquet", table)
    source = opened(path)
    made = list(source.utterances())
    assert [u.samples for u in made] == [1600, 0, 1602]
    assert source.problems == ["1 rows without audio bytes: train.parquet#1"]
    asked = [
        "train.parquet#2",
        "train.parquet#3",
        "train.parquet#1",
        "absent.parquet#0",
        "train.parquet#x",
        "train.parquet#0",
    ]
    answers = list(source.read(asked))
    assert [uri for uri, _ in answers] == asked
    assert [isinstance(data, Exception) for _, data in answers] == [False, True, True, True, True, False]
    assert isinstance(answers[2][1], AudioError)


def test_optional_columns_may_be_missing(tmp_path):
    write(tmp_path / "a.parquet", [{"audio": {"bytes": flac(), "path": "x/5-6-7.flac"}, "text": "T"}])
    assert [(u.id, u.speaker) for u in opened(tmp_path / "a.parquet").utterances()] == [("5-6-7", "")]
    write(tmp_path / "b.parquet", [{"audio": flac(), "text": "T", "speaker_id": "s"}])
    made = list(opened(tmp_path / "b.parquet").utterances())
    assert [(u.id, u.speaker) for u in made] == [("b.parquet#0", "s")]
    assert dict(opened(tmp_path / "b.parquet").read(["b.parquet#0"])) == {"b.parquet#0": flac()}


def test_a_file_without_audio_or_text_is_refused_with_its_columns(tmp_path):
    write(tmp_path / "a.parquet", [{"audio": flac(), "words": "T"}])
    with pytest.raises(UserError, match=r"no column text in .*a\.parquet', which has audio, words"):
        list(opened(tmp_path).utterances())


def test_a_corrupt_file_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", rows(0, 8))
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:2000])
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read as parquet"):
        list(opened(path).utterances())


def test_a_missing_split_is_refused_with_the_present_ones(folder):
    with pytest.raises(UserError, match=r"no split dev in .*which has test, train\.100"):
        opened(folder, splits=["dev"])


def test_overlapping_configurations_of_a_mirror_are_duplicates(folder, tmp_path):
    write(tmp_path / "all/test.clean/0000.parquet", rows(100, 3))
    with pytest.raises(UserError, match=r"duplicate key '1-2-0100' in the source.*all/test\.clean.*clean/test"):
        list(opened(tmp_path, splits=["test.clean", "test"]).utterances())
