"""The canonical form of a label set, and its id.

A label set is a table with the string column ``key`` and any of the strings ``text``, ``speaker``, ``split``,
``language``, ``prompt``, ``task``, the float64 ``weight``, and other columns of type string, int64, float64 or bool.
Its canonical form has rows sorted by (key, task, prompt) in the order of their UTF-8 bytes, no two rows that agree in
these, the columns above in this order and the others after them by name, no nulls and no metadata.

    rows in any order -> normalise (types, nulls) -> sort order -> blocks -> label_id, write_sorted, canonical_labels

Everything works on Arrow columns. :func:`write_sorted` needs memory for the sort order and one block of rows, so that a
memory-mapped table of any size can become a label set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.records import FileInfo
from shards.format.spec import canonical_json
from shards.labels.text import NAMES, text_column

STRINGS = ("key", "text", "speaker", "split", "language", "prompt", "task")
COLUMNS = (*STRINGS, "weight")
SORT_COLUMNS = ("key", "task", "prompt")  # an absent column counts as ""
RESERVED = {"id", "audio", "samples", "audio_id", "shard", "row", "frames", "offset", "length", "scale_offset",
            "scale_length", "crc32", "error", "duration", "text_length"}  # fmt: skip
TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
ROW_GROUP = 16_384  # rows of a row group in the file of a label set
BLOCK_BYTES = 16 << 20  # bytes of a block of rows on their way to a file
MAX_COLUMNS = 256


@dataclass(frozen=True)
class LabelSet:
    """An opened label set.

    Attributes:
        table: the rows in canonical form.
        id: 64 hex digits, :func:`label_id` of the table.
        name: name in the cache, or the file or URL that it was read from.
        problems: one phrase for each kind of row that could not be used.
    """

    table: pa.Table
    id: str
    name: str
    problems: tuple[str, ...] = ()


def canonical_labels(table: pa.Table, where: str) -> pa.Table:
    """Return ``table`` in canonical form. Null strings become "", a null weight 1.0, other null floats NaN.

    Args:
        where: the origin of the table in messages.

    Raises:
        UserError: a column is missing, reserved, doubled or of another type, a weight is not positive, an int or bool
            column has nulls, or rows agree in key, task and prompt.
    """
    table = normalise(table, where)
    blocks = [batch for block in _checked_blocks(table, where) for batch in block.to_batches()]
    return pa.Table.from_batches(blocks, table.schema)


def label_id(table: pa.Table) -> str:
    """Return the id of a table in canonical form (64 hex digits). It does not depend on chunks or the table's origin.

    It is the sha256 of the UTF-8 bytes of this JSON, with sorted object keys and without spaces:
    ``{"columns":[[name,"string",lengths,data],[name,"int64",data],…],"rows":n}``. ``columns`` has the canonical order.
    For a string column, ``lengths`` is the sha256 of the byte lengths of all values, each as uint32, and ``data`` that
    of their UTF-8 bytes, concatenated. For an ``int64`` or ``float64`` column, ``data`` is the sha256 of all values of
    8 bytes; for ``bool``, of one byte a value, 0 or 1. All numbers are little-endian; all hashes are written in hex.
    """
    identity = _Identity(table.schema)
    for batch in table.to_batches(max_chunksize=1 << 16):
        identity.update(batch)
    return identity.result()


def write_sorted(table: pa.Table, path: Path, where: str = "the labels") -> tuple[str, int, FileInfo]:
    """Write ``table`` in canonical form to the parquet file ``path``, and sync it. Rows may be in any order.

    The bytes are deterministic for a given version of pyarrow. Beyond the table, it needs about 20 bytes a row and
    the memory of one block.

    Returns:
        the label id, the number of rows, and size and hash of the file.

    Raises:
        UserError: as :func:`canonical_labels`.
    """
    table = normalise(table, where)
    identity = _Identity(table.schema)
    with pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False) as writer:
        for block in _checked_blocks(table, where):
            identity.update(block)
            writer.write_table(block, row_group_size=ROW_GROUP)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return identity.result(), len(table), FileInfo(bytes=path.stat().st_size, sha256=file_sha256(path))


def identify(table: pa.Table, where: str = "the labels") -> str:
    """Return the id that :func:`write_sorted` would return, without writing."""
    table = normalise(table, where)
    identity = _Identity(table.schema)
    for block in _checked_blocks(table, where):
        identity.update(block)
    return identity.result()


def normalise(table: pa.Table, where: str) -> pa.Table:
    """Return ``table`` with canonical columns and types, without nulls; the rows keep their order.

    Raises:
        UserError: as :func:`canonical_labels`, except for doubled rows.
    """
    check_names(table.column_names, where)
    if "key" not in table.column_names:
        raise UserError(f"{where} has no column 'key' (it has {listed(table.column_names)}): name the utterances in it")
    return pa.table({name: _normal_column(table[name], name, where) for name in column_order(table.column_names)})


def check_names(names: Sequence[str], where: str) -> None:
    """Raise UserError if a label set cannot have columns of these names."""
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{where} has {len(names)} columns, a label set at most {MAX_COLUMNS}: remove some")
    for name in names:
        if not name:
            raise UserError(f"{where} has a column without a name: name or remove it (pandas: index=False)")
        if not name.isprintable() or name.strip() != name or len(name) > 100:
            raise UserError(f"{where} has a column named {name[:100]!r}: use a short name of printable characters")
        if list(names).count(name) > 1:
            raise UserError(f"{where} has more than one column '{name}': rename or remove one")
        if name in RESERVED:
            raise UserError(f"{where} has a column '{name}', a name that the cache uses itself: rename or remove it")


def column_order(names: Iterable[str]) -> list[str]:
    """Return column names in canonical order."""
    present = set(names)
    return [name for name in COLUMNS if name in present] + sorted(present.difference(COLUMNS))


def type_name(kind: pa.DataType) -> str:
    """Return the name of a column type in ids and ``LABELS.json``."""
    return next((name for name, known in TYPES.items() if known == kind), str(kind))


def listed(names: Sequence[Any], limit: int = 5) -> str:
    """Return values in quotes, printable and cut, for a message."""
    texts = ("".join(c if c.isprintable() else "?" for c in str(name)[:80]) for name in names[:limit])
    return ", ".join(f"'{text}'" for text in texts) + (", …" if len(names) > limit else "") or "none"


def sort_order(table: pa.Table) -> NDArray[np.int64] | None:
    """Return the stable order of the rows by (key, task, prompt), int64 [rows]; None if they are already in it."""
    rising, equal = compare_neighbors(table)
    if (rising | equal).all():
        return None
    names = [name for name in SORT_COLUMNS if name in table.column_names]
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in names])
    return np.asarray(order.to_numpy(zero_copy_only=False)).view(np.int64)


def compare_neighbors(table: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Compare each row to the next by (key, task, prompt): whether it is less, and whether it is equal, [rows - 1]."""
    count = max(len(table) - 1, 0)
    less, equal = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    for name in SORT_COLUMNS:
        if name in table.column_names and equal.any():
            first, second = table[name].slice(0, count), table[name].slice(1)
            less |= equal & pc.less(first, second).to_numpy()
            equal &= pc.equal(first, second).to_numpy()
    return less, equal


def blocks(table: pa.Table, order: NDArray[np.int64] | None) -> Iterator[pa.Table]:
    """Yield the rows in this order (None: all), in tables of a multiple of ROW_GROUP rows and one chunk a column.

    Arrow's own ``take`` from many chunks visits the whole table in each call.
    """
    batches = table.to_batches()
    starts = np.cumsum([0] + [len(batch) for batch in batches])
    groups = BLOCK_BYTES // (ROW_GROUP * (table.nbytes // max(len(table), 1) + 1))
    step = ROW_GROUP * min(max(groups, 1), 16)
    for start in range(0, len(table) if order is None else len(order), step):
        if order is None:
            yield table.slice(start, step).combine_chunks()
            continue
        rows = order[start : start + step]
        by_row = np.argsort(rows)
        found = rows[by_row]
        edges = np.searchsorted(found, starts)
        parts = [
            batch.take(pa.array(found[a:z] - first))
            for batch, first, a, z in zip(batches, starts, edges, edges[1:], strict=False)
            if a < z
        ]
        back = np.empty_like(by_row)
        back[by_row] = np.arange(len(rows))
        joined = pa.Table.from_batches(parts).combine_chunks()
        del parts
        yield joined.take(pa.array(back))


def _checked_blocks(table: pa.Table, where: str) -> Iterator[pa.Table]:
    """Yield the canonical rows of a normalised table; raises UserError for doubled rows."""
    last = table.slice(0, 0)
    for block in blocks(table, sort_order(table)):
        joined = pa.concat_tables([last, block])
        doubled = np.flatnonzero(compare_neighbors(joined)[1])
        if len(doubled):
            key = listed([joined["key"][int(doubled[0])].as_py()])
            raise UserError(
                f"{where} has several rows with the same key, task and prompt (key {key}): remove all but one"
            )
        last = block.slice(len(block) - 1)
        yield block


class _Identity:
    """The running hashes of :func:`label_id`."""

    def __init__(self, schema: pa.Schema) -> None:
        self._types = [(field.name, type_name(field.type)) for field in schema]
        self._hashes = [[hashlib.sha256() for _ in range(1 + (kind == "string"))] for _, kind in self._types]
        self._rows = 0

    def update(self, rows: pa.Table | pa.RecordBatch) -> None:
        self._rows += rows.num_rows
        for index, (_, kind) in enumerate(self._types):
            column, hashes = rows.column(index), self._hashes[index]
            for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                if kind == "string":
                    lengths, data = string_buffers(chunk)
                    hashes[0].update(lengths.astype("<u4").data)
                    hashes[1].update(data)
                else:
                    values = chunk.to_numpy(zero_copy_only=False)
                    stored = np.ascontiguousarray(values, {"int64": "<i8", "float64": "<f8"}.get(kind, "u1"))
                    hashes[0].update(stored.data)

    def result(self) -> str:
        columns = [
            [*typed, *(h.hexdigest() for h in hashes)] for typed, hashes in zip(self._types, self._hashes, strict=True)
        ]
        return hashlib.sha256(canonical_json({"rows": self._rows, "columns": columns}).encode()).hexdigest()


def string_buffers(chunk: pa.StringArray) -> tuple[NDArray[np.int32], memoryview]:
    """Return byte lengths, int32 [rows], and the concatenated UTF-8 bytes of a string array without nulls."""
    _, offsets, data = chunk.buffers()
    if not len(chunk) or data is None:
        return np.zeros(len(chunk), dtype=np.int32), memoryview(b"")
    bounds = np.frombuffer(offsets, dtype=np.int32, count=len(chunk) + 1, offset=4 * chunk.offset)
    return np.diff(bounds), memoryview(data)[bounds[0] : bounds[-1]]


def _normal_column(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    if name in STRINGS:
        column = text_column(column, name, where, is_name=name in NAMES)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    target = _target(kind, name)
    if target is None:
        wanted = "numbers" if name == "weight" else "strings, numbers or true/false"
        raise UserError(f"column '{name}' of {where} has values of type {kind}: it can have only {wanted}")
    try:
        column = column.cast(kind).cast(target)
    except pa.ArrowException as error:
        raise UserError(f"column '{name}' of {where} does not fit {type_name(target)}: {one_line(error)}") from None
    if column.null_count:
        default = 1.0 if name == "weight" else {pa.string(): "", pa.float64(): float("nan")}.get(target)
        if default is None or name == "key":
            row = pc.index(column.is_null(), True).as_py()
            raise UserError(f"column '{name}' of {where} has no value in row {row + 1}: each row needs one")
        column = column.fill_null(default)
    if target == pa.float64():
        if name == "weight":
            usable = pc.and_(pc.greater(column, 0.0), pc.is_finite(column))
            row = pc.index(usable, False).as_py()
            if row >= 0:
                raise UserError(
                    f"the weight in row {row + 1} of {where} is {column[row]}: it must be a positive number"
                )
        elif pc.any(pc.is_nan(column)).as_py():  # NaN has many bit patterns, an id needs one
            column = pc.if_else(pc.is_nan(column), pa.scalar(float("nan")), column)
    return column


def _target(kind: pa.DataType, name: str) -> pa.DataType | None:
    types = pa.types
    if types.is_null(kind):
        return pa.float64() if name == "weight" else pa.string()
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return None if name == "weight" else pa.string()
    if types.is_floating(kind) or (name == "weight" and types.is_integer(kind)):
        return pa.float64()
    if types.is_integer(kind):
        return pa.int64()
    return pa.bool_() if types.is_boolean(kind) and name != "weight" else None


def one_line(error: Exception) -> str:
    """Return the message of a library's error as one short line of printable characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:160])
