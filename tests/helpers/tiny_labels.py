"""Label files for the caches of ``tiny_cache.py``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from shards.read.cache import Cache

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]


def write_labels(file: Path, rows: Iterable[Mapping[str, object]]) -> str:
    """Write ``rows``, which have the same keys, as CSV; return the path for a configuration."""
    rows = list(rows)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def write_two_tasks(cache: Path, file: Path, **columns: object) -> str:
    """Write two rows for each utterance: ``transcribe`` with its text, ``count`` with its number of words."""
    rows = []
    for row in Cache.open(cache).manifest.select(["key", "text", "speaker", "split"]).to_pylist():
        rows.append({**row, "task": "transcribe", **columns})
        rows.append({**row, "task": "count", "text": NUMBERS[len(row["text"].split())], **columns})
    return write_labels(file, rows)
