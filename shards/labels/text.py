"""What counts as text in a table: which types of columns and of single values, and what they become.

Text is text: strings, and bytes that are UTF-8. Columns of names (``NAMES``) may also have integers, or floats that are
integers, as pandas writes integers with gaps: 1089.0 becomes "1089". NaN and null are absent. Booleans, lists and
structs are refused. ``shards/labels/table.py`` and ``pipeline/sources`` read all columns through this module.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError

NAMES = ("key", "id", "speaker", "split")
MAX_EXACT = 2**53  # floats above may stand for several integers


def text_value(value: Any, name: str, where: str, *, is_name: bool = False) -> str | None:
    """Return one value of a text column; None if it is absent.

    Args:
        value: None, or a value from JSON or Arrow.
        name: the column, for messages.
        where: row and file, for messages.
        is_name: whether integers are allowed.

    Raises:
        UserError: the value is no text, not UTF-8, or has a NUL or half of a surrogate pair.
    """
    if value is None or (isinstance(value, float) and value != value):
        return None
    text: str = value if isinstance(value, str) else _as_text(value, name, where, is_name)
    if "\0" in text:
        raise UserError(f"{name} in {where} has a NUL character: remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{name} in {where} has half of a surrogate pair: correct that character") from None
    return text


def _as_text(value: Any, name: str, where: str, is_name: bool) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name} in {where} is not UTF-8 ({error.reason}): correct or convert it") from None
    if is_name and isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        value = int(value)
    if not is_name or not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name} in {where} is {value!r:.80}, expected text")
    return str(value)


def check_text_type(kind: pa.DataType, name: str, where: str, *, is_name: bool = False) -> None:
    """Raise UserError if a column of Arrow type ``kind`` cannot be text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_string(kind) or is_binary(kind) or pa.types.is_null(kind):
        return
    if not (is_name and (pa.types.is_integer(kind) or pa.types.is_floating(kind))):
        wanted = "strings or integers" if is_name else "strings"
        raise UserError(f"column '{name}' of {where} has values of type {kind}: it can have only {wanted}")


def text_column(column: pa.ChunkedArray, name: str, where: str, *, is_name: bool = False) -> pa.ChunkedArray:
    """Return a column as strings; absent values are null. Rows count from 1 in messages.

    Raises:
        UserError: as :func:`check_text_type` and :func:`text_value`.
    """
    check_text_type(column.type, name, where, is_name=is_name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        if pa.types.is_floating(column.type):
            if pc.any(pc.greater(pc.abs(column), float(MAX_EXACT))).as_py():
                raise pa.ArrowInvalid("too large")
            column = column.cast(pa.int64())
        column = column.cast(pa.string())
        column.validate(full=True)
    except pa.ArrowException as error:
        for row, value in enumerate(_values(column), 1):
            text_value(value, f"column '{name}'", f"row {row} of {where}", is_name=is_name)
        raise UserError(f"column '{name}' of {where} cannot be read as text ({error}): correct it") from None
    return column


def _values(column: pa.ChunkedArray) -> Any:
    kind = column.type
    if is_string(kind):  # their Python objects would be decoded, which fails without naming the row
        column = pa.chunked_array([chunk.view(_BYTES.get(kind, pa.binary_view())) for chunk in column.chunks])
    return (value.as_py() for value in column)


_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def is_string(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's three types of strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's types of bytes."""
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )
