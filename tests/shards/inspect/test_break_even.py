from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import make_cache

from shards.__main__ import main
from shards.errors import run_command
from shards.format.layout import Layout, seal, unseal
from shards.inspect.break_even import Worth, break_even, measure, sentence
from shards.read.cache import Cache

SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(SECONDS, SECONDS, SECONDS)
def test_break_even_is_the_first_epoch_that_saves_time(spent, encoding, reading):
    epochs = break_even(spent, encoding, reading)
    if epochs is None:
        assert encoding <= reading or spent / (encoding - reading) >= 1e9
        return
    assert epochs >= 1
    assert epochs * (encoding - reading) >= spent * (1 - 1e-9)
    assert (epochs - 1) * (encoding - reading) <= spent * (1 + 1e-9)


@pytest.mark.parametrize(
    ("worth", "words"),
    [
        (Worth(120, 100, 1, 1e9, 2), "reading takes 1 s an epoch (1,000 MB/s measured now), encoding again 100 s"),
        (Worth(120, 100, 1, 1e9, 2), "the cache pays from epoch 2 on, counted over all experiments"),
        (Worth(120, 1, 100, 1e7, None), "the cache does not pay"),
        (Worth(120, 0, 1, 1e9, None), "whether the cache pays is not known"),
        (
            Worth(9e5, 7200, 180, 1e9, 129),
            "reading takes 3.0 min an epoch (1,000 MB/s measured now), encoding again 2.0 h",
        ),
    ],
)
def test_it_is_said_plainly_whether_the_cache_pays(worth, words):
    assert words in sentence(worth)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("worth") / "cache", n=30, shards=3, codec="int8")


def with_seconds(cache: Path, spent: float, encoding: float) -> Path:
    layout = Layout(cache)
    layout.cache.write_bytes(seal({**unseal(layout.cache), "seconds": spent, "encode_seconds": encoding}))
    return cache


def test_an_epoch_is_estimated_from_what_was_really_read(whole, tmp_path):
    cache = Cache.open(with_seconds(Path(shutil.copytree(whole, tmp_path / "cache")), 1000.0, 900.0))
    worth = measure(cache)
    assert worth.reading == pytest.approx(int(cache.frames.sum()) * cache.spec.channels / worth.rate)
    assert 0 < worth.reading < 60
    assert (worth.spent, worth.encoding, worth.epochs) == (1000.0, 900.0, 2)


def info(cache: Path, capsys) -> str:
    assert run_command(main, ["info", str(cache)]) == 0
    return capsys.readouterr().out


def test_info_tells_bytes_an_audio_hour_seconds_and_from_when_on_the_cache_pays(whole, tmp_path, capsys):
    cache = with_seconds(Path(shutil.copytree(whole, tmp_path / "cache")), 1000.0, 900.0)
    told = info(cache, capsys)
    assert "MB per audio hour" in told
    assert "spent         1,000.0 s of extraction, of which the encoder 900.0 s" in told
    assert "the cache pays from epoch 2 on" in told
    assert run_command(main, ["info", str(cache), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worth"]["epochs"] == 2


def test_info_of_an_encoder_faster_than_the_disk_says_that_the_cache_does_not_pay(whole, tmp_path, capsys):
    assert "the cache does not pay" in info(
        with_seconds(Path(shutil.copytree(whole, tmp_path / "cache")), 1.0, 1e-9), capsys
    )


def test_info_of_a_damaged_cache_is_still_told_without_a_measurement(whole, tmp_path, capsys):
    cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    for tar in Layout(cache).shards.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    assert "not measured: the shards are not sound" in info(cache, capsys)
