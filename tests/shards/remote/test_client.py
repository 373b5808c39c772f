"""Real servers on the loopback interface: nginx from Debian, and the S3 protocol by moto's server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
from tiny_cache import make_cache
from tiny_server import serve
from torch.utils.data import DataLoader

from shards.errors import UserError
from shards.read.cache import Cache
from shards.remote import client as storage
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig

pytestmark = pytest.mark.slow
RULES = SamplerConfig(batch_size=4, window_shards=2)
FAULTS = ["cut", "503", "slow", "truncated", "corrupt", "cut"]


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    # Shards of about 300 KB, so that a cut falls into the middle of one.
    return make_cache(tmp_path_factory.mktemp("near") / "cache", n=24, shards=6, channels=128, max_frames=600, seed=3)


@pytest.fixture(autouse=True)
def mirrors(tmp_path, monkeypatch):
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 5)
    return tmp_path / "mirrors"


@pytest.fixture(scope="module")
def nginx(near, tmp_path_factory):
    """The URL of an nginx that serves the folder around the cache."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    folder = tmp_path_factory.mktemp("nginx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {places} server {{ listen 127.0.0.1:{port}; root {near.parent}; }} }}\n"
    )
    server = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def s3(near):
    """The endpoint of an S3 server whose bucket ``bucket`` holds the cache under ``some/cache``."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        url = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        client.create_bucket(Bucket="bucket")
        for path in near.rglob("*.*"):
            client.upload_file(str(path), "bucket", f"some/cache/{path.relative_to(near)}")
        yield url
    finally:
        server.stop()


@pytest.fixture
def account(monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    return lambda url: monkeypatch.setenv("AWS_ENDPOINT_URL", url)


def _wait_for(port: int) -> None:
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(f"no server on port {port}")


def same(url: str, near, workers: int = 0) -> None:
    local, far = Cache.open(near), Cache.open(url)
    rows = []
    for batch in DataLoader(FeatureStream([far], RULES, 5, epochs=1), batch_size=None, num_workers=workers):
        rows += batch.rows
        for row, features, frames in zip(batch.rows, batch.features, batch.lengths, strict=True):
            assert np.array_equal(features[:frames].numpy(), local.features(row))
    assert sorted(rows) == list(range(len(local)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_is_read_from_nginx(near, nginx, workers):
    same(f"{nginx}/cache", near, workers)


def test_what_nginx_sends_over_a_bad_line_arrives_whole_by_ranges(near, nginx):
    with serve(nginx) as line:
        for name in ("CACHE.json", "manifest.parquet", *(f"{shard:06d}.tar" for shard in range(6))):
            line.faults[name] = list(FAULTS)
        same(f"{line.url}/cache", near)
        asked = [wanted for name, wanted in line.asked if name.endswith(".tar")]
    assert any(wanted and not wanted.startswith("bytes=0-") for wanted in asked)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_is_read_from_s3(near, s3, account, workers):
    account(s3)
    same("s3://bucket/some/cache", near, workers)


def test_what_s3_sends_over_a_bad_line_arrives_whole(near, s3, account):
    with serve(s3) as line:
        account(line.url)
        for name in ("CACHE.json", "manifest.parquet", *(f"{shard:06d}.tar" for shard in range(6))):
            line.faults[name] = list(FAULTS)
        same("s3://bucket/some/cache", near)


def test_an_s3_cache_that_is_not_there_is_reported(s3, account):
    account(s3)
    with pytest.raises(UserError, match=r"'s3://bucket/other/CACHE.json' does not exist"):
        Cache.open("s3://bucket/other")
    with pytest.raises(UserError, match=r"'s3://nobody/cache/CACHE.json'"):
        Cache.open("s3://nobody/cache")
