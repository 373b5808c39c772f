"""The labels of a source: the label set that an extraction writes, and the texts that it stores beside the features."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.extract.listing import Listing
from shards.commit.store import Store

COLUMNS = ("text", "speaker", "split")


def source_labels(listing: Listing) -> pa.Table:
    """Return the label table of a listed source: ``key``, ``text``, ``speaker`` and ``split`` of every utterance."""
    return listing.table.select(["key", *COLUMNS])


class LabelLookup:
    """Texts of the source's newest label set by key; opened at the first use, and sorted by key as it is stored."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._table: pa.Table | None = None

    def find(self, keys: list[str]) -> list[dict[str, Any]]:
        """Return text, speaker and split of each key; {} for a key without labels."""
        if self._table is None:
            self._table = self._store.open_labels("source").table.select(["key", *COLUMNS]).combine_chunks()
        column = self._table["key"]
        found = []
        for key in keys:
            low, high = 0, len(column)
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if column[middle].as_py() < key else (low, middle)
            row = self._table.slice(low, 1).to_pylist()
            found.append(row[0] if row and row[0]["key"] == key else {})
        return found
