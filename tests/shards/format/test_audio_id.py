from __future__ import annotations

import hashlib

from shards.format.audio_id import audio_id


def test_the_id_of_a_file_is_its_sha256_and_that_of_a_segment_hashes_it_with_the_fragment():
    file = hashlib.sha256(b"a recording").digest()
    assert audio_id(file, "") == file
    text = f"{file.hex()}#t=1.5,3.25&c=1".encode("ascii")
    assert audio_id(file, "t=1.5,3.25&c=1") == hashlib.sha256(text).digest()
