"""entries."""

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
    """One row, checked: ``audio`` as written, seconds, and the place for a message. ``whole``: all of the file."""

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
    """Every object of a JSONL file (``.gz`` too) with its place for a message; raises UserError."""
    with _open_text(path) as file:
        for number, line in _lines(file, path):
            if not line.strip():
                continue
            location = f"line {number} of '{path}'"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{location} is not JSON ({error}): a manifest has one JSON object in each line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f'{location} is a JSON {type(row).__name__}, not an object such as {{"audio": …, "text": …}}'
                )
            yield row, location


def number_field(row: dict[str, Any], name: str, place: str) -> float | None:
    """The seconds in column ``name``, None when absent or empty; raises UserError."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0) or isinstance(value, bool):
        raise UserError(f"{name} in {place} is {value!r}: it must be a number of seconds, not negative")
    return number


def text_field(row: dict[str, Any], names: Sequence[str], place: str) -> str:
    """The first of ``names`` that has a value, as text; "" when none; raises UserError for a list or an object."""
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{name} in {place} is {value!r}: it must be text")
        return str(value)
    return ""


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
        return open(path, encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise UserError(f"cannot read the manifest '{path}': {error.strerror}") from None


def _lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 after line {number} ({error.reason}): save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"'{path}' is cut short or no gzip file ({error}): fetch it again") from None
