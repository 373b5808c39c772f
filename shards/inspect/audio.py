"""Is the audio still what a cache was made from? Hash the files below a folder and compare with the manifest.

    python -m shards verify CACHE --source /data/LibriSpeech

In: a complete cache and the folder that its source read (the recorded one unless another is named). Out: a
:class:`Problem` for every utterance whose file is missing or has another sha256. Only plain files can be compared
here; audio inside archives or parquet, segments, and audio made on demand need the source's own reader:
``python -m pipeline check CACHE`` reads them, and compares features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import file_sha256
from shards.inspect.findings import Problem, ProgressCallback
from shards.read.cache import Cache

PLAIN_FILE_SOURCES = ("librispeech", "manifest")  # kinds of source whose uris are paths below its root


def compare_audio(
    path: str | Path, folder: Path | None = None, progress: ProgressCallback | None = None
) -> list[Problem]:
    """Every utterance of the cache at ``path`` whose audio file is not the one it was made from.

    Args:
        folder: where the audio stands now; None takes the folder that the cache recorded.
        progress: called with (utterances done, utterances in all).

    Raises:
        UserError: the cache is not sound, its audio is not plain files, or the folder is absent.
    """
    cache = Cache.open(path)
    kind, root = _recorded_source(cache.info)
    uris = cache.manifest["audio"].to_pylist()
    folder = folder if folder is not None else Path(root) if root else None
    if kind not in (None, *PLAIN_FILE_SOURCES) or (
        folder and any("#" in uri and not (folder / uri).exists() for uri in uris)
    ):
        raise UserError(
            f"the audio of '{path}' is not plain files: encode some of it again with `python -m pipeline check {path}`"
        )
    if folder is None:
        raise UserError(f"'{path}' does not record where its audio stood: name the folder after --source")
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}' with the audio of '{path}': name it after --source")
    problems = []
    columns = [cache.manifest[name].to_pylist() for name in ("shard", "key", "audio_sha256")]
    for done, (uri, shard, key, wanted) in enumerate(zip(uris, *columns, strict=True), 1):
        try:
            found = file_sha256(folder / uri)
        except FileNotFoundError:
            problems.append(Problem(shard, uri, key, f"is missing below '{folder}'"))
        except (OSError, ValueError) as error:  # ValueError: a NUL in a path
            problems.append(Problem(shard, uri, key, f"cannot be read: {getattr(error, 'strerror', None) or error}"))
        else:
            if found != wanted:
                problems.append(Problem(shard, uri, key, "is not the audio that the features were made from"))
        if progress:
            progress(done, len(uris))
    return problems


def _recorded_source(info: dict[str, Any]) -> tuple[str | None, str | None]:
    """Kind and root of the source; None for what the provenance (free form) does not say."""
    source = (info.get("provenance") or {}).get("source")
    fields = source if isinstance(source, dict) else {}
    kind, root = fields.get("kind"), fields.get("root")
    return kind if isinstance(kind, str) else None, root if isinstance(root, str) else None
