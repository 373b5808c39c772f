"""Loads a local folder with transformers, which then runs no code but its own, downloads nothing and asks nothing.

By default transformers asks on standard input whether to run the Python code of a folder, so that piped input answers
for the user, and replaces layers by compiled kernels of a hub if the package ``kernels`` is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.weights.resolve import read_model_json

ADAPTER = "adapter_config.json"
KERNELS = "USE_HUB_KERNELS"  # read by transformers when it is imported


def load_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """Return ``loader.from_pretrained(folder, **options)``; ``loader`` is a class of transformers.

    Raises:
        ValueError: ``config.json`` asks for kernels of a hub or for other files of weights, or there is an adapter,
            which transformers applies if peft is installed, and else ignores.
        Exception: what transformers raises, for a folder that needs its own code a ValueError.
    """
    config = folder / "config.json"
    for key, value in _texts(read_model_json(config) if config.is_file() else {}):
        if key.endswith("_implementation") and "/" in value:
            raise ValueError(f"its config.json asks for the kernels of '{value}', which are code: remove {key}")
        if key == "transformers_weights":
            raise ValueError(f"its config.json names '{value[:100]}' as its weights: remove {key}")
    if (folder / ADAPTER).exists():
        raise ValueError(f"it has an adapter, which depends on installed packages: merge it, or remove {ADAPTER}")
    forbid_hub_kernels()
    return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def forbid_hub_kernels() -> None:
    """Let transformers load no kernels of a hub, in this process and its children."""
    os.environ[KERNELS] = "NO"
    kernels: Any = sys.modules.get("transformers.integrations.hub_kernels")
    if kernels is not None:  # it was imported before, by the user's own program
        kernels._kernels_enabled = False


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, value) of all texts in a JSON tree."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else ((key, value) for value in tree)
        for name, value in pairs:
            yield from _texts(value, str(name))
    elif isinstance(tree, str):
        yield key, tree
