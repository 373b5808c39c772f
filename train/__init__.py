"""Training of projectors from cached features into frozen language models.

A projector of your own derives from ``train.Projector``. One that ``python -m train export`` wrote is loaded by::

    projector = train.load_projector("exported/demo")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.inference.export import load_projector
    from train.projectors.base import Projector

__all__ = ["Projector", "load_projector"]

_MODULES = {"Projector": "train.projectors.base", "load_projector": "train.inference.export"}


def __getattr__(name: str) -> Any:  # `import train` stays light: torch is imported on first use
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
