"""Merges the label sets of two copies of a cache, so that a transfer loses none of either side."""

from __future__ import annotations

from shards.errors import UserError
from shards.format.records import seal
from shards.labels.store import LabelEntry, LabelIndex


def merge_labels(source: LabelIndex, target: LabelIndex, source_name: str, target_name: str) -> LabelIndex:
    """Return the label sets of ``target`` after those of ``source`` are copied to it.

    For each name, the side that has all sets of the other decides which set is the current one; ``source`` if both have
    the same. A set that both have keeps its file in ``target``.

    Raises:
        UserError: each side has a set of one name that the other lacks, or sets of the two have the same file name.
    """
    known = {(entry.name, entry.id): entry for entry in target.sets}
    sets = [_keep_file(entry, known.get((entry.name, entry.id))) for entry in source.sets]
    for name in target.names():
        mine, theirs = ({entry.id for entry in index.sets if entry.name == name} for index in (source, target))
        if mine - theirs and theirs - mine:
            raise UserError(
                f"{source_name} and {target_name} have different label sets named '{name}': pull into another folder, "
                "and add the set under another name with `python -m shards label`"
            )
        if theirs - mine:
            sets = [entry for entry in sets if entry.name != name]
            sets += [entry for entry in target.sets if entry.name == name]
    files = [entry.file.name for entry in sets]
    if len(set(files)) < len(files):
        raise UserError(f"{source_name} and {target_name} have different label sets in one file: use another folder")
    return LabelIndex(sets=tuple(sets))


def index_bytes(index: LabelIndex) -> bytes:
    """Return the content of ``LABELS.json``."""
    return seal(index.model_dump(mode="json", by_alias=True))


def _keep_file(entry: LabelEntry, known: LabelEntry | None) -> LabelEntry:
    return entry if known is None or known.file == entry.file else known
