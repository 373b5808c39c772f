"""LibriSpeech as published by OpenSLR: the unpacked folders, or the ``.tar.gz`` archives, read in a single pass.

Reads ``…/LibriSpeech`` (or its parent, or one split folder) with ``train-clean-100/19/198/19-198-0000.flac`` and
``19-198.trans.txt`` (lines ``19-198-0000 THE TEXT``); or an archive, or a folder of archives, with the same contents.
The URI of an utterance is ``train-clean-100/19/198/19-198-0000.flac``, or in an archive
``train-clean-100.tar.gz#LibriSpeech/train-clean-100/19/198/19-198-0000.flac``.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.audio import AudioError, probe
from pipeline.sources.archive import ARCHIVE_ERRORS, ArchiveReader
from pipeline.sources.base import (
    Source,
    Utterance,
    file_tokens,
    is_mac_file,
    list_folder,
    require_splits,
    safe_name,
)
from shards.errors import UserError
from shards.labels.text import text_value

_NO_AUDIO = "transcript lines without audio"
_NO_TEXT = "recordings without a transcript"
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$")


def open_librispeech(path: str, splits: Sequence[str]) -> Source:
    """Open the folders or the archives at ``path``.

    Args:
        path: The LibriSpeech folder, its parent, one split folder, an archive or a folder of archives.
        splits: Splits to read; empty: all.

    Raises:
        UserError: There are no folders and no archives, or a split is missing.
    """
    location = Path(path).expanduser()
    if not location.exists():
        raise UserError(f"source.path '{path}' does not exist: set it to the LibriSpeech folder or an archive")
    if location.is_file():
        if not _ARCHIVE.search(location.name):
            raise UserError(f"source.path '{path}' is not a LibriSpeech archive: set it to a .tar.gz file or a folder")
        return LibriSpeechArchives([location], splits)
    for root in (location, location / "LibriSpeech"):
        names = _split_folders(root)
        if names:
            return LibriSpeechFolders(root, _select_splits(splits, names, root))
    if _is_split(location):
        return LibriSpeechFolders(
            location.resolve().parent, _select_splits(splits, [location.resolve().name], location)
        )
    archives = {_stem(file): file for file in list_folder(location) if _ARCHIVE.search(file.name)}
    if archives:
        selected = _select_splits(splits, list(archives), location)
        return LibriSpeechArchives([archives[name] for name in selected], splits)
    raise UserError(
        f"no LibriSpeech splits and no .tar.gz archives in '{path}': set source.path to the folder that contains "
        "train-clean-100 …"
    )


class LibriSpeechFolders(Source):
    """The unpacked folders; ``root`` contains the split folders."""

    def __init__(self, root: Path, splits: Sequence[str]) -> None:
        super().__init__()
        self.name, self.root = _source_name(splits), root
        self._root, self._splits = root, splits

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        for split in self._splits:
            for speaker in _numbered_folders(self._root / split):
                for chapter in _numbered_folders(speaker):
                    yield from self._chapter(split, speaker.name, chapter)

    def _chapter(self, split: str, speaker: str, chapter: Path) -> Iterator[Utterance]:
        texts: dict[str, str] = {}
        files = list_folder(chapter)
        for file in (file for file in files if file.name.endswith(".trans.txt")):
            texts |= _parse_transcript(file.read_bytes(), str(file), texts)
        for audio in (file for file in files if file.name.endswith(".flac")):
            uri = audio.relative_to(self._root).as_posix()
            if audio.stem not in texts:
                self._problem_log.add(_NO_TEXT, uri)
                continue
            yield Utterance("", audio.stem, uri, texts.pop(audio.stem), speaker, split, probe(audio))
        for identifier in texts:
            self._problem_log.add(_NO_AUDIO, identifier)

    def read_file(self, uri: str) -> bytes:
        try:
            return (self._root / uri).read_bytes()
        except OSError as error:
            raise AudioError(f"cannot read the file: {error.strerror}") from None

    def file_of(self, uri: str) -> tuple[str, str]:
        return os.path.join(self._root, uri), ""


class LibriSpeechArchives(Source):
    """``.tar.gz`` files, each read in two passes: one to list the utterances, one to read the audio."""

    sequential = True

    def __init__(self, archives: Sequence[Path], splits: Sequence[str]) -> None:
        super().__init__()
        self.name = _source_name(splits or [_stem(file) for file in archives])
        self.root = self._root = archives[0].parent
        self._archives, self._splits = archives, splits
        self._cursor: ArchiveReader | None = None

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        found: set[str] = set()
        for archive in self._archives:
            try:
                yield from self._archive(archive, found)
            except ARCHIVE_ERRORS as error:
                if isinstance(error, OSError) and error.errno:  # of the file system, not of the content
                    raise
                raise UserError(
                    f"the archive '{archive}' is truncated or corrupt ({error}): download it again"
                ) from None
        require_splits(self._splits, found, f"'{self._root}'")

    def _archive(self, archive: Path, found: set[str]) -> Iterator[Utterance]:
        """Yield utterances in the order of their audio; a transcript may come before or after the audio."""
        pending: deque[Utterance] = deque()  # in archive order, until the text of the first one is read
        texts: dict[str, str] = {}
        with closing(ArchiveReader(archive)) as tar:
            for member in tar.members():
                name = PurePosixPath(member.name)
                if not member.isfile() or len(name.parts) < 4 or is_mac_file(member.name):
                    continue
                split, speaker = name.parts[-4], name.parts[-3]
                if name.name.endswith(".trans.txt") or name.suffix == ".flac":
                    found.add(split)
                    if self._splits and split not in self._splits:
                        continue
                if name.name.endswith(".trans.txt"):
                    texts |= _parse_transcript(tar.content(member), f"{archive}#{name}", texts)
                elif name.suffix == ".flac":
                    uri = f"{archive.name}#{name}"
                    pending.append(Utterance("", name.stem, uri, "", speaker, split, probe(tar.content(member))))
                while pending and pending[0].id in texts:
                    yield _with_text(pending.popleft(), texts)
        for utterance in pending:
            if utterance.id in texts:
                yield _with_text(utterance, texts)
            else:
                self._problem_log.add(_NO_TEXT, utterance.audio)
        for identifier in texts:
            self._problem_log.add(_NO_AUDIO, identifier)

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        start = 0
        while start < len(uris):
            archive = uris[start].partition("#")[0]
            stop = start
            while stop < len(uris) and uris[stop].partition("#")[0] == archive:
                stop += 1
            yield from self._read_archive(archive, uris[start:stop])
            start = stop

    def tokens(self, uris: Sequence[str]) -> list[str]:
        return file_tokens(os.path.join(self._root, uri.partition("#")[0]) for uri in uris)

    def _read_archive(self, archive: str, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        """Read ``uris`` of one archive in a single pass if they follow its order, continuing where the last call ended.

        Members that come before their turn are buffered.
        """
        buffered: dict[str, bytes] = {}
        wanted = Counter(uri.partition("#")[2] for uri in uris)
        for uri in uris:
            name = uri.partition("#")[2]
            try:
                from_start = False
                while name not in buffered:
                    if self._cursor is None or not self._cursor.may_reach(archive, name):
                        if from_start:
                            raise AudioError(f"no such file in the archive {archive}")
                        self._rewind(archive)
                        from_start = True
                    assert self._cursor is not None
                    for member, data in self._cursor.read_wanted(wanted):
                        buffered[member] = data
                        if member == name:
                            break
            except AudioError as error:
                self.close()
                yield uri, error
            except ARCHIVE_ERRORS as error:
                self.close()
                yield uri, AudioError(f"the archive {archive} is truncated or corrupt ({error})")
            else:
                yield uri, buffered[name]
                wanted[name] -= 1
                if not wanted[name]:
                    del buffered[name], wanted[name]

    def _rewind(self, archive: str) -> None:
        self.close()
        self._cursor = ArchiveReader(self._root / archive)

    def close(self) -> None:
        """Close the archive that is being read, if any."""
        if self._cursor is not None:
            self._cursor.close()
        self._cursor = None


def _with_text(utterance: Utterance, texts: dict[str, str]) -> Utterance:
    return replace(utterance, text=texts.pop(utterance.id))


def _parse_transcript(data: bytes, location: str, known: dict[str, str]) -> dict[str, str]:
    """Parse a .trans.txt file and return id -> text; an id that repeats, or is in ``known``, raises UserError."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"the transcript '{location}' is not UTF-8 ({error.reason}): download it again") from None
    texts: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        identifier, _, text = line.strip().partition(" ")
        if not identifier:
            continue
        if identifier in texts or identifier in known:
            raise UserError(
                f"duplicate key '{identifier}' in line {number} of '{location}': keep one of its transcript lines"
            )
        texts[identifier] = text_value(text.strip(), "the text", f"line {number} of '{location}'") or ""
    return texts


def _select_splits(wanted: Sequence[str], present: Sequence[str], location: Path) -> list[str]:
    require_splits(wanted, present, f"'{location}'")
    return list(dict.fromkeys(wanted)) or sorted(present)


def _split_folders(root: Path) -> list[str]:
    return [folder.name for folder in list_folder(root) if _is_split(folder)] if root.is_dir() else []


def _is_split(folder: Path) -> bool:
    """Return whether ``folder`` contains speaker folders with chapter folders, both named by numbers."""
    return any(_numbered_folders(speaker) for speaker in _numbered_folders(folder))


def _numbered_folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [folder for folder in list_folder(parent) if folder.name.isdigit() and folder.is_dir()]


def _stem(archive: Path) -> str:
    return _ARCHIVE.sub("", archive.name)


def _source_name(splits: Sequence[str]) -> str:
    name = safe_name("-".join(["librispeech", *splits]), "librispeech")
    return name if len(name) <= 48 else f"librispeech-{len(splits)}-splits"
