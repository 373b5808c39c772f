"""A folder or file without permission is one sentence that names it: never a traceback, never rows left out."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from tiny_corpus import flac, librispeech_files, wav, write_archive, write_tree

from pipeline.sources import SourceConfig, lhotse, librispeech, manifest, open_source, parquet
from shards.errors import UserError

# loaded now, because another user may not read the modules of Python
LOADED = (lhotse, librispeech, manifest, parquet, soundfile, codecs.lookup("utf-8-sig"))


@pytest.fixture
def folder():
    """A folder that every user may read, unlike ``tmp_path``."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for closed in path.rglob("*"):
        if closed.is_dir():
            closed.chmod(0o755)
    shutil.rmtree(path)


@contextmanager
def as_somebody(closed: Path) -> Iterator[None]:
    """Take the permissions of ``closed`` away, and be another user than root, who needs none."""
    closed.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)
        closed.chmod(0o755)


def list_all(kind: str, path: Path) -> list:
    return list(open_source(SourceConfig(kind=kind, path=str(path))).utterances())


@pytest.mark.parametrize("name", ["", "dev-clean", "dev-clean/1", "dev-clean/1/100", "dev-clean/1/100/1-100.trans.txt"])
def test_a_librispeech_folder_without_permission_is_refused(folder, name):
    closed = write_tree(folder / "LibriSpeech", librispeech_files(["dev-clean"])) / name
    with as_somebody(closed), pytest.raises(UserError, match=r"[Pp]ermission") as error:
        list_all("librispeech", folder)
    assert str(closed) in str(error.value)


@pytest.mark.parametrize("name", ["", "a.tar.gz"])
def test_a_librispeech_archive_without_permission_is_refused(folder, name):
    (folder / "x").mkdir()
    write_archive(folder / "x/a.tar.gz", librispeech_files(["dev-clean"]))
    with as_somebody(folder / "x" / name), pytest.raises(UserError, match=r"[Pp]ermission"):
        list_all("librispeech", folder / "x")


@pytest.mark.parametrize("name", ["", "sub", "sub/b.parquet"])
def test_a_parquet_folder_or_file_without_permission_is_refused(folder, name):
    (folder / "x/sub").mkdir(parents=True)
    for file in ("a.parquet", "sub/b.parquet"):
        pq.write_table(pa.table({"audio": [flac()], "text": ["x"], "id": [file]}), folder / "x" / file)
    assert len(list_all("parquet", folder / "x")) == 2
    with as_somebody(folder / "x" / name), pytest.raises(UserError, match=r"[Pp]ermission"):
        list_all("parquet", folder / "x")


@pytest.mark.parametrize("name", ["", "m.jsonl"])
def test_a_manifest_without_permission_is_refused(folder, name):
    (folder / "x").mkdir()
    (folder / "x/m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x"}))
    with as_somebody(folder / "x" / name), pytest.raises(UserError, match=r"[Pp]ermission"):
        list_all("manifest", folder / "x/m.jsonl")


def test_a_lhotse_folder_without_permission_is_refused(folder):
    (folder / "x").mkdir()
    with as_somebody(folder / "x"), pytest.raises(UserError, match=r"[Pp]ermission"):
        list_all("manifest", folder / "x")


def test_a_recording_without_permission_is_a_failure(folder):
    (folder / "x").mkdir()
    (folder / "x/a.wav").write_bytes(wav())
    (folder / "m.jsonl").write_text(json.dumps({"audio": "x/a.wav", "text": "x"}))
    source = open_source(SourceConfig(kind="manifest", path=str(folder / "m.jsonl")))
    for closed in ("x", "x/a.wav"):
        with as_somebody(folder / closed):
            (made,) = source.utterances()
            ((_, data),) = source.read([made.audio])
        assert isinstance(data, Exception)
        assert source.problems
