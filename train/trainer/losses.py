"""What a step minimises: cross-entropy, and where a run asks for them distillation and a contrastive term.

In: a batch through the model. Out: the terms of the loss an utterance, and the scalar that is differentiated:

    ((1 - d) · nats + d · divergence) / target tokens + c · contrast / utterances

with d = ``distill.weight`` (1: the divergence alone, as Ultravox) and c = ``contrastive.weight``, sums over all batches
and ranks of the step. ``metrics.jsonl`` tells ``loss`` (the cross-entropy, always), ``distill`` (nats a target token)
and ``contrastive`` (nats an utterance).

The contrastive term is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) from audio to text: the mean of an
utterance's soft tokens, as they stand in the LM's input, must be nearer by cosine to the mean of its own text's
embeddings than to those of the other texts of the global batch. Texts, not soft tokens, are what is told apart, so each
rank needs only the others' texts, and the term is the same under any number of ranks. Equal texts are not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.model import ContrastiveConfig, DistillConfig
from train.lms.distill import distilled_nats
from train.model.audio_lm import AudioLM

DISTILL, CONTRASTIVE = "distill", "contrastive"


@dataclass(frozen=True, slots=True)
class Terms:
    """What one batch costs, float32 sums an utterance [B] that carry the gradient."""

    nats: Tensor
    tokens: Tensor  # [B] int64, target tokens
    soft_rms: Tensor  # scalar, RMS of the valid soft tokens; detached
    further: dict[str, Tensor] = field(default_factory=dict)  # by the names of metrics.jsonl


class Objectives:
    """The terms that a run's settings ask for."""

    def __init__(self, distill: DistillConfig | None = None, contrastive: ContrastiveConfig | None = None) -> None:
        self.distill, self.contrastive = distill or DistillConfig(), contrastive or ContrastiveConfig()

    @property
    def names(self) -> list[str]:
        """Of the terms beside the cross-entropy."""
        weights = {DISTILL: self.distill.weight, CONTRASTIVE: self.contrastive.weight}
        return [name for name, weight in weights.items() if weight]

    def measure(
        self, model: AudioLM, features: Tensor, mask: Tensor, texts: Sequence[str], told_apart: Sequence[str] = ()
    ) -> Terms:
        """The terms of a batch: features [B, T, C], mask [B, T]; ``told_apart``: the texts of the global batch."""
        if not self.names:
            out = model.nats(features, mask, texts)
            return Terms(out.nats, out.tokens, out.soft_rms)
        soft, soft_mask = model.soft_tokens(features, mask)
        sides = model.sides(texts)
        further: dict[str, Tensor] = {}
        if self.distill.weight:
            temperature = self.distill.temperature
            nats, further[DISTILL] = distilled_nats(model.lm, soft, soft_mask, *sides, temperature=temperature)
        else:
            nats = model.lm.target_nats(soft, soft_mask, *sides)
        if self.contrastive.weight:
            further[CONTRASTIVE] = contrast(model, soft, soft_mask, texts, told_apart, self.contrastive.temperature)
        tokens = torch.tensor([len(ids) for ids in sides[2]], device=nats.device)
        return Terms(nats, tokens, model.rms(soft, soft_mask), further)

    def loss(self, terms: Terms, tokens: float, utterances: float) -> Tensor:
        """The part of a batch in the loss of a step of ``tokens`` target tokens and ``utterances``."""
        d, c = self.distill.weight, self.contrastive.weight
        loss = terms.nats.sum() / tokens
        if d:
            loss = (1 - d) * loss + d * terms.further[DISTILL].sum() / tokens
        if c:
            loss = loss + c * terms.further[CONTRASTIVE].sum() / utterances
        return loss

    def told(self, sums: Sequence[float], tokens: float, utterances: float) -> dict[str, float]:
        """The means of ``sums``, which come in the order of ``names``, as ``metrics.jsonl`` tells them."""
        per = {DISTILL: tokens, CONTRASTIVE: utterances}
        return {name: total / per[name] for name, total in zip(self.names, sums, strict=True)}


def contrast(
    model: AudioLM,
    soft: Tensor,
    soft_mask: Tensor,
    texts: Sequence[str],
    told_apart: Sequence[str],
    temperature: float,
) -> Tensor:
    """InfoNCE of each utterance [B] in nats, its own text among ``told_apart``; gradient to the soft tokens alone."""
    others = list(dict.fromkeys([*told_apart, *texts]))
    with torch.no_grad():
        pooled_VD = F.normalize(torch.stack([_pooled_text(model, text) for text in others]), dim=-1)
    entered = model.lm.enter(soft).float().masked_fill(~soft_mask[..., None], 0)
    pooled_BD = F.normalize(entered.sum(1) / soft_mask.sum(1, keepdim=True), dim=-1)
    own = torch.tensor([others.index(text) for text in texts], device=soft.device)
    return F.cross_entropy(pooled_BD @ pooled_VD.T / temperature, own, reduction="none")


def _pooled_text(model: AudioLM, text: str) -> Tensor:
    """Mean of the embeddings of a text's tokens [D] float32; of its end where it is empty."""
    ids = model.prompt.target(text)
    return model.lm.embed(torch.tensor(ids[:-1] or ids, device=model.lm.device)).float().mean(0)
