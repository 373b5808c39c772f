"""Opens the label set that a reader of a cache names."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shards.labels.files import read_label_file
from shards.labels.join import LabelReport, check_labels, enforce
from shards.labels.remote import fetch_label_index
from shards.labels.store import SOURCE, LabelEntry, LabelIndex, find, open_set, read_index
from shards.labels.table import LabelSet
from shards.read.features import FeatureRows
from shards.remote.client import is_url

Joined: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]  # what shards.labels.join.join returns
FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".gz")


def open_labels(
    labels: str | Path | LabelSet | None, features: FeatureRows, max_problems: float
) -> tuple[LabelSet, Joined | None]:
    """Return the label set that ``labels`` names and, if it is known, its join with the features.

    See :meth:`shards.read.cache.Cache.open`.

    Raises:
        UserError: there is no such set or file, it is corrupt, or a file has too many problems.
    """
    if isinstance(labels, LabelSet):
        return labels, None
    if labels is not None and is_label_file(labels):
        report = check_label_file(str(labels), features)
        enforce(report, max_problems, f"'{labels}'", "max_label_problems")
        return report.label_set(str(labels)), report.join()
    entry = find(label_index(features), SOURCE if labels is None else str(labels), f"'{features.location}'")
    return open_stored(entry, features), None


def label_index(features: FeatureRows) -> LabelIndex:
    """Return the label sets of a cache; UserError if their list is corrupt or cannot be fetched."""
    return read_index(features.layout.path) if features.mirror is None else fetch_label_index(features.mirror.remote)[1]


def open_stored(entry: LabelEntry, features: FeatureRows) -> LabelSet:
    """Open a label set of a cache; UserError if it is corrupt or cannot be fetched."""
    if features.mirror is not None:
        features.mirror.fetch_file(features.layout.labels / entry.file.name, entry.file)
    return open_set(features.layout.path, entry)


def is_label_file(labels: str | Path) -> bool:
    """Return whether ``labels`` is the path or URL of a file rather than the name of a label set."""
    text = str(labels)
    return isinstance(labels, Path) or is_url(text) or "/" in text or text.lower().endswith(FILE_SUFFIXES)


def check_label_file(file: str, features: FeatureRows) -> LabelReport:
    """Read a file of labels and compare it with the utterances of a cache; UserError if it cannot be read."""
    _, keys = features.current()
    return check_labels(read_label_file(file), keys, features.current_ids, f"'{file}'")
