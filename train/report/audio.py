"""The recordings behind a report's samples, as WAV data inside the page, where their source can be read.

In: the folders of caches and keys of utterances. Out: a ``data:`` URI for each key, or one sentence that says why there
is none. Only sources on this machine that give a single recording at once are asked: folders of files, local parquet,
and speech or tones, which are made again. The caches say where their audio is; the sha256 of what is read must be the
one that the features were extracted from.

The only module of ``train`` that reads audio sources: a training run needs none, and this one answers with a sentence.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from shards.errors import UserError
from shards.read.cache import Cache

MAX_SECONDS = 15.0  # of a recording; longer ones are cut
MAX_BYTES = 3 << 20  # of audio in a page


def recordings(caches: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], str]:
    """({key: data URI}, ""), or ({}, why there are none)."""
    reasons, found = [], {}
    room = MAX_BYTES
    for path in caches:
        try:
            for key, data in _read(path, keys).items():
                if key not in found and len(data) <= room:
                    room -= len(data)
                    found[key] = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
        except (UserError, OSError) as error:
            reasons.append(f"No audio: {error}")
    return (found, "") if found or not reasons else ({}, reasons[0])


def _read(path: str, keys: Sequence[str]) -> Mapping[str, bytes]:
    """WAV files of those ``keys`` that the cache at ``path`` holds.

    Raises:
        UserError: the cache or its source is gone, or the source gives no single recordings.
    """
    from pipeline.maintain.check import recorded_config
    from pipeline.sources import open_source

    if "://" in path:
        raise UserError(f"'{path}' is a remote cache")
    cache = Cache.open(path)
    rows = np.flatnonzero(pc.is_in(cache.manifest["key"], value_set=_strings(keys)).to_numpy(zero_copy_only=False))
    config = recorded_config(cache.info, Path(path)).source
    if str(config.path or "").startswith("hf:"):
        raise UserError(f"the source of '{path}' is streamed from a remote dataset")
    source = open_source(config)
    if source.sequential:
        raise UserError(f"the source of '{path}' is an archive that can only be read from its start")
    wanted = [cache.row(int(row)) for row in rows]
    wavs = {}
    for row, (_, data) in zip(wanted, source.read([row["audio"] for row in wanted]), strict=True):
        if isinstance(data, bytes) and hashlib.sha256(data).hexdigest() == row["audio_sha256"]:
            wavs[row["key"]] = _wav(data)
    if wanted and not wavs:
        raise UserError(f"the source of '{path}' no longer has the recordings that its features were extracted from")
    return wavs


def _wav(data: bytes) -> bytes:
    """Any audio file as the first seconds of it in PCM16 at 16 kHz, which every browser plays."""
    from pipeline.audio import SAMPLING_RATE, decode, encode_wav

    samples = decode(data)[: round(MAX_SECONDS * SAMPLING_RATE)]
    return encode_wav(np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16), SAMPLING_RATE)


def _strings(keys: Sequence[str]) -> object:
    import pyarrow as pa

    return pa.array(keys, pa.string())
