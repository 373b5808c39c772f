"""``python -m shards find``: which caches there are, in folders, buckets and on a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cache import make_cache
from tiny_hub import serve_hub

from shards.__main__ import main
from shards.errors import UserError, run_command
from shards.format.layout import Layout
from shards.read.cache import Cache
from shards.share.find import Found, find_caches


@pytest.fixture
def root(tmp_path) -> Path:
    make_cache(tmp_path / "caches" / "b corpus" / "whisper-L2", n=6, layer=2)
    make_cache(tmp_path / "caches" / "a" / "whisper-L4", n=4, layer=4, prefix="other")
    return tmp_path / "caches"


def test_every_cache_is_listed_once_in_order_with_its_identity(root):
    first, second = find_caches(root)
    assert first.path == str(root / "a" / "whisper-L4")
    assert (first.corpus, first.layer, first.utterances, first.problem) == ("other", 4, 4, "")
    assert second.feature_id == Cache.open(root / "b corpus" / "whisper-L2").feature_id
    assert second.labels == ["source"]


def test_unfinished_and_unreadable_caches_are_listed_with_the_reason(root):
    Layout(root / "a" / "whisper-L4").cache.unlink()
    Layout(root / "b corpus" / "whisper-L2").cache.write_text("{")
    unfinished, corrupt = find_caches(root)
    assert unfinished.problem == "not finished: 3 of 3 shards"
    assert "is corrupt" in corrupt.problem


def test_caches_can_be_chosen_and_printed_as_json(root, capsys):
    assert main(["find", str(root), "--corpus", "UTT", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert Found(**json.loads(line)).path == str(root / "b corpus" / "whisper-L2")
    assert main(["find", str(root), "--labels", "mine"]) == 1
    assert "no cache fits below" in capsys.readouterr().err


def test_a_root_that_cannot_be_listed_is_refused_in_one_sentence(root, capsys):
    for wrong in (str(root / "nothing"), "https://host/caches", "hf://only"):
        assert run_command(main, ["find", wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(UserError, match="cannot be listed"):
        list(find_caches("http://host/caches"))


def test_the_caches_of_an_owner_on_the_hub_are_found(root, tmp_path):
    cache = root / "a" / "whisper-L4"
    paths = [path for path in cache.rglob("*") if path.is_file()]
    files = {f"layer 4/{path.relative_to(cache)}": path.read_bytes() for path in paths}
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    with serve_hub("someone/features", files | {"README.md": b"x"}) as hub:
        for url in ("hf://someone/*", "hf://datasets/someone/features"):
            words = [sys.executable, "-m", "shards", "find", url, "--json"]
            done = subprocess.run(
                words, env=env | {"HF_ENDPOINT": hub.url}, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            (found,) = map(json.loads, done.stdout.splitlines())
            assert found["path"] == "hf://datasets/someone/features/layer 4"
            assert found["feature_id"] == Cache.open(cache).feature_id


@pytest.mark.slow
def test_the_caches_in_a_bucket_are_found(root, monkeypatch):
    pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    from tiny_s3 import s3_server

    with s3_server("bucket") as served:
        served.account()
        client = boto3.client("s3", endpoint_url=served.url)
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            client.upload_file(str(path), "bucket", f"all/{path.relative_to(root)}")
        found = [each.path for each in find_caches("s3://bucket/all")]
    assert found == ["s3://bucket/all/a/whisper-L4", "s3://bucket/all/b corpus/whisper-L2"]
