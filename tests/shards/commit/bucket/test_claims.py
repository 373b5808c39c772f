"""Claims and commits by conditional puts, on a store in memory."""

from __future__ import annotations

import json
import uuid

import pytest
from tiny_cache import make_cache
from tiny_objects import MemoryObjects

from shards.commit.bucket.claims import ClaimLost, RemoteClaims
from shards.commit.claims import process_identity
from shards.errors import UserError
from shards.format.records import RELEASED, is_claim, is_released

OWNERS = iter(range(1000))


@pytest.fixture
def url():
    return f"tiny://bucket/{uuid.uuid4().hex}"


def claims(url: str, lease: float = 60.0) -> RemoteClaims:
    return RemoteClaims(MemoryObjects(url), f"owner-{next(OWNERS)}", lease)


def never(data: bytes) -> bool:
    return False


def test_one_claim_at_a_time_and_only_its_holder_commits(url):
    a, b = claims(url), claims(url)
    assert a.acquire("x", never)
    assert not b.acquire("x", never)
    with pytest.raises(ClaimLost):
        b.commit("x", b"{}")
    a.commit("x", b"{}")
    assert not b.acquire("x", never)
    assert a.objects.read("x").data == b"{}"


def test_a_claim_is_released_by_its_holder_alone(url):
    a, b = claims(url), claims(url)
    assert a.acquire("x", never)
    b.release("x")
    assert not b.acquire("x", never)
    a.release("x")
    assert b.acquire("x", never)


def test_a_released_claim_is_marked_and_free_at_once(url):
    a, b, c = claims(url), claims(url), claims(url)
    assert a.acquire("x", never)
    a.release("x")
    assert is_released(a.objects.read("x").data)
    assert is_claim(a.objects.read("x").data)  # so that no reader takes it for a record
    assert b.acquire("x", never)
    a.release("x")
    assert not c.acquire("x", never)
    b.commit("x", b"{}")
    b.release("x")
    assert b.objects.read("x").data == b"{}"


def test_a_release_that_comes_after_a_takeover_falls_on_nothing(url):
    a, b = claims(url), claims(url, lease=0.0)
    assert a.acquire("x", never)
    assert not b.acquire("x", never)
    assert b.acquire("x", never)  # a lease of nothing has passed
    held = b.objects.read("x")
    a.release("x")
    assert b.objects.read("x") == held
    b.commit("x", b"{}")


def test_a_store_that_is_away_hides_no_error_by_not_taking_a_claim_back(url):
    def away(what: str, name: str) -> None:
        raise UserError(f"no {what}")

    with claims(url) as a:
        assert a.acquire("x", never)
        a.objects.before = away
        with pytest.raises(UserError, match="no put"):
            a.commit("x", b"{}")
    assert is_claim(claims(url).objects.read("x").data)


def test_a_claim_is_taken_over_when_nothing_is_written_to_it_for_a_lease(url, monkeypatch):
    a, b, now = claims(url), claims(url), [100.0]
    monkeypatch.setattr("shards.commit.claims.time.monotonic", lambda: now[0])
    assert a.acquire("x", never)
    assert not b.acquire("x", never)
    now[0] += 59.0
    a._heartbeat("x")
    now[0] += 59.0
    assert not b.acquire("x", never)  # the beat was seen now
    now[0] += 61.0
    assert b.acquire("x", never)
    with pytest.raises(ClaimLost):
        a.commit("x", b"{}")
    b.commit("x", b"[]")


def test_a_holder_that_died_on_this_machine_is_replaced_at_once(url):
    objects = MemoryObjects(url)
    dead = {"claim": "gone", "beat": 7, **process_identity(), "started": "1"}
    objects.put("x", json.dumps(dead).encode(), None)
    assert claims(url).acquire("x", never)


def test_the_thread_keeps_a_claim_alive(url):
    with claims(url, lease=0.3) as a:
        assert a.acquire("x", never)
        first = a.objects.read("x").data
        seen = {first}
        while len(seen) < 4:
            seen.add(a.objects.read("x").data)
        a.commit("x", b"{}")
        assert a.objects.read("x").data == b"{}"


def test_what_a_lost_holder_left_is_written_over_and_a_late_write_of_it_is_not_accepted(url):
    a, b = claims(url), claims(url)
    assert a.acquire("x", never)
    a.put("x.tar", b"half of a", claim="x")
    b.objects.put("x", b.objects.read("x").data.replace(b"owner", b"other"), b.objects.version("x"))  # taken over
    b._held["x"] = b.objects.version("x")
    b.put("x.tar", b"all of b", claim="x")
    with pytest.raises(ClaimLost):
        a.put("x.tar", b"all of a", claim="x")
    b.commit("x", b"{}")
    assert b.objects.read("x.tar").data == b"all of b"


def test_a_write_that_was_under_way_when_the_claim_went_falls_on_nothing(url):
    """The holder stands still between its last look and its write, and a successor does all of its work meanwhile."""
    a, b = claims(url), claims(url)
    assert a.acquire("x", never)
    a.objects.put("x.tar", b"left by a killed process", None)

    def succeed(what: str, name: str) -> None:
        if what == "put" and name == "x.tar" and a.objects.puts[-1] == "x":  # after the beat that made sure
            a.objects.before = lambda what, name: None
            b.objects.put("x", b'{"claim":"b"}', b.objects.version("x"))
            b._held["x"] = b.objects.version("x")
            b.put("x.tar", b"all of b", claim="x")
            b.commit("x", b"{}")

    a.objects.before = succeed
    a.objects.puts.clear()
    a.objects.puts.append("")
    with pytest.raises(ClaimLost):
        a.put("x.tar", b"all of a", claim="x")
    assert b.objects.read("x.tar").data == b"all of b"
    assert b.objects.read("x").data == b"{}"


def test_who_comes_second_to_a_free_shard_does_not_have_it(url):
    """Both see that nothing stands there; one creates the claim in between."""
    a, b = claims(url), claims(url)

    def overtake(what: str, name: str) -> None:
        if what == "put":
            a.objects.before = lambda what, name: None
            assert b.acquire("x", never)

    a.objects.before = overtake
    assert not a.acquire("x", never)
    b.commit("x", b"{}")


def test_a_claim_differs_from_what_it_becomes(tmp_path):
    cache = make_cache(tmp_path / "cache", n=2, shards=1)
    assert not is_claim((cache / "CACHE.json").read_bytes())
    assert not is_claim(b"[1]")
    assert not is_claim(b"\xff")
    assert is_claim(b'{"claim": "x"}')
    assert [is_released(data) for data in (RELEASED, b'{"claim": "x"}', b"{}", b"[]", b"")] == [True, *[False] * 4]
