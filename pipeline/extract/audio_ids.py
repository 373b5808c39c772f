"""Audio ids of a listing: from the index of an earlier run where a recording is unchanged, else by hashing it.

```
listing: URI, token -> AudioIndex.look_up -> unchanged: its id
                                          -> new or changed: read and hash in threads -> AudioIndex.save
```

The index is a cache like git's: a token is the size and modification time of a file, or whatever else changes with the
audio (:meth:`pipeline.sources.Source.tokens`). A file that changes while its size and modification time stay the same
is noticed only with ``rehash``. Per utterance this module keeps 32 bytes for the id and, for a while, about 40 more.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.extract.listing import Listing
from pipeline.sources import Source
from pipeline.sources.base import token_mtime
from shards.commit.claims import new_owner
from shards.files import atomic_write, make_folder, open_file
from shards.format.audio_id import AUDIO_ID_BYTES, UNKNOWN_AUDIO, audio_id

INDEX_SCHEMA = pa.schema([("uri", pa.string()), ("token", pa.string()), ("audio_id", pa.binary(AUDIO_ID_BYTES))])
MAX_OTHER_ENTRIES = 10_000_000  # entries of recordings that are not in the listing; about 0.5 GB on disk
_VERSION = b"1"
_ROWS = 8192  # rows that are Python objects at a time
_FILES = 16  # files that a thread hashes in one go; handing over a small file takes as long as hashing it
_RACY = 2_000_000_000  # nanoseconds: some file systems store modification times in steps of 2 s
_SAVE_INTERVAL = 60.0  # seconds

BoolArray = npt.NDArray[np.bool_]
RowArray = npt.NDArray[np.intp]
IdArray = npt.NDArray[np.uint8]  # [rows, 32], zeros if unknown
Note = TypeVar("Note")
Result = TypeVar("Result")


def find_audio_ids(
    source: Source, listing: Listing, index: AudioIndex, *, rehash: bool = False, hash_unknown: BoolArray | bool = False
) -> pa.FixedSizeBinaryArray:
    """Return the audio id of every utterance, binary(32) [utterances]; 32 zeros where it is not known.

    Recordings without an entry in ``index`` are read and hashed, unless ``source.hash_ahead`` is false. Those that
    cannot be read stay unknown; encoding them reports why. The index is saved every minute and at the end, also after
    an interrupt.

    Args:
        source: The source that was listed.
        listing: Its utterances.
        index: Ids of earlier runs.
        rehash: Distrust the index and hash all recordings, whatever ``source.hash_ahead`` says.
        hash_unknown: Utterances that are hashed even if ``source.hash_ahead`` is false: bool [utterances], or True
            for all.
    """
    ids = np.zeros((len(listing.table), AUDIO_ID_BYTES), np.uint8)
    if not rehash:
        index.look_up(source, listing, ids)
    rows = np.flatnonzero(~ids.any(axis=1) & (rehash | source.hash_ahead | hash_unknown))
    if len(rows):
        _hash(source, listing, index, rows, ids)
    return _to_arrow(ids)


def record(
    source: Source,
    listing: Listing,
    index: AudioIndex,
    uris: pa.Array | pa.ChunkedArray,
    audio_ids: pa.FixedSizeBinaryArray | pa.ChunkedArray,
) -> None:
    """Add ids that became known when recordings were encoded to the index.

    Args:
        source: The source that was listed.
        listing: Its utterances, listed before the recordings were read.
        index: The index to save.
        uris: URIs of recordings; those that are not in the listing are ignored.
        audio_ids: Their ids, binary(32); zeros are ignored.
    """
    ids = np.zeros((len(listing.table), AUDIO_ID_BYTES), np.uint8)
    index.look_up(source, listing, ids)
    lookup, learnt = _UriLookup(listing), np.zeros(len(ids), np.bool_)
    for batch in pa.table({"uri": uris, "audio_id": audio_ids}).to_batches(_ROWS):
        rows, positions = lookup.find(batch["uri"])
        found = _to_numpy(batch["audio_id"])[positions]
        news = found.any(axis=1) & (found != ids[rows]).any(axis=1)
        ids[rows[news]], learnt[rows[news]] = found[news], True
    rows = np.flatnonzero(learnt)
    if len(rows):
        index.save(source, listing, ids, _changed(source, listing, rows))


class AudioIndex:
    """The parquet file that remembers ids: ``uri``, ``token``, ``audio_id``. Only a cache: it may be deleted.

    It belongs to one folder of recordings, because URIs are relative to it: for another one, it starts anew. A file
    that is corrupt, foreign or of another version is replaced. If two processes save at once, the last one wins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def look_up(self, source: Source, listing: Listing, ids: IdArray) -> None:
        """Write the ids of unchanged recordings into their rows of ``ids``."""
        lookup: _UriLookup | None = None
        for batch in self._entries(source):
            lookup = lookup or _UriLookup(listing)
            rows, positions = lookup.find(batch["uri"])
            same = pc.equal(_take(listing.tokens, rows), batch["token"].take(positions)).to_numpy(zero_copy_only=False)
            ids[rows[same]] = _to_numpy(batch["audio_id"])[positions[same]]

    def save(self, source: Source, listing: Listing, ids: IdArray, changed: BoolArray) -> None:
        """Replace the entries of the listed recordings, and keep up to ``MAX_OTHER_ENTRIES`` others.

        Entries are left out if the id or the token is unknown, if the recording ``changed`` after it was listed (bool
        [rows]), or if it was modified so shortly before that the next change may leave its token the same.
        """
        try:
            make_folder(self._path.parent)
            with tempfile.TemporaryFile(dir=self._path.parent) as file:
                with pq.ParquetWriter(
                    file,
                    INDEX_SCHEMA.with_metadata(_metadata(source)),
                    compression="zstd",
                    write_page_checksum=True,
                ) as writer:
                    for table in _row_groups(
                        chain(_listed_entries(listing, ids, changed), self._other_entries(source, listing))
                    ):
                        writer.write_table(table)
                file.flush()
                data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # not closed: a traceback may hold slices of it
                atomic_write(self._path, memoryview(data), new_owner())
        except OSError as error:
            print(
                f"note: '{self._path}' cannot be written ({error.strerror or error}): the next run reads the same "
                "recordings again",
                file=sys.stderr,
            )

    def _entries(self, source: Source) -> Iterator[pa.RecordBatch]:
        """Yield the entries; none, or those before a damaged page, if the file cannot be used."""
        try:
            with (
                open_file(self._path) as raw,
                pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True) as file,
            ):
                schema = file.schema_arrow
                found = {name: (schema.metadata or {}).get(name) for name in _metadata(source)}
                if not schema.remove_metadata().equals(INDEX_SCHEMA) or found != _metadata(source):
                    return
                for batch in file.iter_batches(_ROWS):
                    batch.validate(full=True)
                    yield batch.drop_null()
        except Exception:  # a damaged file raises many types
            return

    def _other_entries(self, source: Source, listing: Listing) -> Iterator[pa.RecordBatch]:
        lookup: _UriLookup | None = None
        room = MAX_OTHER_ENTRIES
        for batch in self._entries(source):
            lookup = lookup or _UriLookup(listing)
            others = np.ones(len(batch), np.bool_)
            others[lookup.find(batch["uri"])[1]] = False
            kept = batch.filter(pa.array(others))[:room]
            room -= len(kept)
            yield kept


def _metadata(source: Source) -> dict[bytes, bytes]:
    root = os.fsencode(source.root.resolve()) if source.root is not None else b""
    return {b"earshard audio index": _VERSION, b"root": root.hex().encode()}


def _listed_entries(listing: Listing, ids: IdArray, changed: BoolArray) -> Iterator[pa.RecordBatch]:
    newest = listing.started - _RACY
    start = 0
    for uris, tokens in zip(listing.table["audio"].chunks, listing.tokens.chunks, strict=True):
        rows = slice(start, start + len(uris))
        is_safe = np.fromiter((_is_safe(token, newest) for token in tokens.to_pylist()), np.bool_, len(tokens))
        kept = pa.array(is_safe & ids[rows].any(axis=1) & ~changed[rows])
        yield pa.record_batch([uris, tokens, _to_arrow(ids[rows])], schema=INDEX_SCHEMA).filter(kept)
        start = rows.stop


def _is_safe(token: str, newest: int) -> bool:
    """Return whether a later change of the recording changes ``token``: it was modified before ``newest``."""
    mtime = token_mtime(token)
    return bool(token) and (mtime is None or mtime < newest)


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Join small batches, so that the file does not end up in ever smaller row groups."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _ROWS:
            yield pa.Table.from_batches(waiting, INDEX_SCHEMA)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting, INDEX_SCHEMA)


class _UriLookup:
    """Finds URIs in a listing by 64-bit hashes, then compares the strings. Keeps 16 bytes per row."""

    def __init__(self, listing: Listing) -> None:
        self._uris = listing.table["audio"]
        hashes = _hashes(self._uris)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, uris: pa.Array) -> tuple[RowArray, RowArray]:
        """Return the matches as two arrays: the row in the listing, and the position in ``uris``."""
        hashes = _hashes(pa.chunked_array([uris]))
        first, last = (np.searchsorted(self._hashes, hashes, side) for side in ("left", "right"))
        counts = last - first  # several rows may have the same URI
        positions = np.repeat(np.arange(len(uris)), counts)
        rows = self._order[np.repeat(last - np.cumsum(counts), counts) + np.arange(counts.sum())]
        same = pc.equal(_take(self._uris, rows), uris.take(positions)).to_numpy(zero_copy_only=False)
        return rows[same], positions[same]


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    values = chain.from_iterable(chunk.to_pylist() for chunk in column.chunks)
    return np.fromiter(map(hash, values), np.int64, len(column))


def _take(column: pa.ChunkedArray, rows: RowArray) -> pa.Array:
    """Like ``column.take(rows)``, which would copy the whole column to memory."""
    starts = np.cumsum([0, *map(len, column.chunks)])
    chunks = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(chunks, kind="stable")
    parts = [
        column.chunk(chunk).take(pa.array(rows[order[chunks[order] == chunk]] - starts[chunk]))
        for chunk in np.unique(chunks)
    ]
    return pa.concat_arrays(parts).take(np.argsort(order, kind="stable")) if parts else pa.array([], column.type)


def _to_numpy(ids: pa.FixedSizeBinaryArray) -> IdArray:
    start, stop = (AUDIO_ID_BYTES * row for row in (ids.offset, ids.offset + len(ids)))
    return np.asarray(ids.buffers()[1], np.uint8)[start:stop].reshape(-1, AUDIO_ID_BYTES)


def _to_arrow(ids: IdArray) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(AUDIO_ID_BYTES), len(ids), [None, pa.py_buffer(ids)])


def _hash(source: Source, listing: Listing, index: AudioIndex, rows: RowArray, ids: IdArray) -> None:
    """Hash the recordings of ``rows`` into ``ids``, and save the index."""
    is_files = source.file_of(listing.table["audio"][int(rows[0])].as_py()) is not None
    if is_files:
        rows = _by_file(source, listing, rows)
    changed = np.zeros(len(ids), np.bool_)
    threads = len(os.sched_getaffinity(0))
    done = checked = 0

    def save() -> None:
        nonlocal checked
        changed[...] |= _changed(source, listing, rows[checked:done])
        checked = done
        index.save(source, listing, ids, changed)

    saved = time.monotonic()
    progress = tqdm(total=len(rows), desc="hashing audio", unit=" files", delay=1.0)
    with progress, ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        hashes = (_hash_files if is_files else _hash_contents)(source, listing, rows, pool, threads)
        try:
            for row, found in zip(rows, hashes, strict=True):
                ids[row] = np.frombuffer(found, np.uint8)
                done += 1
                progress.update()
                if time.monotonic() - saved > _SAVE_INTERVAL:
                    save()
                    saved = time.monotonic()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            save()


def _changed(source: Source, listing: Listing, rows: RowArray) -> BoolArray:
    """Return which of ``rows`` have another token than when they were listed: bool [rows of the listing]."""
    changed = np.zeros(len(listing.table), np.bool_)
    for some in _split(rows):
        uris, tokens = (_take(column, some) for column in (listing.table["audio"], listing.tokens))
        fresh = pa.array(source.tokens(uris.to_pylist()), pa.string())
        changed[some] = pc.not_equal(fresh, tokens).to_numpy(zero_copy_only=False)
    return changed


def _by_file(source: Source, listing: Listing, rows: RowArray) -> RowArray:
    """Return ``rows`` so that those of one file follow each other, files in the order of their first row."""
    hashes = np.fromiter((hash(path) for _, path, _ in _files(source, listing, rows)), np.int64, len(rows))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    del hashes
    if len(starts) == len(rows):
        return rows
    first = np.empty(len(rows), np.intp)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(rows)))
    return rows[np.argsort(first, kind="stable")]


def _files(source: Source, listing: Listing, rows: RowArray) -> Iterator[tuple[int, str, str]]:
    """Yield the row, the path of its file and the fragment."""
    for some in _split(rows):
        for row, uri in zip(some, _take(listing.table["audio"], some).to_pylist(), strict=True):
            path, fragment = source.file_of(uri) or ("", "")
            yield row, path, fragment


def _hash_files(
    source: Source, listing: Listing, rows: RowArray, pool: ThreadPoolExecutor, threads: int
) -> Iterator[bytes]:
    """Yield the id of each row; a file whose rows follow each other is hashed once."""

    def jobs() -> Iterator[tuple[list[list[str]], Future[list[bytes]]]]:
        files = groupby(_files(source, listing, rows), key=lambda file: file[1])
        while some := [(path, [fragment for _, _, fragment in group]) for path, group in islice(files, _FILES)]:
            yield [fragments for _, fragments in some], pool.submit(_file_hashes, [path for path, _ in some])

    for segments, digests in _ahead(jobs(), 8 * threads):
        for fragments, digest in zip(segments, digests, strict=True):
            for fragment in fragments:
                yield audio_id(digest, fragment) if digest != UNKNOWN_AUDIO else UNKNOWN_AUDIO


def _hash_contents(
    source: Source, listing: Listing, rows: RowArray, pool: ThreadPoolExecutor, threads: int
) -> Iterator[bytes]:
    """Yield the id of each row, from the bytes that the source reads; in source order, because some are sequential."""

    def jobs() -> Iterator[tuple[None, Future[bytes]]]:
        for some in _split(rows):
            for _, data in source.read(_take(listing.table["audio"], some).to_pylist()):
                yield None, pool.submit(_content_sha256, data)

    for _, digest in _ahead(jobs(), 4 * threads):
        yield digest


def _ahead(jobs: Iterator[tuple[Note, Future[Result]]], number: int) -> Iterator[tuple[Note, Result]]:
    """Yield the results of ``jobs`` in order, while the next ``number`` are at work."""
    waiting: deque[tuple[Note, Future[Result]]] = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) > number:
            note, future = waiting.popleft()
            yield note, future.result()
    for note, future in waiting:
        yield note, future.result()


def _file_hashes(paths: list[str]) -> list[bytes]:
    return [_file_sha256(path) for path in paths]


def _file_sha256(path: str) -> bytes:
    try:
        with open_file(Path(path)) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return UNKNOWN_AUDIO


def _content_sha256(data: bytes | Exception) -> bytes:
    return UNKNOWN_AUDIO if isinstance(data, Exception) else hashlib.sha256(data).digest()


def _split(rows: RowArray) -> Iterator[RowArray]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
