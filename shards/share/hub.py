"""A cache as a dataset of a Hugging Face hub: repository, files in commits, dataset card.

In: a complete cache folder and ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``. Out: the dataset, made if it does not
exist. Records are committed after their files; ``CACHE.json`` and the card are the last commit. Files that stand there
with the same content are not sent again, so an interrupted push resumes. The token is huggingface_hub's (``hf auth
login``).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from shards.errors import UserError
from shards.format.layout import Layout
from shards.inspect.info import describe_cache
from shards.share.dataset_card import dataset_card

DATASET_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?")
COMMIT_PATTERNS = (
    ["plan.parquet", "shards/*.tar", "shards/*.parquet"],
    ["shards/*.json", "manifest.parquet", "failures.parquet"],
)


def parse_dataset_url(url: str, license_id: str | None) -> re.Match[str]:
    """The parts of a dataset's URL; UserError for another URL, or without the licence that its card names."""
    match = DATASET_URL.fullmatch(url)
    if match is None:
        raise UserError(f"'{url}' names no dataset: write hf://datasets/OWNER/NAME, or …/NAME/FOLDER")
    if license_id is None:
        raise UserError("a published dataset names its licence: add --licence, such as cc-by-4.0, or other")
    return match


def push_to_hub(layout: Layout, url: str, license_id: str) -> None:
    """Copy a valid cache into a dataset repository.

    Raises:
        UserError: what the hub refuses.
    """
    match = parse_dataset_url(url, license_id)
    repo, folder, revision = match["repo"], match["folder"] or "", match["revision"]

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Refusals and, by their bases, whatever the HTTP client raises; an upload in a thread fails as RuntimeError.
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    errors: tuple[type[Exception], ...] = (*bases, HFValidationError, RuntimeError)
    api, web = HfApi(), f"https://huggingface.co/datasets/{repo}/resolve/{revision or 'main'}"
    text = dataset_card(describe_cache(layout.path), url, license_id, folder, web)
    try:
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        for patterns in COMMIT_PATTERNS:  # upload_folder resumes, and splits what is too large for one commit
            api.upload_folder(
                repo_id=repo,
                repo_type="dataset",
                revision=revision,
                folder_path=layout.path,
                path_in_repo=folder,
                allow_patterns=patterns,
                commit_message=", ".join(patterns),
            )
        last = (("CACHE.json", layout.cache.read_bytes()), ("README.md", text.encode()))
        operations = [CommitOperationAdd(f"{folder}/{name}".lstrip("/"), data) for name, data in last]
        api.create_commit(repo, operations, commit_message="CACHE.json", repo_type="dataset", revision=revision)
    except errors as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the hub did not accept '{url}' ({reason}): check `hf auth login`, rights and connection, then push again"
        ) from None


ProgressCallback = Callable[[int, int], None]  # bytes done, bytes in all
