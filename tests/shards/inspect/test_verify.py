from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_cache import make_cache
from tiny_faults import Fault, exchanges, flips, make_small_cache, reseal, truncations
from tiny_server import serve

from shards.errors import UserError
from shards.format.layout import MANIFEST_SCHEMA, UTTERANCE_SCHEMA, Layout, parquet_bytes, read_parquet
from shards.inspect.verify import verify
from shards.read.cache import Cache


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return (
        make_small_cache(folder / "cache"),
        make_small_cache(folder / "other", tensors="other weights"),
        make_small_cache(folder / "replanned", seed=1),
    )


@pytest.fixture
def cache(small, tmp_path):
    return Path(shutil.copytree(small[0], tmp_path / "cache"))


def what(problems) -> list[tuple]:
    return [(p.shard, p.file, p.key, p.what) for p in problems]


def content(path: Path) -> dict[str, tuple[bytes, str]]:
    """What a trainer gets: features and text of every utterance."""
    cache = Cache.open(path)
    texts = cache.strings("text", range(len(cache)))
    keys = cache.strings("key", range(len(cache)))
    return {key: (cache.features(i).tobytes(), text) for i, (key, text) in enumerate(zip(keys, texts, strict=True))}


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_a_sound_cache_has_no_problem(tmp_path, codec):
    path = make_small_cache(tmp_path / "cache", codec)
    assert verify(path) == verify(path, deep=True) == []
    assert verify(make_cache(tmp_path / "plain", codec=codec), deep=True) == []


def inject(faults, path: Path, train: bool) -> tuple[Counter, Counter, Counter]:
    """(injected, found by the deep check, found by the fast one) of each kind; ``train`` also reads the cache."""
    injected, deep, fast = Counter(), Counter(), Counter()
    good = content(path)
    missed = []
    for fault in faults:
        with fault():
            injected[fault.kind] += 1
            try:
                deep[fault.kind] += (found := bool(verify(path, deep=True)))
                fast[fault.kind] += (quick := bool(verify(path)))
            except UserError:  # CACHE.json and the plan are gone: no cache at all
                found = quick = True
                deep[fault.kind] += 1
                fast[fault.kind] += 1
            if not found or (fault.fast and not quick):
                missed.append((fault.kind, fault.where, found, quick))
            if train:
                with contextlib.suppress(UserError):
                    assert content(path) == good, f"{fault.kind}: a trainer reads other features ({fault.where})"
    assert not missed
    assert verify(path, deep=True) == []
    return injected, deep, fast


def test_faults_in_a_sample_of_places_are_all_found_and_never_trained_on(small):
    cache, other, replanned = small
    inject(flips(cache, 3, seed=0), cache, train=True)
    inject(truncations(cache, 2048), cache, train=True)
    inject(exchanges(cache, other, replanned), cache, train=True)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_faults_in_every_place_are_all_found_and_never_trained_on(tmp_path, codec, capsys):
    cache = make_small_cache(tmp_path / "cache", codec)
    other = make_small_cache(tmp_path / "other", codec, tensors="other weights")
    replanned = make_small_cache(tmp_path / "replanned", codec, seed=1)
    started = time.perf_counter()
    table = [Counter(), Counter(), Counter()]
    for faults in (flips(cache, 150, seed=1), truncations(cache, 512), exchanges(cache, other, replanned)):
        for total, more in zip(table, inject(faults, cache, train=True), strict=True):
            total.update(more)
    with capsys.disabled():
        print(f"\n{codec}: {'fault':<28} injected  --deep  fast")
        for kind, count in table[0].items():
            print(f"{codec}: {kind:<28} {count:8} {table[1][kind]:7} {table[2][kind]:5}")
        seconds = time.perf_counter() - started
        print(
            f"{codec}: {'all':<28} {table[0].total():8} {table[1].total():7} {table[2].total():5}  in {seconds:.0f} s"
        )
    assert table[0] == table[1]


def test_a_changed_payload_names_its_shard_and_key(cache):
    layout = Layout(cache)
    row = read_parquet(layout.rows(1), MANIFEST_SCHEMA).to_pylist()[1]
    with open(layout.tar(1), "r+b") as file:
        file.seek(row["offset"] + 130)
        file.write(b"\x55\x55")
    assert what(verify(cache, deep=True)) == [
        (1, "shards/000001.tar", None, "does not match its sha256"),
        (1, "shards/000001.tar", "utt-0-5", "does not match its crc32"),
    ]
    assert verify(cache) == []


def test_an_incomplete_cache_is_told_and_its_shards_are_checked(cache):
    layout = Layout(cache)
    for path in (layout.cache, layout.manifest, layout.failures, layout.record(2)):
        path.unlink()
    assert what(verify(cache, deep=True)) == [
        (None, "CACHE.json", None, "is missing: the extraction is not complete"),
        (2, "shards/000002.json", None, "is missing: the shard is not committed"),
    ]
    os.truncate(layout.tar(0), 1024)
    assert (0, "shards/000000.tar", None, "has 1024 bytes, not 10240") in what(verify(cache))


def test_a_deleted_record_is_reported_once_and_no_other_shard_blamed(cache):
    Layout(cache).record(1).unlink()
    assert what(verify(cache, deep=True)) == [
        (1, "shards/000001.json", None, "is missing: the shard is not committed"),
    ]


def test_a_record_that_is_of_no_planned_shard_is_reported(cache):
    shutil.copy(Layout(cache).record(1), Layout(cache).record(7))
    assert (None, "shards/000007.json", None, "is not a shard of this cache") in what(verify(cache))


def test_a_tar_that_other_readers_would_take_for_a_shard_is_reported_by_whatever_number_it_has(cache):
    for name in ("1.tar", "-00001.tar", "0000001.tar", "000007.tar"):
        shutil.copy(Layout(cache).tar(1), cache / "shards" / name)
    strangers = [file for _, file, _, told in what(verify(cache)) if told == "is not a shard of this cache"]
    assert strangers == ["shards/-00001.tar", "shards/0000001.tar", "shards/000007.tar", "shards/1.tar"]


def test_what_an_interrupted_or_running_extraction_leaves_is_no_fault(cache):
    (cache / "shards" / "000001.tar.tmp-9-x").write_bytes(b"half")
    (cache / "shards" / "000001.claim").write_bytes(b"{}")
    assert verify(cache, deep=True) == []


@pytest.mark.parametrize("make", [lambda p: None, Path.touch, Path.mkdir])
def test_what_is_no_cache_is_bad_input(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"does not exist|is not a cache"):
        verify(tmp_path / "x")


def test_a_newer_format_is_bad_input_and_not_a_fault(cache):
    reseal(Layout(cache).cache, lambda tree: tree.update(schema_version=2))
    with pytest.raises(UserError, match=r"cache format 2.* update earshard"):
        verify(cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(shard=2),
        lambda tree: tree.update(rows=3),
        lambda tree: tree.update(rows="2"),
        lambda tree: tree.update(frames=10**30),
        lambda tree: tree.update(feature_id="0" * 64),
        lambda tree: tree.update(plan_id="0" * 64),
        lambda tree: tree.update(failures=[]),
        lambda tree: tree.update(failures=[{"key": "utt-0-3", "stage": "decode", "error": "", "attempt": 1}]),
        lambda tree: tree.update(failures=tree["failures"] * 2),
        lambda tree: tree.update(failures="none"),
        lambda tree: tree["tar"].update(bytes=-1),
        lambda tree: tree["tar"].update(sha256="0" * 64),
        lambda tree: tree.pop("tar"),
        lambda tree: tree.update(tar=[]),
        lambda tree: tree["parquet"].update(sha256="x"),
    ],
)
def test_a_record_that_lies_with_a_whole_seal_is_found(cache, change):
    reseal(Layout(cache).record(1), change)
    assert verify(cache, deep=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["counts"].update(utterances=5),
        lambda tree: tree["counts"].update(planned=8),
        lambda tree: tree["counts"].update(shards=10**15),
        lambda tree: tree["counts"].pop("frames"),
        lambda tree: tree.update(counts=None),
        lambda tree: tree.update(manifest_id="0" * 64),
        lambda tree: tree.update(plan_id="0" * 64),
        lambda tree: tree.update(feature_id="0" * 64),
        lambda tree: tree["spec"].update(layer=3),
        lambda tree: tree["spec"].update(channels=10**9),
        lambda tree: tree.update(files={}),
        lambda tree: tree["files"]["failures.parquet"].update(bytes=1),
        lambda tree: tree.pop("spec"),
    ],
)
def test_a_cache_file_that_lies_with_a_whole_seal_is_found(cache, change):
    reseal(Layout(cache).cache, change)
    assert verify(cache)


def forge_rows(path: Path, shard: int, column: str, value) -> None:
    """Change a row of a shard and every hash above it: only the row's own sense can show the lie."""
    layout = Layout(path)
    tables = [read_parquet(layout.rows(s), MANIFEST_SCHEMA).to_pylist() for s in range(3)]
    tables[shard][0][column] = value
    data = parquet_bytes(pa.Table.from_pylist(tables[shard], schema=MANIFEST_SCHEMA))
    layout.rows(shard).write_bytes(data)
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    frames = sum(row["frames"] for row in tables[shard])
    reseal(layout.record(shard), lambda tree: tree.update(parquet=about, frames=frames))
    data = parquet_bytes(pa.Table.from_pylist([row for table in tables for row in table], schema=MANIFEST_SCHEMA))
    layout.manifest.write_bytes(data)
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def change(tree):
        tree["files"]["manifest.parquet"] = about
        tree["counts"]["frames"] = sum(row["frames"] for table in tables for row in table)

    reseal(layout.cache, change)


HOSTILE = [
    ("offset", -1),
    ("offset", 0),
    ("offset", 2**63 - 1),
    ("offset", 1024),
    ("length", 0),
    ("length", -(2**63)),
    ("length", 2**63 - 1),
    ("length", 140),
    ("frames", 0),
    ("frames", -5),
    ("frames", 2**31 - 1),
    ("frames", 3),
    ("scale_offset", 0),
    ("scale_offset", 2**63 - 1),
    ("codec", "int8"),
    ("codec", "bf16"),
    ("codec", "pickle"),
    ("key", "../../etc/passwd"),
    ("key", "utt-0-2"),
    ("key", ""),
    ("shard", 2),
    ("shard", -1),
    ("row", 2),
    ("row", 7),
    ("crc32", 1),
    ("error", float("nan")),
    ("error", -1.0),
    ("text", "another text"),
    ("speaker", "another speaker"),
    ("samples", -1),
    ("samples", 641),
]


@pytest.mark.parametrize(("column", "value"), HOSTILE)
def test_a_row_that_lies_with_every_hash_right_is_found_and_harms_no_reader(cache, column, value):
    forge_rows(cache, 1, column, value)
    assert verify(cache, deep=True)
    try:
        for features, _ in content(cache).values():
            assert len(features) < 1000
    except UserError:
        pass


def test_progress_ends_at_the_bytes_that_were_to_be_read(cache):
    for deep in (False, True):
        steps = []
        verify(cache, deep, lambda done, total, steps=steps: steps.append((done, total)))
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1] > 0


def test_an_unreadable_file_is_a_problem_and_not_a_crash(cache):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    Layout(cache).tar(1).chmod(0)
    assert (1, "shards/000001.tar", None, "cannot be read: Permission denied") in what(verify(cache, deep=True))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_in_the_place_of_one_is_a_problem_and_not_waited_for(cache, make):
    for path in (Layout(cache).tar(1), Layout(cache).rows(2), Layout(cache).plan):
        path.unlink()
        make(path)
    found = {problem.file: problem.what for problem in verify(cache, deep=True) if "cannot be read" in problem.what}
    assert {"plan.parquet", "shards/000001.tar"} <= set(found)
    assert "shards/000002.parquet" in {problem.file for problem in verify(cache)}


def test_a_plan_that_nothing_vouches_for_is_read_with_care(cache):
    """Before the first commit no other file knows the plan's hash."""
    layout = Layout(cache)
    for path in (layout.cache, *layout.shards.glob("*.json")):
        path.unlink()
    layout.plan.write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    (told,) = (problem.what for problem in verify(cache) if problem.file == "plan.parquet")
    assert told.startswith("is not a readable parquet file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[1].update(key="a.b"), "has the key 'a.b', which no shard can hold"),
        (lambda rows: rows[1].update(key=rows[4]["key"]), "contains a key twice"),
        (lambda rows: rows[-1].update(shard=5), "does not number shards and rows from 0 without gaps"),
        (lambda rows: rows[0].update(row=1), "does not number shards and rows from 0 without gaps"),
    ],
)
def test_a_plan_that_no_shards_can_follow_is_reported_though_its_hash_is_right(cache, change, told):
    layout = Layout(cache)
    rows = read_parquet(layout.plan, UTTERANCE_SCHEMA).to_pylist()
    change(rows)
    layout.plan.write_bytes(parquet_bytes(pa.Table.from_pylist(rows, schema=UTTERANCE_SCHEMA)))
    reseal(layout.cache, lambda tree: tree.update(plan_id=hashlib.sha256(layout.plan.read_bytes()).hexdigest()))
    assert (None, "plan.parquet", None, told) in what(verify(cache))


def test_a_remote_cache_with_a_corrupt_plan_is_still_checked_shard_by_shard(cache):
    layout = Layout(cache)
    data = bytearray(layout.plan.read_bytes())
    data[len(data) // 2] ^= 1
    layout.plan.write_bytes(bytes(data))
    with serve(cache) as server:
        assert what(verify(server.url)) == what(verify(cache))
        layout.tar(1).unlink()
        found = what(verify(server.url))
    assert {file for _, file, _, _ in found} == {"plan.parquet", "shards/000001.tar"}


def test_a_url_without_a_cache_is_reported(cache):
    with serve(cache) as server, pytest.raises(UserError, match=r"'.*/nothing' is not a cache"):
        verify(f"{server.url}/nothing")


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 2_000_000,
        b'{"a":' * 500_000,
        b'{"a":"' + b"x" * (17 << 20) + b'"}',
        b"1" * 1_000_000,
        b'{"sha256":NaN}',
        b"\xff\xfe{}",
    ],
    ids=["lists", "objects", "long", "digits", "nan", "utf16"],
)
def test_a_json_bomb_is_refused_in_a_sentence(cache, bomb):
    Layout(cache).record(1).write_bytes(bomb)
    Layout(cache).cache.write_bytes(bomb)
    found = verify(cache)
    assert {"CACHE.json", "shards/000001.json"} <= {problem.file for problem in found}
    assert all(len(problem.what) < 200 for problem in found)
    with pytest.raises(UserError):
        Cache.open(cache)


def test_a_cache_copied_elsewhere_is_as_valid(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    assert verify(tmp_path / "copy", deep=True) == []


def test_a_fault_taken_back_leaves_the_cache_as_it_was(small):
    cache = small[0]
    before = json.dumps({str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(cache.rglob("*.*"))})
    fault: Fault = next(iter(exchanges(*small)))
    with fault():
        pass
    assert (
        json.dumps({str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(cache.rglob("*.*"))}) == before
    )
