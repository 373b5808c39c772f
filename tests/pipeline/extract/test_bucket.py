"""Extraction into a bucket by processes that share nothing else, on a real S3 server on the loopback interface."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from extraction import only_cache, run, snapshot, start, words, write_corpus, write_world
from tiny_s3 import S3, s3_server, use

from shards.__main__ import main
from shards.errors import UserError, WorkFailed
from shards.inspect.verify import verify
from shards.read.cache import Cache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    """18 clips and a tiny Whisper."""
    return write_world(tmp_path_factory.mktemp("bucket"), 18)


@pytest.fixture(scope="module")
def local(tmp_path_factory, world) -> Path:
    """The same cache, extracted by one process into a folder."""
    root = tmp_path_factory.mktemp("local")
    assert run(words(root, *world)) == 0
    return root


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("boto3")
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_server("bucket") as served:
        yield served


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.setenv(f"AWS_{name}", "")  # so that monkeypatch restores it
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    server.account()
    server.puts.clear()
    return server


def remote_words(root: str, scratch: Path, world: tuple[Path, Path], *more: str) -> list[str]:
    scratch.mkdir(exist_ok=True)
    return [*words(Path("unused"), *world), f"root={root}", f"scratch={scratch}", *more]


def download(server: S3, prefix: str, folder: Path) -> Path:
    """Download everything below a prefix of the bucket, without the released claims that only buckets have."""
    import boto3

    bucket = boto3.resource("s3", endpoint_url=server.url).Bucket("bucket")
    for entry in bucket.objects.filter(Prefix=f"{prefix}/"):
        path = folder / entry.key.removeprefix(f"{prefix}/")
        if path.name == "finish.claim":
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.get()["Body"].read())
    return folder


def located(server: S3, prefix: str) -> str:
    """Return the URL of the only cache below a prefix."""
    plan = "/plans/000.parquet"
    (cache,) = {key.removesuffix(plan) for key, _ in server.puts if key.endswith(plan)}
    assert cache.startswith(f"bucket/{prefix}/")
    return f"s3://{cache}"


def wait_for(condition, processes=(), seconds: float = 120) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        assert not any(process.exitcode for process in processes)
        time.sleep(0.02)
    raise TimeoutError


def test_four_workers_of_which_one_is_killed_write_the_same_cache_as_one_process(s3, world, local, tmp_path):
    argv = [remote_words("s3://bucket/four", tmp_path / f"scratch {i}", world, "decode_workers=1") for i in range(4)]
    begin = partial(use, s3.url)
    first = start(argv[0], before=begin, log=tmp_path / "0.log")
    wait_for(lambda: len(s3.commits()) == 2, [first])
    made = Counter(s3.commits())
    # a tar without its record: the process is in the middle of a shard
    wait_for(lambda: [key[-4:] for key, _ in s3.puts].count(".tar") > len(s3.commits()) or first.exitcode is not None)
    os.kill(first.pid, signal.SIGKILL)
    others = [start(words, before=begin, log=tmp_path / f"{i}.log") for i, words in enumerate(argv[1:], 1)]
    for process in others:
        process.join(150)
        assert process.exitcode == 0, (tmp_path / "1.log").read_text()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert snapshot(download(s3, "four", tmp_path / "copy")) == snapshot(local)
    commits = Counter(s3.commits())
    assert set(commits.values()) == {1}
    assert len(commits) == len(list(only_cache(local).glob("shards/*.tar"))) > len(made)
    assert verify(located(s3, "four"), deep=True) == []
    left = list(tmp_path.glob("scratch ?/*"))
    assert len(left) <= 4  # a process killed without running its exit handlers leaves its scratch folder …
    assert run(argv[0], before=begin) == 0  # … to the next one
    assert not list((tmp_path / "scratch 0").glob("*/shards/*.tar"))


@pytest.mark.parametrize("moment", ["claim", "tar", "parquet", "record", "manifest", "CACHE"])
def test_an_extraction_that_was_killed_at_any_put_is_finished_by_the_next(s3, world, local, tmp_path, moment):
    argv = remote_words(f"s3://bucket/{moment}", tmp_path / "scratch", world)
    at = {
        "claim": lambda key, body: key.endswith("000001.json") and b'"claim"' in body,
        "tar": lambda key, body: key.endswith("000001.tar"),
        "parquet": lambda key, body: key.endswith("shards/000001.parquet"),
        "record": lambda key, body: key.endswith("000001.json") and b'"timings"' in body,
        "manifest": lambda key, body: key.endswith("manifests/000.parquet"),
        "CACHE": lambda key, body: key.endswith("CACHE.json") and b'"manifest_id"' in body,
    }[moment]
    process = start(argv, before=partial(use, s3.url))
    wait_for(lambda: any(at(key, body) for key, body in s3.puts), [process])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run(argv, before=partial(use, s3.url), log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert snapshot(download(s3, moment, tmp_path / "copy")) == snapshot(local)


def test_a_corrupt_remote_cache_is_described_verified_and_re_extracted(s3, world, local, tmp_path, capsys):
    import boto3

    argv = remote_words("s3://bucket/damaged", tmp_path / "scratch", world)
    begin = partial(use, s3.url)
    assert run(argv, before=begin) == 0
    url = located(s3, "damaged")
    assert main(["info", url]) is None
    assert "18 of 18 planned, 0 failed" in capsys.readouterr().out
    assert main(["verify", url, "--deep"]) is None
    client = boto3.client("s3", endpoint_url=s3.url)
    key = f"{url.removeprefix('s3://bucket/')}/shards/000001.tar"
    data = bytearray(client.get_object(Bucket="bucket", Key=key)["Body"].read())
    data[3000] ^= 1
    client.put_object(Bucket="bucket", Key=key, Body=bytes(data))
    assert verify(url) == []
    with pytest.raises(WorkFailed, match="is not valid: 2 problems"):
        main(["verify", url, "--deep"])
    assert "000001" in capsys.readouterr().out
    s3.puts.clear()
    assert run([*argv, "--verify"], before=begin, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert s3.commits() == ["000001.json"]
    assert snapshot(download(s3, "damaged", tmp_path / "copy")) == snapshot(local)
    assert run(argv, before=begin, log=tmp_path / "again") == 0
    assert "nothing to do, complete:" in (tmp_path / "again").read_text()


def test_failures_are_reported_counted_and_retried_in_a_bucket(s3, world, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus, 6)
    whole = (corpus / "clip 03.flac").read_bytes()
    (corpus / "clip 03.flac").write_bytes(whole[:200] + bytes(len(whole) - 200))  # same length in the header
    argv, begin = remote_words("s3://bucket/failed", tmp_path / "scratch", (corpus, world[1])), partial(use, s3.url)
    log = tmp_path / "log"
    assert run([*argv, "max_failures=0"], before=begin, log=log) == 1
    assert "more than max_failures=0 allows" in log.read_text()
    assert run([*argv, "max_failures=2"], before=begin) == 0
    url = located(s3, "failed")
    assert verify(url, deep=True) == []
    assert run([*argv, "max_failures=2", "--retry-failed"], before=begin) == 0
    copy = only_cache(download(s3, "failed", tmp_path / "copy"))
    failures = [shard for shard in copy.glob("shards/*.json") if b'"attempt":2' in shard.read_bytes()]
    assert len(failures) == 1
    (corpus / "clip 03.flac").write_bytes(whole)
    s3.puts.clear()
    process = start([*argv, "max_failures=2"], before=begin)  # other audio than the one that failed: it is new
    wait_for(lambda: any(key.endswith("plans/002.parquet") for key, _ in s3.puts), [process])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run([*argv, "max_failures=2"], before=begin) == 0
    assert verify(url, deep=True) == []
    assert len(Cache.open(url)) == 6


def test_writes_whose_responses_are_lost_count_and_are_not_repeated(s3, world, local, tmp_path):
    s3.loses = 3
    try:
        argv = remote_words("s3://bucket/lost", tmp_path / "scratch", world)
        assert run(argv, before=partial(use, s3.url), log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    finally:
        s3.loses = 0
    assert snapshot(download(s3, "lost", tmp_path / "copy")) == snapshot(local)
    assert set(Counter(s3.commits()).values()) == {1}


def test_several_layers_go_into_several_folders_of_a_bucket(s3, world, tmp_path):
    more = ["encoder.layers=[0,1]", "codec=int8"]
    assert run(remote_words("s3://bucket/layers", tmp_path / "scratch", world, *more), before=partial(use, s3.url)) == 0
    assert run(words(tmp_path / "near", *world, *more)) == 0
    assert snapshot(download(s3, "layers", tmp_path / "copy")) == snapshot(tmp_path / "near")


def test_a_missing_bucket_is_refused_with_one_sentence(s3, world, tmp_path):
    log = tmp_path / "log"
    argv = remote_words("s3://nobody/caches", tmp_path / "scratch", world)
    assert run(argv, before=partial(use, s3.url), log=log) == 2
    assert "error: bucket 'nobody' does not exist: create it" in log.read_text()
    with pytest.raises(UserError, match=r"'s3://bucket/nothing' is not a cache"):
        verify("s3://bucket/nothing")
