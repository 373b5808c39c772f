"""Shared by all kinds of sources: the utterance, its key, the base class, and the log of problems.

A source of one kind (such as ``librispeech.py``) yields utterances with the corpus's own ``id`` and an empty ``key``.
``selection.py`` wraps it, creates the keys and applies the filters.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

MAX_KEY = 90
_TRUNCATED_LENGTH = 64
_HASH_DIGITS = 24
_ESCAPE = re.compile(rb"-x([0-9A-F]{2})-")
_LOOKALIKE = re.compile(
    rb"x[0-9A-F]{2}(-|[^A-Za-z0-9_])"
)  # text that would read as an escape after a dash; any illegal byte becomes a dash, too
_PLAIN_KEY = re.compile(rf"(?:[A-Za-z0-9_]|-(?!x[0-9A-F]{{2}}-)){{1,{MAX_KEY}}}")  # ids that are their own keys
_KEY_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


_FILE_TOKEN = re.compile(r"\d+:(-?\d+)(?: .*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording with its text.

    Attributes:
        key: Name in the cache, ``[A-Za-z0-9_-]{1,90}``, unique within a source.
        id: Name in the corpus, from which the key is made.
        audio: URI for :meth:`Source.read`, relative to the source's root.
        text: Transcript, unchanged.
        speaker: "" if unknown.
        split: "" if unknown.
        samples: Length at 16 kHz according to the header; 0 if unknown or unreadable.
    """

    key: str
    id: str
    audio: str
    text: str
    speaker: str = ""
    split: str = ""
    samples: int = 0


class ProblemLog:
    """Counts problems by kind and keeps the first ``max_listed`` names of each."""

    def __init__(self, max_listed: int = 5) -> None:
        self._max_listed = max_listed
        self._counts: dict[str, tuple[int, list[str]]] = {}

    def add(self, problem: str, name: str) -> None:
        """Count ``name`` under ``problem``, a plural noun phrase such as "transcript lines without audio"."""
        count, names = self._counts.get(problem, (0, []))
        self._counts[problem] = (count + 1, [*names, name] if len(names) < self._max_listed else names)

    def clear(self) -> None:
        """Remove all counts."""
        self._counts.clear()

    def sentences(self) -> list[str]:
        """Return one line per problem, in order of occurrence: ``3 transcript lines without audio: a, b, c``."""
        return [
            f"{count} {problem}: {', '.join(map(_printable, names))}{', …' if count > len(names) else ''}"
            for problem, (count, names) in self._counts.items()
        ]


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)


class Source(ABC):
    """A corpus: lists its utterances and reads their audio.

    Subclasses define :meth:`utterances` and either :meth:`read_file` or, if the order of reading matters, :meth:`read`.
    Those whose recordings are files also define :meth:`file_of`; others define :meth:`tokens`.

    Attributes:
        name: Part of the cache's folder name, ``[A-Za-z0-9_-]``.
        sequential: Whether reading out of order is expensive (archives, streams); a plan then keeps the source's order.
        root: Folder that URIs are relative to; None if there is none.
        version: What determines the audio besides the files, such as the synthesizer's version; "" if nothing does.
        speaker_split: Whether ``val_fraction`` splits by speaker; False: by utterance.
        hash_ahead: Whether recordings are hashed before the plan is made. False where reading them is expensive: their
            hashes become known when they are encoded.
        max_hours: Longest segment of a recording that :meth:`read` decodes.
    """

    name: str
    sequential: bool = False
    root: Path | None = None
    version: str = ""
    speaker_split: bool = True
    hash_ahead: bool = True
    max_hours: float = math.inf

    def __init__(self) -> None:
        self._problem_log = ProblemLog()

    @property
    def problems(self) -> list[str]:
        """Problems in the last pass over :meth:`utterances`, one line each with a count and the first few names."""
        return self._problem_log.sentences()

    @abstractmethod
    def utterances(self) -> Iterator[Utterance]:
        """Yield all utterances lazily, always in the same order."""

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        """Yield (uri, encoded audio file or the error that reading it raised) for each URI, in the given order."""
        from pipeline.audio import AudioError  # imports NumPy, which commands that read no audio do not need

        for uri in uris:
            try:
                data = self.read_file(uri)
            except (AudioError, OSError, ValueError) as error:  # ValueError: a NUL in the path
                yield uri, error
            else:
                yield uri, data

    def read_file(self, uri: str) -> bytes:
        """Return the encoded audio file of one URI. Raises :class:`~pipeline.audio.AudioError` or OSError."""
        raise NotImplementedError

    def file_of(self, uri: str) -> tuple[str, str] | None:
        """Return the path of the audio file of ``uri`` and the fragment that names the segment ("": the whole file).

        :meth:`read` yields the bytes of that file, or for a segment bytes that the file and the fragment determine.
        None: the bytes are inside a larger file or a stream, or are synthesized.
        """
        return None

    def tokens(self, uris: Sequence[str]) -> list[str]:
        """Return a short text for each URI that changes whenever its recording may have changed; "" if unknown.

        For a file this is its size and modification time, see :func:`file_tokens`. Reads no audio.
        """
        files = [self.file_of(uri) for uri in uris]
        return file_tokens(file[0] if file else "" for file in files)

    def validation_rows(self, keys: pa.ChunkedArray, speakers: pa.ChunkedArray) -> npt.NDArray[np.bool_] | None:
        """Return which utterances are in the validation split: bool [utterances]. None: keep the corpus's splits.

        Args:
            keys: Keys of all utterances, in source order.
            speakers: Their speakers.
        """
        return None


def file_tokens(paths: Iterable[str]) -> list[str]:
    """Return the token ``size:mtime`` (in nanoseconds) of each file; "" if it does not exist or is not a file."""
    tokens: dict[str, str] = {"": ""}
    for path in (listed := list(paths)):
        if path not in tokens:
            try:
                status = os.stat(path)
            except (OSError, ValueError):  # ValueError: a NUL in the path
                tokens[path] = ""
            else:
                tokens[path] = f"{status.st_size}:{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""
    return [tokens[path] for path in listed]


def token_mtime(token: str) -> int | None:
    """Return the modification time (nanoseconds) in a token of :func:`file_tokens`; None for other tokens."""
    found = _FILE_TOKEN.fullmatch(token)
    return int(found[1]) if found else None


def safe_name(text: str, default: str) -> str:
    """Replace each run of characters other than ``[A-Za-z0-9_-]`` in ``text`` with a dash, and cut at 80 characters.

    Returns ``default`` if nothing is left.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:80] or default


def is_mac_file(name: str) -> bool:
    """Return whether a relative path is one of the copies of metadata that macOS puts beside files and into archives.

    These are ``._name`` and the folder ``__MACOSX``.
    """
    return ("._" in name and any(part.startswith("._") for part in name.split("/"))) or "__MACOSX" in name.split("/")


def list_folder(folder: Path) -> list[Path]:
    """Return the sorted entries of a folder, without those of :func:`is_mac_file`.

    Raises:
        UserError: It cannot be listed. ``Path.glob`` would find nothing in a folder without permission.
    """
    try:
        return sorted(path for path in folder.iterdir() if not is_mac_file(path.name))
    except OSError as error:
        raise UserError(
            f"the folder '{folder}' cannot be listed ({error.strerror}): correct its permissions, or source.path"
        ) from None


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise errors of the file system as a UserError of one sentence; ``what`` was read."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        file = f" at '{error.filename}'" if isinstance(error, OSError) and error.filename else ""
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"{what} cannot be read ({reason}{file}): correct the path or its permissions") from error


def require_splits(wanted: Iterable[str], present: Iterable[str], location: str) -> None:
    """Raise UserError if a wanted split is missing; the message names the present ones."""
    found = set(present)
    missing = [split for split in wanted if split not in found]
    if missing:
        names = join_names(filter(None, found))
        raise UserError(f"no split {join_names(missing)} in {location}, which has {names}: set source.splits")


def join_names(names: Iterable[str]) -> str:
    """Join names for a message: sorted, separated by commas; "none" if there are none."""
    return ", ".join(sorted(names)) or "none"


def encode_key(identifier: str) -> str:
    """Return the key of an id: ``[A-Za-z0-9_-]{1,90}``, because a dot would split a WebDataset key.

    Different ids have different keys. A legal id that does not look like an escape is its own key. Each illegal byte
    (UTF-8) becomes ``-xHH-``. A dash before text that reads like an escape is escaped, too (``-x2D-``), so that
    :func:`decode_key` returns the id exactly. A key longer than 90 characters is cut to 64 and ends with 24 digits of
    the id's sha256; its id is then only in the ``id`` column.

    Raises:
        ValueError: The id is empty.
    """
    if not identifier:
        raise ValueError("expected a non-empty id")
    if _PLAIN_KEY.fullmatch(identifier):
        return identifier
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
    """Return the id that :func:`encode_key` made ``key`` from. Keys that were cut cannot be decoded."""
    raw = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), key.encode())
    return raw.decode("utf-8", "surrogatepass")
