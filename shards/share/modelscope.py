"""Uploads a cache to a dataset on ModelScope, in the order of ``hub.py``, with the hub's own library.

Takes a complete cache folder and ``modelscope://datasets/OWNER/NAME[@REVISION][/FOLDER]``. Files that are already there
with the same sha256 are not sent again. The hub has no commit that fails if another came before it, so another push at
the same time is noticed only by the check before the last commit, or by the verification after it.
Uses the token of the library (``modelscope login``, or MODELSCOPE_API_TOKEN) and MODELSCOPE_ENDPOINT.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.files import file_sha256, scratch_folder
from shards.format.layout import Layout
from shards.inspect.info import describe_cache
from shards.remote.client import missing_modelscope
from shards.share.dataset_card import dataset_card
from shards.share.hub import COMMIT_PATTERNS, last_commit, parse_dataset_url

if TYPE_CHECKING:
    from modelscope_hub import HubApi


def push_to_modelscope(
    layout: Layout,
    url: str,
    license_id: str,
    label_files: Sequence[str],
    labels: bytes,
    check: Callable[[], None],
    private: bool = False,
) -> None:
    """Upload a valid cache; see :func:`shards.share.hub.push_to_hub`.

    Raises:
        UserError: the library is not installed; the repository is public and must not be; or the hub refused.
    """
    match = parse_dataset_url(url, license_id)
    repo, folder, revision = match["repo"], match["folder"] or "", match["revision"] or "master"
    try:
        from modelscope_hub import HubApi, get_default_config
    except ImportError:
        raise missing_modelscope() from None
    api = HubApi()
    base_url = f"{get_default_config().endpoint}/datasets/{repo}/resolve/{revision}"
    text = dataset_card(describe_cache(layout.path), url, license_id, folder, base_url)
    with _refusals(url):
        _open_repository(api, repo, license_id, private, url)
        there = _list(api, repo, revision)
        options: dict[str, Any] = {"repo_id": repo, "repo_type": "dataset", "revision": revision}
        options |= {"use_cache": False, "disable_tqdm": True}  # its cache would be a file in the folder
        for patterns in (*COMMIT_PATTERNS, [f"labels/{name}" for name in label_files]):
            names = sorted({str(path.relative_to(layout.path)) for each in patterns for path in layout.path.glob(each)})
            same = [name for name in names if _is_there(layout.path / name, there.get(f"{folder}/{name}".lstrip("/")))]
            if len(same) < len(names):
                api.upload_folder(
                    folder_path=layout.path,
                    path_in_repo=folder,
                    allow_patterns=patterns,
                    ignore_patterns=[glob.escape(name) for name in same],
                    commit_message=", ".join(patterns),
                    **options,
                )
        check()
        with scratch_folder("earshard-push-") as scratch:
            for name, data in last_commit(match, layout, license_id, labels, text, list(there)).items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(data)
            api.upload_folder(folder_path=scratch, commit_message="CACHE.json", **options)


def _open_repository(api: HubApi, repo: str, license_id: str, private: bool, url: str) -> None:
    """Create the dataset if it does not exist; UserError if it is not private and must be."""
    from modelscope_hub import HubError, Visibility
    from modelscope_hub.errors import is_repo_exists_error

    wanted = Visibility.PRIVATE if private else Visibility.PUBLIC
    try:
        api.create_repo(repo, "dataset", visibility=wanted, license=license_id)
    except HubError as error:
        if not is_repo_exists_error(error):
            raise
        if private and api.get_repo(repo, "dataset").visibility != Visibility.PRIVATE:
            raise UserError(
                f"'{url}' is already public: make it private on the hub, or push without --private"
            ) from None


def _list(api: HubApi, repo: str, revision: str) -> dict[str, Any]:
    """Return path and sha256 of the files of a dataset."""
    from modelscope_hub import NotExistError

    try:
        listed = api.list_repo_files(repo, "dataset", revision=revision)
    except NotExistError:  # nothing was ever committed
        return {}
    return {str(entry.path): entry.sha256 for entry in listed if entry.type != "tree"}


def _is_there(path: Path, sha256: Any) -> bool:
    return bool(sha256) and file_sha256(path) == sha256


@contextmanager
def _refusals(url: str) -> Iterator[None]:
    """Turn what an upload raises into a :class:`UserError`."""
    from modelscope_hub import HubError
    from requests import RequestException

    try:
        yield
    except (HubError, RequestException) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the hub rejected '{url}' ({reason}): check `modelscope login`, permissions and connection, and push again"
        ) from None
