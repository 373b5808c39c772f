"""Read a dataset from a hub: streamed from Hugging Face without a copy on disk, or downloaded from ModelScope.

Takes ``owner/name[@revision]``, a configuration and splits.

- Hugging Face: yields utterances with the URI ``split#row``. The library ``datasets`` downloads the rows and reads
  ``HF_ENDPOINT`` and ``HF_TOKEN``. Listing the utterances takes one pass over the stream and reading the audio another,
  because a plan needs the durations, which are only in the audio.
- ModelScope: ``parquet.py`` reads the parquet files that the library ``modelscope`` downloads to its cache. The library
  reads ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_CACHE`` and ``MODELSCOPE_API_TOKEN``.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.audio import AudioError
from pipeline.sources.base import Source, Utterance, require_splits, safe_name
from pipeline.sources.columns import Columns
from pipeline.sources.parquet import (
    NO_BYTES,
    ParquetFiles,
    audio_bytes,
    audio_column,
    check_columns,
    present_columns,
    split_name,
    to_utterance,
)
from pipeline.weights.hubs import check_reachable, one_sentence
from shards.errors import UserError

_PAGE_SIZE = 200  # files in one response of ModelScope


class HubStream(Source):
    """The source of kind ``parquet`` whose path is ``hf:owner/name``."""

    sequential = True
    hash_ahead = False

    def __init__(self, dataset: str, config_name: str | None, splits: Sequence[str], columns: Columns) -> None:
        super().__init__()
        self.name = _source_name(dataset, config_name, splits)
        self._dataset, _, revision = dataset.partition("@")
        self._config_name, self._revision = config_name, revision or None
        self._splits, self._columns = list(dict.fromkeys(splits)), columns
        self._streams: dict[str, Any] | None = None
        self._commit: str | None = None  # once opened; None if the hub does not tell it
        self._cursor: tuple[str, int, Iterator[dict[str, Any]]] | None = None  # split, next row, rows

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        streams = self._open()
        for split in self._splits or streams:
            rows = iter(streams[split])
            row, names = 0, dict[str, str]()
            while (record := self._next(rows)) is not None:
                if row == 0:
                    check_columns(self._columns, list(record), f"hf:{self._dataset}")
                    names = present_columns(self._columns, list(record))
                yield to_utterance(record, names, f"{split}#{row}", split, self._problem_log)
                row += 1

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        """See :meth:`Source.read`. URIs in stream order take one pass across calls; going back restarts the stream."""
        for uri in uris:
            split, _, row = uri.rpartition("#")
            try:
                yield uri, self._read(split, int(row))
            except (AudioError, UserError, ValueError) as error:
                self._cursor = None
                yield uri, error

    def tokens(self, uris: Sequence[str]) -> list[str]:
        """See :meth:`Source.tokens`. A token names the commit of the dataset, and what selects the bytes in it."""
        self._open()
        if self._commit is None:
            return [""] * len(uris)
        column = audio_column(self._columns)
        return [f"{self._dataset}@{self._commit} {self._config_name or ''} {column}"] * len(uris)

    def _read(self, split: str, row: int) -> bytes:
        streams = self._open()
        if split not in streams:
            raise AudioError(f"no split {split} in the dataset")
        if self._cursor is None or self._cursor[0] != split or self._cursor[1] > row:
            self._cursor = (split, row, iter(streams[split].skip(row)))
        _, next_row, rows = self._cursor
        record: dict[str, Any] | None = None
        while next_row <= row:
            record = self._next(rows)
            if record is None:
                raise AudioError(f"no row {row} in the stream")
            next_row += 1
        self._cursor = (split, next_row, rows)
        data = audio_bytes(record[audio_column(self._columns)]) if record is not None else None
        if data is None:
            raise AudioError(NO_BYTES)
        return data

    def _next(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        except Exception as error:  # the network, the hub's client and the parquet reader raise many types
            raise UserError(
                f"reading hf:{self._dataset} failed ({one_sentence(error)}): run the same command again"
            ) from error

    def _open(self) -> dict[str, Any]:
        """Return one ``IterableDataset`` per split, with encoded audio."""
        if self._streams is None:
            import datasets

            self._commit = _commit_hash(self._dataset, self._revision)
            revision = self._commit or self._revision
            try:
                streams = datasets.load_dataset(self._dataset, self._config_name, revision=revision, streaming=True)
            except Exception as error:  # the hub's client and datasets raise many types
                raise UserError(
                    f"cannot open the dataset hf:{self._dataset}"
                    f"{f' ({self._config_name})' if self._config_name else ''}: {one_sentence(error)}; "
                    "check source.path and source.config_name"
                ) from error
            require_splits(self._splits, streams, f"hf:{self._dataset}")
            audio = audio_column(self._columns)
            self._streams = {split: _without_decoding(stream, audio) for split, stream in streams.items()}
        return self._streams


def _commit_hash(dataset: str, revision: str | None) -> str | None:
    """Return the commit that ``revision`` names. None if the hub does not tell it: opening the dataset says why."""
    from huggingface_hub import HfApi

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    with suppress(Exception):  # the hub's client raises many types
        return HfApi().dataset_info(dataset, revision=revision).sha
    return None


def open_modelscope(dataset: str, config_name: str | None, splits: Sequence[str], columns: Columns) -> ParquetFiles:
    """Open the parquet files of a dataset on ModelScope, after downloading those that are not in the cache.

    Needs the hub even if all files are in the cache: only files that the hub lists are read, and the library compares
    each with the sha256 in the list, cached files every time a source is opened.

    Args:
        dataset: ``OWNER/NAME``, or ``OWNER/NAME@REVISION`` for a branch, tag or commit other than ``master``.
        config_name: Folder of the repository to read; None: the whole repository.
        splits: Splits to download and read; empty: all.
        columns: Names of the columns.

    Raises:
        UserError: The dataset or a split does not exist, there are no parquet files, or the download failed.
    """
    from modelscope import dataset_snapshot_download

    repo, _, revision = dataset.partition("@")
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    fix = "check the name, the revision, the network and the token"
    check_reachable(f"modelscope:{dataset}", endpoint, fix)
    try:
        paths = _list_parquet_files(repo, revision or "master", f"{config_name}/" if config_name else "")
        split_names = {path: split_name(Path(path), Path()) for path in paths}
        require_splits(splits, split_names.values(), f"modelscope:{dataset}")
        chosen = [path for path, split in split_names.items() if not splits or split in splits]
        if not chosen:
            raise UserError(f"no parquet files in modelscope:{dataset}: check source.path and source.config_name")
        patterns = [glob.escape(path) for path in chosen]
        folder = Path(dataset_snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:  # the library raises its own errors and those of requests and the system
        raise UserError(f"modelscope:{dataset} could not be downloaded: {one_sentence(error)}; {fix}") from None
    source = ParquetFiles(str(folder), splits, columns, [folder / path for path in chosen])
    source.name = _source_name(dataset, config_name, splits)
    return source


def _list_parquet_files(repo: str, revision: str, prefix: str) -> list[str]:
    """Return the sorted paths of the parquet files on ModelScope that start with ``prefix``.

    Raises:
        UserError: A path leads out of the repository; the library would write the file outside of its cache.
    """
    from modelscope.hub.api import HubApi

    api, paths, page = HubApi(), list[str](), 1
    while entries := api.get_dataset_files(repo, revision=revision, page_number=page, page_size=_PAGE_SIZE):
        paths += [entry["Path"] for entry in entries if entry["Type"] == "blob"]
        page += 1
    if outside := [path for path in paths if path.startswith("/") or ".." in PurePosixPath(path).parts]:
        raise UserError(f"modelscope:{repo} lists a file outside of the repository ({outside[0]!r}): do not use it")
    return sorted(path for path in paths if path.startswith(prefix) and PurePosixPath(path).suffix == ".parquet")


def _source_name(dataset: str, config_name: str | None, splits: Sequence[str]) -> str:
    name = dataset.partition("@")[0].rpartition("/")[2]
    return safe_name("-".join([name, *([config_name] if config_name else []), *splits]), "parquet")


def _without_decoding(stream: Any, audio: str) -> Any:
    """Return the stream with encoded audio; decoding in ``datasets`` needs torchcodec and FFmpeg."""
    datasets = sys.modules["datasets"]
    features = stream.features
    if features is not None and not isinstance(features.get(audio), datasets.Audio):
        return stream
    return stream.cast_column(audio, datasets.Audio(decode=False))
