"""The label sets of a cache: ``labels/LABELS.json`` and one immutable parquet file for each set.

``LABELS.json`` is sealed JSON (``shards/format/records.py``) that lists the sets, oldest first. The newest set of a
name is the current one of that name. A file is written before the index names it. Functions of bytes and of
:class:`LabelIndex` serve folders and buckets alike; those of a folder expect that the caller holds a claim to write.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shards.errors import UserError, first_validation_error
from shards.files import (
    atomic_write,
    file_sha256,
    make_folder,
    open_file,
    rename_durably,
    temporary_path,
    translate_os_errors,
)
from shards.format.records import MAX_JSON, FileInfo, RecordError, seal, unseal_bytes
from shards.labels.files import read_bounded
from shards.labels.table import (
    MAX_COLUMNS,
    LabelSet,
    check_names,
    column_order,
    compare_neighbors,
    identify,
    label_id,
    listed,
    normalise,
    type_name,
    write_sorted,
)

FOLDER, INDEX = "labels", "LABELS.json"
VERSION = 2
SOURCE = "source"  # the name of the set that an extraction writes
IDENTIFIED = 64 << 20  # bytes of a file up to which opening it checks its id, too
FIX = "copy the labels folder again, or write the set again with `python -m shards label`"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_LINE = r"^[^\x00-\x1f\x7f]{0,2000}$"


class LabelFile(FileInfo):
    """The parquet file of a label set."""

    name: str


class LabelEntry(BaseModel):
    """One set in ``LABELS.json``. ``made`` is a time in ISO format; ``origin``, in JSON ``from``, is for people."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field(pattern=_NAME)
    id: str = Field(pattern="^[0-9a-f]{64}$")
    rows: int = Field(ge=0, le=1 << 40)
    columns: dict[str, Literal["string", "int64", "float64", "bool"]] = Field(max_length=MAX_COLUMNS)
    file: LabelFile
    made: str = Field(pattern=_LINE, max_length=40)
    origin: str = Field(pattern=_LINE, alias="from")

    @model_validator(mode="after")
    def _own_file_name(self) -> LabelEntry:
        if self.file.name not in file_names(self.name, self.id):
            raise ValueError(f"a set named '{self.name}' has no file {self.file.name[:80]!r}")
        return self


class LabelIndex(BaseModel):
    """The content of ``LABELS.json``: label sets, oldest first."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    schema_version: int = VERSION
    sets: tuple[LabelEntry, ...] = ()

    def current(self, name: str) -> LabelEntry | None:
        """Return the newest set of this name."""
        return next((entry for entry in reversed(self.sets) if entry.name == name), None)

    def names(self) -> list[str]:
        """Return the names of all sets, each once, oldest first."""
        return list(dict.fromkeys(entry.name for entry in self.sets))


def parse_index(data: bytes, where: str) -> LabelIndex:
    """Validate the bytes of ``LABELS.json``.

    Raises:
        UserError: they are corrupt, or of another format version.
    """
    try:
        tree: dict[str, Any] = unseal_bytes(data, INDEX)
    except RecordError as error:
        raise UserError(f"{where} is corrupt ({error}): {FIX}") from None
    version = tree.get("schema_version")
    if version != VERSION:
        raise UserError(
            f"{where} has format version {str(version)[:20]!r}, this earshard reads {VERSION}: update earshard"
        )
    try:
        index = LabelIndex.model_validate({**tree, "sets": tuple(tree.get("sets") or ())})
    except (ValidationError, TypeError) as error:
        reason = first_validation_error(error) if isinstance(error, ValidationError) else "sets is not a list"
        raise UserError(f"{where} is not a valid index of label sets: {reason}; {FIX}") from None
    for entry in index.sets:
        check_names(list(entry.columns), f"set '{entry.name}' in {where}")
        if "key" not in entry.columns:
            raise UserError(f"set '{entry.name}' in {where} has no column 'key': {FIX}")
    files = [entry.file.name for entry in index.sets]
    if len(set(files)) < len(files):
        raise UserError(f"{where} names one file for two label sets: {FIX}")
    return index


def with_set(index: LabelIndex, entry: LabelEntry) -> bytes:
    """Return the bytes of ``LABELS.json`` with ``entry`` as the newest; it replaces one of the same name and id."""
    sets = [old for old in index.sets if (old.name, old.id) != (entry.name, entry.id)]
    new = LabelIndex(sets=(*sets, entry))
    return seal(new.model_dump(mode="json", by_alias=True))


def new_entry(
    index: LabelIndex, name: str, table: pa.Table, origin: str, written: tuple[str, int, FileInfo]
) -> LabelEntry:
    """Return the entry of a set that ``write_sorted`` wrote. Its file name belongs to no other set of ``index``."""
    identity, rows, info = written
    taken = {entry.file.name for entry in index.sets if (entry.name, entry.id) != (name, identity)}
    file = next(file for file in file_names(name, identity) if file not in taken)
    return LabelEntry(
        name=name,
        id=identity,
        rows=rows,
        columns=_columns(table),
        file=LabelFile(name=file, bytes=info.bytes, sha256=info.sha256),
        made=_now(),
        **{"from": _printable(origin)},
    )


def file_names(name: str, identity: str) -> list[str]:
    """Return the names that the file of a set may have, in the order in which they are tried."""
    return [f"{name}-{identity[:digits]}.parquet" for digits in (8, 16, 64)]


def check_set_name(name: str, reserved: bool = False) -> None:
    """Raise UserError if ``name`` cannot name a label set. ``reserved`` allows the name that extraction writes."""
    if not re.fullmatch(_NAME[1:-1], name) or re.fullmatch("[0-9a-fA-F]{16,}", name):
        raise UserError(
            f"{name[:80]!r} cannot name a label set: use at most 64 letters, digits, '.', '_' and '-', "
            "and not 16 hex digits or more"
        )
    if name == SOURCE and not reserved:
        raise UserError(f"the name '{SOURCE}' belongs to the labels that `make extract` writes: choose another name")


def find(index: LabelIndex, reference: str, where: str = "the cache") -> LabelEntry:
    """Return the current set of a name, or the set with an id or a unique id prefix of at least 8 hex digits.

    Raises:
        UserError: there is none, or a prefix belongs to several.
    """
    current = index.current(reference)
    if current is not None:
        return current
    matches = {}
    if re.fullmatch("[0-9a-f]{8,64}", reference):
        matches = {entry.id: entry for entry in index.sets if entry.id.startswith(reference)}
    if len(matches) > 1:
        raise UserError(f"'{reference}' is the beginning of {len(matches)} label ids in {where}: give more digits")
    if not matches:
        raise UserError(
            f"{where} has no label set {reference[:200]!r}: choose one of {listed(index.names(), 20)}, or pass a file"
        )
    return matches.popitem()[1]


def read_index(folder: Path) -> LabelIndex:
    """Read the label sets of the cache ``folder``; empty if it has none. Raises UserError if the index is corrupt."""
    path = folder / FOLDER / INDEX
    try:
        with io.BufferedReader(open_file(path)) as file:
            data = file.read(MAX_JSON + 1)
    except (FileNotFoundError, NotADirectoryError):
        return LabelIndex()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): {FIX}") from None
    return parse_index(data, f"'{path}'")


def open_set(folder: Path, entry: LabelEntry) -> LabelSet:
    """Read and check one label set of the cache ``folder``.

    Raises:
        UserError: the file is absent, or differs from the index in size, hash, columns or rows, or, up to 64 MB, in its
            id or order.
    """
    path = folder / FOLDER / entry.file.name
    try:
        with io.BufferedReader(open_file(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.file.bytes or hashlib.file_digest(file, "sha256").hexdigest() != entry.file.sha256:
                raise UserError(f"'{path}' is not the file that {INDEX} describes (its size or sha256 differs): {FIX}")
            table = read_bounded(file, f"'{path}'")
    except OSError as error:
        raise UserError(f"label set '{entry.name}' cannot be read from '{path}' ({error.strerror}): {FIX}") from None
    found = {field.name: type_name(field.type) for field in table.schema}
    if list(found) != column_order(entry.columns) or found != entry.columns or len(table) != entry.rows:
        raise UserError(f"'{path}' has other rows or columns than {INDEX} says: {FIX}")
    if any(column.null_count for column in table.columns):
        raise UserError(f"'{path}' has null values: {FIX}")
    table = normalise(table, f"'{path}'")
    if size <= IDENTIFIED and not (compare_neighbors(table)[0].all() and label_id(table) == entry.id):
        raise UserError(f"'{path}' has rows in another order or another id than {INDEX} says: {FIX}")
    return LabelSet(table, entry.id, entry.name)


def add_set(folder: Path, table: pa.Table, name: str, origin: str, owner: str, *, reserved: bool = False) -> LabelEntry:
    """Add a label set to the cache ``folder``, or return the existing entry if it is the current one of its name.

    The caller holds a claim: there is no lock here. A crash leaves at most a file that the index does not name.

    Args:
        table: labels in any order, see :func:`~shards.labels.table.write_sorted`.
        origin: where the labels come from, for people.
        owner: owner tag of temporary files (``shards/files.py``).
        reserved: allow the name of the set that extraction writes.

    Raises:
        UserError: the name or the table is not valid, or the folder cannot be written.
    """
    check_set_name(name, reserved)
    table = normalise(table, f"label set '{name}'")
    index, labels = read_index(folder), folder / FOLDER
    current = index.current(name)
    alike = [e for e in index.sets if (e.name, e.rows, e.columns) == (name, len(table), _columns(table))]
    with translate_os_errors("writing labels", labels):
        identity = identify(table, f"label set '{name}'") if alike else ""
        known = next((e for e in alike if e.id == identity and _is_intact(labels / e.file.name, e.file)), None)
        if known is not None and known is current:
            return known
        make_folder(labels)
        if known is None:
            partial = temporary_path(labels / f"{name}.parquet", owner)
            try:
                entry = new_entry(index, name, table, origin, write_sorted(table, partial, f"label set '{name}'"))
                rename_durably(partial, labels / entry.file.name)
            finally:
                partial.unlink(missing_ok=True)
        else:  # an older set becomes the current one again
            entry = known.model_copy(update={"made": _now(), "origin": _printable(origin)})
        atomic_write(labels / INDEX, with_set(index, entry), owner)
    return entry


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:2000])


def _columns(table: pa.Table) -> dict[str, Any]:
    return {field.name: type_name(field.type) for field in table.schema}


def _is_intact(path: Path, info: FileInfo) -> bool:
    try:
        return path.stat().st_size == info.bytes and file_sha256(path) == info.sha256
    except OSError:
        return False
