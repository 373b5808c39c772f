"""List a source as an Arrow table that takes no memory: its rows are in an unnamed, memory-mapped file.

```
Source.utterances -> batches -> Arrow file without a name -> memory map -> validation split -> Listing
```

The file disappears when the listing is dropped or the process dies.
"""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from pipeline.sources import Source, Utterance
from shards.errors import UserError
from shards.files import make_folder, translate_os_errors

LISTING_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "id", "audio", "text", "speaker", "split")),
        ("samples", pa.int64()),
    ]
)
_SPOOL_SCHEMA = LISTING_SCHEMA.append(pa.field("token", pa.string()))
_BATCH = 8192  # rows that are Python objects at a time


@dataclass(frozen=True)
class Listing:
    """All utterances of a source, in its order.

    Attributes:
        table: ``LISTING_SCHEMA``, one row per utterance.
        tokens: What :meth:`pipeline.sources.Source.tokens` returned for each row.
        started: When the listing started, before the first token was made: nanoseconds since 1970.
        problems: Problems of the source, one line each.
    """

    table: pa.Table
    tokens: pa.ChunkedArray
    started: int
    problems: list[str]


def list_source(source: Source, folder: Path) -> Listing:
    """List every utterance of ``source``, with the validation split that ``source.val_fraction`` asks for.

    Args:
        source: The source.
        folder: Where the unnamed file is created; about as large as the manifest of the source. Created if missing.

    Raises:
        UserError: There is no utterance, a key repeats, a value cannot be stored, or the disk is full.
    """
    started = time.time_ns()
    spooled = spool(_batches(source), folder, _SPOOL_SCHEMA)
    if not len(spooled):
        problems = f" ({'; '.join(source.problems)})" if source.problems else ""
        raise UserError(
            f"source '{source.name}' has no utterances{problems}: check source.path, source.splits and the durations"
        )
    table = spooled.drop_columns("token")
    chosen = source.validation_rows(table["key"], table["speaker"])
    if chosen is not None:
        split = pc.if_else(pa.array(chosen), "val", "train")
        table = table.set_column(table.schema.get_field_index("split"), "split", split)
    return Listing(table, spooled["token"], started, source.problems)


def spool(batches: Iterator[pa.RecordBatch], folder: Path, schema: pa.Schema) -> pa.Table:
    """Write ``batches`` to an unnamed file in ``folder`` and return them as a table that is mapped from it."""

    def storing() -> AbstractContextManager[None]:  # not around the source, whose errors are about other files
        return translate_os_errors("listing the source", folder)

    with storing():
        make_folder(folder)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closing must not hide the error of a full disk
    try:
        with storing():
            writer = pa.ipc.new_file(file, schema)
        for batch in batches:
            with storing():
                writer.write_batch(batch)
        with storing():
            writer.close()
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # keeps the file
    finally:
        with suppress(OSError):
            file.close()
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


def _batches(source: Source) -> Iterator[pa.RecordBatch]:
    with tqdm(source.utterances(), desc=f"listing {source.name}", unit=" utt", delay=1.0) as progress:
        utterances = iter(progress)
        while rows := list(islice(utterances, _BATCH)):
            tokens = source.tokens([row.audio for row in rows])
            try:
                yield pa.record_batch(
                    [*(pa.array([getattr(row, name) for row in rows], kind) for name, kind in _FIELDS), tokens],
                    schema=_SPOOL_SCHEMA,
                )
            except (UnicodeError, OverflowError, pa.ArrowException) as error:
                raise _unstorable(rows) or error from None


_FIELDS = list(zip(LISTING_SCHEMA.names, LISTING_SCHEMA.types, strict=True))


def _unstorable(rows: list[Utterance]) -> UserError | None:
    """Return the error for the first row with a value that a table cannot contain."""
    for row in rows:
        for name, kind in _FIELDS:
            try:
                pa.array([getattr(row, name)], kind)
            except (UnicodeError, OverflowError, pa.ArrowException) as error:
                return UserError(
                    f"the {'duration' if name == 'samples' else name} of utterance {row.id!r} cannot be stored "
                    f"({str(error).splitlines()[0]}): correct it in the source"
                )
    return None
