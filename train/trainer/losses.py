"""The loss of a training step: cross-entropy, with optional distillation and contrastive terms.

In: a batch's rows and their negative log-likelihood. Out: a ``BatchLoss``, and the scalar that is differentiated:

    ((1 - d) · nll + d · divergence) / target tokens + c · contrast / utterances

with d = ``distill.weight`` (1: the divergence alone, as Ultravox) and c = ``contrastive.weight``, sums over all batches
and ranks of the step. ``metrics.jsonl`` holds ``loss`` (always the cross-entropy), ``distill`` (nats a target token)
and ``contrastive`` (nats an utterance).

The contrastive term is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) from audio to text: the mean of an
utterance's soft tokens, as they stand in the LM's input, must be nearer by cosine to the mean of its own text's
embeddings than to those of the other texts of the global batch. The negatives are texts, not soft tokens, so each rank
needs only the others' texts, and the term is the same under any number of ranks. Equal texts count once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.model import ContrastiveConfig, DistillConfig
from train.lms.base import LmRequest
from train.lms.distill import distillation_losses
from train.model.audio_lm import AudioLM, BatchLoss, batch_loss

DISTILL, CONTRASTIVE = "distill", "contrastive"


class Objectives:
    """The terms that a run's settings ask for."""

    def __init__(self, distill: DistillConfig | None = None, contrastive: ContrastiveConfig | None = None) -> None:
        self.distill, self.contrastive = distill or DistillConfig(), contrastive or ContrastiveConfig()

    @property
    def names(self) -> list[str]:
        """Of the terms beside the cross-entropy."""
        weights = {DISTILL: self.distill.weight, CONTRASTIVE: self.contrastive.weight}
        return [name for name, weight in weights.items() if weight]

    def batch_loss(
        self, model: AudioLM, request: LmRequest, nll: Tensor | None, texts: Sequence[str], negatives: Sequence[str]
    ) -> BatchLoss:
        """All terms of a batch.

        Args:
            nll: [B] of ``request``; None with distillation, which computes it in the pass that it needs anyway.
            texts: [B], those of the batch.
            negatives: the texts of the global batch.
        """
        auxiliary: dict[str, Tensor] = {}
        if nll is None:
            nll, auxiliary[DISTILL] = distillation_losses(
                model.lm, request.soft, request.soft_mask, request.prefix, request.suffix, request.targets,
                temperature=self.distill.temperature,
            )  # fmt: skip
        if self.contrastive.weight:
            auxiliary[CONTRASTIVE] = contrastive_loss(
                model, request.soft, request.soft_mask, texts, negatives, self.contrastive.temperature
            )
        return batch_loss(request, nll, auxiliary)

    def step_loss(self, out: BatchLoss, tokens: float, utterances: float) -> Tensor:
        """The part of a batch in the loss of a step of ``tokens`` target tokens and ``utterances``."""
        d, c = self.distill.weight, self.contrastive.weight
        loss = out.nll.sum() / tokens
        if d:
            loss = (1 - d) * loss + d * out.auxiliary[DISTILL].sum() / tokens
        if c:
            loss = loss + c * out.auxiliary[CONTRASTIVE].sum() / utterances
        return loss

    def means(self, sums: Sequence[float], tokens: float, utterances: float) -> dict[str, float]:
        """``sums`` over the step in the order of ``names``, as means for ``metrics.jsonl``."""
        per = {DISTILL: tokens, CONTRASTIVE: utterances}
        return {name: total / per[name] for name, total in zip(self.names, sums, strict=True)}


def contrastive_loss(
    model: AudioLM,
    soft: Tensor,
    soft_mask: Tensor,
    texts: Sequence[str],
    negatives: Sequence[str],
    temperature: float,
) -> Tensor:
    """InfoNCE of each utterance [B] in nats, its own text among ``negatives``; gradient to the soft tokens alone."""
    others = list(dict.fromkeys([*negatives, *texts]))
    with torch.no_grad():
        pooled_VD = F.normalize(torch.stack([_mean_text_embedding(model, text) for text in others]), dim=-1)
    embedded = model.lm.to_input_embeddings(soft).float().masked_fill(~soft_mask[..., None], 0)
    pooled_BD = F.normalize(embedded.sum(1) / soft_mask.sum(1, keepdim=True), dim=-1)
    own = torch.tensor([others.index(text) for text in texts], device=soft.device)
    return F.cross_entropy(pooled_BD @ pooled_VD.T / temperature, own, reduction="none")


def _mean_text_embedding(model: AudioLM, text: str) -> Tensor:
    """Mean of the embeddings of a text's tokens [D] float32; of its end where it is empty."""
    ids = model.prompt.target_ids(text)
    return model.lm.embed(torch.tensor(ids[:-1] or ids, device=model.lm.device)).float().mean(0)
