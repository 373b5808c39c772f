"""Rows of manifests: read JSONL, check fields, and hold the result as a :class:`ManifestEntry`."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shards.errors import UserError


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One checked row of a manifest.

    Attributes:
        audio: Path as written in the manifest.
        text: Transcript.
        location: File and line, for messages.
        id: "" if the row has none.
        speaker: "" if unknown.
        split: "" if unknown.
        start: Start of the segment, in seconds.
        duration: In seconds; None if unknown.
        channel: Index of the channel; None: all.
        is_whole_file: The utterance is the whole file, not a segment.
    """

    audio: str
    text: str
    location: str
    id: str = ""
    speaker: str = ""
    split: str = ""
    start: float = 0.0
    duration: float | None = None
    channel: int | None = None
    is_whole_file: bool = True


def json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each object of a JSONL file (also ``.gz``) and its location for messages; raises UserError."""
    with open_text(path) as file:
        for number, line in numbered_lines(file, path):
            if not line.strip():
                continue
            location = f"line {number} of '{path}'"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{location} is not JSON ({error}): a manifest has one JSON object per line") from None
            if not isinstance(row, dict):
                raise UserError(
                    f'{location} is a JSON {type(row).__name__}, expected an object such as {{"audio": …, "text": …}}'
                )
            yield row, location


def number_field(row: dict[str, Any], name: str, location: str) -> float | None:
    """Return the seconds in field ``name``, or None if it is missing or empty; raises UserError."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0) or isinstance(value, bool):
        raise UserError(f"{name} in {location} is {value!r}, expected a non-negative number of seconds")
    return number


def text_field(row: dict[str, Any], names: Sequence[str], location: str) -> str:
    """Return the first of the fields ``names`` that has a value, as text; "" if none has.

    Raises:
        UserError: The value is a list or an object.
    """
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{name} in {location} is {value!r}, expected text")
        return str(value)
    return ""


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file (also ``.gz``) as UTF-8; raises UserError."""
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
        return open(path, encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise UserError(f"cannot read the manifest '{path}': {error.strerror}") from None


def numbered_lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line), counted from 1; raises UserError if the file is not UTF-8 or a corrupt gzip file."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 after line {number} ({error.reason}): save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"'{path}' is truncated or not a gzip file ({error}): copy or download it again") from None
