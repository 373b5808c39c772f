"""What every kind of source shares: the utterance, its key, the base class, and the tally of what was odd on the way.

A kind (``librispeech.py`` …) yields utterances with the source's own ``id`` and an empty ``key``; ``selection.py``
wraps it, makes the keys and applies the filters.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError

MAX_KEY = 90
_TRUNCATED_LENGTH = 64
_HASH_DIGITS = 24
_ESCAPE = re.compile(rb"-x([0-9A-F]{2})-")
_LOOKALIKE = re.compile(rb"x[0-9A-F]{2}(-|[^A-Za-z0-9_])")  # what follows a dash: another byte becomes a dash, too
_KEY_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording with its text.

    Attributes:
        key: name in the cache, ``[A-Za-z0-9_-]{1,90}``, unique in a source.
        id: the source's own name, before it was rewritten to a key.
        audio: uri that the source's ``read`` understands, relative to its root.
        text: the transcript as the source has it.
        speaker: "" when unknown.
        split: "" when unknown.
        samples: length at 16 kHz from the header; 0 when unknown or unreadable.
    """

    key: str
    id: str
    audio: str
    text: str
    speaker: str = ""
    split: str = ""
    samples: int = 0


class ProblemLog:
    """Counts by kind of problem, with the first ``shown`` names of each."""

    def __init__(self, max_listed: int = 5) -> None:
        self._shown = max_listed
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, problem: str, name: str) -> None:
        """Count one ``name`` under ``problem``, a plural such as "transcript lines without audio"."""
        count, names = self._found.get(problem, (0, []))
        self._found[problem] = (count + 1, [*names, name] if len(names) < self._shown else names)

    def clear(self) -> None:
        self._found.clear()

    def sentences(self) -> list[str]:
        """``3 transcript lines without audio: a, b, c``, one for each problem, in the order first met."""
        return [
            f"{count} {problem}: {', '.join(names)}{', …' if count > len(names) else ''}"
            for problem, (count, names) in self._found.items()
        ]


class Source(ABC):
    """Where utterances come from.

    A kind defines :meth:`utterances` and either :meth:`read_file` or, where the order of reading matters, :meth:`read`.

    Attributes:
        name: part of the cache's folder name, ``[A-Za-z0-9_-]``.
        sequential: reading out of order is expensive (archives, streams): a plan keeps the source's order.
        root: the folder that uris are relative to; None when there is none.
        version: what else decides the bytes of the audio (the synthesiser's version); "" where the files do.
        speaker_split: ``val_fraction`` keeps a speaker on one side; False where each utterance stands for itself.
    """

    name: str
    sequential: bool = False
    root: Path | None = None
    version: str = ""
    speaker_split: bool = True

    def __init__(self) -> None:
        self._problem_log = ProblemLog()

    @property
    def problems(self) -> list[str]:
        """What was odd in the last pass over ``utterances``, a sentence each with a count and the first few names."""
        return self._problem_log.sentences()

    @abstractmethod
    def utterances(self) -> Iterator[Utterance]:
        """All utterances, lazily, in an order that never changes."""

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        """(uri, encoded audio file, or the error that reading it raised) for each uri, in the order given."""
        from pipeline.audio import AudioError  # imports NumPy: a command that reads no audio starts without it

        for uri in uris:
            try:
                data = self.read_file(uri)
            except (AudioError, OSError) as error:
                yield uri, error
            else:
                yield uri, data

    def read_file(self, uri: str) -> bytes:
        """The encoded audio file of one uri. Raises :class:`~pipeline.audio.AudioError` or OSError."""
        raise NotImplementedError


def safe_name(text: str, default: str) -> str:
    """``text`` with every run of other characters than ``[A-Za-z0-9_-]`` as one dash, at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:80] or default


def require_splits(wanted: Iterable[str], present: Iterable[str], where: str) -> None:
    """UserError if a split is not there; the message names those that are."""
    found = set(present)
    missing = [split for split in wanted if split not in found]
    if missing:
        names = join_names(filter(None, found))
        raise UserError(f"no split {join_names(missing)} in {where}, which holds {names}: set source.splits")


def join_names(names: Iterable[str]) -> str:
    """The names for a sentence: sorted, with commas, or "none"."""
    return ", ".join(sorted(names)) or "none"


def encode_key(identifier: str) -> str:
    """A key for the source's own id: ``[A-Za-z0-9_-]{1,90}``, because a dot would split a WebDataset key.

    Different ids have different keys.
    A legal id that does not look like an escape is its own key. Each byte (UTF-8) that a key may not hold becomes
    ``-xHH-``. A dash before what reads like an escape is escaped, too (``-x2D-``), so that :func:`decode_key` returns
    the id exactly. A key longer than 90 characters is cut to 64 and ends in 24 digits of the id's sha256; its id is in
    the ``id`` column only.

    Raises:
        ValueError: the id is empty.
    """
    if not identifier:
        raise ValueError("an empty id has no key")
    raw = identifier.encode("utf-8", "surrogatepass")
    key = "".join(
        f"-x{byte:02X}-"
        if byte not in _KEY_BYTES or (byte == ord("-") and _LOOKALIKE.match(raw, position + 1))
        else chr(byte)
        for position, byte in enumerate(raw)
    )
    if len(key) <= MAX_KEY:
        return key
    return f"{key[:_TRUNCATED_LENGTH]}-{hashlib.sha256(raw).hexdigest()[:_HASH_DIGITS]}"


def decode_key(key: str) -> str:
    """The id that :func:`encode_key` made ``key`` of (not for keys that had to be cut)."""
    raw = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), key.encode())
    return raw.decode("utf-8", "surrogatepass")
