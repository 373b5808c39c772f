from __future__ import annotations

import ast
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scripts import load_script
from tiny_cache import append, flip, grow, make_cache, original, plan_row

from shards.commit.folder import add_labels
from shards.format.layout import Layout
from shards.format.records import unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA
from shards.format.spec import FeatureSpec
from shards.labels.table import COLUMNS as LABEL_COLUMNS
from shards.labels.table import label_id
from shards.read.cache import Cache

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def reader():
    return load_script("docs/read_cache.py")


def assert_same(found: list, cache: Cache) -> None:
    items = range(len(cache))
    assert [label["key"] for _, label in found] == cache.strings("key", items)
    assert [label["text"] for _, label in found] == cache.strings("text", items)
    for index, (features, _) in enumerate(found):
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, cache.features(index).astype(np.float32))


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_the_reader_in_the_docs_reads_every_item_of_every_codec(reader, tmp_path, codec):
    path = make_cache(tmp_path / "cache", n=9, codec=codec)
    assert_same(list(reader.read_cache(path)), Cache.open(path))


def test_the_reader_in_the_docs_reads_a_cache_that_has_grown_with_any_of_its_label_sets(reader, tmp_path):
    path = make_cache(tmp_path / "cache", n=9)
    old = grow(path, 2, utt_00003="other audio")
    rows = [plan_row("utt-00004", 960, 4, 0, "broken")]
    labels = [*old.labels.table.to_pylist(), {"key": "unknown", "text": "", "speaker": "", "split": ""}]
    append(path, old.spec, rows, labels, lambda key, n: original(0, 0, n), failed={"utt-00004"})
    tasks = [("utt-00003", "b", "two"), ("utt-00003", "a", "one"), ("utt-00001", "", "x")]
    table = pa.table({name: [row[i] for row in tasks] for i, name in enumerate(("key", "task", "text"))})
    add_labels(Layout(path), table, "tasks", "test")
    assert len(Cache.open(path)) == 10
    assert_same(list(reader.read_cache(path)), Cache.open(path))
    assert_same(list(reader.read_cache(path, "tasks")), Cache.open(path, "tasks"))
    assert_same(list(reader.read_cache(path, old.labels.id)), Cache.open(path, old.labels.id))


def test_the_reader_in_the_docs_is_short_and_needs_the_standard_library_numpy_and_pyarrow_alone():
    tree = ast.parse((DOCS / "read_cache.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "pyarrow.parquet"}
    last = max(node.end_lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    lines = (DOCS / "read_cache.py").read_text().splitlines()[last:]
    assert sum(bool(line.strip()) for line in lines) <= 45


def test_the_reader_in_the_docs_refuses_damage(reader, tmp_path):
    path = make_cache(tmp_path / "cache", n=4)
    layout = Layout(path)
    (labels,) = layout.labels.glob("*.parquet")
    for file, at, what in (
        (layout.tar(1), 700, r"utterance utt-00001 in .*000001.tar"),
        (layout.manifest(0), 30, "manifests/000.parquet"),
        (layout.failures(0), 30, "failures/000.parquet"),
        (labels, 30, "labels/source-"),
        (layout.cache, layout.cache.read_bytes().index(b'"bytes":') + 8, "CACHE.json"),
    ):
        flip(file, at)
        with pytest.raises(ValueError, match=f"{what}.* is damaged"):
            list(reader.read_cache(path))
        flip(file, at)
    assert len(list(reader.read_cache(path))) == 4


def test_the_reader_in_the_docs_runs_as_its_first_line_says(tmp_path):
    path = make_cache(tmp_path / "cache", n=3, shards=1)
    done = subprocess.run([sys.executable, DOCS / "read_cache.py", path], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["utt-00000", "utt-00001", "utt-00002"]


FREE = ("provenance", "timings", "frontend")  # objects of any fields


def names(tree: object) -> set[str]:
    """Return the names of all fields in a JSON tree."""
    if isinstance(tree, dict):
        return {*tree, *(name for field, value in tree.items() if field not in FREE for name in names(value))}
    return {name for value in tree for name in names(value)} if isinstance(tree, list) else set()


def test_the_format_page_names_every_column_and_field(tmp_path):
    page = (DOCS / "format.md").read_text()
    layout = Layout(make_cache(tmp_path / "cache", n=2, shards=1))
    fields = {*MANIFEST_SCHEMA.names, *FAILURE_SCHEMA.names, *FeatureSpec.model_fields, *LABEL_COLUMNS}
    for path in (layout.cache, layout.record(0), layout.labels / "LABELS.json"):
        fields |= names(unseal(path))
    missing = [name for name in sorted(fields) if f"`{name}`" not in page]
    assert not missing


def test_a_seal_can_be_checked_by_cutting_it_out_of_the_line_as_the_page_says(tmp_path):
    layout = Layout(make_cache(tmp_path / "cache", n=2, shards=1))
    for path in (layout.cache, layout.record(0), layout.labels / "LABELS.json"):
        line = path.read_text(encoding="utf-8").removesuffix("\n")
        digest = json.loads(line)["sha256"]
        field = f'"sha256":"{digest}"'
        cut = line.replace(f",{field}" if path.name == "LABELS.json" else f"{field},", "")
        assert len(cut) == len(line) - len(field) - 1
        assert hashlib.sha256(cut.encode()).hexdigest() == digest


def test_a_label_id_is_what_the_page_says(tmp_path):
    """From the page alone: canonical JSON of the hashes of lengths, texts and numbers."""
    table = pa.table(
        {
            "key": ["a", "b"],
            "text": ["grün", ""],
            "weight": pa.array([1.0, 0.5]),
            "clean": [True, False],
            "snr": [float("nan"), 3.0],
            "take": pa.array([1, -1], pa.int64()),
        }
    )

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    columns = [
        ["key", "string", sha(struct.pack("<II", 1, 1)), sha(b"ab")],
        ["text", "string", sha(struct.pack("<II", 5, 0)), sha("grün".encode())],
        ["weight", "float64", sha(struct.pack("<dd", 1.0, 0.5))],
        ["clean", "bool", sha(b"\x01\x00")],
        ["snr", "float64", sha(bytes.fromhex("000000000000f87f") + struct.pack("<d", 3.0))],
        ["take", "int64", sha(struct.pack("<qq", 1, -1))],
    ]
    tree = {"columns": columns, "rows": 2}
    assert label_id(table) == sha(json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def test_the_audio_id_of_a_segment_is_what_the_page_says():
    audio_id = pytest.importorskip("shards.format.audio_id").audio_id
    whole = hashlib.sha256(b"a file").digest()
    assert audio_id(whole, "") == whole
    assert audio_id(whole, "t=1.5,3.25&c=1") == hashlib.sha256(f"{whole.hex()}#t=1.5,3.25&c=1".encode()).digest()


def test_a_manifest_id_is_what_the_page_says(tmp_path):
    path = make_cache(tmp_path / "cache", n=4, shards=2)
    grow(path)
    info, before = unseal(Layout(path).cache), ""
    for entry in info["generations"]:
        shards = range(entry["first_shard"], entry["first_shard"] + entry["shards"])
        tars = [hashlib.sha256(Layout(path).tar(shard).read_bytes()).hexdigest() for shard in shards]
        text = json.dumps([info["feature_id"], before, entry["plan_id"], *tars], separators=(",", ":"))
        before = hashlib.sha256(text.encode()).hexdigest()
        assert entry["manifest_id"] == before
