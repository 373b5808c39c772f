"""Manifests, which list recordings and their transcripts: JSONL, CSV, TSV, NeMo's JSONL, or the file pair of lhotse.

A row has ``audio``, ``file``, ``wav`` or ``audio_filepath`` (NeMo), and ``text``; optional are ``duration`` and
``offset`` in seconds, ``channel`` or ``channel_selector`` (NeMo), ``speaker``, ``key`` or ``id``, and ``split``. A CSV
file is separated by commas or, as some spreadsheets write it, by semicolons; see ``shards/labels/rows.py`` for
quotation marks. ``columns`` maps other column names. For lhotse, the path is the folder, the recordings or the
supervisions (``lhotse.py``). Relative paths are relative to the manifest.

Other fields that would change the audio are refused (``_refuse_other_audio``).

The audio of a row is what NeMo loads: ``duration`` seconds from ``offset``. Without an ``offset`` it is the first
``duration`` seconds of the file, which is the whole file if that ends within 0.1 s; a ``duration`` of 0 or none means
the rest of the file. Audio that ends more than 0.1 s before that is a failure, where NeMo takes what there is.

The URI of an utterance is the path of its recording. A segment has ``#t=1.5,3.25`` (in seconds) appended, and ``&c=1``
for one channel; it is read as a WAV file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.audio import SAMPLING_RATE, TOLERANCE, AudioError, probe, read_segment
from pipeline.sources.base import Source, Utterance, is_mac_file, join_names, require_splits, safe_name
from pipeline.sources.columns import Columns
from pipeline.sources.entries import (
    ManifestEntry,
    channel_field,
    json_rows,
    number_field,
    open_manifest,
    text_field,
)
from pipeline.sources.presets import PRESETS, PresetName
from shards.errors import UserError
from shards.labels.rows import choose_delimiter, delimited_rows, text_lines
from shards.labels.text import text_value

DEFAULT_COLUMNS: Mapping[str, Sequence[str]] = {
    "audio": ("audio", "file", "wav", "audio_filepath"),
    "text": ("text",),
    "speaker": ("speaker",),
    "key": ("key", "id"),
    "split": ("split",),
    "offset": ("offset",),
    "duration": ("duration",),
}
NO_FILE = "recordings that do not exist (each becomes a failure)"
_NO_HEADER = "recordings with no readable header"
_SEGMENT = re.compile(r"#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)?(?:&c=(\d+))?$")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CHANNELS = ("channel", "channel_selector")
_STARTS = ("start", "start_time", "begin", "begin_time")
_ENDS = ("end", "end_time", "stop", "stop_time")
_OTHER_AUDIO = frozenset(("shard_id", "supervisions", "type", "transforms", *_STARTS, *_ENDS))
_CUTS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")
_TARRED = re.compile(r"_OP_\d+\.\.\d+_CL_")
_UNPACK = "unpack its tar files into the folder of the manifest and remove shard_id from the rows"


class Manifest(Source):
    """The source of kind ``manifest``."""

    def __init__(self, path: str, splits: Sequence[str], columns: Columns) -> None:
        super().__init__()
        self._path = Path(path).expanduser()
        if not self._path.exists():
            if _TARRED.search(path):
                raise UserError(f"source.path '{path}' names the shards of a NeMo tarred data set: {_UNPACK}")
            raise UserError(
                f"source.path '{path}' does not exist: set it to a .jsonl, .csv or .tsv file or a lhotse folder"
            )
        self.root = self._root = self._path if self._path.is_dir() else self._path.parent
        self.name = safe_name(self._path.resolve().name.split(".")[0], "manifest")
        self._splits = list(splits)
        self._columns, self._names = columns, columns.resolve(DEFAULT_COLUMNS)

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        seen: set[str] = set()
        for entry in self._entries():
            seen.add(entry.split)
            if not self._splits or entry.split in self._splits:
                yield self._utterance(entry)
        require_splits(self._splits, seen, f"'{self._path}'")

    def read_file(self, uri: str) -> bytes:
        path, fragment = self.file_of(uri)
        file = Path(path)
        if not file.is_file():
            raise AudioError("the file does not exist")
        segment = _SEGMENT.search(f"#{fragment}")
        if not segment:
            return file.read_bytes()
        start, stop, channel = segment.groups()
        return read_segment(
            file,
            float(start),
            float(stop) if stop else None,
            int(channel) if channel else None,
            self.max_hours,
        )

    def file_of(self, uri: str) -> tuple[str, str]:
        segment = _SEGMENT.search(uri) if "#" in uri else None
        if segment is None:
            return os.path.join(self._root, uri), ""
        return os.path.join(self._root, uri[: segment.start()]), segment[0][1:]

    def _entries(self) -> Iterator[ManifestEntry]:
        from pipeline.sources import lhotse

        pairs = lhotse.find_manifest_pairs(self._path)
        if pairs:
            if self._columns.mapped():
                raise UserError(
                    f"'{self._path}' contains lhotse manifests, whose fields have fixed names: remove source.columns"
                )
            for pair in pairs:
                yield from lhotse.read_entries(pair, self._problem_log)
            return
        name = self._path.name.lower()
        if self._path.is_dir():
            raise UserError(
                f"no lhotse manifests (recordings.jsonl.gz and supervisions.jsonl.gz) in the folder '{self._path}': "
                "set source.path to the manifest file"
            )
        if name.endswith(_JSON_SUFFIXES):
            self._columns.require((row for row, _ in json_rows(self._path)), str(self._path))
            rows = json_rows(self._path)
        elif self._path.suffix.lower() in _DELIMITERS:
            rows = _table_rows(self._path, _DELIMITERS[self._path.suffix.lower()], self._columns)
        else:
            raise UserError(
                f"the manifest '{self._path}' has an unknown suffix: rename it to .jsonl, .json, .csv or .tsv"
            )
        for row, location in rows:
            if not _OTHER_AUDIO.isdisjoint(row):
                _refuse_other_audio(row, location, self._columns)
            yield _entry(row, location, self._names)

    def _utterance(self, entry: ManifestEntry) -> Utterance:
        audio = self._relative(entry.audio)
        file = os.path.join(self._root, audio)
        samples = 0
        if not os.path.isfile(file):
            self._problem_log.add(NO_FILE, audio)
        elif entry.duration is not None:
            samples = round(entry.duration * SAMPLING_RATE)
            if entry.is_whole_file and probe(file) - samples > TOLERANCE * SAMPLING_RATE:
                return self._utterance(replace(entry, id=entry.id or _default_id(audio, entry), is_whole_file=False))
        else:
            samples = max(0, probe(file) - round(entry.start * SAMPLING_RATE))
            if not samples:
                self._problem_log.add(_NO_HEADER, audio)
        uri = audio if entry.is_whole_file else f"{audio}#t={_format_seconds(entry.start)},{_format_stop(entry)}"
        if entry.channel is not None:
            uri = (f"{audio}#t=0," if entry.is_whole_file else uri) + f"&c={entry.channel}"
        return Utterance(
            "", entry.id or _default_id(audio, entry), uri, entry.text, entry.speaker, entry.split, samples
        )

    def _relative(self, audio: str) -> str:
        """Make an absolute path below the root relative, so that the folder can be moved."""
        root = f"{self._root.absolute()}{os.sep}"
        return audio.removeprefix(root) if audio != root else audio


class TableFolder(Manifest):
    """A folder with one table per split, in the layout of a preset of kind ``manifest``."""

    def __init__(self, path: str, splits: Sequence[str], columns: Columns, preset: PresetName) -> None:
        super().__init__(path, splits, columns)
        tables = PRESETS[preset].tables
        assert tables is not None
        self._audio = tables.audio
        prefix, suffix = tables.name.split("{split}")
        files = sorted(file for file in self._path.glob(f"{prefix}*{suffix}") if not is_mac_file(file.name))
        if not files:
            raise UserError(
                f"no {prefix}*{suffix} in '{path}': set source.path to the folder that contains these files of preset "
                f"{preset}"
            )
        self._files = {file.name.removeprefix(prefix).removesuffix(suffix): file for file in files}
        require_splits(splits, self._files, f"'{path}'")
        self.name = safe_name(f"{preset}-{self._path.resolve().name}", "manifest")

    def _entries(self) -> Iterator[ManifestEntry]:
        for split in dict.fromkeys(self._splits):
            for row, location in _table_rows(self._files[split], "\t", self._columns):
                entry = _entry(row, location, self._names)
                name = PurePosixPath(entry.audio).stem
                yield replace(entry, audio=self._audio.format(audio=entry.audio), id=entry.id or name, split=split)


def _entry(row: dict[str, Any], location: str, names: Mapping[str, Sequence[str]]) -> ManifestEntry:
    """Check one row; ``names`` are the columns that may contain each field."""
    audio = text_field(row, names["audio"], location)
    if not audio:
        raise UserError(
            f"no audio in {location}, which has {join_names(list(row))}: add one of {', '.join(names['audio'])}"
        )
    text = names["text"][0]
    transcript = text_value(row.get(text), text, location)
    if transcript is None:
        raise UserError(
            f"no {text} in {location}, which has {join_names(list(row))}: every utterance needs a transcript"
        )
    start, duration = (
        number_field(row, column[0], location) if (column := names[field]) else None for field in ("offset", "duration")
    )
    channels = [channel_field(row, name, location) for name in _CHANNELS if name in row]
    return ManifestEntry(
        audio=audio,
        text=transcript,
        location=location,
        id=text_field(row, names["key"], location, is_name=True),
        speaker=text_field(row, names["speaker"], location, is_name=True),
        split=text_field(row, names["split"], location, is_name=True),
        start=start or 0.0,
        duration=duration or None,
        channel=next((channel for channel in channels if channel is not None), None),
        is_whole_file=start is None,
    )


def _refuse_other_audio(row: dict[str, Any], location: str, columns: Columns) -> None:
    """Refuse fields that would change the audio in a way that is not implemented; raises UserError."""
    if row.get("shard_id") is not None:
        raise UserError(f"{location} is of a NeMo tarred data set (it has a shard_id): {_UNPACK}")
    if isinstance(row.get("supervisions"), list) or str(row.get("type")) in _CUTS:
        raise UserError(
            f"{location} is a cut of lhotse: write recordings and supervisions with CutSet.decompose(output_dir=…) and "
            "set source.path to that folder"
        )
    if row.get("transforms"):
        raise UserError(f"{location} has transforms, which are not applied: save the transformed audio, and list that")
    for field, names in (("offset", _STARTS), ("duration", _ENDS)):
        known = columns.resolve(DEFAULT_COLUMNS)[field]
        if getattr(columns, field) is None and not any(row.get(name) not in (None, "") for name in known):
            name = next((name for name in names if row.get(name) not in (None, "")), None)
            if name is not None:
                raise UserError(
                    f"{location} has the field '{name}', which is not used to cut the recording: write the segment as "
                    f"offset and duration in seconds, or set source.columns.{field} to a column, or to '' to use whole "
                    "recordings"
                )


def _table_rows(path: Path, delimiter: str, columns: Columns) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row of a CSV or TSV file, by column name, and its location for messages; raises UserError."""
    where = f"'{path}'"
    with open_manifest(path) as file:
        lines = text_lines(file, where)
        first = next(lines, (1, ""))
        delimiter = choose_delimiter(first[1], delimiter)
        rows = delimited_rows(itertools.chain([first], lines), where, delimiter)
        names = next(rows, (1, []))[1]
        columns.require([names], str(path))
        fields = columns.resolve(DEFAULT_COLUMNS)
        audio, text = fields["audio"], fields["text"]
        if not set(text) & set(names) or not set(audio) & set(names):
            raise UserError(
                f"line 1 of '{path}' has the columns {join_names(list(names))}: expected {text[0]} and one of "
                f"{', '.join(audio)}, separated by {delimiter!r}; if they have other names, set source.columns"
            )
        doubled = [name for name in itertools.chain(*fields.values(), _CHANNELS) if names.count(name) > 1]
        if doubled:
            raise UserError(f"line 1 of {where} has more than one column '{doubled[0]}': rename or remove one")
        for number, row in rows:
            yield dict(zip(names, row, strict=True)), f"line {number} of {where}"


def _format_stop(entry: ManifestEntry) -> str:
    return "" if entry.duration is None else _format_seconds(entry.start + entry.duration)


def _format_seconds(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


_UNUSUAL_PATH = re.compile(r"^/|(^|/)\.{0,2}(/|$)")


def _default_id(audio: str, entry: ManifestEntry) -> str:
    """Return the path without its suffix; for a segment, start and end in milliseconds are appended."""
    if _UNUSUAL_PATH.search(audio):
        name = str(PurePosixPath(audio.lstrip("/")).with_suffix("")) if PurePosixPath(audio).name else audio
    else:  # the same, at a tenth of the time
        folder, slash, file = audio.rpartition("/")
        stem, _, suffix = file.rpartition(".")
        name = folder + slash + (stem if stem and suffix else file)
    if entry.is_whole_file:
        return name
    stop = "" if entry.duration is None else f"-{round(1000 * (entry.start + entry.duration))}"
    return f"{name}-{round(1000 * entry.start)}{stop}"
