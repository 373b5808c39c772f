from __future__ import annotations

import hashlib
import threading

from hypothesis import given
from hypothesis import strategies as st

from shards.commit.writer import MAX_QUEUED_UPDATES, BackgroundHash


@given(st.lists(st.lists(st.binary(max_size=4000), max_size=3), max_size=3 * MAX_QUEUED_UPDATES))
def test_the_digest_is_that_of_all_pieces_in_their_order(updates):
    found = BackgroundHash()
    for pieces in updates:
        found.update(pieces)
    assert found.hexdigest() == hashlib.sha256(b"".join(piece for pieces in updates for piece in pieces)).hexdigest()


def test_the_digest_can_be_asked_for_in_between():
    found = BackgroundHash()
    found.update([b"one"])
    assert found.hexdigest() == hashlib.sha256(b"one").hexdigest()
    found.update([b"two"])
    assert found.hexdigest() == hashlib.sha256(b"onetwo").hexdigest()


def test_no_thread_is_left_after_closing():
    before = threading.active_count()
    found = BackgroundHash()
    found.update([b"x" * 100_000])
    assert threading.active_count() == before + 1
    found.close()
    found.close()
    assert threading.active_count() == before
