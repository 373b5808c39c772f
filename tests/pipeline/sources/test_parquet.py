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


def columns(**named) -> pa.Table:
    """Return a table of two recordings; an array as keyword replaces or adds a column."""
    audio = [{"bytes": flac(1600 + n, n), "path": f"spk{n}/{n}.flac"} for n in range(2)]
    return pa.table({"audio": pa.array(audio), "text": ["one", "zwei äö"], **named})


def listed(folder: Path, table: pa.Table, **settings) -> list:
    pyarrow.parquet.write_table(table, folder / "train.parquet", store_schema=False)
    return list(opened(folder / "train.parquet", **settings).utterances())


def test_bytes_are_utf_8_text_in_every_text_column(tmp_path):
    table = columns(text=pa.array([b"one", "zwei äö".encode()]), id=pa.array([b"u0", b"u1"]), speaker_id=[b"s", None])
    made = listed(tmp_path, table)
    assert [(u.id, u.text, u.speaker) for u in made] == [("u0", "one", "s"), ("u1", "zwei äö", "")]


@pytest.mark.parametrize(
    ("speakers", "expected"),
    [
        (pa.array([1089, None], pa.int16()), ["1089", ""]),
        (pa.array([1089.0, float("nan")]), ["1089", ""]),
        (pa.array([1089.0, None], pa.float32()), ["1089", ""]),
        (pa.nulls(2), ["", ""]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
    ],
)
def test_speakers_may_be_integers_and_nan_is_absent(tmp_path, speakers, expected):
    assert [u.speaker for u in listed(tmp_path, columns(speaker_id=speakers))] == expected


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"text": pa.array([["a", "b"], ["c"]])}, "column 'text' of .* has values of type list<.*only strings"),
        ({"text": pa.array([True, False])}, "column 'text' of .* has values of type bool: .*only strings"),
        ({"text": pa.array([1, 2])}, "column 'text' of .* has values of type int64: .*only strings"),
        ({"text": pa.array([{"a": "b"}] * 2)}, "column 'text' of .* has values of type struct<.*only strings"),
        ({"id": pa.array([True, False])}, "column 'id' of .* has values of type bool: .*only strings or integers"),
        ({"speaker_id": pa.array([["a"], ["b"]])}, "column 'speaker_id' of .* has values of type list<"),
        ({"speaker_id": pa.array([1.0, 1.5])}, "speaker_id in 'train.parquet#1' is 1.5, expected text"),
        ({"text": pa.array([b"a", b"\xff"])}, "text in 'train.parquet#1' is not UTF-8"),
        (
            {"text": pa.array([b"a", b"\xff"]).view(pa.string())},
            "column 'text' of .* is not UTF-8 in row 1: correct or convert it",
        ),
        ({"audio": ["a.wav", "b.wav"]}, "column 'audio' of .* type string, .*list the paths .*source.kind=manifest"),
        ({"audio": pa.array([[0.5], [0.25]])}, "column 'audio' of .* type list<.*: write each recording into it as a"),
        ({"audio": pa.array([[1], [2]])}, "column 'audio' of .* type list<.*: write each recording into it as a WAV"),
        ({"audio": pa.array([{"path": "a"}] * 2)}, "column 'audio' of .* type struct<.*: list the paths"),
        (
            {"audio": pa.array([{"array": [0.5], "sampling_rate": 16000}] * 2)},
            "column 'audio' of .* type struct<.*: write each recording into it",
        ),
        (
            {
                "audio": pa.array(
                    [{"bytes": None, "path": "a"}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})
                )
            },
            "column 'audio' of .* has paths but no bytes: list the paths .* source.kind=manifest",
        ),
    ],
)
def test_columns_of_other_types_are_refused_by_name(tmp_path, named, reason):
    with pytest.raises(UserError, match=reason) as error:
        listed(tmp_path, columns(**named))
    assert "\n" not in str(error.value)


def test_recordings_of_one_name_in_several_folders_are_several_utterances(tmp_path):
    paths = ["spk0/audio.wav", "/x/spk1/audio.wav", "spk1/other.wav", "spk2/1.2.wav"]
    audio = [{"bytes": flac(1600 + n, n), "path": path} for n, path in enumerate(paths)]
    made = listed(tmp_path, pa.table({"audio": audio, "text": ["x"] * 4}))
    assert [u.id for u in made] == ["spk0/audio", "x/spk1/audio", "other", "1.2"]
    assert len({u.key for u in made}) == 4
    made = listed(tmp_path, pa.table({"audio": [flac()] * 4, "text": ["x"] * 4, "file": paths}))
    assert [u.id for u in made] == ["spk0/audio", "x/spk1/audio", "other", "1.2"]


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    table = columns().append_column("text", pa.array(["x", "y"]))
    with pytest.raises(UserError, match="has more than one column 'text'"):
        listed(tmp_path, table)


def test_files_of_a_mac_are_skipped(folder):
    (folder / "test/._0000.parquet").write_bytes(b"\0\5\26\7")
    (folder / "__MACOSX/test").mkdir(parents=True)
    (folder / "__MACOSX/test/0000.parquet").write_bytes(b"\0\5\26\7")
    assert len(list(opened(folder, splits=["test"]).utterances())) == 3
    assert len(list(opened(folder / "**/*.parquet", splits=["test"]).utterances())) == 3


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
