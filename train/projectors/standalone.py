"""Loads an exported projector with only PyTorch and safetensors. An export contains a copy of this file.

The projector maps features float32 [B, T, C], or integer codes [B, T, codebooks], and their mask [B, T] (True at
frames) to soft tokens [B, S, D] and their mask [B, S].
"""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file

from .base import Projector, under_autocast
from .codes import CodeEmbedding, CodesProjector
from .ctc import HeadTokens
from .mixer import LayerMixer, MixedProjector

CONFIG_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab"}


def load(folder: str | Path, lm: str | Path | None = None, projector_class: Any = None) -> Projector:
    """Load the projector of the export ``folder`` on the CPU, in evaluation mode, with float32 weights.

    Args:
        folder: the export.
        lm: the folder of the language model that will read the soft tokens.
        projector_class: the class of the projector; None: the one in this package that ``config.json`` names.

    Raises:
        ValueError: ``lm`` is not the language model of the training.
    """
    if lm is not None:
        require_same_lm(Path(folder), Path(lm))
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    module, name = config["source"].split(":")
    if projector_class is None:
        projector_class = getattr(import_module(f".{module}", __package__), name)
    dim = config.get("code_dim", 0)  # 0: the features are floats
    sizes = dim or config["channels"], config["width"], config["embedding_rms"]
    if module == "own":
        projector = under_autocast(projector_class)(*sizes, **config["projector"]["settings"])
    else:
        tokens = config.get("tokens")
        own = [HeadTokens.placeholder(len(tokens), config["width"])] if tokens else []
        projector = projector_class(SimpleNamespace(**config["projector"]), *sizes, *own)
    if config["layers"] > 1:
        projector = MixedProjector(LayerMixer(config["layers"], config["normalise_layers"]), projector)
    if dim:
        size = config["specs"][0]["frontend"]["codebook_size"]
        projector = CodesProjector(CodeEmbedding(config["channels"], size, dim), projector)
    projector.load_state_dict(load_file(Path(folder) / "projector.safetensors"))
    return projector.eval()


def require_same_lm(folder: Path, lm: Path) -> None:
    """Compare the language model in ``lm`` with ``lm.json`` of an export: configs, files of the tokenizer, weights.

    Raises:
        ValueError: names the file that differs.
    """
    try:
        record = json.loads((folder / "lm.json").read_text(encoding="utf-8"))
        files, weights = dict(record["files"]), str(record["language_model"])
    except FileNotFoundError:
        raise ValueError(f"'{folder}' has no lm.json: export the run again") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"'{folder / 'lm.json'}' is corrupt: export the run again") from None
    if not files:
        raise ValueError(f"'{folder}' was trained with {weights}, which is no folder of transformers: leave out lm")
    if not lm.is_dir():
        raise ValueError(f"'{lm}' is not a folder: pass the folder of the language model")
    found = config_hashes(lm)
    for name in sorted(files.keys() | found.keys()):
        if files.get(name) != found.get(name):
            change = "is missing" if name not in found else "is new" if name not in files else "differs"
            raise ValueError(
                f"{name} of the language model '{lm}' {change} from that of the training of '{folder}', so its ids or "
                "logits would be others: restore it"
            )
    if weights != weights_hash(lm):
        raise ValueError(f"the weights in '{lm}' are not those with which '{folder}' was trained: restore them")


def config_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of the files in ``folder`` that determine ids and the architecture, by their names."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix in CONFIG_SUFFIXES]
    paths += folder.glob("*chat_templates/*.jinja")
    named = {str(path.relative_to(folder)): path for path in sorted(paths)}
    return {name: _sha256(path).hex() for name, path in named.items() if not name.endswith(".index.json")}


def weights_hash(folder: Path) -> str:
    """Return ``sha256:…`` over the safetensors files of ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + _sha256(path))
    return f"sha256:{digest.hexdigest()[:16]}"


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
