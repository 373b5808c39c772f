"""Load scripts outside the packages, for tests that call their functions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


def load_script(path: str) -> ModuleType:
    """Return the script at ``path``, relative to the repository, as a module, without running its main part."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # required by the script's dataclasses
    spec.loader.exec_module(module)
    return module
