"""Loads an exported projector with only PyTorch and safetensors. An export contains a copy of this file.

The projector maps features float32 [B, T, C] and their mask [B, T] (True at frames) to soft tokens [B, S, D] and their
mask [B, S].
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file

from .base import Projector, under_autocast
from .ctc import HeadTokens
from .mixer import LayerMixer, MixedProjector


def load(folder: str | Path) -> Projector:
    """Load the projector of the export ``folder`` on the CPU, in evaluation mode, with float32 weights."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    module, name = config["source"].split(":")
    projector_class = getattr(import_module(f".{module}", __package__), name)
    sizes = config["channels"], config["width"], config["embedding_rms"]
    if module == "own":
        projector = under_autocast(projector_class)(*sizes, **config["projector"]["settings"])
    else:
        tokens = config.get("tokens")
        own = [HeadTokens.placeholder(len(tokens), config["width"])] if tokens else []
        projector = projector_class(SimpleNamespace(**config["projector"]), *sizes, *own)
    if config["layers"] > 1:
        projector = MixedProjector(LayerMixer(config["layers"], config["normalise_layers"]), projector)
    projector.load_state_dict(load_file(Path(folder) / "projector.safetensors"))
    return projector.eval()
