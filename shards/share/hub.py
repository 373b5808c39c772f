"""Uploads a cache to a dataset repository on a Hugging Face hub, with a dataset card.

Takes a complete cache folder and ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``; creates the dataset if it does not
exist. Records are committed after their files; ``CACHE.json``, ``LABELS.json`` and the card are the last commit. Files
that are already there with the same content are not sent again, so an interrupted push resumes. Uses the token of
huggingface_hub (``hf auth login``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from shards.errors import UserError
from shards.format.layout import Layout
from shards.inspect.info import describe_cache
from shards.labels.store import INDEX
from shards.share.dataset_card import dataset_card

DATASET_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?")
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
        raise UserError(f"'{url}' is not a dataset URL: write hf://datasets/OWNER/NAME, or …/NAME/FOLDER")
    if license_id is None:
        raise UserError("a published dataset needs a license: add --licence with an identifier such as cc-by-4.0")
    return match


def push_to_hub(
    layout: Layout, url: str, license_id: str, label_files: Sequence[str], labels: bytes, check: Callable[[], None]
) -> None:
    """Upload a valid cache to a dataset repository.

    Args:
        label_files: names of the files in ``labels/`` to upload.
        labels: content of ``LABELS.json``.
        check: called before the last commit; raises UserError if the cache there is no longer as it was. A commit of
            another process after that makes the last commit fail.

    Raises:
        UserError: the hub refused the request, or the upload failed.
    """
    match = parse_dataset_url(url, license_id)
    repo, folder, revision = match["repo"], match["folder"] or "", match["revision"]

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Rejections and, by their base classes, all errors of the HTTP client. A failed upload thread raises RuntimeError.
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    errors: tuple[type[Exception], ...] = (*bases, HFValidationError, RuntimeError)
    api, base_url = HfApi(), f"https://huggingface.co/datasets/{repo}/resolve/{revision or 'main'}"
    text = dataset_card(describe_cache(layout.path), url, license_id, folder, base_url)
    try:
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
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
        last = (
            (f"labels/{INDEX}", labels),
            ("CACHE.json", layout.cache.read_bytes()),
            ("README.md", text.encode()),
        )
        api.create_commit(
            repo,
            [CommitOperationAdd(f"{folder}/{name}".lstrip("/"), data) for name, data in last],
            commit_message="CACHE.json",
            repo_type="dataset",
            revision=revision,
            parent_commit=uploaded.oid,
        )
    except errors as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the hub rejected '{url}' ({reason}): check `hf auth login`, permissions and connection, then push again"
        ) from None


ProgressCallback = Callable[[int, int], None]  # (bytes done, total bytes)
