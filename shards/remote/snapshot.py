"""A far cache without its tars, for those who look at it: what ``info`` and ``verify`` read of a URL.

In: the URL of a cache, complete or not. Out: a temporary folder of the same layout. Tars stand in it as holes of the
size that they have afar; :func:`far_tar` brings one whole for as long as it is looked at. Nothing is listed, so a plain
web server will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from shards.errors import UserError
from shards.files import make_folder, told
from shards.format.layout import Layout, read_plan
from shards.format.records import RecordError, is_claim, unseal
from shards.remote.client import Remote, connect, fetch_file, file_size

READERS = 16  # files fetched at once


@contextmanager
def far_copy(url: str, tables: bool = True) -> Iterator[Path]:
    """A local folder that holds what the far cache holds, until the end of the block; tars as holes.

    Args:
        tables: also the tables and tars; False fetches ``CACHE.json`` alone, or plan and records where there is none.

    Raises:
        UserError: there is no cache, or it cannot be reached.
    """
    url = url.rstrip("/")
    remote = connect(url)
    with TemporaryDirectory(prefix="earshard-far-") as folder, told("looking at a far cache", Path(folder)):
        layout = Layout(Path(folder))
        make_folder(layout.shards)
        complete = _fetch(remote, url, layout, layout.cache)
        if not complete or tables:
            if not _fetch(remote, url, layout, layout.plan) and not complete:
                raise UserError(f"there is no cache at '{url}': it has neither CACHE.json nor plan.parquet")
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(lambda path: _fetch(remote, url, layout, path), _files(layout, tables)))
        yield layout.path


@contextmanager
def far_tar(url: str, path: Path) -> Iterator[Path]:
    """The whole tar that ``path``, of a :func:`far_copy`, stands for; removed at the end of the block."""
    whole = path.with_suffix(".whole")
    size = path.stat().st_size
    try:
        fetch_file(connect(url), f"shards/{path.name}", size, whole, f"{url}/shards/{path.name}")
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _files(layout: Layout, tables: bool) -> Iterator[Path]:
    """What else a cache consists of, as far as its plan or CACHE.json tell."""
    try:
        shards = read_plan(layout).shards
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


def _fetch(remote: Remote, url: str, layout: Layout, path: Path) -> bool:
    """Bring one file, or of a tar its size; False where there is none, or a claim in its place."""
    name = str(path.relative_to(layout.path))
    what = f"{url}/{name}"
    size = file_size(remote, name, what)
    if size is None:
        return False
    if path.suffix == ".tar":
        with open(path, "wb") as file:
            file.truncate(size)
        return True
    fetch_file(remote, name, size, path, what)
    if path.suffix == ".json" and is_claim(path.read_bytes()):
        path.unlink()
        return False
    return True
