"""Labels against features: which rows can be used, which feature each belongs to, and what two label sets differ in.

table in file order -> check_labels (join by key or id, count, drop doubled rows) -> enforce -> LabelSet -> join
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import UserError
from shards.labels.table import (
    SORT_COLUMNS,
    LabelSet,
    blocks,
    compare_neighbors,
    label_id,
    listed,
    normalise,
    sort_order,
)

Strings: TypeAlias = "pa.Array | pa.ChunkedArray"
EXAMPLES = 5


@dataclass(frozen=True)
class Problem:
    """A kind of row that cannot be used: how many there are, and the keys of the first ones."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelReport:
    """What :func:`check_labels` found.

    Attributes:
        table: the labels in canonical form. Of doubled rows, the first in file order. Rows of unknown keys are kept,
            because the cache may grow, except in a join by id.
        rows: number of rows that were checked.
        joined_by: the cache's column that the rows were joined by: ``key`` or ``id``.
        features: int64 [table rows], the cache's row of each row of the table; -1 if its key is unknown.
        unknown: rows whose key has no features.
        doubled: rows that agree with an earlier row in key, task and prompt, whether or not in other columns.
        empty: rows with a text that is empty or white space.
        unlabelled: features without any row. They are not errors.
    """

    table: pa.Table
    rows: int
    joined_by: str
    features: NDArray[np.int64]
    unknown: Problem = field(default=Problem())
    doubled: Problem = field(default=Problem())
    empty: Problem = field(default=Problem())
    unlabelled: Problem = field(default=Problem())

    @property
    def matched(self) -> int:
        """Number of features that have a row."""
        return len(np.unique(self.features[self.features >= 0]))

    def problems(self) -> tuple[str, ...]:
        """Return one phrase for each kind of problem that was found."""
        phrases = (
            (self.unknown, f"without features (their {self.joined_by} is not in the cache)", "row"),
            (self.doubled, "with the key, task and prompt of an earlier row", "row"),
            (self.empty, "with an empty text", "row"),
            (self.unlabelled, "without labels", "utterance"),
        )
        return tuple(
            f"{problem.count:,} {noun}{'s' * (problem.count != 1)} {phrase}: {listed(problem.examples, EXAMPLES)}"
            + ", …" * (problem.count > EXAMPLES)
            for problem, phrase, noun in phrases
            if problem.count
        )

    def join(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return what :func:`join` returns for the table and the keys of the cache, without looking them up again."""
        return _items(self.features)

    def label_set(self, name: str) -> LabelSet:
        """Return the checked labels as an opened set."""
        return LabelSet(self.table, label_id(self.table), name, self.problems())


def check_labels(table: pa.Table, keys: Strings, ids: Strings | Callable[[], Strings], where: str) -> LabelReport:
    """Join labels to the rows of a cache, bring them into canonical form and count the rows that cannot be used.

    Rows are joined by their column ``key``; by ``id`` if there is no ``key``; and by ``key`` as an id if no key, but
    every id, is known to the cache. A column ``id`` beside ``key`` is dropped: the cache has its own.

    Args:
        table: labels in file order.
        keys: the keys of the cache, unique.
        ids: the source's ids, in the same order, or what returns them if they are needed.
        where: the origin of the labels in messages.

    Raises:
        UserError: see :func:`~shards.labels.table.normalise`; or the labels are joined by ids that are not unique.
    """
    names = table.column_names
    by_id = "key" not in names and "id" in names
    if by_id:
        table = table.rename_columns(["key" if name == "id" else name for name in names])
    elif "id" in names:
        table = table.drop_columns(["id"])
    table = normalise(table, where)
    given, rows = table["key"], len(table)
    found = pc.index_in(given, value_set=_called(ids) if by_id else keys)
    if not by_id and rows and found.null_count == rows:
        as_id = pc.index_in(given, value_set=_called(ids))
        by_id = as_id.null_count == 0
        found = as_id if by_id else found
    known = found.is_valid()
    unknown = _problem(given, np.flatnonzero(~_numpy(known)))
    if by_id:
        if pc.count_distinct(_called(ids)).as_py() < len(keys):
            raise UserError(f"{where} is joined by id, but ids of the cache are not unique: write its keys into 'key'")
        if unknown.count:
            table, found = table.filter(known), found.filter(known)
        table = table.set_column(0, "key", _chunked(keys).take(found))
    labelled = np.zeros(len(keys), dtype=bool)
    labelled[_numpy(found.drop_null())] = True
    empty = Problem()
    if "text" in table.column_names:
        blank = pc.or_(pc.equal(table["text"], ""), pc.utf8_is_space(table["text"]))
        empty = _problem(table["key"], np.flatnonzero(_numpy(blank)))
    canonical, file_rows, doubled = _without_doubled(table)
    return LabelReport(
        table=canonical,
        rows=rows,
        joined_by="id" if by_id else "key",
        features=_numpy(found.fill_null(-1)).astype(np.int64)[file_rows],
        unknown=unknown,
        doubled=doubled,
        empty=empty,
        unlabelled=_problem(_chunked(keys), np.flatnonzero(~labelled)),
    )


def enforce(report: LabelReport, limit: float, where: str, setting: str) -> None:
    """Refuse labels with too many unusable rows: unknown, doubled or without a text.

    Args:
        limit: allowed number of such rows; below 1, their fraction of all rows.
        setting: the option or key that raises the limit, for the message.

    Raises:
        UserError: there are more, or no row has features.
    """
    bad = report.unknown.count + report.doubled.count + report.empty.count
    if report.rows and (report.features < 0).all():
        raise UserError(
            f"no row of {where} has features in the cache, by {report.joined_by} ({'; '.join(report.problems()[:1])}): "
            "pass labels of this corpus, with its keys or ids"
        )
    if bad > (limit * report.rows if limit < 1 else limit):
        raise UserError(
            f"{where} has {bad:,} unusable rows among {report.rows:,} ({'; '.join(report.problems())}): "
            f"correct them, or raise {setting} (now {limit:g})"
        )


def join(labels: pa.Table, keys: Strings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which label row belongs to which feature row: an inner join by key.

    Args:
        labels: table in canonical form.
        keys: the keys of the feature rows, unique.

    Returns:
        label rows and feature rows, both int64 [items], ordered by (feature row, label row).
    """
    return _items(_numpy(pc.index_in(labels["key"], value_set=keys).fill_null(-1)).astype(np.int64))


def differences(old: LabelSet, new: LabelSet) -> str:
    """Return in one phrase what ``new`` changes: values per column, rows and columns added or removed."""
    if old.id == new.id:
        return "no differences"
    known, given = _row_keys(old.table), _row_keys(new.table)
    found = pc.index_in(given, value_set=known)
    both = found.is_valid()
    before, after = found.drop_null(), pc.indices_nonzero(both)
    phrases = []
    for name in new.table.column_names:
        if name not in old.table.column_names:
            phrases.append(f"column '{name}' added")
        elif name not in SORT_COLUMNS:
            first, second = old.table[name].take(before), new.table[name].take(after)
            if first.type != second.type:
                phrases.append(f"column '{name}' changed from {first.type} to {second.type}")
                continue
            changed = pc.sum(pc.not_equal(first, second)).as_py() or 0
            if pa.types.is_floating(first.type):  # NaN differs from itself
                changed -= pc.sum(pc.and_(pc.is_nan(first), pc.is_nan(second))).as_py() or 0
            if changed:
                phrases.append(f"{changed:,} {name}{'s' * (changed != 1)} changed")
    phrases += [f"column '{name}' removed" for name in old.table.column_names if name not in new.table.column_names]
    for count, verb in ((len(given) - len(before), "added"), (len(known) - len(before), "removed")):
        if count:
            phrases.append(f"{count:,} row{'s' * (count != 1)} {verb}")
    return ", ".join(phrases)


def _row_keys(table: pa.Table) -> pa.ChunkedArray:
    """Return one string per row that (key, task, prompt) determine."""
    parts = [table[name] if name in table.column_names else pa.scalar("") for name in SORT_COLUMNS]
    return pc.binary_join_element_wise(*parts, "\0")


def _items(features: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    label_rows = np.flatnonzero(features >= 0)
    label_rows = label_rows[np.argsort(features[label_rows], kind="stable")]
    return label_rows, features[label_rows]


def _without_doubled(table: pa.Table) -> tuple[pa.Table, NDArray[np.int64], Problem]:
    """Return the canonical rows without those that repeat a (key, task, prompt), their rows in ``table``, and these."""
    order = sort_order(table)
    ordered = table
    if order is not None:
        ordered = pa.Table.from_batches([batch for block in blocks(table, order) for batch in block.to_batches()])
    file_rows = np.arange(len(table)) if order is None else order
    repeats = np.flatnonzero(compare_neighbors(ordered)[1]) + 1
    if not len(repeats):
        return ordered, file_rows, Problem()
    keep = np.ones(len(table), dtype=bool)
    keep[repeats] = False
    return ordered.filter(pa.array(keep)), file_rows[keep], _problem(table["key"], np.sort(file_rows[repeats]))


def _called(column: Strings | Callable[[], Strings]) -> Strings:
    return column() if callable(column) else column


def _problem(keys: pa.ChunkedArray, rows: NDArray[np.int64]) -> Problem:
    return Problem(len(rows), tuple(keys[int(row)].as_py() for row in rows[:EXAMPLES]))


def _numpy(column: Any) -> NDArray[Any]:
    array = column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    return np.asarray(array)


def _chunked(column: Strings) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
