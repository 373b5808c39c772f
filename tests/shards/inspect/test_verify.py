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
from tiny_faults import Fault, damages, exchanges, flips, make_small_cache, reseal, truncations
from tiny_server import serve

from shards.errors import UserError
from shards.format.layout import Layout, manifest_id
from shards.format.records import unseal
from shards.format.schemas import MANIFEST_SCHEMA, PLAN_SCHEMA, UNKNOWN_AUDIO, parquet_bytes, read_parquet
from shards.inspect import label_check
from shards.inspect import snapshot as snapshot_module
from shards.inspect.verify import verify
from shards.labels import store as label_store
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


def content(path: Path, labels: str | None = None) -> dict[str, tuple[bytes, str]]:
    """What a trainer gets: features and text of every utterance."""
    cache = Cache.open(path, labels)
    texts = cache.strings("text", range(len(cache)))
    keys = cache.strings("key", range(len(cache)))
    return {key: (cache.features(i).tobytes(), text) for i, (key, text) in enumerate(zip(keys, texts, strict=True))}


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_a_sound_cache_has_no_problem(tmp_path, codec):
    path = make_small_cache(tmp_path / "cache", codec)
    assert verify(path) == verify(path, deep=True) == []
    assert verify(make_cache(tmp_path / "plain", codec=codec), deep=True) == []


def is_found(path: Path, deep: bool) -> bool:
    try:
        return bool(verify(path, deep))
    except UserError:  # CACHE.json and the plan are gone: no cache at all
        return True


def inject(faults, path: Path) -> tuple[Counter, Counter, Counter]:
    """(injected, found by the deep check, found by the fast one) of each kind; also reads the cache by both labels."""
    injected, deep, fast = Counter(), Counter(), Counter()
    good = {name: content(path, name) for name in ("source", "mine")}
    missed = []
    for fault in faults:
        with fault():
            quick = is_found(path, deep=False)
            found = quick or is_found(path, deep=True)  # the deep check makes every fast check, too
            injected[fault.kind] += 1
            deep[fault.kind] += found
            fast[fault.kind] += quick
            if not found or (fault.fast and not quick):
                missed.append((fault.kind, fault.where, found, quick))
            for name, wanted in good.items():
                with contextlib.suppress(UserError):
                    assert content(path, name) == wanted, f"{fault.kind}: a trainer reads others ({fault.where})"
    assert not missed
    assert verify(path, deep=True) == []
    return injected, deep, fast


def test_faults_in_a_sample_of_places_are_all_found_and_never_trained_on(small):
    cache, other, replanned = small
    inject(flips(cache, 2, seed=0), cache)
    inject(truncations(cache, 4096), cache)
    inject(exchanges(cache, other, replanned), cache)


def test_damage_at_random_places_is_always_found_and_never_trained_on(small):
    inject(damages(small[0], 120, seed=2), small[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_damage_at_a_thousand_random_places_is_always_found_and_never_trained_on(tmp_path, seed):
    cache = make_small_cache(tmp_path / "cache", ["f16", "bf16", "int8", "fp8"][seed])
    inject(damages(cache, 250, seed), cache)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_faults_in_every_place_are_all_found_and_never_trained_on(tmp_path, codec, capsys):
    cache = make_small_cache(tmp_path / "cache", codec)
    other = make_small_cache(tmp_path / "other", codec, tensors="other weights")
    replanned = make_small_cache(tmp_path / "replanned", codec, seed=1)
    started = time.perf_counter()
    table = [Counter(), Counter(), Counter()]
    for faults in (flips(cache, 20, seed=1), truncations(cache, 4096), exchanges(cache, other, replanned)):
        for total, more in zip(table, inject(faults, cache), strict=True):
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
    for path in (layout.cache, layout.manifest(1), layout.failures(1), layout.record(2)):
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


@pytest.mark.parametrize("url", [False, True])
def test_an_unfinished_generation_is_no_fault_and_its_committed_shards_are_checked(cache, url):
    layout = Layout(cache)
    (done := unseal(layout.cache))["generations"].pop()
    reseal(layout.cache, lambda tree: tree.update(generations=done["generations"], counts=first_counts(done)))
    with serve(cache) as server:
        where = server.url if url else cache
        assert verify(where, deep=True) == []
        shutil.copy(layout.tar(0), layout.tar(2))
        found = {(file, told) for shard, file, key, told in what(verify(where, deep=True)) if key is None}
        assert ("shards/000002.tar", "does not match its sha256") in found
        layout.record(2).unlink()
        assert verify(where, deep=True) == []
        layout.plan(1).write_bytes(b"PAR1" + bytes(40) + b"PAR1")
        assert {problem.file for problem in verify(where)} == {"plans/001.parquet"}


def first_counts(info: dict) -> dict:
    return {**info["generations"][0]["counts"], "superseded": 0}


def test_a_plan_of_unknown_audio_is_followed_by_any_audio(tmp_path):
    layout = Layout(make_cache(tmp_path / "cache", n=4, shards=1))
    table = read_parquet(layout.plan(0), PLAN_SCHEMA)
    ids = pa.array([UNKNOWN_AUDIO] * 3 + [b"1" * 32], pa.binary(32))
    replace_plan(layout, 0, table.set_column(4, "audio_id", ids).to_pylist())
    assert what(verify(layout.path)) == [
        (0, "shards/000000.parquet", None, "and the failures in its record do not add up to the planned rows")
    ]


@pytest.mark.parametrize("make", [lambda p: None, Path.touch, Path.mkdir])
def test_what_is_no_cache_is_bad_input(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"does not exist|is not a cache"):
        verify(tmp_path / "x")


@pytest.mark.parametrize(("version", "fix"), [(3, "update earshard"), (1, "extract again with `make extract`")])
def test_another_format_is_bad_input_and_not_a_fault(cache, version, fix):
    reseal(Layout(cache).cache, lambda tree: tree["spec"].update(schema_version=version))
    with serve(cache) as server:
        for where in (cache, server.url):
            with pytest.raises(UserError, match=f"{where}/CACHE.json' has cache format {version}, this .* 2: {fix}$"):
                verify(where)


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
        lambda tree: tree["counts"].update(superseded=0),
        lambda tree: tree["counts"].pop("frames"),
        lambda tree: tree["counts"].pop("superseded"),
        lambda tree: tree.update(counts=None),
        lambda tree: tree.update(generations=[]),
        lambda tree: tree["generations"].reverse(),
        lambda tree: tree["generations"].append(tree["generations"][1]),
        lambda tree: tree["generations"][0].update(manifest_id="0" * 64),
        lambda tree: tree["generations"][1].update(manifest_id="0" * 64),
        lambda tree: tree["generations"][1].update(plan_id="0" * 64),
        lambda tree: tree["generations"][1].update(first_shard=1),
        lambda tree: tree["generations"][1].update(shards=10**15),
        lambda tree: tree["generations"][1]["counts"].update(samples=1),
        lambda tree: tree["generations"][1]["counts"].pop("planned"),
        lambda tree: tree["generations"][1]["files"].pop("plan"),
        lambda tree: tree["generations"][0]["files"]["plan"].update(bytes=1),
        lambda tree: tree.update(feature_id="0" * 64),
        lambda tree: tree["spec"].update(layer=3),
        lambda tree: tree["spec"].update(channels=10**9),
        lambda tree: tree["generations"][1]["files"]["failures"].update(bytes=1),
        lambda tree: tree.pop("spec"),
    ],
)
def test_a_cache_file_that_lies_with_a_whole_seal_is_found(cache, change):
    reseal(Layout(cache).cache, change)
    assert verify(cache)


def forge_rows(path: Path, shard: int, column: str, value) -> None:
    """Change a row of a shard and every hash above it: only the row's own sense can show the lie."""
    layout, generation = Layout(path), shard // 2
    tables = {s: read_parquet(layout.rows(s), MANIFEST_SCHEMA).to_pylist() for s in ((0, 1), (2,))[generation]}
    tables[shard][0][column] = value
    data = parquet_bytes(pa.Table.from_pylist(tables[shard], schema=MANIFEST_SCHEMA))
    layout.rows(shard).write_bytes(data)
    frames = sum(row["frames"] for row in tables[shard])
    reseal(layout.record(shard), lambda tree: tree.update(parquet=about(data), frames=frames))
    rows = [row for table in tables.values() for row in table]
    manifest = parquet_bytes(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    layout.manifest(generation).write_bytes(manifest)

    def change(tree):
        entry = tree["generations"][generation]
        entry["files"]["manifest"] = about(manifest)
        for name in ("frames", "samples"):
            entry["counts"][name] = sum(row[name] for row in rows)
            tree["counts"][name] = sum(each["counts"][name] for each in tree["generations"])

    reseal(layout.cache, change)


def replace_plan(layout: Layout, generation: int, rows: list[dict]) -> None:
    """Write another plan and every hash of it."""
    layout.plan(generation).write_bytes(data := parquet_bytes(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)))
    plan_id = about(data)["sha256"]

    def change(tree):
        tree["generations"][generation].update(plan_id=plan_id)
        tree["generations"][generation]["files"].update(plan=about(data))
        before = ""
        for number, entry in enumerate(tree["generations"]):
            shards = range(entry["first_shard"], entry["first_shard"] + entry["shards"])
            for shard in shards if number == generation else ():
                reseal(layout.record(shard), lambda record: record.update(plan_id=plan_id))
            tars = [unseal(layout.record(shard))["tar"]["sha256"] for shard in shards]
            before = entry["manifest_id"] = manifest_id(tree["feature_id"], before, entry["plan_id"], tars)

    reseal(layout.cache, change)


def about(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


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
    ("scale_length", 16),
    ("key", "../../etc/passwd"),
    ("key", "utt-0-2"),
    ("key", ""),
    ("shard", 3),
    ("shard", -1),
    ("row", 2),
    ("row", 7),
    ("crc32", 1),
    ("error", float("nan")),
    ("error", -1.0),
    ("audio", "other.wav"),
    ("audio_id", b"1" * 32),
    ("audio_id", bytes(32)),
    ("samples", -1),
    ("samples", 641),
]


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize(("column", "value"), HOSTILE)
def test_a_row_that_lies_with_every_hash_right_is_found_and_harms_no_reader(cache, column, value, shard):
    forge_rows(cache, shard, column, value)
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
    layout = Layout(cache)
    for path in (layout.tar(1), layout.rows(2), layout.plan(0), layout.labels / "LABELS.json"):
        path.unlink()
        make(path)
    found = {problem.file: problem.what for problem in verify(cache, deep=True) if "cannot be read" in problem.what}
    assert {"shards/000001.tar", "labels/LABELS.json"} <= set(found)
    assert {"plans/000.parquet", "shards/000002.parquet"} <= {problem.file for problem in verify(cache)}


def test_a_plan_that_nothing_vouches_for_is_read_with_care(cache):
    """Before the first commit no other file knows the plan's hash."""
    layout = Layout(cache)
    for path in (layout.cache, layout.plan(1), *layout.shards.glob("*.json")):
        path.unlink()
    layout.plan(0).write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    (told,) = (problem.what for problem in verify(cache) if problem.file == "plans/000.parquet")
    assert told.startswith("is not a readable parquet file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[1].update(key="a.b"), "has the key 'a.b', which no shard can hold"),
        (lambda rows: rows[1].update(key=rows[2]["key"]), "contains a key twice"),
        (lambda rows: rows[-1].update(shard=5), "does not number shards from 2 and rows from 0 without gaps"),
        (lambda rows: rows[0].update(row=1), "does not number shards from 2 and rows from 0 without gaps"),
        (
            lambda rows: [row.update(shard=1) for row in rows],
            "does not number shards from 2 and rows from 0 without gaps",
        ),
    ],
)
def test_a_plan_that_no_shards_can_follow_is_reported_though_its_hash_is_right(cache, change, told):
    layout = Layout(cache)
    rows = read_parquet(layout.plan(1), PLAN_SCHEMA).to_pylist()
    change(rows)
    replace_plan(layout, 1, rows)
    assert (None, "plans/001.parquet", None, told) in what(verify(cache))


def test_tables_without_a_generation_are_reported_whatever_number_they_have(cache):
    layout = Layout(cache)
    strangers = [layout.plan(3), layout.manifest(2), layout.failures(0).with_name("0.parquet")]
    for path in strangers:
        shutil.copy(layout.plan(0), path)
    found = {file for _, file, _, told in what(verify(cache)) if told == "is not a table of a generation of this cache"}
    assert found == {str(path.relative_to(cache)) for path in strangers}


def change_labels(cache: Path, change) -> None:
    reseal(cache / "labels" / "LABELS.json", change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tree: tree["sets"].pop(), "is not named by LABELS.json"),
        (lambda tree: tree["sets"][-1].update(id="28c0e4c3" + "0" * 56), "has rows in another order or another id"),
        (lambda tree: tree["sets"][-1].update(id="0" * 64), "is not a valid index of label sets"),
        (lambda tree: tree["sets"][-1].update(rows=7), "has other rows or columns than LABELS.json says"),
        (lambda tree: tree["sets"][-1]["file"].update(bytes=1), "bytes, not 1"),
        (lambda tree: tree["sets"][-1]["file"].update(sha256="0" * 64), "does not match its sha256"),
        (lambda tree: tree["sets"].append(tree["sets"][0]), "names one file for two label sets"),
        (lambda tree: tree["sets"][-1]["file"].update(name="../CACHE.json"), "is not a valid index of label sets"),
        (lambda tree: tree.update(schema_version=3), "has format version '3', this earshard reads 2: update earshard"),
        (lambda tree: tree.update(sets=None), ""),
    ],
)
def test_labels_that_lie_with_a_whole_seal_are_found(cache, change, told):
    change_labels(cache, change)
    problems = verify(cache)
    assert problems
    assert all(problem.file.startswith("labels/") and told in problem.what for problem in problems)


def test_the_id_of_a_large_label_set_is_checked_only_in_depth(cache, monkeypatch):
    for module in (label_check, label_store):
        monkeypatch.setattr(module, "IDENTIFIED", 1)
    change_labels(cache, lambda tree: tree["sets"][-1].update(id="28c0e4c3" + "0" * 56))
    assert verify(cache) == []
    assert [problem.file for problem in verify(cache, deep=True)] == ["labels/mine-28c0e4c3.parquet"]


def test_a_label_file_that_is_no_table_is_a_problem_and_not_a_crash(cache):
    path = cache / "labels" / "mine-28c0e4c3.parquet"
    path.write_bytes(b"PAR1")
    change_labels(cache, lambda tree: tree["sets"][-1]["file"].update(about(b"PAR1")))
    ((_, file, _, told),) = what(verify(cache))
    assert (file, told[:30]) == (f"labels/{path.name}", "is not a readable parquet file")


def test_a_set_that_is_being_added_is_no_fault(cache):
    shutil.copy(cache / "labels" / "mine-28c0e4c3.parquet", cache / "labels" / "new-00000000.parquet")
    assert [problem.what for problem in verify(cache)] == ["is not named by LABELS.json"]
    Layout(cache).labels_claim.write_bytes(b"{}")
    assert verify(cache) == []


def test_a_remote_cache_with_a_corrupt_plan_is_still_checked_shard_by_shard(cache):
    layout = Layout(cache)
    data = bytearray(layout.plan(0).read_bytes())
    data[len(data) // 2] ^= 1
    layout.plan(0).write_bytes(bytes(data))
    with serve(cache) as server:
        assert what(verify(server.url)) == what(verify(cache))
        layout.tar(1).unlink()
        found = what(verify(server.url))
    assert {file for _, file, _, _ in found} == {"plans/000.parquet", "shards/000001.tar"}


def test_a_number_of_shards_that_a_stranger_declares_is_not_believed(cache, monkeypatch):
    monkeypatch.setattr(snapshot_module, "MAX_ABSENT", 32)

    def lie(tree):
        tree["generations"][1].update(shards=10**9)
        tree["counts"].update(shards=2 + 10**9)

    reseal(Layout(cache).cache, lie)
    with serve(cache) as server:
        assert what(verify(server.url)) == what(verify(cache)) != []
        Layout(cache).plan(1).unlink()
        server.asked.clear()
        assert "plans/001.parquet" in {problem.file for problem in verify(server.url)}
        assert len(server.asked) < 100


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
    (cache / "labels" / "LABELS.json").write_bytes(bomb)
    found = verify(cache)
    assert {"CACHE.json", "shards/000001.json", "labels/LABELS.json"} <= {problem.file for problem in found}
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
