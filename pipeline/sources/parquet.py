"""Parquet files in the layout of ``openslr/librispeech_asr`` and its mirrors, with the audio inside the rows.

Reads a file, a folder or a glob of parquet files. The columns are ``audio`` (``{bytes, path}`` or plain bytes) and
``text``; optional are ``id`` (default: the stem of the path in ``audio``, else of ``file``; where stems repeat, the
path without its suffix) and ``speaker_id``. ``columns`` maps other names. Columns of other types are refused when a
file is opened. The URI of an utterance is ``relative.parquet#row``. ``hub.py`` reads the same layout from a hub.
"""

from __future__ import annotations

import glob
import os
import re
from array import array
from collections.abc import Container, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from pipeline.audio import AudioError, probe
from pipeline.sources.base import (
    ProblemLog,
    Source,
    Utterance,
    file_tokens,
    is_mac_file,
    join_names,
    list_folder,
    require_splits,
    safe_name,
)
from pipeline.sources.columns import Columns
from shards.errors import UserError
from shards.labels.text import NAMES, check_text_type, is_binary, is_string, text_value

NO_AUDIO = "rows without audio bytes"
NO_BYTES = "no audio bytes in the row"
_USE_MANIFEST = "list the paths and texts in a manifest and set source.kind=manifest"
_WRITE_FILES = "write each recording into it as a WAV or FLAC file (in datasets: the feature Audio)"
PARQUET_ERRORS = (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError)
DEFAULT_COLUMNS = {"audio": ["audio"], "text": ["text"], "key": ["id"], "speaker": ["speaker_id"]}
_BATCH = 32  # rows read at a time while listing, because audio is large
_PATH_BATCH = 4096  # rows read at a time where only paths are read
_PART_SUFFIX = re.compile(r"-\d+-of-\d+$")


class ParquetFiles(Source):
    """Local parquet files. A call of :meth:`read` reads each row group that it needs once.

    Args:
        path: File, folder or glob.
        splits: Splits to read; empty: all.
        columns: Names of the columns.
        files: Files of the folder ``path`` to read; None: all.
    """

    def __init__(self, path: str, splits: Sequence[str], columns: Columns, files: Sequence[Path] | None = None) -> None:
        super().__init__()
        self._columns = columns
        root, files = _find_files(path) if files is None else (Path(path), files)
        by_split: dict[str, list[Path]] = {}
        for file in files:
            by_split.setdefault(split_name(file, root), []).append(file)
        require_splits(splits, by_split, f"'{path}'")
        chosen = list(dict.fromkeys(splits)) or sorted(by_split)
        self.root = self._root = root
        self.name = safe_name("-".join([safe_name(_stem(path), "parquet"), *splits]), "parquet")
        self._files = [(split, file) for split in chosen for file in by_split[split]]
        self._cached_column: tuple[tuple[str, int], Any] | None = None  # the last row group's audio column
        self._repeated: frozenset[int] | None = None  # hashes of stems that several recordings share

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        if self._repeated is None:
            self._repeated = self._repeated_stems()
        for split, file in self._files:
            uri = file.relative_to(self._root).as_posix()
            parquet = open_file(file, self._columns)
            names = present_columns(self._columns, parquet.schema_arrow.names)
            for row, record in enumerate(_records(parquet, list(dict.fromkeys(names.values())), file)):
                yield to_utterance(record, names, f"{uri}#{row}", split, self._problem_log, self._repeated)

    def _repeated_stems(self) -> frozenset[int]:
        """Return the hashes of the stems that name several recordings. Reads only the paths; keeps 8 bytes a row."""
        hashes = array("q")
        for _, file in self._files:
            parquet = open_file(file, self._columns)
            names = present_columns(self._columns, parquet.schema_arrow.names)
            audio = names["audio"]
            columns = [f"{audio}.path"] if _has_field(parquet.schema_arrow.field(audio).type, "path") else []
            columns += [names["file"]] if "file" in names else []
            if "key" in names or not columns:
                continue
            for record in _records(parquet, columns, file, _PATH_BATCH):
                path = (record.get(audio) or {}).get("path") or record.get(names.get("file", ""))
                if path:
                    hashes.append(hash(PurePosixPath(str(path)).stem))
        values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
        return frozenset(values[counts > 1].tolist())

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        locations: dict[str, tuple[str, int, int]] = {}  # URI -> file, row group, row in the group
        groups: dict[tuple[str, int], list[str]] = {}
        failed: dict[str, Exception] = {}
        starts: dict[str, list[int]] = {}
        for uri in uris:
            name, _, row = uri.rpartition("#")
            try:
                if name not in starts:
                    starts[name] = _group_starts(open_file(self._root / name, self._columns))
                if not row.isdigit() or int(row) >= starts[name][-1]:
                    raise AudioError(f"no row {row} in {name}")
                group = next(g for g in range(len(starts[name])) if int(row) < starts[name][g + 1])
                locations[uri] = (name, group, int(row) - starts[name][group])
                groups.setdefault((name, group), []).append(uri)
            except (AudioError, UserError, OSError) as error:
                failed[uri] = error
        ready: dict[str, bytes | Exception] = {}
        for uri in uris:
            if uri in failed:
                yield uri, failed[uri]
                continue
            if uri not in ready:
                name, group, _ = locations[uri]
                try:
                    column = self._row_group(name, group)
                    for other in dict.fromkeys(groups[name, group]):
                        ready[other] = audio_bytes(column[locations[other][2]].as_py()) or AudioError(NO_BYTES)
                except (*PARQUET_ERRORS, UserError) as error:
                    reason = AudioError(f"cannot read row group {group} of {name}: {first_line(error)}")
                    ready |= dict.fromkeys(groups[name, group], reason)
            groups[locations[uri][:2]].remove(uri)
            is_repeated = uri in groups[locations[uri][:2]]
            yield uri, ready[uri] if is_repeated else ready.pop(uri)

    def tokens(self, uris: Sequence[str]) -> list[str]:
        """See :meth:`Source.tokens`. The column that contains the recordings is part of a token."""
        tokens = file_tokens(os.path.join(self._root, uri.rpartition("#")[0]) for uri in uris)
        column = audio_column(self._columns)
        return [token and f"{token} {column}" for token in tokens]

    def _row_group(self, name: str, group: int) -> Any:
        if self._cached_column is None or self._cached_column[0] != (name, group):
            self._cached_column = None  # freed first, so that only one column is in memory
            audio = audio_column(self._columns)
            table = open_file(self._root / name, self._columns).read_row_group(group, columns=[audio])
            self._cached_column = ((name, group), table.column(audio))
        return self._cached_column[1]


def open_file(file: Path, columns: Columns) -> Any:
    """Open a ``pyarrow.parquet.ParquetFile``; raises UserError if it is unreadable or lacks a required column."""
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        schema = parquet.schema_arrow
        names = schema.names
    except PARQUET_ERRORS as error:
        raise UserError(f"'{file}' cannot be read as parquet ({first_line(error)}): download it again") from None
    check_columns(columns, names, str(file))
    for field, column in present_columns(columns, names).items():
        kind = schema.field(column).type
        if field == "audio":
            _check_audio_type(kind, column, str(file))
            if _has_field(kind, "path") and _has_no_bytes(parquet.metadata, f"{column}.bytes"):
                raise UserError(f"column '{column}' of '{file}' has paths but no bytes: {_USE_MANIFEST}")
        elif field != "file":
            check_text_type(kind, column, f"'{file}'", is_name=field in NAMES)
    return parquet


def _records(parquet: Any, columns: list[str], file: Path, batch_size: int = _BATCH) -> Iterator[dict[str, Any]]:
    """Yield the rows of an open file; raises UserError."""
    row = 0
    try:
        for batch in parquet.iter_batches(batch_size=batch_size, columns=columns):
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError:
                raise _not_utf8(batch, row, file) from None
            yield from records
            row += len(records)
    except PARQUET_ERRORS as error:
        raise UserError(
            f"'{file}' cannot be read as parquet after row {row} ({first_line(error)}): download it again"
        ) from None


def _not_utf8(batch: Any, first_row: int, file: Path) -> UserError:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for row, value in enumerate(column, first_row):
            try:
                value.as_py()
            except UnicodeDecodeError:
                return UserError(f"column '{name}' of '{file}' is not UTF-8 in row {row}: correct or convert it")
    return UserError(f"'{file}' has text that is not UTF-8: correct or convert it")


def _check_audio_type(kind: Any, column: str, location: str) -> None:
    """Raise UserError unless a column of this type contains encoded recordings."""

    data = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if _has_field(kind, "bytes"):
        data = kind.field("bytes").type
    if is_binary(data) or pyarrow.types.is_null(kind):
        return
    mend = _USE_MANIFEST if is_string(data) or _has_field(kind, "path") else _WRITE_FILES
    raise UserError(
        f"column '{column}' of '{location}' has values of type {kind!s:.100}, expected the bytes of audio files: "
        f"{mend}, or set source.columns.audio to another column"
    )


def _has_field(kind: Any, name: str) -> bool:

    return bool(pyarrow.types.is_struct(kind)) and kind.get_field_index(name) >= 0


def _has_no_bytes(metadata: Any, path: str) -> bool:
    """Return whether the statistics of a file say that the column ``path`` is null in all of its rows."""
    rows = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == path:
                statistics = column.statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count < group.num_rows:
                    return False
                rows += group.num_rows
    return rows > 0


def check_columns(columns: Columns, names: Sequence[str], location: str) -> None:
    """Raise UserError unless ``names`` include audio, text and all mapped columns."""
    columns.require([names], location)
    for column in present_columns(columns, names).values():
        if list(names).count(column) > 1:
            raise UserError(f"'{location}' has more than one column '{column}': rename or remove one")
    present = present_columns(columns, names)
    missing = [field for field in ("audio", "text") if field not in present]
    if missing:
        raise UserError(
            f"no column {join_names(missing)} in '{location}', which has {join_names(names)}: expected audio and text; "
            f"if they have other names, set source.columns, such as source.columns.{missing[0]}=…"
        )


def present_columns(columns: Columns, names: Sequence[str]) -> dict[str, str]:
    """Map each field, and ``file``, to its column; fields whose column is not in ``names`` are left out."""
    candidates = {**columns.resolve(DEFAULT_COLUMNS), "file": ["file"]}
    return {field: column for field, possible in candidates.items() for column in possible if column in names}


def audio_column(columns: Columns) -> str:
    """Return the name of the column that contains the recordings."""
    return columns.audio or DEFAULT_COLUMNS["audio"][0]


def to_utterance(
    record: dict[str, Any],
    columns: dict[str, str],
    uri: str,
    split: str,
    problem_log: ProblemLog,
    repeated: Container[int] = (),
) -> Utterance:
    """Convert one row to an utterance; count it in ``problem_log`` if it has no audio.

    Args:
        record: The row, by column.
        columns: Column of each field, from :func:`present_columns`.
        uri: URI of the utterance.
        split: Split of the utterance.
        problem_log: Log of rows without audio.
        repeated: Hashes of the stems that name several recordings.

    Raises:
        UserError: The audio column does not contain bytes, or a text column no text.
    """
    record = {field: record[column] for field, column in columns.items()}
    audio, where = record["audio"], f"'{uri}'"
    data, name = audio_bytes(audio), audio.get("path") if isinstance(audio, dict) else None
    identifier, speaker = (
        text_value(record.get(field), columns.get(field, field), where, is_name=True) for field in ("key", "speaker")
    )
    if identifier is None:
        path = text_value(name or record.get("file"), "the path of the recording", where)
        identifier = _default_id(path, repeated) if path else uri
    if not data:
        problem_log.add(NO_AUDIO, uri)
    return Utterance(
        key="",
        id=identifier,
        audio=uri,
        text=text_value(record["text"], columns["text"], where) or "",
        speaker=speaker or "",
        split=split,
        samples=probe(data) if data else 0,
    )


def _default_id(path: str, repeated: Container[int]) -> str:
    """Return the stem of a path; its folders, too, if several recordings have that stem."""
    file = PurePosixPath(path)
    return file.stem if hash(file.stem) not in repeated else str(file.with_suffix("")).lstrip("/")


def first_line(error: Exception) -> str:
    """Return the first line of the message of ``error``, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def audio_bytes(audio: Any) -> bytes | None:
    """Return the encoded file in a row's ``audio``, which is ``{bytes, path}`` or plain bytes; None if it is empty.

    Raises:
        UserError: It is something else, such as the path of a file.
    """
    data = audio.get("bytes") if isinstance(audio, dict) else audio
    if data is not None and not isinstance(data, bytes):
        raise UserError(
            f"the audio column of the parquet files contains {type(data).__name__} ({str(data)[:60]!r}), expected the "
            "bytes of recordings: set source.columns.audio to the column that contains them, or list the files in a "
            "manifest"
        )
    return data or None


def _group_starts(parquet: Any) -> list[int]:
    """Return the first row of each row group, followed by the total number of rows."""
    starts = [0]
    for group in range(parquet.metadata.num_row_groups):
        starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
    return starts


def _find_files(path: str) -> tuple[Path, list[Path]]:
    """Return the folder that URIs are relative to, and the sorted files."""
    location = Path(path).expanduser()
    if location.is_file():
        return location.parent, [location]
    if location.is_dir():
        root, files = location, sorted(_parquet_files(location))
    else:
        found = (Path(name) for name in sorted(glob.glob(str(location), recursive=True)) if not is_mac_file(name))
        files = [file for file in found if file.is_file()]
        plain = [part for part in location.parts if not glob.has_magic(part)]
        root = Path(*location.parts[: next(i for i, part in enumerate([*location.parts, "*"]) if part not in plain)])
    if not files:
        raise UserError(
            f"no parquet files at '{path}': set source.path to a .parquet file, a folder, a glob or hf:OWNER/NAME"
        )
    return root, files


def _parquet_files(folder: Path) -> Iterator[Path]:
    """Yield the parquet files below a folder; raises UserError for a folder that cannot be listed."""
    for path in list_folder(folder):
        if path.suffix == ".parquet":
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _parquet_files(path)


def split_name(file: Path, root: Path) -> str:
    """Return the split, ``train`` for ``train-00000-of-00014.parquet``, ``train/0000.parquet`` or ``train.parquet``."""
    name = _PART_SUFFIX.sub("", file.stem)
    inside = file.relative_to(root).parts
    return inside[-2] if name.isdigit() and len(inside) > 1 else name


def _stem(path: str) -> str:
    stem = Path(path).expanduser().resolve().stem
    return "parquet" if glob.has_magic(stem) else _PART_SUFFIX.sub("", stem)
