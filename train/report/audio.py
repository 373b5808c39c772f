"""Recordings of a report's samples, embedded in the page as WAV data.

Takes cache folders and keys of utterances; returns a ``data:`` URI for each key, or one sentence that explains why
there is no audio. Only local sources with random access are read: folders of files, local parquet, and synthetic speech
or tones, which are synthesized again. The caches record where their audio is. A recording is used only if its audio id
is that of the recording from which the features were extracted.

This is the only module of ``train`` that reads audio sources. Training needs none, so an unreadable source is not an
error here.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.audio_id import audio_id
from shards.read.cache import Cache

if TYPE_CHECKING:
    from pipeline.sources import Source

MAX_SECONDS = 15.0  # per recording; longer ones are truncated
MAX_BYTES = 3 << 20  # WAV data per page, before base64


def recordings(caches: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return ({key: data URI}, ""), or ({}, the reason why there is no audio)."""
    reasons, found = [], {}
    bytes_left = MAX_BYTES
    for path in caches:
        try:
            for key, data in _read(path, keys).items():
                if key not in found and len(data) <= bytes_left:
                    bytes_left -= len(data)
                    found[key] = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
        except (UserError, OSError) as error:
            reasons.append(f"No audio: {error}")
    return (found, "") if found or not reasons else ({}, reasons[0])


def _read(path: str, keys: Sequence[str]) -> Mapping[str, bytes]:
    """Return WAV files of those ``keys`` that are in the cache at ``path``.

    Raises:
        UserError: the cache or its source is not available, or the source has no random access.
    """
    from pipeline.audio import AudioError
    from pipeline.maintain.check import recorded_config
    from pipeline.sources import open_source

    if "://" in path:
        raise UserError(f"'{path}' is a remote cache")
    cache = Cache.open(path)
    rows = np.flatnonzero(pc.is_in(cache.column("key"), value_set=_strings(keys)).to_numpy(zero_copy_only=False))
    config = recorded_config(cache.provenance, Path(path)).source
    if str(config.path or "").startswith("hf:"):
        raise UserError(f"the source of '{path}' is streamed from a remote dataset")
    source = open_source(config)
    if source.sequential:
        raise UserError(f"the source of '{path}' is an archive that can only be read sequentially")
    wanted = list({row["key"]: row for row in (cache.row(int(row)) for row in rows)}.values())
    wavs = {}
    for row, (_, data) in zip(wanted, source.read([row["audio"] for row in wanted]), strict=True):
        if isinstance(data, bytes) and _audio_id(source, row["audio"], data) == row["audio_id"]:
            with suppress(AudioError):  # a player is left out where an earlier version was less strict
                wavs[row["key"]] = _wav(data)
    if wanted and not wavs:
        raise UserError(
            f"the source of '{path}' no longer contains the recordings from which the features were extracted"
        )
    return wavs


def _audio_id(source: Source, uri: str, data: bytes) -> bytes:
    path, fragment = source.file_of(uri) or ("", "")
    if not fragment:
        return hashlib.sha256(data).digest()
    return audio_id(bytes.fromhex(file_sha256(Path(path))), fragment)


def _wav(data: bytes) -> bytes:
    """Convert the start of an audio file to 16-bit PCM WAV at 16 kHz, which every browser plays."""
    from pipeline.audio import SAMPLING_RATE, decode, encode_wav

    samples = decode(data)[: round(MAX_SECONDS * SAMPLING_RATE)]
    return encode_wav(np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16), SAMPLING_RATE)


def _strings(keys: Sequence[str]) -> object:
    import pyarrow as pa

    return pa.array(keys, pa.string())
