"""A local copy of a remote cache without the content of its tars: what ``info`` and ``verify`` read from a URL.

Copies a cache, complete or not, into a temporary folder of the same layout. Tars are sparse files of their remote size;
:func:`fetch_tar` downloads one temporarily. Nothing is listed, so a plain web server is sufficient.
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
    """Copy the remote cache into a temporary folder, removed at the end of the block. Tars are sparse files.

    Args:
        tables: also fetch tables and the sizes of tars. False fetches ``CACHE.json`` only, or the plan and the records
            if it does not exist.

    Raises:
        UserError: there is no cache at ``url``, or it cannot be reached.
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
                raise UserError(f"'{remote.url}' is not a cache: it has neither CACHE.json nor plan.parquet")
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(lambda path: _fetch(remote, layout, path), _files(layout, tables)))
        yield layout.path


@contextmanager
def fetch_tar(url: str, path: Path) -> Iterator[Path]:
    """Download the tar that ``path`` in a :func:`snapshot` represents; removed at the end of the block."""
    whole = path.with_suffix(".whole")
    try:
        with open(whole, "wb") as file:
            Remote(url).fetch(f"shards/{path.name}", file, path.stat().st_size)
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _files(layout: Layout, tables: bool) -> Iterator[Path]:
    """Yield the other files of a cache, as far as its plan or CACHE.json determine them."""
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
    """Fetch one file, or only the size of a tar. Returns False if it does not exist or is a claim."""
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
