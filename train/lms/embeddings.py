"""The tokenizer and the input embeddings of a language model of which nothing else is loaded.

Stage 1 (``train/pretrain/``) compares audio with token embeddings alone. From a transformers folder, the rows that it
asks for are read and no other tensor: the model is built on the meta device, which holds shapes without values.
nanochat's checkpoints are one file each, which is loaded whole and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from train.config.model import LmConfig
from train.lms.base import Tokenizer
from train.lms.load import resolve_lm

_RMS_ROWS = 4096  # evenly spaced rows over which the RMS is computed


@dataclass(frozen=True)
class TokenEmbeddings:
    """What stage 1 needs of a language model."""

    reference: str
    identity: str  # as that of the language model
    files: dict[str, str]  # sha256 of the configs and the tokenizer's files, by name
    tokenizer: Tokenizer
    width: int  # D
    count: int  # rows of the embedding matrix
    rows: Callable[[Sequence[int]], Tensor]  # ids -> what the model's ``embed`` returns for them, float32 [N, D]

    def rms(self) -> float:
        """Return the RMS of the embeddings, over ``_RMS_ROWS`` of them."""
        step = max(1, self.count // _RMS_ROWS)
        return math.sqrt(float(self.rows(range(0, self.count, step)).square().mean()))


def read_embeddings(reference: str, options: LmConfig, seed: int = 0) -> TokenEmbeddings:
    """Read the tokenizer and the input embeddings of the model of ``reference``.

    Args:
        reference: as in ``load_lm``.
        options: the settings of the language model.
        seed: that of the run, for nanochat's random weights.

    Raises:
        UserError: the reference cannot be resolved, or the folder holds no causal LM with an embedding matrix.
    """
    if reference.startswith("nanochat:"):
        from train.lms.nanochat.model import load_nanochat

        lm = load_nanochat(reference, device="cpu", dtype=torch.float32, train=False, seed=seed, options=options)
        weight = lm.embed(torch.arange(lm.gpt.transformer.wte.num_embeddings)).float()
        return TokenEmbeddings(
            reference, lm.identity, {}, lm.tokenizer, lm.width, len(weight), lambda ids: weight[torch.tensor(list(ids))]
        )
    return _from_folder(resolve_lm(reference), reference)


def _from_folder(folder: Path, reference: str) -> TokenEmbeddings:
    from pipeline.weights.pretrained import forbid_hub_kernels, load_pretrained
    from train.lms.hf.model import HfTokenizer, generation_ends, hash_configs, hash_weights, loading_errors

    forbid_hub_kernels()  # before the first import of transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with loading_errors(folder, reference):
        config = load_pretrained(AutoConfig, folder)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call] # as in the library
        tokenizer = load_pretrained(AutoTokenizer, folder)
    module = model.get_input_embeddings()
    count, width = module.num_embeddings, module.embedding_dim
    name = next(name for name, each in model.named_parameters() if each is module.weight)
    path, stored = _find_rows(folder, name, (count, width), reference)
    factor = _module_factor(module)

    def rows(ids: Sequence[int]) -> Tensor:
        from safetensors import safe_open

        wanted = torch.tensor(list(ids), dtype=torch.int64)
        with safe_open(path, framework="pt") as file:
            matrix = file.get_slice(stored)
            found = torch.cat([matrix[int(i) : int(i) + 1].float() for i in wanted]) if len(wanted) else None
        if found is None:
            return torch.empty(0, width)
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"'{reference}' holds NaN or infinite values in the tensor {stored}: copy it again")
        return found * factor

    ends = generation_ends(model) if getattr(model, "generation_config", None) else []
    own = HfTokenizer(tokenizer, reference, ends)
    return TokenEmbeddings(reference, hash_weights(folder), hash_configs(folder), own, width, count, rows)


def _find_rows(folder: Path, name: str, shape: tuple[int, int], reference: str) -> tuple[Path, str]:
    """Return the file and the name of the embedding matrix: as the model calls it, or without the model's prefix."""
    from safetensors import SafetensorError, safe_open

    from pipeline.weights.resolve import weight_files

    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="np") as file:
                for stored in file.keys():  # noqa: SIM118 - not a mapping
                    same = stored == name or name.endswith(f".{stored}") or stored.endswith(f".{name}")
                    if same and tuple(file.get_slice(stored).get_shape()) == shape:
                        return path, stored
        except SafetensorError as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"'{path}' cannot be read ({reason}): copy it again") from None
    raise UserError(
        f"'{reference}' has no tensor {name} of shape {list(shape)} in its safetensors files, and stage 1 needs the "
        "input embeddings: set pretrain.steps=0, or choose another lm.model"
    )


def _module_factor(module: Any) -> float:
    """Return the factor by which an embedding module multiplies its rows, as Gemma's does."""
    scale = getattr(module, "scalar_embed_scale", None) or getattr(module, "embed_scale", 1.0)
    return float(scale) if isinstance(scale, int | float) else 1.0
