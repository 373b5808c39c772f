"""Streaming from a hub, in another process because ``huggingface_hub`` reads HF_ENDPOINT at import."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny_corpus import flac
from tiny_hub import COMMIT, dataset_hub

PROGRAM = """
import dataclasses, hashlib, json, sys
from pipeline.sources import SourceConfig, open_source
from shards.errors import UserError

for settings, asked in json.loads(sys.argv[1]):
    source = open_source(SourceConfig(kind="parquet", **settings))
    results = {"name": source.name, "sequential": source.sequential, "hash_ahead": source.hash_ahead}
    try:
        results["utterances"] = [dataclasses.asdict(u) for u in source.utterances()]
    except UserError as error:
        results["error"] = str(error)
    results["read"] = [
        [uri, str(data) if isinstance(data, Exception) else hashlib.sha256(data).hexdigest()]
        for start in range(0, len(asked), 2)
        for uri, data in source.read(asked[start : start + 2])
    ]
    results["tokens"] = source.tokens(asked) if asked else []
    results["modules"] = [name for name in ("torchcodec",) if name in sys.modules]
    print("RESULTS", json.dumps(results))
"""


def parquet(first: int, count: int) -> bytes:
    rows = [
        {
            "file": f"1-2-{n:04d}.flac",
            "audio": {"bytes": flac(1600 + n, n), "path": f"1-2-{n:04d}.flac"},
            "text": f"TEXT {n}",
            "speaker_id": n // 2,
            "chapter_id": 1,
            "id": f"1-2-{n:04d}",
        }
        for n in range(first, first + count)
    ]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


README = b"""---
configs:
- config_name: clean
  data_files:
  - {split: train.100, path: clean/train.100/*.parquet}
  - {split: test, path: clean/test/*.parquet}
---
"""
FILES = {
    "README.md": README,
    "clean/test/0000.parquet": parquet(0, 3),
    "clean/train.100/0000.parquet": parquet(10, 3),
    "clean/train.100/0001.parquet": parquet(13, 2),
}


REVISION = "fedcba9876543210fedcba9876543210fedcba98"
URIS = ["train.100#0", "train.100#3", "train.100#4", "test#1", "test#0", "test#9", "dev#0", "test#2"]
QUESTIONS = [
    ({"path": "hf:owner/tiny", "config_name": "clean", "splits": ["test", "train.100"]}, URIS),
    ({"path": "hf:owner/tiny", "config_name": "clean", "splits": ["dev"]}, []),
    ({"path": "hf:owner/absent"}, []),
    (
        {
            "path": f"hf:owner/tiny@{REVISION}",
            "config_name": "clean",
            "splits": ["test"],
            "columns": {"text": "file", "speaker": "chapter_id", "key": ""},
        },
        ["test#0"],
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    home = str(tmp_path_factory.mktemp("huggingface"))
    with dataset_hub("owner/tiny", FILES) as (endpoint, requests):
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": home, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(QUESTIONS)],
            env={**os.environ, **hub},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert any("owner/absent" in request for request in requests)
    assert any(REVISION in request for request in requests)
    return [
        json.loads(line.removeprefix("RESULTS ")) for line in done.stdout.splitlines() if line.startswith("RESULTS ")
    ]


def test_a_dataset_of_a_hub_is_streamed_and_read_in_any_order(results):
    first = results[0]
    assert (first["name"], first["sequential"]) == ("tiny-clean-test-train-100", True)
    made = first["utterances"]
    assert [u["audio"] for u in made] == [f"test#{n}" for n in range(3)] + [f"train.100#{n}" for n in range(5)]
    expected = {"key": "1-2-0011", "id": "1-2-0011", "audio": "train.100#1", "text": "TEXT 11"}
    assert made[4] == {**expected, "speaker": "5", "split": "train.100", "samples": 1611}
    assert [uri for uri, _ in first["read"]] == URIS
    answers = dict(first["read"])
    assert answers.pop("test#9") == "no row 9 in the stream"
    assert answers.pop("dev#0") == "no split dev in the dataset"
    numbers = {u["audio"]: int(u["id"][-4:]) for u in made}
    for uri, digest in answers.items():
        assert digest == hashlib.sha256(flac(1600 + numbers[uri], numbers[uri])).hexdigest()
    assert first["modules"] == []


def test_a_missing_split_or_dataset_is_a_one_sentence_error(results):
    assert results[1]["error"] == "no split dev in hf:owner/tiny, which has test, train.100: set source.splits"
    assert results[2]["error"].startswith("cannot open the dataset hf:owner/absent: ")
    assert "\n" not in results[2]["error"]


def test_a_token_names_the_commit_of_the_dataset_also_where_no_revision_is_set(results):
    assert set(results[0]["tokens"]) == {f"owner/tiny@{COMMIT} clean audio"}
    assert results[3]["tokens"] == [f"owner/tiny@{REVISION} clean audio"]
    assert results[0]["hash_ahead"] is False


def test_columns_are_mapped_and_the_revision_is_requested(results):
    made = results[3]["utterances"]
    expected = [(f"1-2-{n:04d}", f"1-2-{n:04d}.flac", "1") for n in range(3)]
    assert [(u["key"], u["text"], u["speaker"]) for u in made] == expected
    assert results[3]["name"] == "tiny-clean-test"
    assert results[3]["read"] == [["test#0", hashlib.sha256(flac(1600, 0)).hexdigest()]]
