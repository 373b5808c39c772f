"""Rows of text files, read strictly: what label files and the manifests of sources share.

    binary file -> text_lines (UTF-8, numbered, bounded) -> delimited_rows (CSV, TSV) | json_object (JSON lines)

TSV has no quoting: a quotation mark is a letter. In CSV a quotation mark opens a value at its start only, and closes it
at its end; inside of a quoted value it is doubled (RFC 4180). Each row has as many fields as the first one.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal

from shards.errors import UserError

MAX_LINE = 16 << 20  # bytes of a line, and characters of a value
Line = tuple[int, str]  # number, counted from 1, and text with its line end
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")  # ended a line on the first Macs


def text_lines(file: BinaryIO, where: str) -> Iterator[Line]:
    """Yield the lines of a file, or of a decompressing stream, that is at its start.

    Raises:
        UserError: a line is not UTF-8 or longer than ``MAX_LINE``, or the stream is damaged.
    """
    number = 0
    try:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise UserError(
                    f"line {number} of {where} is longer than {MAX_LINE >> 20} MiB: write one utterance a line"
                )
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"line {number} of {where} is not UTF-8 ({error.reason}): save the file as UTF-8") from None
    except (EOFError, zlib.error, OSError) as error:  # gzip raises all of them
        raise UserError(f"{where} cannot be read after line {number} ({error}): copy or download it again") from None


def choose_delimiter(header: str, delimiter: str) -> str:
    """Return the delimiter of a CSV file: spreadsheets write ";" where the comma is the decimal separator."""
    return ";" if delimiter == "," and header.count(";") > header.count(",") else delimiter


def delimited_rows(lines: Iterable[Line], where: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each row, the header first, and the line on which the row starts. Blank lines are no rows.

    Args:
        lines: from :func:`text_lines`.
        where: the file in messages.
        delimiter: a tab for TSV; else CSV.

    Raises:
        UserError: a quotation mark does not open and close a whole value (the message names the line where it opened),
            a quoted value contains what looks like rows, or a row has another number of fields than the header.
    """
    csv.field_size_limit(MAX_LINE)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    read: list[Line] = []  # the lines of the current row

    def feed() -> Iterator[str]:
        for number, line in lines:
            for part in _LONE_RETURN.split(line) if "\r" in line.rstrip("\r\n") else [line]:
                read.append((number, part))
                yield part

    reader = csv.reader(feed(), delimiter=delimiter, quoting=quoting, strict=True)
    columns = 0
    while True:
        read.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"line {_opening_line(read, delimiter)} of {where} has a quotation mark that does not open and close a "
                f"whole value ({error}): write every '\"' inside of a value twice, and quote the value"
            ) from None
        if row is None:
            return
        if not row:
            continue
        columns = columns or len(row)
        if len(row) != columns:
            raise UserError(
                f"line {read[0][0]} of {where} has {len(row)} fields, but line 1 has {columns}: "
                + ("tabs separate fields" if delimiter == "\t" else f"quote values that contain '{delimiter}'")
            )
        if len(read) > 1:
            _refuse_swallowed_rows(row, delimiter, f"line {read[0][0]} of {where}")
        yield read[0][0], row


def _refuse_swallowed_rows(row: list[str], delimiter: str, where: str) -> None:
    """Refuse a value of several lines that look like rows: an opening quotation mark without its closing one."""
    for index, value in enumerate(row):
        *inner, last = re.split(r"\r\n?|\n", value.rstrip("\r\n"))
        is_like_rows = all(line.count(delimiter) >= len(row) - 1 for line in inner[1:])
        if inner and is_like_rows and last.count(delimiter) >= max(index, 1):
            raise UserError(
                f"{where} has a quotation mark that makes one value of several lines that look like rows "
                f"({value[:80]!r}): double it, or use JSON lines for texts of several lines"
            )


def _opening_line(lines: list[Line], delimiter: str) -> int:
    """Return the line of the last quotation mark that opened a value in ``lines``, the beginning of a row."""
    opened, state = lines[0][0], "start"
    for number, line in lines:
        for character in line:
            if state == "quoted":
                state = "closing" if character == '"' else "quoted"
            elif state == "closing" and character == '"':
                state = "quoted"
            elif character in (delimiter, "\r", "\n"):
                state = "start"
            elif state == "closing":
                return opened
            elif state == "start" and character == '"':
                opened, state = number, "quoted"
            else:
                state = "plain"
    return opened


def json_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object in one line of a file; ``where`` names both.

    Raises:
        UserError: the line is no JSON object, names a field twice, or has half of a surrogate pair.
    """
    try:
        tree = _DECODER.decode(line)
        if "\\u" in line:  # UTF-8 itself has none
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} has half of a surrogate pair (a cut emoji, {_surrogate(line)}): correct that character"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise UserError(f"{where} is not a JSON object ({reason}): write one object a line") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where} is not a JSON object (it is a {type(tree).__name__}): write one object a line")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is specified twice")
    return tree


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # json.loads would make one for each line


def _surrogate(line: str) -> str:
    found = re.search(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", line)
    return found[0] if found else "\\ud800"
