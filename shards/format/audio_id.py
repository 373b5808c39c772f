"""The audio id, 32 bytes that name a recording by its content: equal ids mean equal audio, wherever it is stored.

The id of a whole file is the sha256 of its bytes. The id of a segment, whose URI has a fragment such as
``#t=1.5,3.25&c=1``, is the sha256 of the text ``<sha256 of the file, 64 hex digits>#t=1.5,3.25&c=1``. The id of a
variant is the sha256 of ``<audio id of the recording, 64 hex digits>~<number of the variant>~<recipe>``.
"""

from __future__ import annotations

import hashlib

AUDIO_ID_BYTES = 32
UNKNOWN_AUDIO = bytes(AUDIO_ID_BYTES)  # in a plan: the recording has not been read yet


def audio_id(file_sha256: bytes, uri_fragment: str) -> bytes:
    """Return the audio id (32 bytes) of a file, or of a segment of it.

    Args:
        file_sha256: sha256 of the whole file, 32 bytes.
        uri_fragment: the part of the URI after ``#``; "" for the whole file.
    """
    if not uri_fragment:
        return file_sha256
    return hashlib.sha256(f"{file_sha256.hex()}#{uri_fragment}".encode()).digest()


def variant_id(recording: bytes, number: int, recipe: str) -> bytes:
    """Return the audio id (32 bytes) of a variant of a recording.

    Args:
        recording: audio id of the recording; of one that nobody has read, the variant is unknown, too.
        number: number of the variant; 0 is the recording itself.
        recipe: what determines the change, as canonical JSON.
    """
    if not number or recording == UNKNOWN_AUDIO:
        return recording
    return hashlib.sha256(f"{recording.hex()}~{number}~{recipe}".encode()).digest()
