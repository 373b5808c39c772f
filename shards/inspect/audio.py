"""Compares the audio files that a cache was made from with the sha256 recorded in its manifest.

    python -m shards verify CACHE --source /data/LibriSpeech

Takes a complete cache and the audio folder (by default the recorded one); returns a :class:`Problem` for every
utterance whose file is missing or has a different sha256. Only plain files can be compared. Audio inside archives or
parquet files, segments and synthetic audio need the reader of their source: ``python -m pipeline check CACHE`` reads
them and compares features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import file_sha256
from shards.inspect.findings import Problem, ProgressCallback
from shards.read.cache import Cache

PLAIN_FILE_SOURCES = ("librispeech", "manifest")  # source kinds whose URIs are paths relative to their root


def compare_audio(
    path: str | Path, folder: Path | None = None, progress: ProgressCallback | None = None
) -> list[Problem]:
    """Find the utterances of the cache at ``path`` whose audio file is missing or has changed.

    Args:
        folder: the audio folder; ``None`` uses the folder recorded in the cache.
        progress: called with (utterances done, total utterances).

    Raises:
        UserError: the cache is corrupt, its audio is not stored as plain files, or the folder does not exist.
    """
    cache = Cache.open(path)
    kind, root = _recorded_source(cache.info)
    uris = cache.manifest["audio"].to_pylist()
    folder = folder if folder is not None else Path(root) if root else None
    if kind not in (None, *PLAIN_FILE_SOURCES) or (
        folder and any("#" in uri and not (folder / uri).exists() for uri in uris)
    ):
        raise UserError(
            f"the audio of '{path}' is not stored as plain files: encode a sample of it again with "
            f"`python -m pipeline check {path}`"
        )
    if folder is None:
        raise UserError(f"'{path}' does not record its audio folder: pass the folder to --source")
    if not folder.is_dir():
        raise UserError(f"audio folder '{folder}' of '{path}' does not exist: pass the folder to --source")
    problems = []
    columns = [cache.manifest[name].to_pylist() for name in ("shard", "key", "audio_sha256")]
    for done, (uri, shard, key, wanted) in enumerate(zip(uris, *columns, strict=True), 1):
        try:
            found = file_sha256(folder / uri)
        except FileNotFoundError:
            problems.append(Problem(shard, uri, key, f"is missing in '{folder}'"))
        except (OSError, ValueError) as error:  # ValueError: a NUL in a path
            problems.append(Problem(shard, uri, key, f"cannot be read: {getattr(error, 'strerror', None) or error}"))
        else:
            if found != wanted:
                problems.append(Problem(shard, uri, key, "is not the audio that the features were made from"))
        if progress:
            progress(done, len(uris))
    return problems


def _recorded_source(info: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return kind and root of the source; ``None`` for what the free-form provenance does not record."""
    source = (info.get("provenance") or {}).get("source")
    fields = source if isinstance(source, dict) else {}
    kind, root = fields.get("kind"), fields.get("root")
    return kind if isinstance(kind, str) else None, root if isinstance(root, str) else None
