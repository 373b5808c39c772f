"""lhotse's manifests: recordings (where the audio is) and supervisions (who says what, when), read without lhotse.

In: ``recordings.jsonl.gz`` with ``supervisions.jsonl.gz`` beside it, or pairs such as
``libri_recordings_dev-clean.jsonl.gz`` and ``libri_supervisions_dev-clean.jsonl.gz`` (then ``dev-clean`` is the
split). Out: the entries of ``manifest.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.sources.base import Tally, listed
from pipeline.sources.entries import Entry, json_rows, number_of, word_of
from shards.errors import UserError

_NAME = re.compile(r"^(?P<prefix>.*?)(?P<kind>recordings|supervisions)(?P<suffix>.*?)(?P<ending>\.jsonl(\.gz)?)$")
_WHOLE = 0.002  # s; a supervision that covers its recording but for this is all of it


def pairs_at(path: Path) -> list[tuple[Path, Path, str]]:
    """(recordings, supervisions, split) for ``path``, a folder or one of the two files; empty when it is neither."""
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
            raise UserError(f"'{file}' has no {other} manifest beside it: lhotse's two files belong together")
        pairs.append((recordings, supervisions, name["suffix"].strip("_-.")))
    return pairs


def entries(pair: tuple[Path, Path, str], tally: Tally) -> Iterator[Entry]:
    """One entry for each supervision, in their order; raises UserError for a line that is none."""
    recordings_file, supervisions_file, split = pair
    recordings = {word_of(row, ["id"], place): (row, place) for row, place in json_rows(recordings_file)}
    unused = dict.fromkeys(recordings)
    for row, place in json_rows(supervisions_file):
        recording_id = word_of(row, ["recording_id"], place)
        if not recording_id or "start" not in row or "duration" not in row:
            raise UserError(
                f"{place} is no supervision: it needs recording_id, start, duration, not {listed(list(row))}"
            )
        if recording_id not in recordings:
            tally.add("supervisions without a recording", word_of(row, ["id"], place))
            continue
        unused.pop(recording_id, None)
        yield _entry(row, place, split, *recordings[recording_id])
    for recording_id in unused:
        tally.add("recordings without a supervision", recording_id)


def _entry(row: dict[str, Any], place: str, split: str, recording: dict[str, Any], recording_place: str) -> Entry:
    start = number_of(row, "start", place) or 0.0
    duration = number_of(row, "duration", place)
    total = number_of(recording, "duration", recording_place)
    audio, channel = _audio(row, recording, recording_place)
    return Entry(
        audio=audio,
        text=word_of(row, ["text"], place),
        place=place,
        id=word_of(row, ["id"], place),
        speaker=word_of(row, ["speaker"], place),
        split=split,
        start=start,
        duration=duration,
        channel=channel,
        whole=start < _WHOLE and total is not None and duration is not None and abs(total - duration) < _WHOLE,
    )


def _audio(row: dict[str, Any], recording: dict[str, Any], place: str) -> tuple[str, int | None]:
    """The file that holds the supervision's channel, and the channel's place in it (None for a file of one channel)."""
    sources = recording.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{place} is no lhotse recording: it needs sources")
    wanted = row.get("channel", 0)
    wanted = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
    for source in sources:
        if source.get("type") != "file":
            raise UserError(f"{place} has audio of type {source.get('type')!r}: only files are read")
        channels = source.get("channels") or [0]
        if isinstance(wanted, list) or wanted in channels or len(sources) == 1:
            one = len(channels) == 1 or isinstance(wanted, list) or wanted not in channels
            return str(source["source"]), None if one else channels.index(wanted)
    raise UserError(f"{place} has no channel {wanted}: its sources and its supervisions do not fit")
