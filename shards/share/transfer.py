"""Uploads a whole cache to a hub or a bucket, or downloads one, and verifies the result.

    python -m shards push caches/… hf://datasets/OWNER/NAME --licence cc-by-4.0
    python -m shards push caches/… modelscope://datasets/OWNER/NAME --licence cc-by-4.0
    python -m shards push caches/… s3://bucket/caches/name
    python -m shards pull hf://datasets/OWNER/NAME caches/name

``CACHE.json`` is transferred last; without it, the files at the destination do not count as a complete cache. Both
commands resume an interrupted transfer. A cache that has grown is transferred onto an earlier state of itself: only
what is new is sent, and readers of the earlier state are undisturbed. Label sets of both sides are kept.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from shards.commit.bucket.objects import Objects
from shards.commit.claims import Claims, new_owner
from shards.commit.finalize import temporary_files
from shards.config.base import flatten
from shards.errors import UserError, WorkFailed
from shards.files import (
    TEMPORARY_INFIX,
    atomic_write,
    file_lock,
    file_sha256,
    make_folder,
    scratch_folder,
    temporary_path,
    translate_os_errors,
)
from shards.format.layout import Layout, read_plan
from shards.format.records import (
    MAX_JSON,
    CacheInfo,
    FileInfo,
    RecordError,
    is_claim,
    is_released,
    unseal,
    unseal_bytes,
)
from shards.inspect.findings import Problem
from shards.inspect.verify import verify
from shards.labels.remote import fetch_label_index
from shards.labels.store import INDEX, LabelIndex, read_index
from shards.read.cache import Cache
from shards.remote.client import Remote, is_url
from shards.remote.mirror import extends, fetch_info, fetch_record
from shards.remote.object_store import SCHEMES
from shards.share.hub import ProgressCallback, parse_dataset_url, push_to_hub
from shards.share.merge import index_bytes, merge_labels
from shards.share.modelscope import push_to_modelscope
from shards.share.publish import HUBS, Publication

TRANSFERS = 4  # concurrent shard transfers
PULL = "pull-"  # begins the owner tag of a pull
POLL_INTERVAL = 0.2  # seconds between two attempts to get the claim of the label sets
ABSOLUTE_PATH = re.compile(r"(path:|file://)?(/|~|[A-Za-z]:[\\/])")  # an absolute path in a file system


@dataclass(frozen=True)
class _Destination:
    """What a push finds at its destination: contents of ``CACHE.json`` and ``LABELS.json`` (None: there is none).

    Attributes:
        listed: number of generations that its ``CACHE.json`` lists.
        merged: the label sets of both sides.
    """

    cache: bytes | None
    listed: int
    labels: bytes | None
    merged: LabelIndex


def push(
    path: Path,
    url: str,
    license_id: str | None = None,
    progress: ProgressCallback | None = None,
    log: Callable[[str], None] = lambda line: None,
    private: bool = False,
) -> None:
    """Copy the cache at ``path`` to ``url``. Skips files that are already there; never replaces another cache.

    Args:
        license_id: license named in the dataset card; required by a hub.
        progress: called with (bytes done, total bytes).
        log: called before the transfer with a line that lists the local paths to be published, if there are any.
        private: whether the repository of a hub must be private.

    Raises:
        UserError: ``path`` is not a complete cache, ``url`` is not writable, or another cache or a newer state of this
            one is there.
        WorkFailed: the cache is not valid, or the copy differs from it.
    """
    url = url.rstrip("/")
    if url.startswith(("http://", "https://")):
        raise UserError(f"'{url}' is not writable: use hf://datasets/OWNER/NAME, or a bucket such as s3://…")
    if url.startswith(HUBS):
        parse_dataset_url(url, license_id)
    layout, remote = Layout(path), Remote(url)
    if not layout.cache.exists():
        raise UserError(f"'{path}' is not a complete cache (no CACHE.json): finish its extraction first")
    _require_valid(verify(path), str(path))
    info, labels = CacheInfo.model_validate(unseal(layout.cache)), read_index(path)
    paths = ", ".join(f"{key} '{text}'" for key, text in local_paths(info, labels))
    if paths:
        log(f"note: the cache contains paths of this machine, which will be published: {paths}")
    found = _inspect(layout, info, labels, remote)
    if license_id is not None and url.startswith(HUBS):
        upload = push_to_hub if url.startswith("hf://") else push_to_modelscope
        upload(layout, url, license_id, *_new_labels(labels, found), lambda: _require_same(remote, found), private)
    else:
        _push_files(layout, info, labels, remote, found, progress)
    _require_valid(verify(url), url)


def describe_push(path: Path) -> Publication:
    """Return what a push of the cache at ``path`` would publish.

    Raises:
        UserError: ``path`` is not a complete cache.
    """
    layout = Layout(path)
    if not layout.cache.exists():
        raise UserError(f"'{path}' is not a complete cache (no CACHE.json): finish its extraction first")
    cache, labels = Cache.open(path), read_index(path)
    info, rows = CacheInfo.model_validate(unseal(layout.cache)), range(len(cache))
    texts = sum(1 for text in cache.strings("text", rows) if text)
    speakers = set(cache.strings("speaker", rows)) if cache.has_column("speaker") else set()
    paths = "; ".join(f"{key} '{text}'" for key, text in local_paths(info, labels))
    facts = [
        ("utterances", f"{info.counts['utterances']:,}"),
        ("texts", f"{texts:,} (and those of {max(0, len(labels.sets) - 1)} other label sets)"),
        ("speakers", f"{len(speakers - {''}):,}"),
        ("local paths", paths or "none"),
    ]
    return Publication(_files(layout, info, [entry.file.name for entry in labels.sets]), facts)


def _files(layout: Layout, info: CacheInfo, label_files: Iterable[str]) -> list[Path]:
    """Return the files of a cache, of which it has all but some tables."""
    numbers, shards = range(len(info.generations)), range(info.counts["shards"])
    tables = [table(number) for number in numbers for table in (layout.plan, layout.manifest, layout.failures)]
    files = [file(shard) for shard in shards for file in (layout.tar, layout.rows, layout.record)]
    listed = [*tables, *files, layout.cache, layout.labels / INDEX, *(layout.labels / name for name in label_files)]
    return [path for path in listed if path.exists()]


def local_paths(info: CacheInfo, labels: LabelIndex) -> list[tuple[str, str]]:
    """Return (dotted key, text) of every absolute path of this machine in the provenance of a cache and its labels.

    They are published with the cache: its files are sealed, so they cannot be removed from the copy.
    """
    fields = [field for entry in info.generations for field in flatten(entry.provenance).items()]
    fields += [(f"labels.{entry.name}.from", entry.origin) for entry in labels.sets]
    found = []
    for key, value in fields:
        texts = value if isinstance(value, list) else [value]
        found += [(key, text) for text in texts if isinstance(text, str) and ABSOLUTE_PATH.match(text)]
    return list(dict.fromkeys(found))


def _inspect(layout: Layout, info: CacheInfo, labels: LabelIndex, remote: Remote) -> _Destination:
    """Return what is at the destination of a push; UserError if the cache cannot be pushed onto it."""
    another = UserError(f"another cache exists at '{remote.url}': push to an empty folder")
    cache = remote.read_if_exists(layout.cache.name, MAX_JSON + 1)
    for claim in (cache, remote.read_if_exists(layout.finalize_claim.name, MAX_JSON)):
        if claim is not None and is_claim(claim) and not is_released(claim):
            raise UserError(f"an extraction is running at '{remote.url}': push to an empty folder")
    listed = 0
    if cache is not None and not is_released(cache):
        listed = _num_shared(cache, info, another, f"'{remote.url}'", f"'{layout.path}'", "pull it first")
    for number in range(listed, len(info.generations)):
        plan = layout.plan(number)
        found = remote.read_if_exists(f"plans/{plan.name}", plan.stat().st_size + 1)
        if found is not None and found != plan.read_bytes():
            if listed:
                raise UserError(
                    f"another extraction extends the cache at '{remote.url}': finish it there, then pull it"
                )
            raise another
    their_labels, index = fetch_label_index(remote)
    merged = merge_labels(labels, index, f"'{layout.path}'", f"'{remote.url}'")
    return _Destination(cache, listed, their_labels, merged)


def _new_labels(labels: LabelIndex, found: _Destination) -> tuple[list[str], bytes]:
    """Return the names of the label files to be sent, and the new content of ``LABELS.json``."""
    mine = {entry.file for entry in labels.sets}
    return [entry.file.name for entry in found.merged.sets if entry.file in mine], index_bytes(found.merged)


def _require_same(remote: Remote, found: _Destination) -> None:
    """Raise UserError if the destination has changed since ``found`` was read."""
    cache = remote.read_if_exists("CACHE.json", MAX_JSON + 1)
    if (cache, fetch_label_index(remote)[0]) != (found.cache, found.labels):
        raise _changed(remote)


def _changed(remote: Remote) -> UserError:
    return UserError(f"the cache at '{remote.url}' was changed by another process meanwhile: push again")


def _push_files(
    layout: Layout,
    info: CacheInfo,
    labels: LabelIndex,
    remote: Remote,
    found: _Destination,
    progress: ProgressCallback | None,
) -> None:
    """Copy to any file system that fsspec can write."""
    generations, (label_files, index) = range(len(info.generations)), _new_labels(labels, found)

    def send(path: Path, *, there: bool) -> int:
        """Upload a file unless it is ``there`` with its size; returns its bytes."""
        name, size = str(path.relative_to(layout.path)), path.stat().st_size
        if not there or remote.size(name) != size:
            remote.upload(path, name)
        return size

    def send_shard(shard: int) -> int:
        """Upload the files of a shard, whose record marks it as complete; returns their bytes."""
        group = [layout.tar(shard), layout.rows(shard), layout.record(shard)]
        record = remote.read_if_exists(f"shards/{group[-1].name}", group[-1].stat().st_size + 1)
        is_there = record == group[-1].read_bytes()
        return sum(path.stat().st_size if is_there else send(path, there=False) for path in group)

    def replace(path: Path, data: bytes, before: bytes | None) -> int:
        if data != before:
            _replace(remote, str(path.relative_to(layout.path)), data, before)
        return path.stat().st_size if path.exists() else 0

    def steps(pool: ThreadPoolExecutor) -> Iterable[int]:
        for number in generations:
            yield send(layout.plan(number), there=number < found.listed)
        yield from pool.map(send_shard, range(info.counts["shards"]))
        for name in label_files:
            yield send(layout.labels / name, there=True)
        yield replace(layout.labels / INDEX, index, found.labels)
        for number in generations:
            yield send(layout.manifest(number), there=number < found.listed)
            yield send(layout.failures(number), there=number < found.listed)
        yield replace(layout.cache, layout.cache.read_bytes(), found.cache)

    total = sum(path.stat().st_size for path in _files(layout, info, label_files))
    with ThreadPoolExecutor(TRANSFERS) as pool:
        _track_progress(steps(pool), total, progress)


def _replace(remote: Remote, name: str, data: bytes, before: bytes | None) -> None:
    """Replace a file if its content is still ``before``; a store with conditional writes decides this itself.

    Raises:
        UserError: another process has changed the file, or it cannot be written.
    """
    if remote.url.partition("://")[0] in SCHEMES:
        try:
            objects = Objects(remote.url)
            found = objects.read(name)
            same = (found.data if found else None) == before
            written = same and objects.put(name, data, found.version if found else None) is not None
        except UserError:
            pass  # such as a store without conditional writes: the request below succeeds, or reports the error
        else:
            if not written:
                raise _changed(remote)
            return
    if remote.read_if_exists(name, MAX_JSON + 1) != before:
        raise _changed(remote)
    with scratch_folder("earshard-push-") as folder, translate_os_errors("pushing a cache", folder):
        (folder / "file").write_bytes(data)
        remote.upload(folder / "file", name)


def _track_progress(sizes: Iterable[int], total: int, progress: ProgressCallback | None) -> None:
    done = 0
    for size in sizes:
        done += size
        if progress:
            progress(done, total)


def pull(url: str, path: Path, progress: ProgressCallback | None = None) -> None:
    """Copy the complete cache at ``url``, or in a folder, into the folder ``path`` and verify every byte.

    Label sets that only the folder has are kept.

    Args:
        progress: called with (bytes done, total bytes).

    Raises:
        UserError: there is no complete cache at ``url``, ``path`` holds another cache or a newer state of this one, or
            another process is pulling into it.
        WorkFailed: the copy is not valid. Corrupt files are removed, so that another pull downloads them again.
    """
    remote = Remote(url if is_url(url) else Path(url).absolute().as_uri())
    data, info = fetch_info(remote)
    with translate_os_errors("pulling a cache", path):
        make_folder(path)
        lock = path / "pull.lock"
        with file_lock(lock, wait=False) as held:
            if not held:
                raise UserError(f"another process pulls a cache into '{path}': wait until it ends")
            try:
                _pull(remote, Layout(path), data, info, progress)
            finally:
                lock.unlink(missing_ok=True)


def _pull(remote: Remote, layout: Layout, data: bytes, info: CacheInfo, progress: ProgressCallback | None) -> None:
    path, owner = layout.path, f"{PULL}{new_owner()}"
    before = layout.cache.read_bytes() if layout.cache.exists() else None
    _require_pullable(layout, info, before, remote.url)
    index_data, index = fetch_label_index(remote)
    merged = merge_labels(index, read_index(path), f"'{remote.url}'", f"'{path}'")
    fetched = {layout.cache, layout.labels / INDEX}

    def fetch(target: Path, file: FileInfo, is_there: Callable[[Path, FileInfo], bool]) -> None:
        fetched.add(target)
        if not is_there(target, file):
            name = str(target.relative_to(layout.path))
            remote.download(name, target, temporary_path(target, owner), file.bytes, file.sha256)

    def fetch_shard(shard: int) -> int:
        record_data, record = fetch_record(remote, shard, info)
        fetched.add(layout.record(shard))
        atomic_write(layout.record(shard), record_data, owner)
        for target, file in ((layout.rows(shard), record.parquet), (layout.tar(shard), record.tar)):
            fetch(target, file, _has_size)
        return record.tar.bytes

    with translate_os_errors("pulling a cache", path):
        for folder in layout.folders:
            make_folder(folder)
            for stray in temporary_files(folder):
                if f"{TEMPORARY_INFIX}{PULL}" in stray.name:  # of a pull that was killed: this one holds the lock
                    stray.unlink(missing_ok=True)
        for number, entry in enumerate(info.generations):
            fetch(layout.plan(number), entry.files.plan, _is_intact)
            fetch(layout.manifest(number), entry.files.manifest, _is_intact)
            fetch(layout.failures(number), entry.files.failures, _is_intact)
            plan = read_plan(layout.plan(number), remote.url)  # bounds the number of shards that a stranger declares
            if plan.num_shards != entry.shards or (entry.shards and plan.first_shard != entry.first_shard):
                raise UserError(
                    f"'{remote.url}' is corrupt: the plan of generation {number} has {plan.num_shards} shards from "
                    f"{plan.first_shard}, CACHE.json says {entry.shards} from {entry.first_shard}"
                )
        with ThreadPoolExecutor(TRANSFERS) as pool:
            _track_progress(pool.map(fetch_shard, range(info.counts["shards"])), info.counts["bytes"], progress)
        for file in {entry.file for entry in index.sets} & {entry.file for entry in merged.sets}:
            fetch(layout.labels / file.name, file, _is_intact)
        if index_data is not None:
            _save_labels(layout, index_data, index, owner, remote.url)
        atomic_write(layout.cache, data, owner)
    problems = verify(path, deep=True)
    if problems:
        for problem in problems:
            if path / problem.file in fetched:
                (path / problem.file).unlink(missing_ok=True)
        layout.cache.unlink(missing_ok=True)
        if before is not None and before != data:  # the earlier state stays readable
            atomic_write(layout.cache, before, owner)
    _require_valid(problems, str(path))


def _num_shared(data: bytes, info: CacheInfo, another: UserError, target: str, source: str, fix: str) -> int:
    """Return the number of generations in ``data``, the ``CACHE.json`` of the target.

    Raises:
        UserError: it is not an earlier state of the source's ``info``: ``another``, or a sentence that ends with
            ``fix`` if it is a later one.
    """
    try:
        theirs = CacheInfo.model_validate(unseal_bytes(data, "CACHE.json"))
    except (RecordError, ValidationError):
        raise another from None
    if not extends(info, theirs):
        if not extends(theirs, info):
            raise another
        counts = f"{len(theirs.generations)} generations of this cache, {source} only {len(info.generations)}"
        raise UserError(f"{target} has {counts}: {fix}")
    return len(theirs.generations)


def _require_pullable(layout: Layout, info: CacheInfo, before: bytes | None, url: str) -> None:
    """Raise UserError if the folder holds something else than an earlier state of the remote cache."""
    another = UserError(f"'{layout.path}' contains another cache: pull into another folder")
    listed = 0
    if before is not None:
        listed = _num_shared(before, info, another, f"'{layout.path}'", f"'{url}'", "there is nothing to pull")
    for number, entry in enumerate(info.generations[listed:], listed):
        try:
            plan_id = read_plan(layout.plan(number)).id
        except (UserError, FileNotFoundError, NotADirectoryError):  # a corrupt plan is fetched again
            continue
        if plan_id != entry.plan_id:
            raise another


def _save_labels(layout: Layout, data: bytes, index: LabelIndex, owner: str, url: str) -> None:
    """Add the label sets of the remote cache to those of the folder, while no other process adds one."""
    path = layout.labels / INDEX
    with Claims(owner) as claims:
        while not claims.acquire(layout.labels_claim):
            time.sleep(POLL_INTERVAL)
        mine = read_index(layout.path)
        merged = merge_labels(index, mine, f"'{url}'", f"'{layout.path}'")
        if merged != mine or not path.exists():
            atomic_write(path, data if merged == index else index_bytes(merged), owner)


def _has_size(path: Path, file: FileInfo) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes


def _is_intact(path: Path, file: FileInfo) -> bool:
    return _has_size(path, file) and file_sha256(path) == file.sha256


def _require_valid(problems: list[Problem], name: str) -> None:
    if problems:
        first = problems[0]
        raise WorkFailed(
            f"'{name}' is not valid: {first.file} {first.what}"
            + (f", and {len(problems) - 1} more problems" if len(problems) > 1 else "")
            + f" (run `python -m shards verify {name}` to list all problems)"
        )
