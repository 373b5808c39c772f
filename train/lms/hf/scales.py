"""By what a family multiplies its embeddings and its logits, read from its config and proved on its own logits.

In: a Hugging Face causal LM. Out: :class:`Scales`. A run goes past the model's own ``forward`` (it embeds rows itself,
and makes logits at target positions alone), so what a family does there must be done here:

| | on embeddings | on logits |
|---|---|---|
| Gemma | in the embedding module | softcap (Gemma 2 on) |
| Granite | in the base model, on ``inputs_embeds``, too | / ``logits_scaling`` |
| Cohere | | × ``logit_scale`` |
| Falcon-H1 | × ``embedding_multiplier``, of ids alone | × ``lm_head_multiplier`` |

No list of families is kept: of all factors that a config tells, those are taken that reproduce the model's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = 0.02  # of the largest logit: what bfloat16 and other kernels may differ by


@dataclass(frozen=True, slots=True)
class Scales:
    """What stands between ids and rows, and between the output matrix and logits."""

    embedding: float = 1.0  # of a row of the embedding module, before it is given as ``inputs_embeds``
    logits: float = 1.0  # of the output matrix's product
    softcap: float | None = None  # c · tanh(logits / c), last

    def to_logits(self, product_NV: Tensor) -> Tensor:
        """The output matrix's product [N, V] -> logits [N, V] float32."""
        logits = product_NV.float()
        if self.logits != 1:
            logits = logits * self.logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def find_scales(model: Any) -> Scales | None:
    """The factors with which ``model``'s parts give its own logits of four tokens; None when none does."""
    config = model.config.get_text_config()
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    found: list[tuple[float, Scales]] = []
    softcap = getattr(config, "final_logit_softcapping", None)
    for embedding, logits in product(_embedding_factors(config), _logit_factors(config)):
        scales = Scales(embedding, logits, softcap)
        rows = model.get_input_embeddings()(ids) * embedding
        states = model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state[0]
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
