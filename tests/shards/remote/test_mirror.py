from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_cache import flip, grow, make_cache
from tiny_faults import reseal
from tiny_server import FAULTS, serve
from torch.utils.data import DataLoader

from shards.__main__ import main
from shards.commit.folder import add_labels
from shards.errors import UserError
from shards.format.layout import Layout
from shards.read.cache import Cache
from shards.remote import client as storage
from shards.remote import mirror as mirror_module
from shards.remote.mirror import Mirror
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig

RULES = SamplerConfig(batch_size=4, window_shards=2)


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("near") / "cache", n=48, shards=12, seed=3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF", (0.001,) * 4)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    monkeypatch.delenv("EARSHARD_CACHE_GB", raising=False)
    return tmp_path / "mirrors"


def shards_in(root):
    return sorted(path.name for path in root.glob("*/shards/*.tar"))


def same(far: Cache, near) -> bool:
    local = Cache.open(near)
    return len(far) == len(local) and all(np.array_equal(far.features(i), local.features(i)) for i in range(len(far)))


def test_a_remote_cache_returns_the_batches_of_the_local_one_through_any_loader(near, root):
    want = [(b.rows, b.texts, b.features) for b in FeatureStream([Cache.open(near)], RULES, 5, epochs=2)]
    with serve(near) as server:
        far = Cache.open(server.url)
        assert far.manifest_id == Cache.open(near).manifest_id
        assert far.location == server.url
        streams = [FeatureStream([far], RULES, 5, epochs=2, prefetch=p) for p in (0, 3)]
        for loader in (*streams, DataLoader(streams[0], batch_size=None, num_workers=2)):
            got = [(b.rows, b.texts, b.features) for b in loader]
            assert [g[:2] for g in got] == [w[:2] for w in want]
            assert all(g[2].equal(w[2]) for g, w in zip(got, want, strict=True))
        assert all(server.count(f"{shard:06d}.tar") == 1 for shard in range(12))


def test_opening_fetches_no_shard_and_reading_one_row_fetches_one(near, root):
    with serve(near) as server:
        far = Cache.open(server.url)
        assert shards_in(root) == []
        far.features(0)
        assert shards_in(root) == ["000000.tar"]
        assert not list(root.glob("*/shards/*.part"))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name", ["CACHE.json", "manifests/000.parquet", "000001.json", "000001.tar", "LABELS.json", "labels/*.parquet"]
)
def test_a_transfer_that_fails_is_repeated_and_never_seen(near, root, name, fault, ranges):
    name = next(near.glob(name)).name if "*" in name else name
    with serve(near, ranges) as server:
        server.faults[name] = [fault] * 3
        assert same(Cache.open(server.url), near)
        assert len(server.faults[name]) == (2 if fault == "slow" else 0)  # slow is no failure


def test_a_cut_transfer_continues_where_it_was_cut(near, root):
    size = Layout(near).tar(0).stat().st_size
    with serve(near) as server:
        server.faults["000000.tar"] = ["cut"]
        Cache.open(server.url).features(0)
        asked = [wanted for name, wanted in server.asked if name.endswith("000000.tar")]
    assert asked[0] is None
    start, end = map(int, asked[1].removeprefix("bytes=").split("-"))
    assert 0 < start < size
    assert end == size - 1


def test_a_long_shard_over_a_line_that_keeps_breaking_arrives_as_long_as_it_advances(near, root):
    with serve(near) as server:
        server.faults["000000.tar"] = ["cut"] * 8  # more than there are attempts without progress
        Cache.open(server.url).features(0)
        assert server.count("000000.tar") == 9


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "HTTP 503"),
        ("corrupt", "its sha256 does not match the recorded one"),
        ("truncated", "it ended after|sha256"),
        ("403", "permission denied"),
    ],
)
def test_what_never_arrives_whole_ends_in_one_sentence_and_leaves_no_shard(near, root, fault, reason):
    with serve(near, ranges=False) as server:
        server.always["000002.tar"] = fault
        far = Cache.open(server.url)
        with pytest.raises(UserError, match=reason) as told:
            list(FeatureStream([far], RULES, 5, epochs=1))
        assert f"{server.url}/shards/000002.tar" in str(told.value)
        assert "\n" not in str(told.value)
    assert "000002.tar" not in shards_in(root)


def test_a_remote_cache_that_is_not_there_is_reported(near, root, tmp_path):
    with serve(tmp_path) as server:
        with pytest.raises(UserError, match=r"'http.*/nothing/CACHE.json' does not exist: pass the URL of a complete"):
            Cache.open(f"{server.url}/nothing/")
        url = server.url
    with pytest.raises(UserError, match="could not be fetched in 5 attempts"):
        Cache.open(url)
    with pytest.raises(UserError, match=r"'nosuch://x/y' is not a valid cache URL"):
        Cache.open("nosuch://x/y")


@pytest.mark.parametrize("typed", ["our caches/été", "our%20caches/%C3%A9t%C3%A9"])
def test_a_url_may_be_typed_as_the_folder_is_called_or_as_a_browser_shows_it(near, root, tmp_path, typed):
    (tmp_path / "our caches").mkdir()
    (tmp_path / "our caches" / "été").symlink_to(near)
    with serve(tmp_path) as server:
        assert same(Cache.open(f"{server.url}/{typed}"), near)


def test_any_filesystem_of_fsspec_will_do(near, root):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(near), "/bucket/cache", recursive=True)
    far = Cache.open("memory://bucket/cache")
    assert same(far, near)
    memory.rm("/bucket", recursive=True)
    with pytest.raises(UserError, match=r"'memory://bucket/cache/CACHE.json' does not exist"):
        Cache.open("memory://bucket/cache")


def test_a_filesystem_that_raises_anything_is_asked_again(near, root, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(near), "/flaky/cache", recursive=True)
    whole, calls = type(memory).cat_file, []

    def cat_file(self, path, **more):
        calls.append(path)
        if len(calls) % 2:
            raise RuntimeError("the service is\ntired")
        return whole(self, path, **more)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    monkeypatch.setattr(storage, "CHUNK", 4096)  # several a shard, one for small files
    assert same(Cache.open("memory://flaky/cache"), near)


def test_a_scheme_without_its_package_is_reported(root):
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"s3:// needs the Python package s3fs, .* 'earshard\[s3\]'"):
            Cache.open("s3://bucket/cache")


def taken_by(root: Path) -> int:
    """Bytes of shards, whole or under way, at one moment: while this holds the lock of who makes room."""
    sizes = {}
    with open(root / "room.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in root.glob("*/shards/*"):
            if path.suffix in (".tar", ".part"):  # the one becomes the other at any time
                with suppress(FileNotFoundError):
                    sizes[path.with_suffix("")] = path.stat().st_size
    return sum(sizes.values())


def test_the_folder_stays_within_its_budget_and_every_row_is_read(near, root):
    size = max(Layout(near).tar(shard).stat().st_size for shard in range(12))
    with serve(near) as server:
        far = Cache.open(Mirror.open(server.url, budget=6 * size))
        local = Cache.open(near)
        for batch in FeatureStream([far], RULES, 5, epochs=3):
            assert taken_by(root) <= 6 * size
            for row, features, frames in zip(batch.rows, batch.features, batch.lengths, strict=True):
                assert np.array_equal(features[:frames].numpy(), local.features(row))
        assert sum(server.count(f"{shard:06d}.tar") for shard in range(12)) > 12


def test_a_shard_that_becomes_whole_while_it_is_counted_is_counted(tmp_path):
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    parts = [folder / f"{shard:06d}.part" for shard in range(800)]
    for part in parts:
        part.write_bytes(b"x")
    thread = threading.Thread(target=lambda: [part.rename(part.with_suffix(".tar")) for part in parts])
    thread.start()
    counts = set()
    while thread.is_alive():
        counts.add(sum(taken for _, taken, _ in mirror_module._mirrored_shards(tmp_path)))
    thread.join()
    assert counts == {len(parts)}


def test_the_longest_unused_shard_makes_room_and_a_mapped_one_does_not(near, root):
    layout = Layout(near)
    three = sum(layout.tar(shard).stat().st_size for shard in range(4))
    with serve(near) as server:
        mirror = Mirror.open(server.url, budget=three)
        held = mirror.open_shard(0)
        for shard in (1, 2, 3):
            mirror.fetch(shard)
        os.utime(mirror.layout.tar(1))  # used again
        mirror.fetch(4)
        assert {"000000.tar", "000001.tar", "000004.tar"} <= set(shards_in(root))
        assert "000002.tar" not in shards_in(root)
        held.close()
        for shard in (5, 6, 7):
            mirror.fetch(shard)
        assert "000000.tar" not in shards_in(root)


def test_after_a_clock_was_set_back_a_day_the_shards_in_use_stay(near, root):
    layout = Layout(near)
    three = sum(layout.tar(shard).stat().st_size for shard in range(4))
    with serve(near) as server:
        mirror = Mirror.open(server.url, budget=three)
        for shard in (0, 1, 2):
            mirror.fetch(shard)
            tomorrow = time.time() + 86_400
            os.utime(mirror.layout.tar(shard), (tomorrow, tomorrow))
        for shard in (3, 4):
            mirror.fetch(shard)
        assert {"000003.tar", "000004.tar"} <= set(shards_in(root))


def test_what_is_needed_waits_for_the_room_of_a_fetch_that_is_under_way(near, root):
    both = sum(Layout(near).tar(shard).stat().st_size for shard in (0, 1))
    with serve(near) as server:
        far = Mirror.open(server.url, budget=both - 1)
        server.faults["000000.tar"] = ["hang"]
        far.prefetch([0])
        assert server.waiting.wait(60)
        needs = threading.Thread(target=far.fetch, args=(1,))
        needs.start()
        needs.join(0.3)
        assert needs.is_alive()
        assert taken_by(root) < both
        server.go_on.set()
        needs.join(60)
        assert shards_in(root) == ["000001.tar"]


def test_a_mapping_outlives_its_file(near, root):
    with serve(near) as server:
        far = Cache.open(server.url)
        before = far.features(0).copy()
        for path in root.glob("*/shards/*.tar"):
            path.unlink()
        assert np.array_equal(far.features(0), before)
        assert np.array_equal(pickle.loads(pickle.dumps(far)).features(0), before)  # fetched again by another process


def test_what_is_mixed_at_a_time_must_fit(near, root):
    with serve(near) as server:
        far = Cache.open(Mirror.open(server.url, budget=int(1.5 * Layout(near).tar(0).stat().st_size)))
        with pytest.raises(UserError, match=r"the 2 shards of a window.*set EARSHARD_CACHE_GB.*lower window_shards"):
            next(iter(FeatureStream([far], RULES, 5)))


def test_the_budget_is_a_number_of_gigabytes(near, root, monkeypatch):
    monkeypatch.setenv("EARSHARD_CACHE_GB", "lots")
    with serve(near) as server, pytest.raises(UserError, match="EARSHARD_CACHE_GB is 'lots'"):
        Cache.open(server.url)
    monkeypatch.setenv("EARSHARD_CACHE_GB", "0.5")
    with serve(near) as server:
        assert Cache.open(server.url).mirror.budget == 500_000_000


def test_a_cache_that_was_replaced_at_its_url_is_not_mixed_with_the_old(near, root, tmp_path):
    shown = tmp_path / "shown"
    shown.symlink_to(near)
    with serve(tmp_path) as server:
        assert same(Cache.open(f"{server.url}/shown"), near)
        shown.unlink()
        other = make_cache(tmp_path / "other", n=20, shards=2, seed=9)
        shown.symlink_to(other)
        assert same(Cache.open(f"{server.url}/shown"), other)


@pytest.fixture
def growing(near, tmp_path):
    return Path(shutil.copytree(near, tmp_path / "growing"))


def test_a_run_keeps_its_generation_while_the_cache_grows_and_is_opened_anew_beside_it(growing, root):
    want = [(b.rows, b.texts, b.features) for b in FeatureStream([Cache.open(growing)], RULES, 5, epochs=2)]
    with serve(growing) as server:
        run = Cache.open(server.url)
        stream = FeatureStream([run], RULES, 5, epochs=2)
        loaded = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
        batches = iter(stream)
        got = [next(batches) for _ in range(3)]
        grow(growing, n=6, shards=2, utt_00003="another recording")
        new = Cache.open(server.url)
        assert (len(new), new.generation, run.generation) == (54, 1, 0)
        assert same(new, growing)
        assert len(list(root.glob("*/CACHE.json"))) == 1
        for each in ([*got, *batches], loaded):  # in this process, and in one that starts only now
            assert all((b.rows, b.texts) == w[:2] and b.features.equal(w[2]) for b, w in zip(each, want, strict=True))
        again = Cache.open(server.url, generation=0)
        assert (again.manifest_id, again.manifest_id != new.manifest_id) == (run.manifest_id, True)
        assert server.count("000000.tar") == server.count("manifests/000.parquet") == 1


def test_a_mirror_that_was_opened_before_the_cache_grew_reads_what_another_process_has_seen_since(growing, root):
    with serve(growing) as server:
        mirror = Mirror.open(server.url)
        grow(growing)
        assert same(Cache.open(server.url), growing)
        assert same(Cache.open(mirror), growing)


def test_an_outdated_answer_takes_no_generation_from_its_readers(growing, root):
    outdated = Layout(growing).cache.read_bytes()
    with serve(growing) as server:
        grow(growing)
        far = Cache.open(server.url)
        current = Layout(growing).cache.read_bytes()
        Layout(growing).cache.write_bytes(outdated)
        Cache.open(server.url, generation=0)
        Layout(growing).cache.write_bytes(current)
        assert same(pickle.loads(pickle.dumps(far)), growing)


def test_a_cache_whose_last_generation_was_replaced_disturbs_no_reader_of_the_old_one(growing, root, tmp_path):
    other = Path(shutil.copytree(growing, tmp_path / "other"))
    grow(growing, n=6, seed=1)
    grow(other, n=6, seed=2, prefix="other")
    with serve(growing) as server:
        old = Cache.open(server.url)
        server.folder = other
        assert same(Cache.open(server.url), other)
        for row in range(48, 54):
            with pytest.raises(UserError, match="belongs to another cache"):
                old.features(row)
        server.folder = growing
        assert same(old, growing)


def test_the_tables_of_a_folder_are_fetched_once_and_again_if_they_are_damaged(near, root):
    with serve(near) as server:
        Cache.open(server.url)
        Cache.open(server.url)
        tables = [*root.glob("*/manifests/*.parquet"), *root.glob("*/labels/*.parquet")]
        assert [server.count(path.name) for path in tables] == [2, 1]  # manifest and failures have one name
        for path in tables:
            flip(path, 40)
        assert same(Cache.open(server.url), near)
        assert [server.count(path.name) for path in tables] == [3, 2]


def test_a_label_set_that_is_added_is_found_at_the_next_opening(growing, root):
    with serve(growing) as server:
        run = Cache.open(server.url)
        with pytest.raises(UserError, match=r"'http.*' has no label set 'mine': choose one of 'source'"):
            Cache.open(server.url, "mine")
        add_labels(Layout(growing), pa.table({"key": ["utt-00002"], "text": ["mine"]}), "mine", "test")
        far = Cache.open(server.url, "mine")
        assert (len(far), far.strings("text", [0])) == (1, ["mine"])
        assert np.array_equal(far.features(0), run.features(2))
        assert len(pickle.loads(pickle.dumps(run))) == 48


def test_labels_that_lie_about_their_file_are_refused(growing, root):
    reseal(growing / "labels" / "LABELS.json", lambda tree: tree["sets"][0]["file"].update(sha256="0" * 64))
    with serve(growing) as server, pytest.raises(UserError, match=r"labels/source-.* \(its sha256 does not match"):
        Cache.open(server.url)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tree: tree["spec"].update(schema_version=1),
            "has cache format 1, this earshard reads 2: extract again",
        ),
        (lambda tree: tree.update(feature_id="0" * 64), r"has a CACHE\.json with missing or invalid fields"),
        (lambda tree: tree["counts"].update(bytes=10**400), r"has a CACHE\.json with missing or invalid fields"),
        (lambda tree: tree["generations"].clear(), r"has a CACHE\.json with missing or invalid fields"),
    ],
)
def test_a_cache_file_of_a_stranger_is_refused_in_a_sentence(growing, root, change, sentence):
    reseal(Layout(growing).cache, change)
    with serve(growing) as server, pytest.raises(UserError, match=sentence):
        Cache.open(server.url)


def test_a_record_of_another_cache_is_refused(near, root, tmp_path):
    other = make_cache(tmp_path / "other", n=48, shards=12, seed=3, layer=4)
    with serve(other) as server:
        far = Cache.open(server.url)
        server.folder = near
        with pytest.raises(UserError, match=r"000000.json' could not be fetched .* \(it belongs to another cache\)"):
            far.features(0)


READER = """
import sys
from shards.read.cache import Cache
cache = Cache.open(sys.argv[1])
print(sum(float(cache.features(i).astype("f8").sum()) for i in range(len(cache))))
"""


def test_processes_of_a_machine_fetch_each_shard_once(near, root):
    with serve(near) as server:
        readers = [
            subprocess.Popen([sys.executable, "-c", READER, server.url], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        sums = {reader.communicate(timeout=60)[0] for reader in readers}
        assert all(reader.returncode == 0 for reader in readers)
        assert all(server.count(f"{shard:06d}.tar") == 1 for shard in range(12))
    assert len(sums) == 1


def test_a_process_killed_while_it_fetches_blocks_no_other(near, root):
    with serve(near) as server:
        server.faults["000000.tar"] = ["hang"]
        reader = subprocess.Popen([sys.executable, "-c", READER, server.url])
        assert server.waiting.wait(60)
        assert [path.name for path in root.glob("*/shards/*.part")] == ["000000.part"]
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        assert same(Cache.open(server.url), near)
    assert not list(root.glob("*/shards/*.part"))


def test_a_fork_while_shards_are_fetched_holds_no_lock(near, root):
    with serve(near) as server:
        far = Cache.open(server.url)
        server.faults["000000.tar"] = ["hang"]
        far.mirror.prefetch([0])
        assert server.waiting.wait(60)
        context = multiprocessing.get_context("fork")
        stop = context.Event()
        child = context.Process(target=stop.wait)  # keeps what it inherited
        child.start()
        server.go_on.set()
        try:
            assert same(far, near)
        finally:
            stop.set()
            child.join()


def test_remote_shards_are_fetched_in_order_of_need(near, root, monkeypatch):
    monkeypatch.setattr(mirror_module, "FETCHERS", 1)
    with serve(near) as server:
        stream = FeatureStream([Cache.open(server.url)], RULES, 5, epochs=1)
        first_use = dict.fromkeys(  # shards: two a window
            chain.from_iterable((row // 4 for row in batch.rows) for batch in stream)  # 4 rows a shard
        )
        fetched = [int(name[7:13]) for name, _ in server.asked if name.endswith(".tar")]
    assert sorted(fetched) == list(range(12))
    window = {shard: place // 2 for place, shard in enumerate(first_use)}
    windows = [window[shard] for shard in fetched]
    assert all(later >= earlier - 1 for earlier, later in pairwise(windows))


def test_a_state_of_a_local_cache_resumes_the_remote_one(near, root):
    stream = FeatureStream([Cache.open(near)], RULES, 5, epochs=1)
    whole = [batch.rows for batch in stream]
    state = json.loads(json.dumps(next(iter(FeatureStream([Cache.open(near)], RULES, 5, epochs=1))).state))
    with serve(near) as server:
        far = FeatureStream([Cache.open(server.url)], RULES, 5, epochs=1)
        far.load_state_dict(state)
        assert [batch.rows for batch in far] == whole[1:]


def test_the_command_line_lists_a_remote_cache(near, root, capsys):
    with serve(near) as server:
        assert main(["ls", server.url, "--limit", "3"]) is None
        assert main(["head", server.url, "--n", "2"]) is None
        assert capsys.readouterr().out.count("utt-00001") == 2
        assert main(["info", server.url]) is None
        assert "s of extraction" in capsys.readouterr().out
        assert main(["verify", server.url, "--deep"]) is None
        assert "valid (every byte of every shard)" in capsys.readouterr().out
