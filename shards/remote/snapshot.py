"""A remote cache without its tars, for those who look at it: what ``info`` and ``verify`` read of a URL.

In: the URL of a cache, complete or not. Out: a temporary folder of the same layout. Tars stand in it as holes of the
size that they have at the URL; :func:`fetch_tar` fetches one for as long as it is looked at. Nothing is listed, so a
plain web server is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from shards.errors import UserError
from shards.files import make_folder, translate_os_errors
from shards.format.layout import Layout, read_plan
from shards.format.records import RecordError, is_claim, unseal
from shards.remote.client import Remote

READERS = 16  # files fetched at once


@contextmanager
def snapshot(url: str, tables: bool = True) -> Iterator[Path]:
    """A local folder that holds what the remote cache holds, until the end of the block; tars as holes.

    Args:
        tables: also the tables and tars; False fetches ``CACHE.json`` alone, or plan and records if it does not exist.

    Raises:
        UserError: there is no cache, or it cannot be reached.
    """
    remote = Remote(url)
    with (
        TemporaryDirectory(prefix="earshard-remote-") as folder,
        translate_os_errors("reading a remote cache", Path(folder)),
    ):
        layout = Layout(Path(folder))
        make_folder(layout.shards)
        complete = _fetch(remote, layout, layout.cache)
        if not complete or tables:
            if not _fetch(remote, layout, layout.plan) and not complete:
                raise UserError(f"there is no cache at '{remote.url}': it has neither CACHE.json nor plan.parquet")
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(lambda path: _fetch(remote, layout, path), _files(layout, tables)))
        yield layout.path


@contextmanager
def fetch_tar(url: str, path: Path) -> Iterator[Path]:
    """The whole tar that ``path``, of a :func:`snapshot`, stands for; removed at the end of the block."""
    whole = path.with_suffix(".whole")
    try:
        with open(whole, "wb") as file:
            Remote(url).fetch(f"shards/{path.name}", file, path.stat().st_size)
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _files(layout: Layout, tables: bool) -> Iterator[Path]:
    """What else a cache consists of, as far as its plan or CACHE.json tell."""
    try:
        shards = read_plan(layout).num_shards
    except UserError:
        try:
            shards = int(unseal(layout.cache)["counts"]["shards"])
        except (OSError, RecordError, KeyError, TypeError, ValueError):
            return
    if tables:
        yield from (layout.manifest, layout.failures)
    for shard in range(shards):
        yield layout.record(shard)
        if tables:
            yield from (layout.rows(shard), layout.tar(shard))


def _fetch(remote: Remote, layout: Layout, path: Path) -> bool:
    """Fetch one file, or of a tar its size; False if it does not exist, or is a claim."""
    name = str(path.relative_to(layout.path))
    size = remote.size(name)
    if size is None:
        return False
    with open(path, "wb") as file:
        if path.suffix == ".tar":
            file.truncate(size)
        else:
            remote.fetch(name, file, size)
    if path.suffix == ".json" and is_claim(path.read_bytes()):
        path.unlink()
        return False
    return True
