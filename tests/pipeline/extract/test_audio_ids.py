"""Audio ids: the content of every recording, read only if it may have changed."""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import flac, librispeech_files, wav, write_archive, write_tree

from pipeline.extract import audio_ids
from pipeline.extract.audio_ids import AudioIndex, find_audio_ids, record
from pipeline.extract.listing import Listing, list_source
from pipeline.sources import Source, SourceConfig, open_source
from shards.files import open_file
from shards.format.audio_id import UNKNOWN_AUDIO, audio_id

OLD = 1_600_000_000_123_456_789  # nanoseconds


class Corpus:
    """Clips with a manifest, their index, and the number of recordings that the last run read."""

    def __init__(self, folder: Path) -> None:
        self.clips, self.index = folder / "clips", AudioIndex(folder / "cache" / "index.parquet")
        self.path = folder / "cache" / "index.parquet"
        self.reads = 0
        self.clips.mkdir(parents=True)
        for name in "abc":
            self.write(name, name.encode())
        self.list("a", "b", "c")

    def write(self, name: str, data: bytes, mtime: int = OLD) -> None:
        file = self.clips / f"{name}.wav"
        file.write_bytes(data)
        os.utime(file, ns=(mtime, mtime))

    def list(self, *names: str) -> None:
        with open(self.clips / "list.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["audio", "text", "key"], *([f"{name}.wav", "text", number] for number, name in enumerate(names))]
            )

    def source(self) -> Source:
        return open_source(SourceConfig(kind="manifest", path=str(self.clips / "list.csv")))

    def listing(self) -> Listing:
        return list_source(self.source(), self.path.parent)

    def find(self, **settings) -> list[bytes]:
        return find_audio_ids(self.source(), self.listing(), self.index, **settings).to_pylist()


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """A corpus whose ids are in the index."""
    made = Corpus(tmp_path)
    digest = audio_ids._file_sha256

    def count(path: str) -> bytes:
        made.reads += 1
        return digest(path)

    monkeypatch.setattr(audio_ids, "_file_sha256", count)
    assert made.find() == sha256(b"a", b"b", b"c")
    assert made.reads == 3
    made.reads = 0
    return made


def sha256(*contents: bytes) -> list[bytes]:
    return [hashlib.sha256(data).digest() for data in contents]


def test_a_second_run_reads_nothing(clips):
    assert clips.find() == sha256(b"a", b"b", b"c")
    assert clips.reads == 0


@pytest.mark.parametrize(
    ("data", "mtime"), [(b"B", OLD + 1), (b"bb", OLD), (b"B", OLD - 10**15)], ids=["size kept", "mtime kept", "older"]
)
def test_only_a_changed_recording_is_read_again(clips, data, mtime):
    clips.write("b", data, mtime)
    assert clips.find() == sha256(b"a", data, b"c")
    assert clips.reads == 1


def test_bytes_that_change_under_the_same_size_and_mtime_are_found_by_rehash_alone(clips):
    clips.write("b", b"B")
    assert clips.find() == sha256(b"a", b"b", b"c")
    assert clips.find(rehash=True) == sha256(b"a", b"B", b"c")
    assert clips.reads == 3
    assert clips.find() == sha256(b"a", b"B", b"c")  # the index was corrected
    assert clips.reads == 3


def test_a_recording_that_was_just_written_is_read_each_time(clips):
    clips.write("b", b"B", time.time_ns())
    assert clips.find() == clips.find() == sha256(b"a", b"B", b"c")
    assert clips.reads == 2


def test_a_recording_that_changes_between_listing_and_hashing_is_not_remembered(clips):
    clips.write("b", b"B", OLD + 1)
    listing = clips.listing()
    clips.write("b", b"C", OLD + 2)
    assert find_audio_ids(clips.source(), listing, clips.index).to_pylist() == sha256(b"a", b"C", b"c")
    clips.write("b", b"B", OLD + 1)  # put back, with its old modification time
    assert clips.find() == sha256(b"a", b"B", b"c")


def test_recordings_that_are_not_in_the_listing_are_remembered(clips):
    clips.list("a")
    clips.write("a", b"A", OLD + 1)
    assert clips.find() == sha256(b"A")
    clips.list("c", "b", "a")
    assert clips.find() == sha256(b"c", b"b", b"A")
    assert clips.reads == 1


def test_the_number_of_other_recordings_is_bounded(clips, monkeypatch):
    monkeypatch.setattr(audio_ids, "MAX_OTHER_ENTRIES", 1)
    clips.list("a")
    clips.write("a", b"A", OLD + 1)
    clips.find()
    assert sorted(pq.read_table(clips.path)["uri"].to_pylist()) == ["a.wav", "b.wav"]


def test_two_utterances_of_one_recording_have_one_id_and_it_is_read_once(clips):
    clips.list("a", "b", "c", "a")
    assert clips.find() == sha256(b"a", b"b", b"c", b"a")
    assert clips.reads == 0
    assert clips.find(rehash=True) == sha256(b"a", b"b", b"c", b"a")
    assert clips.reads == 3


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "foreign", "version", "folder of recordings"])
def test_an_index_that_cannot_be_used_is_rebuilt(clips, damage):
    data = clips.path.read_bytes()
    table = pq.read_table(clips.path)
    if damage == "truncated":
        clips.path.write_bytes(data[: len(data) // 2])
    elif damage == "bit":
        place = data.index(hashlib.sha256(b"b").digest()) + 5
        clips.path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif damage == "empty":
        clips.path.write_bytes(b"")
    elif damage == "foreign":
        pq.write_table(pa.table({"uri": ["a.wav"], "audio_id": [b"?"]}), clips.path)
    else:
        key = b"root" if damage == "folder of recordings" else b"earshard audio index"
        lies = table.set_column(2, "audio_id", pa.array([bytes(range(32))] * 3, pa.binary(32)))
        pq.write_table(lies.replace_schema_metadata({**table.schema.metadata, key: b"other"}), clips.path)
    assert clips.find() == sha256(b"a", b"b", b"c")
    assert clips.reads == 3
    assert pq.read_table(clips.path).equals(table)


def test_an_index_that_cannot_be_written_is_reported_and_costs_nothing_else(clips, capsys):
    clips.path.unlink()
    clips.path.mkdir()
    assert clips.find() == sha256(b"a", b"b", b"c")
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: '{clips.path}' cannot be written (Is a directory): the next run reads")


def test_a_recording_that_cannot_be_read_has_no_id(clips):
    (clips.clips / "b.wav").unlink()
    os.mkfifo(clips.clips / "b.wav")
    clips.list("a", "b", "absent")
    assert clips.find() == [*sha256(b"a"), UNKNOWN_AUDIO, UNKNOWN_AUDIO]


def test_an_interrupted_run_keeps_what_it_hashed(clips, monkeypatch):
    clips.path.unlink()

    def interrupted(*args):
        yield from sha256(b"a", b"b")
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(audio_ids, "_hash_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clips.find()
    assert clips.find() == sha256(b"a", b"b", b"c")
    assert clips.reads == 1


def test_the_index_is_saved_while_hashing(clips, monkeypatch):
    clips.path.unlink()
    monkeypatch.setattr(audio_ids, "_SAVE_INTERVAL", -1.0)
    saved = []
    hash_files = audio_ids._hash_files

    def watch(*args):
        for digest in hash_files(*args):
            saved.append(len(pq.read_table(clips.path)) if clips.path.exists() else 0)
            yield digest

    monkeypatch.setattr(audio_ids, "_hash_files", watch)
    clips.find()
    assert saved == [0, 1, 2]


def test_ids_that_encoding_found_are_remembered(clips):
    clips.write("b", b"B", OLD + 1)
    source, listing = clips.source(), clips.listing()
    uris = pa.array(["b.wav", "elsewhere.wav", "a.wav"])
    found = pa.array([*sha256(b"B", b"?"), UNKNOWN_AUDIO], pa.binary(32))
    record(source, listing, clips.index, uris, found)
    assert clips.find() == sha256(b"a", b"B", b"c")
    assert clips.reads == 0


def test_many_recordings_are_found_in_any_order(clips, monkeypatch):
    monkeypatch.setattr("pipeline.extract.listing._BATCH", 40)
    monkeypatch.setattr(audio_ids, "_ROWS", 30)
    monkeypatch.setattr(audio_ids, "hash", lambda text: len(text), raising=False)  # most are equal
    names = [f"clip {number}" for number in range(300)]
    for name in names[::2]:
        clips.write(name, name.encode())
    clips.list(*names)
    expected = [hashlib.sha256(name.encode()).digest() if number % 2 == 0 else UNKNOWN_AUDIO
                for number, name in enumerate(names)]  # fmt: skip
    assert clips.find() == expected
    clips.reads = 0
    clips.list(*names[::-1])
    assert clips.find() == expected[::-1]
    assert clips.reads == 150  # those that do not exist


def find(config: dict, folder: Path, **settings) -> list[bytes]:
    source = open_source(SourceConfig.model_validate(config))
    return find_audio_ids(source, list_source(source, folder), AudioIndex(folder / "index"), **settings).to_pylist()


def contents(config: dict) -> list[bytes]:
    source = open_source(SourceConfig.model_validate(config))
    return [data for _, data in source.read([u.audio for u in source.utterances()])]


def test_the_segments_of_a_file_have_ids_of_their_own_and_the_file_is_read_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(audio_ids, "open_file", lambda path: opened.append(path.name) or open_file(path))
    for number in range(2):
        (tmp_path / f"{number}.wav").write_bytes(wav(16_000, number))
    rows = [f"{number}.wav,text,{start},0.1" for start in (0, 0.25, 0.5) for number in range(2)]
    (tmp_path / "list.csv").write_text("\n".join(["audio,text,offset,duration", *rows]))
    config = {"kind": "manifest", "path": str(tmp_path / "list.csv")}
    expected = [audio_id(hashlib.sha256(wav(16_000, number)).digest(), f"t={start},{stop}")
                for start, stop in (("0", "0.1"), ("0.25", "0.35"), ("0.5", "0.6")) for number in range(2)]  # fmt: skip
    assert find(config, tmp_path / "cache") == expected
    assert [name for name in opened if name != "index"] == ["0.wav", "1.wav"]


def age(*files: Path) -> None:
    for file in files:
        os.utime(file, ns=(OLD, OLD))


@pytest.fixture
def not_read(monkeypatch):
    """Call it to make sure that nothing is read from now on."""

    def forbid(*args):
        raise AssertionError("a recording was read")

    def start() -> None:
        monkeypatch.setattr(audio_ids, "_content_sha256", forbid)
        monkeypatch.setattr(audio_ids, "_file_sha256", forbid)

    return start


def test_recordings_in_archives_and_in_folders_have_the_same_ids(tmp_path, not_read):
    files = librispeech_files(["dev-clean"])
    tree = write_tree(tmp_path / "tree", files)
    (tmp_path / "archives").mkdir()
    age(write_archive(tmp_path / "archives" / "dev-clean.tar.gz", files), *tree.rglob("*.flac"))
    trees, archives = ({"kind": "librispeech", "path": str(tmp_path / name)} for name in ("tree", "archives"))
    expected = sha256(*contents(trees))
    assert find(trees, tmp_path / "1") == expected
    assert sorted(find(archives, tmp_path / "2")) == sorted(expected)
    assert find(archives, tmp_path / "2") == sha256(*contents(archives))
    not_read()
    assert find(trees, tmp_path / "1") == expected
    assert sorted(find(archives, tmp_path / "2")) == sorted(expected)


def test_recordings_in_parquet_files_are_read_again_for_another_column_only(tmp_path, not_read):
    rows = [{"id": str(n), "text": "text", "audio": flac(1600, n), "other": flac(1600, 10 + n)} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=2)
    age(tmp_path / "train.parquet")
    config = {"kind": "parquet", "path": str(tmp_path)}
    assert find(config, tmp_path / "cache") == sha256(*(flac(1600, n) for n in range(5)))
    other = find({**config, "columns": {"audio": "other"}}, tmp_path / "cache")
    assert other == sha256(*(flac(1600, 10 + n) for n in range(5)))
    not_read()
    assert find({**config, "columns": {"audio": "other"}}, tmp_path / "cache") == other


def test_synthetic_recordings_are_hashed_only_when_asked(tmp_path, not_read):
    expected = sha256(*contents({"kind": "tones"}))
    assert find({"kind": "tones"}, tmp_path) == [UNKNOWN_AUDIO] * 5
    wanted = np.array([False, True, False, False, True])
    some = find({"kind": "tones"}, tmp_path, hash_unknown=wanted)
    assert some == [digest if ask else UNKNOWN_AUDIO for digest, ask in zip(expected, wanted, strict=True)]
    assert find({"kind": "tones"}, tmp_path, hash_unknown=True) == expected
    not_read()
    assert find({"kind": "tones"}, tmp_path) == expected
    assert find({"kind": "tones", "seed": 1}, tmp_path) == [UNKNOWN_AUDIO] * 5


@pytest.mark.parametrize("kind", ["tones", "speech"])
def test_the_token_of_a_synthetic_recording_names_what_the_uri_does_not(kind):
    source = open_source(SourceConfig(kind=kind))
    tokens: Sequence[str] = source.tokens([next(source.utterances()).audio] * 2)
    assert tokens[0] == tokens[1]
    assert ("espeak-ng" if kind == "speech" else "numpy") in tokens[0]
