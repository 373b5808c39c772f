"""Rows of manifests: read JSONL, check fields, and hold the result as a :class:`ManifestEntry`."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from shards.errors import UserError
from shards.files import open_file
from shards.labels.rows import json_object, text_lines
from shards.labels.text import text_value

MAX_SECONDS = 1e9
MAX_CHANNELS = 1024


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
    with open_manifest(path) as file:
        for number, line in text_lines(file, f"'{path}'"):
            if line.strip():
                location = f"line {number} of '{path}'"
                yield json_object(line, location), location


def number_field(row: dict[str, Any], name: str, location: str) -> float | None:
    """Return the seconds in field ``name``, or None if it is missing, empty or NaN; raises UserError."""
    value = row.get(name)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MAX_SECONDS or isinstance(value, bool):
        raise UserError(f"{name} in {location} is {value!r:.80}, expected a non-negative number of seconds")
    return number


def channel_field(row: dict[str, Any], name: str, location: str) -> int | None:
    """Return the index of the channel in field ``name``; None if it is absent or means all channels; raises UserError.

    NeMo's ``channel_selector`` is an index, a list of indices, or "average".
    """
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if value is None or value in ("", "average") or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        channel = float(value)
    except (TypeError, ValueError, OverflowError):
        channel = math.nan
    if isinstance(value, bool) or not (channel.is_integer() and 0 <= channel < MAX_CHANNELS):
        raise UserError(
            f"{name} in {location} is {value!r:.80}, expected the index of one channel, counted from 0: correct "
            "it, or rename the field if it is something else"
        )
    return int(channel)


def text_field(row: dict[str, Any], names: Sequence[str], location: str, *, is_name: bool = False) -> str:
    """Return the first of the fields ``names`` that has a value, as text; "" if none has.

    Raises:
        UserError: see :func:`shards.labels.text.text_value`.
    """
    for name in names:
        if text := text_value(row.get(name), name, location, is_name=is_name):
            return text
    return ""


@contextmanager
def open_manifest(path: Path) -> Iterator[BinaryIO]:
    """Open a manifest (also ``.gz``) for reading; raises UserError."""
    try:
        file = open_file(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read the manifest '{path}' ({reason}): check source.path and its permissions"
        ) from None
    with io.BufferedReader(file) as raw:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw)
