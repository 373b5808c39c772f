"""A cache as a dataset of a Hugging Face hub: repository, files in commits, dataset card.

In: a complete cache folder and ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``. Out: the dataset, made if it is
absent. Some dozens of files go into a commit; ``CACHE.json`` and the card are in the last one. Files that stand there
with the same content are not sent again, so a push that was stopped goes on. The token is huggingface_hub's (``hf auth
login``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.layout import Layout, sequence
from shards.inspect.info import describe_cache
from shards.share.dataset_card import card

FILES = 60  # in a commit, about; hubs advise against more than a hundred
BYTES = 5_000_000_000  # in a commit, about


def push_to_hub(layout: Layout, url: str, licence: str | None, progress: Progress | None = None) -> None:
    """Copy a cache that is known to be sound into a dataset repository.

    Raises:
        UserError: a malformed URL, no licence, another cache there, or what the hub refuses.
    """
    match = HUB.fullmatch(url)
    if match is None:
        raise UserError(f"'{url}' names no dataset: write hf://datasets/OWNER/NAME, or …/NAME/FOLDER")
    if licence is None:
        raise UserError("a published dataset names its licence: add --licence, such as cc-by-4.0, or other")
    repo, folder, revision = match["repo"], match["folder"] or "", match["revision"]

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # one of our own is moved by ``progress``
    # Refusals and, by their bases, whatever the HTTP client raises; an upload in a thread fails as RuntimeError.
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    troubles: tuple[type[Exception], ...] = (*bases, HFValidationError, RuntimeError)
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        there = _standing(api, repo, revision, folder)
        if "CACHE.json" in there and not _same(layout.cache, there["CACHE.json"]):
            raise UserError(f"another cache stands at '{url}': push to another dataset, or a folder of it")
        web = f"https://huggingface.co/datasets/{repo}/resolve/{revision or 'main'}"
        text = card(describe_cache(layout.path), url, licence, folder, web)
        done, total = 0, sum(path.stat().st_size for group in sequence(layout) for path in group)
        for batch in _batches(layout):
            names = [str(path.relative_to(layout.path)) for path in batch]
            operations = [
                CommitOperationAdd(f"{folder}/{name}" if folder else name, str(path))
                for name, path in zip(names, batch, strict=True)
                if name not in there or not _same(path, there[name])
            ]
            if layout.cache in batch:
                operations.append(CommitOperationAdd(f"{folder}/README.md" if folder else "README.md", text.encode()))
            if operations:
                message = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
                api.create_commit(repo, operations, commit_message=message, repo_type="dataset", revision=revision)
            done += sum(path.stat().st_size for path in batch)
            if progress:
                progress(done, total)
    except troubles as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the hub did not take '{url}' ({reason}): check `hf auth login`, rights and connection, then push again"
        ) from None


def _batches(layout: Layout) -> Iterator[list[Path]]:
    """Files for a commit each; the last one holds what makes the cache complete, and nothing else."""
    *groups, last = sequence(layout)
    batch: list[Path] = []
    for group in groups:
        batch += group
        if len(batch) >= FILES or sum(path.stat().st_size for path in batch) >= BYTES:
            yield batch
            batch = []
    if batch:
        yield batch
    yield last


def _standing(api: Any, repo: str, revision: str | None, folder: str) -> dict[str, Any]:
    """The files below ``folder`` of the repository, by their name in the cache."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import EntryNotFoundError

    prefix = f"{folder}/" if folder else ""
    try:
        tree = list(api.list_repo_tree(repo, folder or None, recursive=True, revision=revision, repo_type="dataset"))
    except EntryNotFoundError:  # no such folder yet
        return {}
    return {entry.path.removeprefix(prefix): entry for entry in tree if isinstance(entry, RepoFile)}


def _same(path: Path, entry: Any) -> bool:
    """Whether a file of the repository has a local file's content."""
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == file_sha256(path))
    data = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


Progress = Callable[[int, int], None]  # bytes done, bytes in all


HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?")
