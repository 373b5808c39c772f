"""``modelscope:owner/name`` with a hub on loopback.

All tests use one other process, because ``modelscope`` reads its settings at import.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny_corpus import flac
from tiny_modelscope import ModelScope, serve_modelscope

PROGRAM = """
import json, sys
from pipeline.sources import SourceConfig, open_source
from shards.errors import UserError

for line in sys.stdin:
    try:
        source = open_source(SourceConfig(kind="parquet", **json.loads(line)))
        made = list(source.utterances())
        assert all(isinstance(data, bytes) for _, data in source.read([u.audio for u in made]))
        answer = {"name": source.name, "utterances": [[u.key, u.text, u.split, u.audio] for u in made]}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def parquet(*texts: str) -> bytes:
    rows = [{"clip": {"bytes": flac(1600, n), "path": f"{text}.flac"}, "said": text} for n, text in enumerate(texts)]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


REVISIONS = {
    "master": {
        "README.md": b"a dataset",
        "clean/test/0000.parquet": parquet("e", "f"),
        "clean/train-00000-of-00002.parquet": parquet("a", "b"),
        "clean/train-00001-of-00002.parquet": parquet("c"),
        "other/train.parquet": parquet("g"),
    },
    "v1.0": {"train.parquet": parquet("old")},
}
COLUMNS = {"audio": "clip", "text": "said"}


class SourceProcess:
    """The process, its hub and the folder of its downloads."""

    def __init__(self, hub: ModelScope, cache: Path) -> None:
        self.hub, self.cache = hub, cache
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MODELSCOPE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**clean, "MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_CACHE": str(cache), "NO_PROXY": "127.0.0.1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, **settings) -> dict:
        """Return the name and the utterances of a source after reading each, or the error."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"path": "modelscope:owner/tiny", "columns": COLUMNS} | settings) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def source_process(tmp_path_factory):
    with serve_modelscope("owner/tiny", {}) as hub:
        source_process = SourceProcess(hub, tmp_path_factory.mktemp("modelscope"))
        yield source_process
        source_process.process.communicate()


@pytest.fixture
def ask(source_process) -> SourceProcess:
    """Return the process, with an empty cache and an undamaged hub."""
    shutil.rmtree(source_process.cache, ignore_errors=True)  # exists only after a download
    source_process.hub.revisions, source_process.hub.damaged, source_process.hub.downloads = dict(REVISIONS), set(), []
    return source_process


def test_only_the_files_of_the_splits_are_downloaded_and_only_once(ask):
    first = ask(config_name="clean", splits=["train"])
    assert first["name"] == "tiny-clean-train"
    assert first["utterances"] == [
        ["a", "a", "train", "clean/train-00000-of-00002.parquet#0"],
        ["b", "b", "train", "clean/train-00000-of-00002.parquet#1"],
        ["c", "c", "train", "clean/train-00001-of-00002.parquet#0"],
    ]
    assert sorted(ask.hub.downloads) == [("master", f"clean/train-0000{n}-of-00002.parquet") for n in (0, 1)]
    assert ask(config_name="clean", splits=["train"]) == first
    assert len(ask.hub.downloads) == 2


def test_the_named_revision_is_read(ask):
    answer = ask(path="modelscope:owner/tiny@v1.0")
    assert (answer["name"], answer["utterances"]) == ("tiny", [["old", "old", "train", "train.parquet#0"]])
    assert ask.hub.downloads == [("v1.0", "train.parquet")]


def test_a_cached_file_that_the_hub_no_longer_lists_is_not_read(ask):
    ask()
    files = {path: data for path, data in REVISIONS["master"].items() if not path.startswith("other")}
    ask.hub.revisions = {"master": files}
    assert [key for key, *_ in ask()["utterances"]] == ["e", "f", "a", "b", "c"]


def test_a_path_that_leads_out_of_the_repository_is_refused(ask):
    ask.hub.revisions = {"master": {"../../evil/train.parquet": parquet("x"), "train.parquet": parquet("a")}}
    assert "lists a file outside of the repository ('../../evil/train.parquet')" in ask()["error"]
    assert ask.hub.downloads == []


def test_glob_characters_in_a_file_name_match_only_that_file(ask):
    ask.hub.revisions = {"master": {"v[1]/train.parquet": parquet("a"), "v1/train.parquet": parquet("b")}}
    assert [key for key, *_ in ask(config_name="v[1]")["utterances"]] == ["a"]
    assert ask.hub.downloads == [("master", "v[1]/train.parquet")]


def test_a_file_with_another_hash_than_the_hub_lists_is_refused_and_not_kept(ask):
    ask.hub.damaged = {"clean/test/0000.parquet"}
    error = ask(splits=["test"])["error"]
    assert error.startswith("modelscope:owner/tiny could not be downloaded: ")
    assert "\n" not in error
    assert not list(ask.cache.rglob("*.parquet"))
    ask.hub.damaged = set()
    assert [key for key, *_ in ask(splits=["test"])["utterances"]] == ["e", "f"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": ["dev"]}, "no split dev in modelscope:owner/tiny, which has test, train: set source.splits"),
        (
            {"config_name": "dirty"},
            "no parquet files in modelscope:owner/tiny: check source.path and source.config_name",
        ),
        ({"path": "modelscope:owner/absent"}, "modelscope:owner/absent could not be downloaded: "),
        ({"path": "modelscope:owner/tiny@v9"}, "modelscope:owner/tiny@v9 could not be downloaded: "),
    ],
)
def test_a_missing_split_folder_dataset_or_revision_is_a_one_sentence_error(ask, settings, message):
    error = ask(**settings)["error"]
    assert error.startswith(message)
    assert "\n" not in error
    assert ask.hub.downloads == []
