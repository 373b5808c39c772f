"""Compares the audio files that a cache was made from with the audio ids recorded in its manifests.

    python -m shards verify CACHE --source /data/LibriSpeech

Takes a complete cache and the audio folder (by default the recorded one); returns a :class:`Problem` for every current
utterance whose file is missing or has other audio. Whole files and segments of files (``talk.wav#t=1.5,3.25``) can be
compared; each file is read once, in several threads. Audio inside archives or parquet files and synthetic audio need
the reader of their source: ``python -m pipeline check CACHE`` reads them and compares features.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.audio_id import audio_id
from shards.inspect.findings import Problem, ProgressCallback
from shards.read.cache import Cache
from shards.read.features import FeatureRows

PLAIN_FILE_SOURCES = ("librispeech", "manifest")  # source kinds whose URIs are paths relative to their root
SEGMENT = re.compile(r"t=[0-9.]+,[0-9.]*(&c=[0-9]+)?")  # what follows the '#' in the URI of a segment
HASHED_AHEAD = 64  # files handed to the threads at once for each thread


def compare_audio(
    path: str | Path, folder: Path | None = None, progress: ProgressCallback | None = None
) -> list[Problem]:
    """Find the utterances of the cache at ``path`` whose audio is missing or has changed.

    Args:
        folder: the audio folder; ``None`` uses the folder that the newest generation recorded.
        progress: called with (files done, total files).

    Raises:
        UserError: the cache is corrupt, its audio is not stored as plain files, or the folder does not exist.
    """
    cache = Cache.open(path)
    kind, root = _recorded_source(cache.provenance)
    folder = folder if folder is not None else Path(root) if root else None
    table = _current_rows(cache.features_table)
    places = [_split(uri, folder) for uri in table["audio"].to_pylist()]
    if kind not in (None, *PLAIN_FILE_SOURCES) or any(place is None for place in places):
        raise UserError(
            f"the audio of '{path}' is not stored as plain files: encode a sample of it again with "
            f"`python -m pipeline check {path}`"
        )
    if folder is None:
        raise UserError(f"'{path}' does not record its audio folder: pass the folder to --source")
    if not folder.is_dir():
        raise UserError(f"audio folder '{folder}' of '{path}' does not exist: pass the folder to --source")
    files = list(dict.fromkeys(place[0] for place in places if place is not None))
    found = {}
    for done, (file, digest) in enumerate(_hash_all(folder, files), 1):
        found[file] = digest
        if progress:
            progress(done, len(files))
    problems = []
    columns = [table[name].to_pylist() for name in ("audio", "shard", "key", "audio_id")]
    for place, uri, shard, key, wanted in zip(places, *columns, strict=True):
        assert place is not None  # refused above
        digest = found[place[0]]
        if isinstance(digest, str):
            problems.append(Problem(shard, uri, key, digest))
        elif audio_id(digest, place[1]) != wanted:
            problems.append(Problem(shard, uri, key, "is not the audio that the features were made from"))
    return problems


def _current_rows(features: FeatureRows) -> pa.Table:
    rows, _ = features.current()
    table = features.table().select(["audio", "shard", "key", "audio_id"])
    return table if rows is None else table.take(pa.array(rows.astype(np.int64)))


def _split(uri: str, folder: Path | None) -> tuple[str, str] | None:
    """Return file and fragment of a URI ("" for a whole file); None if it is neither a file nor a segment of one."""
    file, hash_sign, fragment = uri.rpartition("#")
    if hash_sign and SEGMENT.fullmatch(fragment) and not (folder and (folder / uri).exists()):
        return file, fragment
    return (uri, "") if not hash_sign or folder is None or (folder / uri).exists() else None


def _hash_all(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
    """Yield each file with its sha256, or with a phrase that says why it cannot be read."""

    def digest(file: str) -> tuple[str, bytes | str]:
        try:
            return file, bytes.fromhex(file_sha256(folder / file))
        except FileNotFoundError:
            return file, f"is missing in '{folder}'"
        except (OSError, ValueError) as error:  # ValueError: a NUL in a path
            return file, f"cannot be read: {getattr(error, 'strerror', None) or error}"

    threads, left = os.cpu_count() or 1, iter(files)
    with ThreadPoolExecutor(threads) as pool:
        while part := list(islice(left, HASHED_AHEAD * threads)):
            yield from pool.map(digest, part)


def _recorded_source(provenance: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return kind and root of the source; ``None`` for what the free-form provenance does not record."""
    source = provenance.get("source")
    fields = source if isinstance(source, dict) else {}
    kind, root = fields.get("kind"), fields.get("root")
    return kind if isinstance(kind, str) else None, root if isinstance(root, str) else None
