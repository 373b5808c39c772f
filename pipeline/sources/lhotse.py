"""Read lhotse manifests, recordings (audio files) and supervisions (segments with speaker and text), without lhotse.

Reads ``recordings.jsonl.gz`` and ``supervisions.jsonl.gz`` in the same folder, or pairs such as
``libri_recordings_dev-clean.jsonl.gz`` and ``libri_supervisions_dev-clean.jsonl.gz``, whose split is ``dev-clean``.
Yields entries for ``manifest.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.sources.base import ProblemLog, join_names
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
            file
            for file in sorted(path.iterdir())
            if (found := _NAME.match(file.name)) and found["kind"] == "recordings"
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
    recordings = {text_field(row, ["id"], location): (row, location) for row, location in json_rows(recordings_file)}
    unused = dict.fromkeys(recordings)
    for row, location in json_rows(supervisions_file):
        recording_id = text_field(row, ["recording_id"], location)
        if not recording_id or "start" not in row or "duration" not in row:
            raise UserError(
                f"{location} is not a supervision: expected recording_id, start and duration, got "
                f"{join_names(list(row))}"
            )
        if recording_id not in recordings:
            problem_log.add("supervisions without a recording", text_field(row, ["id"], location))
            continue
        unused.pop(recording_id, None)
        yield _entry(row, location, split, *recordings[recording_id])
    for recording_id in unused:
        problem_log.add("recordings without a supervision", recording_id)


def _entry(
    row: dict[str, Any], location: str, split: str, recording: dict[str, Any], recording_location: str
) -> ManifestEntry:
    start = number_field(row, "start", location) or 0.0
    duration = number_field(row, "duration", location)
    total = number_field(recording, "duration", recording_location)
    audio, channel = _audio(row, recording, recording_location)
    return ManifestEntry(
        audio=audio,
        text=text_field(row, ["text"], location),
        location=location,
        id=text_field(row, ["id"], location),
        speaker=text_field(row, ["speaker"], location),
        split=split,
        start=start,
        duration=duration,
        channel=channel,
        is_whole_file=start < _WHOLE_TOLERANCE
        and total is not None
        and duration is not None
        and abs(total - duration) < _WHOLE_TOLERANCE,
    )


def _audio(row: dict[str, Any], recording: dict[str, Any], location: str) -> tuple[str, int | None]:
    """Return the file with the supervision's channel, and the channel's index in it (None: use the whole file)."""
    sources = recording.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{location} is not a lhotse recording: it has no sources")
    wanted = row.get("channel", 0)
    wanted = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
    for source in sources:
        if source.get("type") != "file":
            raise UserError(f"{location} has audio of type {source.get('type')!r}: only type 'file' is supported")
        channels = source.get("channels") or [0]
        if isinstance(wanted, list) or wanted in channels or len(sources) == 1:
            all_channels = len(channels) == 1 or isinstance(wanted, list) or wanted not in channels
            return str(source["source"]), None if all_channels else channels.index(wanted)
    raise UserError(f"{location} has no channel {wanted}: its sources do not match its supervisions")
