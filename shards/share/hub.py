"""Uploads a cache to a dataset repository on a Hugging Face hub, with a dataset card; or a folder to a model's.

Takes a complete cache folder and ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``; creates the dataset if it does not
exist. Records are committed after their files; ``CACHE.json``, ``LABELS.json`` and the card are the last commit. Files
that are already there with the same content are not sent again, so an interrupted push resumes. Uses the token of
huggingface_hub (``hf auth login``).

The hub reads the card at the root of a repository, which lists the caches in folders, below the card of a cache that is
at the root itself. A card at the root that somebody else wrote is left alone by a push into a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.format.layout import Layout
from shards.format.records import MAX_JSON, CacheInfo
from shards.inspect.info import describe_cache
from shards.labels.store import INDEX
from shards.remote.client import DATASET_URL, Remote
from shards.remote.mirror import fetch_info
from shards.share.dataset_card import CACHE_MARK, LIST_MARK, dataset_card, list_card, with_list

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MODEL_URL = re.compile(r"hf://(?!datasets/|spaces/|models/)(?P<repo>[^/@]+/[^/@]+)")
COMMIT_PATTERNS = (
    ["plans/*.parquet", "shards/*.tar", "shards/*.parquet"],
    ["shards/*.json", "manifests/*.parquet", "failures/*.parquet"],
)


def parse_dataset_url(url: str, license_id: str | None) -> re.Match[str]:
    """Parse a dataset URL.

    Raises:
        UserError: the URL is not a dataset URL, or ``license_id``, which the dataset card needs, is None.
    """
    match = DATASET_URL.fullmatch(url)
    if match is None:
        hub = "modelscope" if url.startswith("modelscope:") else "hf"
        raise UserError(f"'{url}' is not a dataset URL: write {hub}://datasets/OWNER/NAME, or …/NAME/FOLDER")
    if license_id is None:
        raise UserError("a published dataset needs a license: add --licence with an identifier such as cc-by-4.0")
    return match


def push_to_hub(
    layout: Layout,
    url: str,
    license_id: str,
    label_files: Sequence[str],
    labels: bytes,
    check: Callable[[], None],
    private: bool = False,
) -> None:
    """Upload a valid cache to a dataset repository.

    Args:
        label_files: names of the files in ``labels/`` to upload.
        labels: content of ``LABELS.json``.
        check: called before the last commit; raises UserError if the cache there is no longer as it was. A commit of
            another process after that makes the last commit fail.
        private: whether the repository must be private.

    Raises:
        UserError: the repository is public and must not be; or the hub refused the request, or the upload failed.
    """
    match = parse_dataset_url(url, license_id)
    repo, folder, revision = match["repo"], match["folder"] or "", match["revision"]

    from huggingface_hub import CommitOperationAdd, HfApi

    api, base_url = HfApi(), f"https://huggingface.co/datasets/{repo}/resolve/{revision or 'main'}"
    text = dataset_card(describe_cache(layout.path), url, license_id, folder, base_url)
    with _refusals(url):
        _open_repository(api, repo, "dataset", private, url)
        for patterns in (*COMMIT_PATTERNS, [f"labels/{name}" for name in label_files]):
            if not patterns:
                continue
            uploaded = api.upload_folder(  # resumes, and splits uploads that are too large for one commit
                repo_id=repo,
                repo_type="dataset",
                revision=revision,
                folder_path=layout.path,
                path_in_repo=folder,
                allow_patterns=patterns,
                commit_message=", ".join(patterns),
            )
        check()
        there = api.list_repo_files(repo, repo_type="dataset", revision=revision)
        last = last_commit(match, layout, license_id, labels, text, there)
        api.create_commit(
            repo,
            [CommitOperationAdd(name, data) for name, data in last.items()],
            commit_message="CACHE.json",
            repo_type="dataset",
            revision=revision,
            parent_commit=uploaded.oid,
        )


def push_model(folder: Path, url: str, private: bool = False) -> None:
    """Upload the files of ``folder`` as one commit to the model repository ``hf://OWNER/NAME``; create it if need be.

    Raises:
        UserError: the URL is none of a model, the repository is public and must not be, or the hub refused.
    """
    match = MODEL_URL.fullmatch(url)
    if match is None:
        raise UserError(f"'{url}' is not the URL of a model: write hf://OWNER/NAME")

    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(url):
        _open_repository(api, match["repo"], "model", private, url)
        api.upload_folder(repo_id=match["repo"], folder_path=folder, ignore_patterns=["*__pycache__*"])


def _open_repository(api: HfApi, repo: str, kind: str, private: bool, url: str) -> None:
    """Create the repository if it does not exist; UserError if it is public and must be private."""
    api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
    if private and not api.repo_info(repo, repo_type=kind).private:
        raise UserError(f"'{url}' is already public: make it private on the hub, or push without --private")


def last_commit(
    match: re.Match[str], layout: Layout, license_id: str, labels: bytes, card: str, there: Collection[str]
) -> dict[str, bytes]:
    """Return the files of the last commit of a push, by their paths in the repository.

    Args:
        match: of the URL.
        labels: content of ``LABELS.json``.
        card: text of the cache's card.
        there: paths of the files in the repository.
    """
    files = {f"labels/{INDEX}": labels, "CACHE.json": layout.cache.read_bytes(), "README.md": card.encode()}
    found = {f"{match['folder'] or ''}/{name}".lstrip("/"): data for name, data in files.items()}
    if listed := _root_card(there, match, layout, license_id, card):
        found["README.md"] = listed.encode()
    return found


def _root_card(files: Collection[str], match: re.Match[str], layout: Layout, license_id: str, card: str) -> str | None:
    """Return the card at the root, with the caches of all folders; None if it is to stay as it is.

    ``card`` is that of the cache to be pushed, which may be the cache at the root.
    """
    revision, folder = match["revision"], match["folder"] or ""
    root = f"{match['hub']}://datasets/{match['repo']}" + (f"@{revision}" if revision else "")
    folders = {name.removesuffix("/CACHE.json") for name in files if name.endswith("/CACHE.json")} - {folder}
    caches = {each: fetch_info(Remote(f"{root}/{each}"))[1] for each in folders}
    if not folder:
        return with_list(card, dict(sorted(caches.items()))) if caches else None
    caches[folder] = CacheInfo.model_validate_json(layout.cache.read_bytes())
    caches = dict(sorted(caches.items()))
    data = Remote(root).read_if_exists("README.md", MAX_JSON)
    before = None if data is None else data.decode(errors="replace")
    if "CACHE.json" in files:
        return with_list(before, caches) if before is not None and CACHE_MARK in before else None
    return list_card(caches, root, license_id) if before is None or LIST_MARK in before else None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the hub's library: rejections and, by their base classes, all of its HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), HFValidationError)


@contextmanager
def _refusals(url: str) -> Iterator[None]:
    """Turn what an upload raises into a :class:`UserError`."""
    errors: tuple[type[Exception], ...] = (*hub_errors(), RuntimeError)  # the last of an upload thread
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the hub rejected '{url}' ({reason}): check `hf auth login`, permissions and connection, then push again"
        ) from None


ProgressCallback = Callable[[int, int], None]  # (bytes done, total bytes)
