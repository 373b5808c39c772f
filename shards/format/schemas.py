"""The parquet files of a cache: schemas, deterministic writing and safe reading of untrusted files.

Writes the same bytes for the same table. Reads a table with exactly the expected columns; sizes declared by a file are
checked against the size of the file before memory is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.files import open_file
from shards.format.records import RecordError

PLAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("audio", pa.string()),
        ("samples", pa.int64()),
        ("audio_id", pa.binary(32)),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        *PLAN_SCHEMA,
        ("frames", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("scale_offset", pa.int64()),
        ("scale_length", pa.int64()),
        ("crc32", pa.uint32()),
        ("error", pa.float32()),
    ]
)
UNKNOWN_AUDIO = bytes(32)  # audio id of a planned recording that nobody has read yet
ROW_GROUP = 16_384  # rows: a reader can load the strings of a few shards without those of the whole manifest
FAILURE_SCHEMA = pa.schema(
    [("key", pa.string()), ("stage", pa.string()), ("error", pa.string()), ("attempt", pa.int32())]
)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return ``table`` as parquet. The bytes are deterministic for a given version of pyarrow."""
    sink = pa.BufferOutputStream()
    write_parquet(sink, table.schema, [table])
    data: bytes = sink.getvalue().to_pybytes()
    return data


def write_parquet(sink: Any, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write ``tables`` to a file object or path as one parquet file; return the number of rows.

    The bytes depend on the rows, not on their division into tables. At most a row group and a table are in memory.
    """
    rows, waiting = 0, schema.empty_table()
    with pq.ParquetWriter(sink, schema, compression="zstd", store_schema=False) as writer:
        for table in tables:
            rows += len(table)
            waiting = pa.concat_tables([waiting, table]) if len(waiting) else table
            while len(waiting) >= ROW_GROUP:
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks())
                waiting = waiting.slice(ROW_GROUP)
        if len(waiting) or not rows:
            writer.write_table(waiting.combine_chunks())
    return rows


def read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a parquet file that must have exactly ``schema`` and no nulls.

    Raises:
        FileNotFoundError: the file does not exist.
        RecordError: as :func:`check_parquet`, or the rows are not as declared.
    """
    size = check_parquet(path, schema)
    with _as_record_errors(path), pq.ParquetFile(path, memory_map=True) as file:
        table = pa.Table.from_batches(list(read_batches(path.name, file, size)), schema)
        if len(table) != file.metadata.num_rows:
            raise RecordError(f"{path.name} has {len(table)} rows but declares {file.metadata.num_rows}")
        return table.replace_schema_metadata(None)


def check_parquet(path: Path, schema: pa.Schema) -> int:
    """Check that a parquet file has exactly the columns of ``schema``; return its size in bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        RecordError: the file has other columns, is not parquet, or declares far more rows or text than a legitimate
            file of its size (a few bytes can declare, or decompress to, more than fits in memory).
    """
    size = _size(path)
    with _as_record_errors(path), pq.ParquetFile(path, memory_map=True) as file:
        found = file.schema_arrow.remove_metadata()
        if not found.equals(schema):
            raise RecordError(
                f"{path.name} has other columns than the cache format: {_first_difference(found, schema)}"
            )
        bound_parquet(path.name, file.metadata, size)
    return size


@contextmanager
def _as_record_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path.name} is not a readable parquet file ({type(error).__name__})") from None


def read_batches(name: str, file: pq.ParquetFile, size: int, **options: Any) -> Iterator[pa.RecordBatch]:
    """Yield and validate the rows of an open parquet file of ``size`` bytes.

    Args:
        name: name of the file in messages.
        options: passed to ``iter_batches``.

    Raises:
        RecordError: the rows decompress to more than a file of that size can contain, or a value is null.
        pyarrow.ArrowException: an offset or a string is invalid.
    """
    room = TEXT_ROOM + TEXT_GROWTH * size
    for batch in file.iter_batches(BATCH, **options):
        room -= batch.nbytes
        if room < 0:
            raise RecordError(f"{name} decompresses to more than a file of {size} bytes can contain")
        batch.validate(full=True)  # checks string offsets and UTF-8
        for column, values in zip(batch.schema.names, batch.columns, strict=True):
            if values.null_count:
                raise RecordError(f"{name} has null values in column '{column}'")
        yield batch


def _size(path: Path) -> int:
    try:
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read: {error.strerror}") from None


BATCH = 8192  # rows decompressed at once
MAX_ROWS_PER_BYTE = 4  # unique keys limit how well rows compress; a row of a plan takes about 30 bytes
TEXT_GROWTH, TEXT_ROOM = 200, 64 << 20  # allowed bytes in memory: per byte of the file, and a constant for any file


def bound_parquet(name: str, metadata: Any, size: int) -> None:
    """Check the sizes that a parquet file of ``size`` bytes declares; RecordError before memory is allocated."""
    rows = metadata.num_rows
    unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if not 0 <= rows <= MAX_ROWS_PER_BYTE * size or not 0 <= unpacked <= TEXT_ROOM + TEXT_GROWTH * size:
        raise RecordError(f"{name} declares {rows} rows and {unpacked} bytes in a file of {size} bytes")


def _first_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    for field in wanted:
        index = found.get_field_index(field.name)
        if index < 0:
            return f"'{field.name}' is missing"
        if found.field(index).type != field.type:
            return f"'{field.name}' is {found.field(index).type}, not {field.type}"
    return f"{found.names} instead of {wanted.names}"
