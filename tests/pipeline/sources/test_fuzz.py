"""Damaged tables raise nothing but UserError, whether they are read as labels or as a source.

EARSHARD_FUZZ=20000 python -m pytest -m slow tests/pipeline/sources/test_fuzz.py
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import flac, wav

from pipeline.sources import SourceConfig, open_source
from pipeline.sources.librispeech import LibriSpeechArchives
from shards.errors import UserError
from shards.labels.files import read_label_file
from shards.labels.table import canonical_labels

CASES = int(os.environ.get("EARSHARD_FUZZ", "3000"))
PIECES = [
    *(b'"', b"\t", b",", b";", b"\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"..", b"/", b"x" * 300),
    *(b"\\ud83d", b"\\u0000", b"NaN", b"true", b"null", b"-1", b"1e999", b"9" * 30, b"[]", b"{}", b"[[", b'"audio"'),
]
ROWS = [{"key": f"k{n}", "audio": "a.wav", "text": f'say "{n}", ö', "speaker": n, "offset": 0.01 * n, "duration": 0.02,
         "weight": 1.5} for n in range(4)]  # fmt: skip
RECORDING = {"id": "r", "sources": [{"type": "file", "channels": [0, 1], "source": "a.wav"}], "duration": 0.1,
             "sampling_rate": 16000, "num_samples": 1600, "transforms": None}  # fmt: skip
SUPERVISION = {"id": "s", "recording_id": "r", "start": 0.0, "duration": 0.1, "channel": 0, "text": "x", "speaker": "s"}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change one to four places: other bytes, a piece that means something in a table, a part left out or doubled."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((0, 1, 1, 2, 8, 64)))
        new = rng.choice((rng.randbytes(stop - start), rng.choice(PIECES), b"", data[start:stop] * 2))
        data = data[:start] + new + data[stop:]
    return data if rng.random() < 0.9 else data[: rng.randrange(len(data) + 1)]


def csv_file(rows: list[dict]) -> bytes:
    values = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *values]).encode()


def tsv_file(rows: list[dict]) -> bytes:
    return "\n".join("\t".join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)]).encode()


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none")
    return file.getvalue()


def archive(_: list[dict]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {"1-2-0000.flac": flac(160), "1-2.trans.txt": b"1-2-0000 A TEXT\n"}.items():
            member = tarfile.TarInfo(f"LibriSpeech/ö/1/2/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


LABELS: dict[str, Callable[[list[dict]], bytes]] = {
    "a.csv": csv_file, "a.tsv": tsv_file, "a.jsonl": json_lines, "a.parquet": parquet,
    "a.jsonl.gz": lambda rows: gzip.compress(json_lines(rows), mtime=0),
}  # fmt: skip
SOURCES: dict[str, tuple[str, Callable[[list[dict]], bytes]]] = {
    **{name: ("manifest", make) for name, make in LABELS.items() if name != "a.parquet"},
    "recordings.jsonl": ("manifest", lambda _: json_lines([RECORDING])),
    "supervisions.jsonl": ("manifest", lambda _: json_lines([SUPERVISION])),
    "a.parquet": ("parquet", parquet),
    "a.tar": ("librispeech", archive),
}


def is_accepted(read: Callable[[], object]) -> bool:
    """Return whether the file was read; False for a UserError of one line. Other exceptions pass."""
    message = ""
    try:
        read()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert message.encode() is not None
    return not message


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELS)
def test_a_damaged_label_file_raises_nothing_but_user_errors(tmp_path, name):
    rng, counts = random.Random(f"labels {name}"), [0, 0]
    valid = LABELS[name]([{k: v for k, v in row.items() if k not in ("audio", "offset", "duration")} for row in ROWS])
    for _ in range(CASES // len(LABELS)):
        (tmp_path / name).write_bytes(mutate(valid, rng))
        counts[is_accepted(lambda: canonical_labels(read_label_file(tmp_path / name), "F"))] += 1
    assert min(counts) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_source_raises_nothing_but_user_errors(tmp_path, name):
    rng, counts = random.Random(f"source {name}"), [0, 0]
    kind, make = SOURCES[name]
    (tmp_path / "a.wav").write_bytes(wav(channels=2))
    (tmp_path / "recordings.jsonl").write_bytes(json_lines([RECORDING]))
    (tmp_path / "supervisions.jsonl").write_bytes(json_lines([SUPERVISION]))
    if kind == "parquet":
        rows = [{"id": row["key"], "audio": {"bytes": flac(160), "path": "a.flac"}, "text": row["text"],
                 "speaker_id": row["speaker"]} for row in ROWS]  # fmt: skip
    valid = make(rows if kind == "parquet" else ROWS)

    def list_and_read() -> None:
        source = open_source(SourceConfig(kind=kind, path=str(tmp_path / name)))
        uris = [utterance.audio for utterance in source.utterances()]
        source.tokens(uris)
        assert all(problem.isprintable() for problem in source.problems)
        assert all(isinstance(data, bytes | Exception) for _, data in source.read(uris))
        if isinstance(source._source, LibriSpeechArchives):
            source._source.close()

    for _ in range(CASES // len(SOURCES)):
        (tmp_path / name).write_bytes(mutate(valid, rng))
        counts[is_accepted(list_and_read)] += 1
    assert min(counts) > 0
