"""Checks of the label sets of a cache: a part of ``shards/inspect/verify.py``.

Takes the untrusted folder ``labels``; reports a corrupt index, every file that differs from it, and files that it does
not name.
"""

from __future__ import annotations

import io
from pathlib import Path

from shards.errors import UserError
from shards.files import open_file
from shards.format.records import MAX_JSON
from shards.inspect.findings import Findings
from shards.labels.store import FIX, IDENTIFIED, INDEX, LabelEntry, open_set, parse_index
from shards.labels.table import compare_neighbors, label_id


def check_label_sets(findings: Findings, folder: Path, deep: bool, complete: bool) -> None:
    """Report the problems of the label sets in ``folder``.

    Args:
        deep: also compute the id of sets that are too large for a reader to check.
        complete: the cache is complete, so that it must have label sets.
    """
    index, files = folder / INDEX, sorted(folder.glob("*.parquet"))  # listed before the index is read: it may grow
    try:
        with io.BufferedReader(open_file(index)) as file:
            data = file.read(MAX_JSON + 1)
        sets = parse_index(data, "").sets
    except FileNotFoundError:
        if complete:
            findings.report(None, index, "is missing: the cache has no labels")
        return
    except OSError as error:
        findings.report_error(None, index, error)
        return
    except UserError as error:
        findings.report(None, index, str(error).removesuffix(FIX).strip(" :"))
        return
    for entry in sets:
        path = folder / entry.file.name
        if findings.check_file(path, entry.file) and (what := _mismatch(path, entry, deep)):
            findings.report(None, path, what)
    adding = (folder.parent / "labels.claim").exists()
    for path in files:
        if not adding and path.name not in {entry.file.name for entry in sets}:
            findings.report(None, path, f"is not named by {INDEX}")


def _mismatch(path: Path, entry: LabelEntry, deep: bool) -> str | None:
    """Return how the content of a file, whose hash is right, differs from what the index says; None if it does not."""
    try:
        table = open_set(path.parent.parent, entry).table
    except UserError as error:
        return str(error).removesuffix(FIX).removeprefix(f"'{path}'").strip(" :")
    if not deep or entry.file.bytes <= IDENTIFIED:  # open_set has compared the id
        return None
    same = compare_neighbors(table)[0].all() and label_id(table) == entry.id
    return None if same else f"has rows in another order or another id than {INDEX} says"
