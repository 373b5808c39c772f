from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cache import make_cache, make_spec, plan_row

from shards.commit.finalize import commit_record, stray_files, write_plan
from shards.commit.writer import CommitError, ShardWriter, StoredMembers, remove_stray_shard_files
from shards.errors import WorkFailed
from shards.files import TEMPORARY_INFIX
from shards.format.codec import CodecError, decode
from shards.format.layout import Layout
from shards.format.schemas import MANIFEST_SCHEMA, PLAN_SCHEMA, read_parquet
from shards.format.tar import TarError
from shards.read.cache import Cache

CHANNELS = 4
AUDIO = bytes(range(32))
SPEC = make_spec(CHANNELS)
CHANGING = [  # every call by which a commit changes the disk
    *("open", "write", "writev", "pwrite", "fsync", "replace"),
]


class Crash(BaseException):
    """The process ends here: nothing is cleaned up."""


def utterance(row: int, key: str = "", **more) -> dict:
    key = key or f"utt-{row:03d}"
    return {**plan_row(key, 960, 0, row, f"{key}.wav"), **more}


def features(row: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(row).standard_normal((frames, CHANNELS), dtype=np.float32)


def planned(path: Path, n: int = 3) -> tuple[Layout, str]:
    layout = Layout(path)
    table = pa.Table.from_pylist([*map(utterance, range(n))], PLAN_SCHEMA)
    return layout, write_plan(layout, 0, [table], "plan").id


def write(layout: Layout, plan_id: str, owner: str, n: int = 3, spec=SPEC) -> dict:
    with ShardWriter(layout, 0, spec, plan_id, owner) as writer:
        for row in range(n):
            writer.add(utterance(row), features(row), samples=960, audio_id=AUDIO, labels={"text": f"text {row}"})
        return writer.commit({"seconds": 0.0})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_a_committed_shard_returns_every_utterance_through_its_rows(tmp_path, codec):
    spec = make_spec(CHANNELS, codec)
    layout, plan_id = planned(tmp_path)
    record = write(layout, plan_id, "me", spec=spec)
    assert commit_record(layout, 0, spec.feature_id, plan_id) == record
    data = layout.tar(0).read_bytes()
    rows = read_parquet(layout.rows(0), MANIFEST_SCHEMA).to_pylist()
    assert [row["key"] for row in rows] == ["utt-000", "utt-001", "utt-002"]
    for row in rows:
        stored = np.load(io.BytesIO(data[row["offset"] :][: row["length"]]), allow_pickle=False)
        at = row["scale_offset"]
        scale = np.load(io.BytesIO(data[at:][: row["scale_length"]]), allow_pickle=False) if at >= 0 else None
        wanted = features(row["row"])
        gap = np.linalg.norm(decode(codec, stored, scale) - wanted) / np.linalg.norm(wanted)
        assert gap == pytest.approx(row["error"], rel=1e-3)
        assert gap < 0.06


@settings(max_examples=20)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=4),
    frames=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_two_writes_of_the_same_utterances_are_the_same_bytes(tmp_path_factory, texts, frames, seed):
    found = []
    for owner in ("1-a", "22-b"):
        layout = Layout(tmp_path_factory.mktemp("twice"))
        layout.shards.mkdir()
        with ShardWriter(layout, 0, SPEC, "p", owner) as writer:
            for row, text in enumerate(texts):
                x = features(seed + row, frames)
                writer.add(utterance(row), x, samples=320 * frames, audio_id=AUDIO, labels={"text": text})
            writer.commit({"seconds": 1.0})
        found.append(files(layout.shards))
        with tarfile.open(layout.tar(0)) as archive:
            abouts = [json.load(archive.extractfile(info)) for info in archive if info.name.endswith(".json")]
        assert [about["text"] for about in abouts] == texts
    assert found[0] == found[1]


def test_leaving_the_block_without_a_commit_leaves_nothing(tmp_path):
    layout, plan_id = planned(tmp_path)
    with ShardWriter(layout, 0, SPEC, plan_id, "me") as writer:
        writer.add(utterance(0), features(0), samples=960, audio_id=AUDIO)
    assert files(layout.shards) == {}


def test_an_exception_leaves_nothing(tmp_path):
    layout, plan_id = planned(tmp_path)
    writer = ShardWriter(layout, 0, SPEC, plan_id, "me")
    writer.add(utterance(0), features(0), samples=960, audio_id=AUDIO)
    assert files(layout.shards)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert files(layout.shards) == {}


@pytest.mark.parametrize(
    ("about", "x", "error"),
    [
        (utterance(0), np.full((2, CHANNELS), np.nan, np.float32), CodecError),
        (utterance(0), np.full((2, CHANNELS), 1e6, np.float32), CodecError),
        (utterance(0), np.zeros((2, CHANNELS + 1), np.float32), ValueError),
        (utterance(0), np.zeros((0, CHANNELS), np.float32), ValueError),
        (utterance(0), np.zeros(CHANNELS, np.float32), ValueError),
        (utterance(0, "a.b"), np.zeros((2, CHANNELS), np.float32), ValueError),
        (utterance(0, "../escape"), np.zeros((2, CHANNELS), np.float32), ValueError),
        (utterance(0, id="\ud800"), np.zeros((2, CHANNELS), np.float32), ValueError),
    ],
)
def test_what_cannot_be_stored_is_refused_before_its_first_byte_and_the_shard_continues(tmp_path, about, x, error):
    layout, plan_id = planned(tmp_path)
    with ShardWriter(layout, 0, SPEC, plan_id, "me") as writer:
        with pytest.raises(error):
            writer.add(about, x, samples=640, audio_id=AUDIO)
        writer.add_failure("utt-000", "store", "no")
        for row in (1, 2):
            writer.add(utterance(row), features(row), samples=960, audio_id=AUDIO)
        writer.commit({"seconds": 0.0})
    with tarfile.open(layout.tar(0)) as archive:
        assert archive.getnames() == ["utt-001.npy", "utt-001.json", "utt-002.npy", "utt-002.json"]


def test_two_writers_of_one_shard_do_not_touch_each_other(tmp_path):
    layout, plan_id = planned(tmp_path)
    with ShardWriter(layout, 0, SPEC, plan_id, "one") as one, ShardWriter(layout, 0, SPEC, plan_id, "two") as two:
        for row in range(3):
            one.add(utterance(row), features(row), samples=960, audio_id=AUDIO)
            two.add(utterance(row), features(row), samples=960, audio_id=AUDIO)
        first = one.commit({"seconds": 0.0})
        once = files(layout.shards)
        assert two.commit({"seconds": 0.0}) == first
    once = {name: data for name, data in once.items() if f"{TEMPORARY_INFIX}two" not in name}
    assert files(layout.shards) == once
    assert commit_record(layout, 0, SPEC.feature_id, plan_id) == first


def test_an_owner_that_stood_still_while_its_shard_was_taken_over_harms_nothing(tmp_path):
    layout, plan_id = planned(tmp_path)
    slow = ShardWriter(layout, 0, SPEC, plan_id, "slow")
    slower = ShardWriter(layout, 0, SPEC, plan_id, "slower")
    for row in range(3):
        for writer in (slow, slower):
            writer.add(utterance(row), features(row), samples=960, audio_id=AUDIO)
    remove_stray_shard_files(layout, 0)  # the new owner of the claim begins
    with pytest.raises(WorkFailed, match=r"shard 000000 .* was taken over .* rerun the same command"), slow:
        slow.commit({"seconds": 9.0})
    assert files(layout.shards) == {}
    record = write(layout, plan_id, "new")
    whole = files(layout.shards)
    with slower:
        assert slower.commit({"seconds": 9.0}) == record
    assert files(layout.shards) == whole


@pytest.mark.parametrize("call", CHANGING)
def test_a_full_disk_at_any_write_of_a_commit_leaves_no_half_shard_and_no_temporary_file(tmp_path, monkeypatch, call):
    """Every k-th call fails once with 'no space'; the writer cleans up, and a second try commits."""
    k = 0
    while True:
        k += 1
        path = tmp_path / str(k)
        layout, plan_id = planned(path)
        calls, real = 0, getattr(os, call)

        def failing(*args, real=real, k=k, **more):
            nonlocal calls
            calls += 1
            if calls == k:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **more)

        with monkeypatch.context() as broken:
            broken.setattr(os, call, failing)
            with contextlib.suppress(OSError):
                write(layout, plan_id, "me")
            if calls < k:
                break
        assert not list(stray_files(layout))
        write(layout, plan_id, "me")
        assert commit_record(layout, 0, SPEC.feature_id, plan_id)
    assert k > 1 or call == "pwrite"


def test_a_crash_between_any_two_steps_is_seen_as_uncommitted_or_committed_and_never_half(tmp_path, monkeypatch):
    whole_layout, _ = planned(tmp_path / "whole")
    write(whole_layout, _, "me")
    whole = files(whole_layout.shards)
    seen, k = set(), 0
    while True:
        k += 1
        path = tmp_path / str(k)
        layout, plan_id = planned(path)
        calls, crashed = 0, False

        def step(real, k=k):
            def call(*args, **more):
                nonlocal calls, crashed
                calls += 1
                crashed |= calls >= k
                if crashed:
                    raise Crash
                return real(*args, **more)

            return call

        with monkeypatch.context() as broken:
            for name in [*CHANGING, "unlink", "rename"]:
                broken.setattr(os, name, step(getattr(os, name)))
            try:
                write(layout, plan_id, "dead")
            except Crash:
                pass
            else:
                if not crashed:
                    break
        record = commit_record(layout, 0, SPEC.feature_id, plan_id)
        seen.add(record is not None)
        if record is not None:
            assert {name: data for name, data in files(layout.shards).items() if TEMPORARY_INFIX not in name} == whole
        assert all(f"{TEMPORARY_INFIX}dead" in path.name for path in stray_files(layout))
        remove_stray_shard_files(layout, 0)
        write(layout, plan_id, "next")
        assert files(layout.shards) == whole
    assert seen == {True, False}
    assert k > 20


def test_a_short_write_is_carried_on(tmp_path, monkeypatch):
    layout, plan_id = planned(tmp_path / "whole")
    write(layout, plan_id, "me")
    short, _ = planned(tmp_path / "short")
    with monkeypatch.context() as slow:
        real = {name: getattr(os, name) for name in ("write", "pwrite")}
        slow.setattr(os, "writev", lambda fd, parts: real["write"](fd, b"".join(parts)[:100]))
        slow.setattr(os, "pwrite", lambda fd, data, at: real["pwrite"](fd, data[:77], at))
        slow.setattr(os, "write", lambda fd, data: real["write"](fd, data[:900]))
        write(short, plan_id, "me")
    assert files(short.shards) == files(layout.shards)


def test_a_changed_header_or_text_is_never_committed_either(tmp_path, monkeypatch):
    layout, plan_id = planned(tmp_path)
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [bytes(parts[0]).replace(b"ear", b"eer"), *parts[1:]]))
    with pytest.raises((CommitError, TarError)):
        write(layout, plan_id, "me")
    monkeypatch.setattr(
        os, "writev", lambda fd, parts: real(fd, [bytes(x).replace(b'"text"', b'"tixt"') for x in parts])
    )
    with pytest.raises(CommitError, match="crc32"):
        write(layout, plan_id, "me")
    assert files(layout.shards) == {}


def test_bytes_that_come_back_changed_are_never_committed(tmp_path, monkeypatch):
    layout, plan_id = planned(tmp_path)
    real = os.writev

    def flipping(fd, parts):
        *before, data, pad = parts  # the array's bytes, or the JSON
        return real(fd, [*before, bytes(data[:-1]) + bytes([data[-1] ^ 1]), pad])

    monkeypatch.setattr(os, "writev", flipping)
    with pytest.raises(CommitError, match="crc32"):
        write(layout, plan_id, "me")
    assert files(layout.shards) == {}


@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_copied_features_keep_their_bytes_their_checksum_and_their_row(tmp_path, codec):
    old = Cache.open(make_cache(tmp_path / "old", n=3, channels=CHANNELS, codec=codec, shards=1))
    layout, plan_id = planned(tmp_path / "new")
    with ShardWriter(layout, 0, old.spec, plan_id, "me") as writer:
        for row in range(3):
            writer.add_stored(utterance(row), stored(old, row), {"text": "copied"})
        writer.commit({"seconds": 0.0})
    data, before = layout.tar(0).read_bytes(), Layout(old.path).tar(0).read_bytes()
    for row, copied in enumerate(read_parquet(layout.rows(0), MANIFEST_SCHEMA).to_pylist()):
        about = old.row(row)
        for kind in ("", "scale_"):
            at, was = (data_at[f"{kind}offset"] for data_at in (copied, about))
            length = copied[f"{kind}length"]
            assert data[at : at + length] == before[was : was + length]
        same = ("frames", "samples", "crc32", "error", "audio_id", "length", "scale_length")
        assert {name: copied[name] for name in same} == {name: about[name] for name in same}
    assert b'"text": "copied"' in data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"crc32": 1}, "do not match their checksum"),
        ({"frames": 2}, "the copied features are"),
        ({"payload": memoryview(b"no array"), "crc32": zlib.crc32(b"no array")}, "is not an .npy array"),
    ],
)
def test_copied_bytes_that_are_not_such_features_are_refused_and_the_shard_continues(tmp_path, change, reason):
    old = Cache.open(make_cache(tmp_path / "old", n=3, channels=CHANNELS, shards=1, min_frames=3))
    layout, plan_id = planned(tmp_path / "new")
    with ShardWriter(layout, 0, SPEC, plan_id, "me") as writer:
        with pytest.raises(CodecError, match=reason):
            writer.add_stored(utterance(0), replace(stored(old, 0), **change))
        writer.add_stored(utterance(1), stored(old, 1))
        writer.commit({"seconds": 0.0})
    with tarfile.open(layout.tar(0)) as archive:
        assert archive.getnames() == ["utt-001.npy", "utt-001.json"]


def stored(cache: Cache, row: int) -> StoredMembers:
    about = cache.row(row)
    payload, scale, crc = cache.features_table.members(row)
    return StoredMembers(payload, scale, crc, about["frames"], about["samples"], about["error"], about["audio_id"])


def test_cleaning_removes_what_dead_owners_left_of_this_shard_alone(tmp_path):
    layout, _ = planned(tmp_path)
    mine = [f"000001.{kind}{TEMPORARY_INFIX}9-dead" for kind in ("tar", "parquet", "json", "claim")]
    others = [f"000002.tar{TEMPORARY_INFIX}8-live", "000001.claim", "0000010.tar.tmp-1-x"]
    for name in mine + others:
        (layout.shards / name).touch()
    remove_stray_shard_files(layout, 1)
    assert sorted(files(layout.shards)) == sorted(others)


def test_the_tars_of_a_cache_never_change_between_versions(tmp_path):
    """The format is a promise: a change here needs another schema version, or a reason that names this test."""
    layout, plan_id = planned(tmp_path)
    with ShardWriter(layout, 0, SPEC, plan_id, "me") as writer:
        x = np.arange(12, dtype=np.float32).reshape(3, CHANNELS) / 8
        labels = {"text": 'grün "1"\n', "speaker": "s", "split": "train"}
        writer.add(utterance(0), x, samples=960, audio_id=AUDIO, labels=labels)
        writer.add(utterance(1), -x, samples=959, audio_id=AUDIO, labels={**labels, "text": ""})
        record = writer.commit({"seconds": 0.0})
    assert record["tar"] == {"bytes": 10240, "sha256": TAR_SHA256}


TAR_SHA256 = "525d9f4476590452a43e9e0493af81a8f7d5282c42caba89273d5b7a5aeafd43"
