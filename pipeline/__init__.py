"""Extraction of features with frozen speech encoders. An encoder of your own derives from ``pipeline.OwnEncoder``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.encoders.own import OwnEncoder

__all__ = ["OwnEncoder"]


def __getattr__(name: str) -> Any:  # `import pipeline` stays light: torch is imported on first use
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pipeline.encoders.own"), name)
