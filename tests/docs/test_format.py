from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import load_script
from tiny_cache import make_cache

from shards.format.layout import FAILURE_SCHEMA, MANIFEST_SCHEMA, Layout
from shards.format.records import unseal
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def reader():
    return load_script("docs/read_cache.py")


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_the_reader_in_the_docs_reads_every_utterance_of_every_codec(reader, tmp_path, codec):
    path = make_cache(tmp_path / "cache", n=9, codec=codec)
    cache = Cache.open(path)
    found = list(reader.read_cache(path))
    assert [key for key, _, _ in found] == cache.strings("key", range(9))
    assert [about["text"] for _, _, about in found] == cache.strings("text", range(9))
    for index, (_, features, _) in enumerate(found):
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, cache.features(index).astype(np.float32))


def test_the_reader_in_the_docs_is_short_and_needs_the_standard_library_and_numpy_alone():
    tree = ast.parse((DOCS / "read_cache.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
    lines = (DOCS / "read_cache.py").read_text().splitlines()[tree.body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in lines) <= 40


def test_the_reader_in_the_docs_refuses_damage(reader, tmp_path):
    path = make_cache(tmp_path / "cache", n=4)
    tar = Layout(path).tar(1)
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="shard 1 is damaged"):
        list(reader.read_cache(path))


def test_the_reader_in_the_docs_runs_as_its_first_line_says(tmp_path):
    path = make_cache(tmp_path / "cache", n=3, shards=1)
    done = subprocess.run([sys.executable, DOCS / "read_cache.py", path], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["utt-00000", "utt-00001", "utt-00002"]


def test_the_format_page_names_every_column_and_field(tmp_path):
    page = (DOCS / "format.md").read_text()
    layout = Layout(make_cache(tmp_path / "cache", n=2, shards=1))
    fields = {*MANIFEST_SCHEMA.names, *FAILURE_SCHEMA.names, *FeatureSpec.model_fields}
    for path in (layout.cache, layout.record(0)):
        tree = unseal(path)
        fields |= set(tree)
        for value in tree.values():
            fields |= set(value) if isinstance(value, dict) and value is not tree.get("provenance") else set()
    missing = [name for name in sorted(fields) if f"`{name}`" not in page]
    assert not missing


def test_a_seal_can_be_checked_by_cutting_it_out_of_the_line_as_the_page_says(tmp_path):
    layout = Layout(make_cache(tmp_path / "cache", n=2, shards=1))
    for path in (layout.cache, layout.record(0)):
        line = path.read_text(encoding="utf-8").removesuffix("\n")
        digest = json.loads(line)["sha256"]
        assert hashlib.sha256(line.replace(f'"sha256":"{digest}",', "").encode()).hexdigest() == digest
