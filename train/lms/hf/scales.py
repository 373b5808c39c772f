"""The factors by which a model family scales its embeddings and logits.

A run does not call the model's own ``forward``: it embeds ids itself and computes logits only at target positions. What
a family does there must be done here:

| | on embeddings | on logits |
|---|---|---|
| Gemma | in the embedding module | softcap (Gemma 2 on) |
| Granite | in the base model, on ``inputs_embeds``, too | / ``logits_scaling`` |
| Cohere | | × ``logit_scale`` |
| Falcon-H1 | × ``embedding_multiplier``, for ids only | × ``lm_head_multiplier`` |

There is no list of families: :func:`find_scales` tries the factors in the config of a model and takes those that
reproduce its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = 0.02  # relative to the largest logit: bfloat16 and different kernels may differ by this much


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors of the input embeddings and of the logits."""

    embedding: float = 1.0  # of the output of the embedding module, before it is passed as ``inputs_embeds``
    logits: float = 1.0  # of the product with the output matrix
    softcap: float | None = None  # c · tanh(logits / c), applied last

    def to_logits(self, product_NV: Tensor) -> Tensor:
        """Map the product with the output matrix [N, V] to logits [N, V] float32."""
        logits = product_NV.float()
        if self.logits != 1:
            logits = logits * self.logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def decoder(model: Any) -> Any:
    """Return the module below the output matrix, which maps embeddings to hidden states."""
    base = model.base_model
    return getattr(model, "model", base) if base is model else base  # Llama 4's text model names no base model


@torch.no_grad()
def find_scales(model: Any) -> Scales | None:
    """Return the factors that reproduce the logits of ``model`` for four tokens, or None if there are none."""
    config = model.config.get_text_config()
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    found: list[tuple[float, Scales]] = []
    softcap = getattr(config, "final_logit_softcapping", None)
    for embedding, logits in product(_embedding_factors(config), _logit_factors(config)):
        scales = Scales(embedding, logits, softcap)
        rows = model.get_input_embeddings()(ids) * embedding
        states = decoder(model)(inputs_embeds=rows, use_cache=False).last_hidden_state[0]
        ours = scales.to_logits(model.get_output_embeddings()(states))
        found.append((float((ours - theirs).abs().max()), scales))
    error, best = min(found, key=lambda each: each[0])
    return best if error <= _TOLERANCE * float(theirs.abs().max()) else None


def _embedding_factors(config: Any) -> list[float]:
    return _distinct([1.0, _config_factor(config, "embedding_multiplier")])


def _logit_factors(config: Any) -> list[float]:
    scaling = _config_factor(config, "logits_scaling")  # Granite divides by it, HyperCLOVA X multiplies
    return _distinct(
        [1.0, scaling, 1 / scaling, _config_factor(config, "logit_scale"), _config_factor(config, "lm_head_multiplier")]
    )


def _config_factor(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else 1.0


def _distinct(values: list[float]) -> list[float]:
    return list(dict.fromkeys(values))
