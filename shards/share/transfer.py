"""Uploads a whole cache to a hub or a bucket, or downloads one, and verifies the result.

    python -m shards push caches/… hf://datasets/OWNER/NAME --licence cc-by-4.0
    python -m shards push caches/… s3://bucket/caches/name
    python -m shards pull hf://datasets/OWNER/NAME caches/name

``CACHE.json`` is transferred last; without it, the files at the destination do not count as a complete cache. Both
commands resume an interrupted transfer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shards.commit.claims import new_owner
from shards.config.base import flatten
from shards.errors import UserError, WorkFailed
from shards.files import atomic_write, make_folder, temporary_path, translate_os_errors
from shards.format.layout import Layout, transfer_order
from shards.format.records import is_claim, is_released, unseal
from shards.inspect.findings import Problem
from shards.inspect.verify import verify
from shards.remote.client import Remote
from shards.remote.mirror import fetch_info, fetch_record
from shards.share.hub import ProgressCallback, parse_dataset_url, push_to_hub

TRANSFERS = 4  # concurrent shard transfers
ABSOLUTE_PATH = re.compile(r"(path:|file://)?(/|~|[A-Za-z]:[\\/])")  # an absolute path in a file system


def push(
    path: Path,
    url: str,
    license_id: str | None = None,
    progress: ProgressCallback | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Copy the cache at ``path`` to ``url``. Skips files that are already there; never replaces another cache.

    Args:
        license_id: license named in the dataset card; required by a hub.
        progress: called with (bytes done, total bytes).
        log: called before the transfer with a line that lists the local paths to be published, if there are any.

    Raises:
        UserError: ``path`` is not a complete cache, ``url`` is not writable, or another cache is there.
        WorkFailed: the cache is not valid, or the copy differs from it.
    """
    url = url.rstrip("/")
    if url.startswith(("http://", "https://")):
        raise UserError(f"'{url}' is not writable: use hf://datasets/OWNER/NAME, or a bucket such as s3://…")
    if url.startswith("hf://"):
        parse_dataset_url(url, license_id)
    layout, remote = Layout(path), Remote(url)
    if not layout.cache.exists():
        raise UserError(f"'{path}' is not a complete cache (no CACHE.json): finish its extraction first")
    _require_valid(verify(path), str(path))
    paths = ", ".join(f"{key} '{text}'" for key, text in local_paths(unseal(layout.cache).get("provenance") or {}))
    if paths:
        log(f"note: CACHE.json contains paths of this machine, which will be published: {paths}")
    for file in (layout.plan, layout.cache):
        found = remote.read_if_exists(file.name, file.stat().st_size + 1)
        if found is not None and not is_released(found) and found != file.read_bytes():
            what = "an extraction is running" if is_claim(found) else "another cache exists"
            raise UserError(f"{what} at '{url}': push to an empty folder")
    if license_id is not None and url.startswith("hf://"):
        push_to_hub(layout, url, license_id)
    else:
        _push_files(layout, remote, progress)
    _require_valid(verify(url), url)


def local_paths(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (dotted key, text) of every absolute path of this machine in the provenance of ``CACHE.json``.

    They are published with the cache: the file is sealed, so they cannot be removed from the copy.
    """
    found = []
    for key, value in flatten(dict(provenance)).items():
        texts = value if isinstance(value, list) else [value]
        found += [(key, text) for text in texts if isinstance(text, str) and ABSOLUTE_PATH.match(text)]
    return found


def _push_files(layout: Layout, remote: Remote, progress: ProgressCallback | None) -> None:
    """Copy to any file system that fsspec can write."""
    first, *shards, last = transfer_order(layout)
    total = sum(path.stat().st_size for group in (first, *shards, last) for path in group)

    def send(group: list[Path]) -> int:
        """Upload the files of a group, whose last file marks it as complete; returns its bytes."""
        *_, seal = group
        if remote.read_if_exists(str(seal.relative_to(layout.path)), seal.stat().st_size + 1) != seal.read_bytes():
            for path in group:
                remote.upload(path, str(path.relative_to(layout.path)))
        return sum(path.stat().st_size for path in group)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        steps = (map(send, [first]), pool.map(send, shards), map(send, [last]))
        _track_progress((size for step in steps for size in step), total, progress)


def _track_progress(sizes: Iterable[int], total: int, progress: ProgressCallback | None) -> None:
    done = 0
    for size in sizes:
        done += size
        if progress:
            progress(done, total)


def pull(url: str, path: Path, progress: ProgressCallback | None = None) -> None:
    """Copy the complete cache at ``url`` into the folder ``path`` and verify every byte.

    Args:
        progress: called with (bytes done, total bytes).

    Raises:
        UserError: there is no complete cache at ``url``, or ``path`` holds another cache.
        WorkFailed: the copy is not valid. Corrupt files are removed, so that another pull downloads them again.
    """
    remote, layout, owner = Remote(url), Layout(path), new_owner()
    data, info = fetch_info(remote)
    if layout.cache.exists() and layout.cache.read_bytes() != data:
        raise UserError(f"'{path}' contains another cache: pull into another folder")

    def fetch(target: Path, size: int, sha256: str | None = None) -> int:
        """Fetch a file unless it exists locally with the right size; returns its bytes."""
        if not (target.is_file() and target.stat().st_size == size):
            name = str(target.relative_to(layout.path))
            remote.download(name, target, temporary_path(target, owner), size, sha256)
        return size

    def fetch_shard(shard: int) -> int:
        record_data, record = fetch_record(remote, shard, info)
        atomic_write(layout.record(shard), record_data, owner)
        for target, file in ((layout.rows(shard), record.parquet), (layout.tar(shard), record.tar)):
            fetch(target, file.bytes, file.sha256)
        return record.tar.bytes

    with translate_os_errors("pulling a cache", path):
        make_folder(layout.shards)
        size = remote.size(layout.plan.name)
        if size is None:
            raise UserError(f"'{remote.url}/{layout.plan.name}' does not exist: the remote cache is incomplete")
        fetch(layout.plan, size)
        for target in (layout.manifest, layout.failures):
            fetch(target, info.files[target.name].bytes, info.files[target.name].sha256)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            _track_progress(pool.map(fetch_shard, range(info.counts["shards"])), info.counts["bytes"], progress)
        atomic_write(layout.cache, data, owner)
    problems = verify(path, deep=True)
    for problem in problems:
        if problem.file.startswith("shards/"):
            (path / problem.file).unlink(missing_ok=True)
    if problems:
        layout.cache.unlink(missing_ok=True)
    _require_valid(problems, str(path))


def _require_valid(problems: list[Problem], name: str) -> None:
    if problems:
        first = problems[0]
        raise WorkFailed(
            f"'{name}' is not valid: {first.file} {first.what}"
            + (f", and {len(problems) - 1} more problems" if len(problems) > 1 else "")
            + f" (run `python -m shards verify {name}` to list all problems)"
        )
