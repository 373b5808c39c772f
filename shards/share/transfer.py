"""Publish a cache and fetch one: the whole folder to a hub or a bucket, and back, verified.

    python -m shards push caches/… hf://datasets/OWNER/NAME --licence cc-by-4.0
    python -m shards push caches/… s3://bucket/caches/name
    python -m shards pull hf://datasets/OWNER/NAME caches/name

In: a complete cache folder and a URL. Out: the same files at the other end, ``CACHE.json`` last: until then nobody
takes what stands there for a cache. A shard's record follows its files. Both go on where they were stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shards.commit.claims import new_owner
from shards.config.base import flatten
from shards.errors import UserError, WorkFailed
from shards.files import atomic_write, fsync_folder, make_folder, told
from shards.format.layout import Layout, sequence
from shards.format.records import (
    MAX_JSON,
    CacheInfo,
    FileInfo,
    RecordError,
    ShardRecord,
    is_claim,
    is_released,
    parse,
    unseal,
)
from shards.inspect.findings import Problem
from shards.inspect.verify import verify
from shards.remote.client import Broken, Remote, connect, fetch_file, file_size, insist, open_filesystem, read_small
from shards.share.hub import Progress

SENDERS = 4  # shards on their way at once


def push(
    path: Path,
    url: str,
    licence: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Copy the cache at ``path`` to ``url``; what stands there already is left, another cache is never replaced.

    Args:
        licence: for a hub, the licence that its dataset card names.
        tell: takes the line that names paths of this machine, before anything is sent.

    Raises:
        UserError: no complete cache, a URL that cannot be written, or another cache stands there.
        WorkFailed: the cache is not sound, or what arrived is not what was sent.
    """
    url = url.rstrip("/")
    if url.startswith(("http://", "https://")):
        raise UserError(f"'{url}' cannot be written: name hf://datasets/OWNER/NAME, or a bucket such as s3://…")
    layout = Layout(path)
    if not layout.cache.exists():
        raise UserError(f"'{path}' is no complete cache (no CACHE.json): finish its extraction first")
    _require_sound(verify(path), str(path))
    line = notice(unseal(layout.cache).get("provenance") or {})
    if line is not None:
        tell(line)
    if url.startswith("hf://"):
        from shards.share.hub import push_to_hub

        push_to_hub(layout, url, licence, progress)
    else:
        _push_files(layout, url, progress)
    _require_sound(verify(url), url)


def _push_files(layout: Layout, url: str, progress: Progress | None) -> None:
    """To any filesystem that fsspec can write."""
    files, top = open_filesystem(url)
    remote = connect(url)
    first, *shards, last = sequence(layout)
    done, total = 0, sum(path.stat().st_size for group in (first, *shards, last) for path in group)
    for path in (layout.plan, layout.cache):
        found = _small(remote, path.name, url, path.stat().st_size + 1)
        if found is not None and not is_released(found) and found != path.read_bytes():
            what = "an extraction is under way" if is_claim(found) else "another cache stands"
            raise UserError(f"{what} at '{url}': push to an empty place")

    def send(group: list[Path]) -> int:
        """Files of a group, the last of which says that it is whole."""
        *_, seal = group
        name = str(seal.relative_to(layout.path))
        if _small(remote, name, url, seal.stat().st_size + 1) != seal.read_bytes():
            for path in group:
                _put(files, path, f"{top.rstrip('/')}/{path.relative_to(layout.path)}", url)
        return sum(path.stat().st_size for path in group)

    with ThreadPoolExecutor(SENDERS) as pool:
        for step in (map(send, [first]), pool.map(send, shards), map(send, [last])):
            for size in step:
                done += size
                if progress:
                    progress(done, total)


def _put(files: Any, path: Path, target: str, url: str) -> None:
    def attempt() -> None:
        try:
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.put_file(str(path), target)
        except PermissionError:
            raise
        except NotImplementedError as error:
            raise UserError(
                f"'{url}' cannot be written ({error or 'read-only'}): name a bucket, such as s3://…"
            ) from None
        except Exception as error:  # whatever a filesystem raises may pass
            raise Broken(str(error) or type(error).__name__) from error

    insist(attempt, f"{url}/{path.name}", doing="written")


def _small(remote: Remote, name: str, url: str, most: int) -> bytes | None:
    def attempt() -> bytes | None:
        try:
            return read_small(remote, name, most)
        except FileNotFoundError:
            return None

    return insist(attempt, f"{url}/{name}")


def pull(url: str, path: Path, progress: Progress | None = None) -> None:
    """Copy the complete cache at ``url`` into the folder ``path`` and verify every byte.

    Raises:
        UserError: no complete cache there, or another one here.
        WorkFailed: what arrived is not sound; the damaged files are removed, so that another pull fetches them.
    """
    url, remote, layout, owner = url.rstrip("/"), connect(url.rstrip("/")), Layout(path), new_owner()
    data = _small(remote, "CACHE.json", url, MAX_JSON + 1)
    if data is None or is_claim(data):
        raise UserError(f"there is no complete cache at '{url}' (no CACHE.json): nothing can be pulled yet")
    try:
        info = CacheInfo.model_validate(parse(data, "CACHE.json"))
    except (RecordError, ValidationError):
        raise UserError(f"the CACHE.json of '{url}' is damaged, or of another format: nothing was pulled") from None
    if layout.cache.exists() and layout.cache.read_bytes() != data:
        raise UserError(f"'{path}' holds another cache: pull into another folder")
    with told("pulling a cache", path):
        make_folder(layout.shards)
        total, done = info.counts["bytes"] + sum(file.bytes for file in info.files.values()), 0

        def fetch(target: Path, expected: FileInfo | None) -> int:
            return _fetch(remote, url, layout, target, expected, owner)

        fetch(layout.plan, None)
        done += sum(fetch(layout.path / name, expected) for name, expected in sorted(info.files.items()))
        with ThreadPoolExecutor(SENDERS) as pool:
            for size in pool.map(lambda shard: _fetch_shard(fetch, layout, shard), range(info.counts["shards"])):
                done += size
                if progress:
                    progress(done, total)
        atomic_write(layout.cache, data, owner)
    problems = verify(path, deep=True)
    for problem in problems:
        if problem.file.startswith("shards/"):
            (path / problem.file).unlink(missing_ok=True)
    if problems:
        layout.cache.unlink(missing_ok=True)
    _require_sound(problems, str(path))


def _fetch_shard(fetch: Callable[[Path, FileInfo | None], int], layout: Layout, shard: int) -> int:
    """A shard's record, then the files that it names; bytes of the tar."""
    fetch(layout.record(shard), None)
    try:
        record = ShardRecord.model_validate(unseal(layout.record(shard)))
    except (RecordError, ValidationError):
        layout.record(shard).unlink()
        raise WorkFailed(f"the record of shard {shard:06d} came damaged: run the same pull again") from None
    fetch(layout.rows(shard), record.parquet)
    return fetch(layout.tar(shard), record.tar)


def _fetch(remote: Remote, url: str, layout: Layout, target: Path, expected: FileInfo | None, owner: str) -> int:
    """Bring one file unless it stands here in its size; its bytes."""
    name = str(target.relative_to(layout.path))
    size = expected.bytes if expected else file_size(remote, name, f"{url}/{name}")
    if size is None:
        raise UserError(f"there is no '{url}/{name}': what stands there is no whole cache")
    if not (target.is_file() and target.stat().st_size == size):
        partial = target.with_name(f"{target.name}.tmp-{owner}")
        try:
            fetch_file(remote, name, size, partial, f"{url}/{name}", expected.sha256 if expected else None)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        fsync_folder(target.parent)
    return size


def _require_sound(problems: list[Problem], name: str) -> None:
    if problems:
        first = problems[0]
        raise WorkFailed(
            f"'{name}' is not sound: {first.file} {first.what}"
            + (f", and {len(problems) - 1} more problems" if len(problems) > 1 else "")
            + f" (`python -m shards verify {name}` tells all)"
        )


_LOCAL = re.compile(r"(path:|file://)?(/|~|[A-Za-z]:[\\/])")


def local_places(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, text) of every absolute path of a file system in ``provenance``."""
    found = []
    for key, value in flatten(dict(provenance)).items():
        texts = value if isinstance(value, list) else [value]
        found += [(key, text) for text in texts if isinstance(text, str) and _LOCAL.match(text)]
    return found


def notice(provenance: Mapping[str, Any]) -> str | None:
    """One line for who is about to publish; None where nothing local is told."""
    listed = ", ".join(f"{key} '{text}'" for key, text in local_places(provenance))
    if not listed:
        return None
    return f"note: CACHE.json and job.json name places of this machine, which are published with them: {listed}"
