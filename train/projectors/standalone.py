"""A trained projector, rebuilt with PyTorch and safetensors alone. An export carries this file as ``projector``.

In: an export's folder. Out: its projector: features float32 [B, T, C] and their mask [B, T] (True = a frame) -> soft
tokens [B, S, D] and their mask [B, S].
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file

from .base import Projector, under_autocast
from .mixer import LayerMixer, MixedProjector


def load(folder: str | Path) -> Projector:
    """The projector in ``folder``, in evaluation mode, on the CPU; its weights are float32."""
    about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    module, name = about["source"].split(":")
    kind = getattr(import_module(f".{module}", __package__), name)
    sizes = about["channels"], about["width"], about["embedding_rms"]
    if module == "own":
        projector = under_autocast(kind)(*sizes, **about["projector"]["settings"])
    else:
        projector = kind(SimpleNamespace(**about["projector"]), *sizes)
    if about["layers"] > 1:
        projector = MixedProjector(LayerMixer(about["layers"], about["normalise_layers"]), projector)
    projector.load_state_dict(load_file(Path(folder) / "projector.safetensors"))
    return projector.eval()
