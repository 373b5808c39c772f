"""Training of projectors from cached features into language models.

A trained projector that ``python -m train export`` wrote comes back in one line::

    projector = train.load_projector("exported/demo")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import train` stays light
    from train.projectors import Projector


def load_projector(folder: str | Path, kind: str | None = None) -> Projector:
    """The projector of an export; see :func:`train.inference.export.load_projector`."""
    from train.inference.export import load_projector as load

    return load(folder, kind)
