"""Read lhotse manifests, recordings (audio files) and supervisions (segments with speaker and text), without lhotse.

Reads ``recordings.jsonl.gz`` and ``supervisions.jsonl.gz`` in the same folder, or pairs such as
``libri_recordings_dev-clean.jsonl.gz`` and ``libri_supervisions_dev-clean.jsonl.gz``, whose split is ``dev-clean``.
Yields entries for ``manifest.py``.

A supervision is a segment of one channel of its recording, or of all channels of a file, whose mean is taken. What
lhotse would compute is refused: ``transforms``, a choice of several channels, and sources other than files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.sources.base import ProblemLog, join_names, list_folder
from pipeline.sources.entries import ManifestEntry, json_rows, number_field, text_field
from shards.errors import UserError

_NAME = re.compile(r"^(?P<prefix>.*?)(?P<kind>recordings|supervisions)(?P<suffix>.*?)(?P<ending>\.jsonl(\.gz)?)$")
_WHOLE_TOLERANCE = 0.002  # seconds; a supervision that covers its recording up to this is the whole file


def find_manifest_pairs(path: Path) -> list[tuple[Path, Path, str]]:
    """Return (recordings, supervisions, split) of each pair of manifests.

    Args:
        path: A folder, or one of the two files. Other files have no pairs.

    Raises:
        UserError: One file of a pair is missing.
    """
    if path.is_dir():
        files = [
            file for file in list_folder(path) if (found := _NAME.match(file.name)) and found["kind"] == "recordings"
        ]
    else:
        files = [path] if _NAME.match(path.name) else []
    pairs = []
    for file in files:
        name = _NAME.match(file.name)
        assert name is not None
        both = {
            kind: next(
                (
                    candidate
                    for ending in (name["ending"], ".jsonl.gz", ".jsonl")
                    if (candidate := file.with_name(f"{name['prefix']}{kind}{name['suffix']}{ending}")).is_file()
                ),
                None,
            )
            for kind in ("recordings", "supervisions")
        }
        recordings, supervisions = both["recordings"], both["supervisions"]
        if recordings is None or supervisions is None:
            other = "supervisions" if supervisions is None else "recordings"
            raise UserError(f"'{file}' has no {other} manifest in the same folder: copy both files of lhotse there")
        pairs.append((recordings, supervisions, name["suffix"].strip("_-.")))
    return pairs


def read_entries(pair: tuple[Path, Path, str], problem_log: ProblemLog) -> Iterator[ManifestEntry]:
    """Yield one entry per supervision, in file order; raises UserError for an invalid line."""
    recordings_file, supervisions_file, split = pair
    recordings = _read_recordings(recordings_file)
    unused = dict.fromkeys(recordings)
    for row, location in json_rows(supervisions_file):
        recording_id = text_field(row, ["recording_id"], location, is_name=True)
        start, duration = (number_field(row, name, location) for name in ("start", "duration"))
        if not recording_id or start is None or duration is None:
            raise UserError(
                f"{location} is not a supervision: expected recording_id, start and duration, got "
                f"{join_names(list(row))}"
            )
        if recording_id not in recordings:
            problem_log.add("supervisions without a recording", text_field(row, ["id"], location, is_name=True))
            continue
        unused.pop(recording_id, None)
        recording, recording_location = recordings[recording_id]
        total = number_field(recording, "duration", recording_location)
        audio, channel = _audio(row, location, recording, recording_location)
        yield ManifestEntry(
            audio=audio,
            text=text_field(row, ["text"], location),
            location=location,
            id=text_field(row, ["id"], location, is_name=True),
            speaker=text_field(row, ["speaker"], location, is_name=True),
            split=split,
            start=start,
            duration=duration,
            channel=channel,
            is_whole_file=start < _WHOLE_TOLERANCE and total is not None and abs(total - duration) < _WHOLE_TOLERANCE,
        )
    for recording_id in unused:
        problem_log.add("recordings without a supervision", recording_id)


def _read_recordings(file: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Return each recording and its location, by id; raises UserError."""
    recordings: dict[str, tuple[dict[str, Any], str]] = {}
    for row, location in json_rows(file):
        identifier = text_field(row, ["id"], location, is_name=True)
        if identifier in recordings:
            raise UserError(
                f"{location} has the id '{identifier}', as has {recordings[identifier][1]}: give each recording its "
                "own id, or remove one"
            )
        if transforms := row.get("transforms"):
            names = [str(each.get("name")) if isinstance(each, dict) else str(each) for each in _as_list(transforms)]
            raise UserError(
                f"recording '{identifier}' in {location} has the transforms {', '.join(names):.200}, which are not "
                "applied: save the transformed audio with lhotse (CutSet.save_audios), or remove the recording"
            )
        recordings[identifier] = (row, location)
    return recordings


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _audio(
    row: dict[str, Any], location: str, recording: dict[str, Any], recording_location: str
) -> tuple[str, int | None]:
    """Return the file with the supervision's channel, and the channel's index in it (None: use the whole file)."""
    sources = recording.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{recording_location} is not a lhotse recording: it has no sources")
    wanted = _channels(row.get("channel"), location)
    for source in sources:
        if source.get("type") != "file":
            raise UserError(
                f"{recording_location} has audio of type {source.get('type')!r:.80}: only type 'file' is supported"
            )
        channels = _channels(source.get("channels"), recording_location)
        if set(wanted) <= set(channels):
            if 1 < len(wanted) < len(channels):
                raise UserError(
                    f"{location} names {len(wanted)} of {len(channels)} channels: choose one channel, or all"
                )
            audio = text_field(source, ["source"], recording_location)
            if not audio:
                raise UserError(f"{recording_location} has a source without a file: correct it")
            return audio, None if len(wanted) == len(channels) else channels.index(wanted[0])
    raise UserError(
        f"{location} has the channels {wanted}, which no file of its recording ({recording_location}) has: correct its "
        "channel"
    )


def _channels(value: Any, location: str) -> list[int]:
    """Return a supervision's or a file's channels; the default of lhotse is channel 0."""
    channels = [0] if value is None or value == [] else _as_list(value)
    if not all(isinstance(channel, int) and not isinstance(channel, bool) for channel in channels):
        raise UserError(f"the channels {value!r:.80} in {location} are not integers: correct them")
    return list(dict.fromkeys(channels))
