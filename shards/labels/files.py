"""Reading of label files: CSV, TSV, JSON lines and parquet, from a path or a URL, without trust in what they declare.

    path or URL -> local file, unpacked if .gz, bounded -> pyarrow's reader -> pa.Table in file order

CSV and TSV have text only: "007" and "NA" stay as they are. ``weight`` is a number; an additional column becomes int64
or float64 if writing the numbers again gives the same text in every row. TSV has no quoting. In CSV a quotation mark
opens a value at its start only, and closes it at its end. JSON lines and parquet keep their types.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.files import open_file
from shards.labels.rows import Line, choose_delimiter, delimited_rows, json_object, text_lines
from shards.labels.table import COLUMNS, STRINGS, check_names, listed, one_line, string_buffers
from shards.labels.text import NAMES, text_column, text_value
from shards.remote.client import Remote, is_url

MAX_BYTES = 4 << 30  # of a label file, unpacked
BLOCK = 16 << 20  # bytes parsed at once; a longer row is refused
ROWS = 8192  # rows of parquet decompressed at once
MAX_ROWS_PER_BYTE = 4  # of a parquet file: keys limit how well rows compress
GROWTH, ROOM = 200, 64 << 20  # bytes that a compressed file may unpack to: per byte of the file, and for any file
LONG_LINE = 4096  # characters; a longer line of JSON is checked before pyarrow reads it
_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
_AFTER_VALUE = re.compile(r"[}\]]\s*[^,}\]\s]")  # a second value on the line, or a text such as "[noise] yes"
TEXTS = (*STRINGS, "id")
_QUOTE, _LINE_ENDS = ord('"'), (ord("\n"), ord("\r"))


def read_label_file(source: str | Path, max_bytes: int = MAX_BYTES) -> pa.Table:
    """Read labels from a ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson`` or ``.json`` file (also ``.gz``), or ``.parquet``.

    Args:
        source: path or URL.
        max_bytes: limit of the size of the file, and of its text when unpacked.

    Returns:
        the rows in file order, with the columns of the file; at least ``key`` or ``id``.

    Raises:
        UserError: the file is absent, too large, not UTF-8, not valid, has NUL characters, or column names that a label
            set cannot have.
    """
    where, name = f"'{source}'", (urlsplit(str(source)).path if is_url(source) else str(source)).lower()
    kind = _KINDS.get(Path(name.removesuffix(".gz")).suffix)
    if kind is None or (kind == "parquet" and name.endswith(".gz")):
        raise UserError(f"{where} has an unknown suffix: labels are read from .csv, .tsv, .jsonl (or .gz), or .parquet")
    with _opened(source, where, name.endswith(".gz"), max_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise UserError(f"{where} is empty: write one row for each utterance, with the column 'key'")
        if kind == "json":
            table = _read_json(file, where)
        elif kind == "parquet":
            table = read_bounded(file, where, lambda names: _check_columns(names, where))
        else:
            table = _read_csv(file, where, "\t" if kind == "tsv" else ",")
    for index, name in enumerate(table.column_names):
        if name in TEXTS:
            column = text_column(table[name], name, where, is_name=name in NAMES)
            table = table.set_column(index, name, column)
    _refuse_nul(table, where)
    return table.replace_schema_metadata(None)


def read_bounded(file: BinaryIO, where: str, check_columns: Callable[[list[str]], None] = lambda _: None) -> pa.Table:
    """Read an open parquet file. Declared sizes are checked before memory is allocated for them.

    Args:
        check_columns: called with the names of the columns before any row is read.

    Raises:
        UserError: the file is corrupt, or declares or unpacks to more than a file of its size can contain.
    """
    size = os.fstat(file.fileno()).st_size
    room, blocks, waiting = ROOM + GROWTH * size, [], []
    try:
        parquet = pq.ParquetFile(file)
        check_columns(parquet.schema_arrow.names)
        rows, groups = parquet.metadata.num_rows, parquet.metadata.num_row_groups
        unpacked = sum(parquet.metadata.row_group(group).total_byte_size for group in range(groups))
        if not 0 <= rows <= MAX_ROWS_PER_BYTE * size or not 0 <= unpacked <= room:
            raise UserError(
                f"{where} declares {rows} rows and {unpacked} bytes in a file of {size} bytes: write it again"
            )
        for batch in parquet.iter_batches(ROWS):
            room -= batch.nbytes
            if room < 0:
                raise UserError(f"{where} unpacks to more than a file of {size} bytes can contain: write it again")
            waiting.append(batch)
            if sum(each.nbytes for each in waiting) > BLOCK:
                blocks.append(pa.concat_batches(waiting))  # in buffers that are not larger than their content
                waiting = []
        table = pa.Table.from_batches([*blocks, *waiting], parquet.schema_arrow)
        _validate(table, where)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{where} is not a readable parquet file ({one_line(error)}): write it again") from None
    return table.replace_schema_metadata(None)


def _validate(table: pa.Table, where: str) -> None:
    """Check string offsets and UTF-8."""
    try:
        table.validate(full=True)
    except pa.ArrowException:
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_string(column.type):
                text_column(column, name, where)  # names the row
        raise


@contextmanager
def _opened(source: str | Path, where: str, gzipped: bool, limit: int) -> Iterator[BinaryIO]:
    """Open a label file as a local, seekable file."""
    with ExitStack() as stack:
        if is_url(source):
            parts = urlsplit(str(source))
            if parts.query or parts.fragment:
                raise UserError(
                    f"{where} has a part after '?' or '#': pass the plain URL of a file, or download it first"
                )
            folder, _, name = str(source).rpartition("/")
            remote = Remote(folder)
            size = remote.size(name)
            if size is None:
                raise UserError(f"{where} does not exist: pass the URL of a label file")
            _check_size(size, limit, where)
            file = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            remote.fetch(name, file, size)
            file.flush()
        else:
            try:
                file = stack.enter_context(io.BufferedReader(open_file(Path(source).expanduser())))
            except OSError as error:
                raise UserError(
                    f"{where} cannot be read ({error.strerror}): pass a label file or the name of a set"
                ) from None
            size = os.fstat(file.fileno()).st_size
            _check_size(size, limit, where)
        if gzipped:
            packed, file = file, cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            _unpack(packed, file, min(limit, ROOM + GROWTH * size), where)
        file.seek(0)
        yield file


def _check_size(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise UserError(f"{where} has {size:,} bytes, more than {limit:,}: split it, or convert it to parquet")


def _unpack(packed: BinaryIO, file: BinaryIO, limit: int, where: str) -> None:
    packed.seek(0)
    left, decoder = limit, zlib.decompressobj(31)
    data = packed.read(1 << 20)
    try:
        while data:
            text = decoder.decompress(data, 8 << 20)
            left -= len(text)
            if left < 0:
                raise UserError(f"{where} unpacks to more than {limit:,} bytes: split it, or convert it to parquet")
            file.write(text)
            if decoder.eof:  # another member may follow
                rest = decoder.unused_data or packed.read(1 << 20)
                data, decoder = rest, zlib.decompressobj(31) if rest else decoder
            else:
                data = decoder.unconsumed_tail or packed.read(1 << 20)
        if not decoder.eof:
            raise UserError(f"{where} ends in the middle of its gzip data: copy or write it again")
    except zlib.error as error:
        raise UserError(f"{where} is not gzip data ({one_line(error)}): rename it, or write it again") from None
    file.flush()


def _check_columns(names: list[str], where: str) -> None:
    check_names([name for name in names if name != "id"], where)
    if names.count("id") > 1:
        raise UserError(f"{where} has more than one column 'id': rename or remove one")
    if "key" not in names and "id" not in names:
        raise UserError(
            f"{where} has no column 'key' or 'id' (it has {listed(names)}): add the key of the utterance to each row"
        )


def _lines(file: BinaryIO, where: str) -> Iterator[Line]:
    file.seek(0)
    return text_lines(file, where)


def _read_csv(file: BinaryIO, where: str, delimiter: str) -> pa.Table:
    first = next(_lines(file, where))
    delimiter = choose_delimiter(first[1], delimiter)
    quoted = delimiter != "\t"
    names = next(delimited_rows([first], where, delimiter), (1, []))[1]
    _check_columns(names, f"line 1 of {where}")
    lines, has_quotes = _count_lines(file)
    has_quotes = has_quotes and quoted
    file.seek(0)
    try:
        table = pa_csv.read_csv(
            file,
            pa_csv.ReadOptions(block_size=BLOCK),
            pa_csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=has_quotes
            ),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[], strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _count_rows(file, where, delimiter)
        raise UserError(f"{where} cannot be read ({one_line(error)}): correct that row") from None
    if table.column_names != names:
        raise UserError(f"line 1 of {where} cannot be read as column names: write them without line breaks and quotes")
    is_unclear = has_quotes and (lines > len(table) + 1 or not _quotes_are_regular(file, delimiter))
    if is_unclear and _count_rows(file, where, delimiter) != len(table):
        raise UserError(f"{where} has quotation marks that can be read in two ways: double each one inside a value")
    for index, name in enumerate(names):
        if name == "weight":
            table = table.set_column(index, name, _weights(table[name], where))
        elif name not in COLUMNS and name != "id":
            table = table.set_column(index, name, _numbers(table[name]))
    return table


def _count_rows(file: BinaryIO, where: str, delimiter: str) -> int:
    """Return the number of rows after the header. Raises UserError for the first one that is not valid.

    Slow: it is used for files that pyarrow refuses, because it does not name the line, for values of several lines, and
    for unusual quotation marks.
    """
    return sum(1 for _ in delimited_rows(_lines(file, where), where, delimiter)) - 1


def _count_lines(file: BinaryIO) -> tuple[int, bool]:
    """Return the number of line feeds, and whether there is any quotation mark."""
    file.seek(0)
    counts = [(block.count(b"\n"), b'"' in block) for block in iter(lambda: file.read(1 << 20), b"")]
    return sum(lines for lines, _ in counts), any(quotes for _, quotes in counts)


def _quotes_are_regular(file: BinaryIO, delimiter: str) -> bool:
    """Return whether each quotation mark opens a value at its start, closes it at its end, or is doubled in it."""
    size, count = os.fstat(file.fileno()).st_size, 0
    for start in range(0, size, BLOCK):
        file.seek(max(start - 1, 0))
        window = b"\n" * (start == 0) + file.read(BLOCK + 2 - (start == 0))
        data = np.frombuffer(window if len(window) == BLOCK + 2 else window + b"\n", dtype=np.uint8)
        at = np.flatnonzero(data[1:-1] == _QUOTE) + 1
        opens = (np.arange(len(at)) + count) % 2 == 0
        outside = np.where(opens, data[at - 1], data[at + 1])
        if not np.isin(outside, (_QUOTE, ord(delimiter), *_LINE_ENDS)).all():
            return False
        count += len(at)
    return count % 2 == 0


def _weights(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    text = pc.if_else(pc.equal(column, ""), "1", column)
    try:
        return text.cast(pa.float64())
    except pa.ArrowException:
        number = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
        row = pc.index(pc.match_substring_regex(text, number), False).as_py()
        raise UserError(f"the weight {listed([text[row]])} in row {row + 1} of {where} is not a number") from None


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column as int64 or float64 if that loses nothing of its text."""
    for kind in (pa.int64(), pa.float64()):
        try:
            numbers = column.cast(kind)
        except pa.ArrowException:
            continue
        same = pc.equal(numbers.cast(pa.string()), pc.replace_substring_regex(column, r"\.0$", ""))
        others = pc.indices_nonzero(pc.invert(same))  # some exponents: Python writes 1e-07, pyarrow 1e-7
        texts = zip(column.take(others), numbers.take(others), strict=True)
        finite = kind == pa.int64() or pc.all(pc.is_finite(numbers)).as_py()
        if len(column) and finite and all(text.as_py() == repr(number.as_py()) for text, number in texts):
            return numbers
    return column


def _read_json(file: BinaryIO, where: str) -> pa.Table:
    for number, line in _lines(file, where):  # pyarrow crashes at a first value null, and at values nested very deeply
        text = line.strip(" \t\r\n")
        if text and (text[0] != "{" or text[-1] != "}" or len(text) > LONG_LINE or _AFTER_VALUE.search(text)):
            json_object(text, f"line {number} of {where}")
    try:
        table = _parse_json(file)
    except (pa.ArrowException, UnicodeDecodeError):
        table = None
    if table is None or not all(_is_plain(field) for field in table.schema):
        with tempfile.TemporaryFile() as plain:
            _write_plain(file, plain, where)
            try:
                table = _parse_json(plain)
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise UserError(
                    f"{where} cannot be read as JSON lines ({one_line(error)}): correct that value"
                ) from None
    _check_columns(table.column_names, where)
    return table


def _parse_json(file: BinaryIO) -> pa.Table:
    types: dict[str, pa.DataType] = {}
    while True:
        file.seek(0)
        table = pa_json.read_json(
            file,
            pa_json.ReadOptions(block_size=BLOCK),
            pa_json.ParseOptions(explicit_schema=pa.schema(list(types.items()))),
        )
        table.validate(full=True)
        times = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
        if not times:
            return table
        types.update(dict.fromkeys(times, pa.string()))  # pyarrow takes texts such as 2024-01-31 for dates


def _is_plain(field: pa.Field) -> bool:
    """Return whether a text column needs no look at its single values."""
    kind = field.type
    is_text = pa.types.is_string(kind) or pa.types.is_null(kind)
    return field.name not in TEXTS or is_text or (field.name in NAMES and pa.types.is_integer(kind))


def _write_plain(file: BinaryIO, plain: BinaryIO, where: str) -> None:
    """Copy JSON lines with text in all text columns. Raises UserError for the first line that is not valid."""
    for number, line in _lines(file, where):
        if line.strip():
            place = f"line {number} of {where}"
            row = json_object(line, place)
            texts = {name: text_value(row[name], name, place, is_name=name in NAMES) for name in TEXTS if name in row}
            plain.write(json.dumps({**row, **texts}).encode() + b"\n")


def _refuse_nul(table: pa.Table, where: str) -> None:
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not pa.types.is_string(column.type):
            continue
        for chunk in column.chunks:
            if not np.frombuffer(string_buffers(chunk)[1], dtype=np.uint8).all():
                row = pc.index(pc.match_substring(column, "\0"), True).as_py()
                raise UserError(f"column '{name}' of {where} has a NUL character in row {row + 1}: remove it")
