"""The loss of a training step: cross-entropy, with optional distillation and contrastive terms.

The loss of a step is

    ((1 - d) · nll + d · divergence + a · ctc + b · spelling) / target tokens + c · contrastive / utterances

with d = ``distill.weight`` (1 uses the divergence alone, as Ultravox does), a = ``ctc.weight`` and c =
``contrastive.weight``, which may both fall to 0 over ``decay_steps``, and b = ``projector.spelling`` in stage 1, times
a in stage 2. Every sum is over all batches and ranks of the step. ``metrics.jsonl`` holds ``loss`` (always the
cross-entropy), ``distill`` and ``ctc`` (nats per target token), ``spelling`` (nats per byte) and ``contrastive`` (nats
per utterance).

The contrastive term is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) from audio to text. The query is the mean
of an utterance's soft tokens as the LM receives them, the keys are the mean token embeddings of the texts of the global
batch, and the similarity is the cosine. Because the negatives are texts rather than soft tokens, ranks exchange only
texts, and the loss does not depend on the number of ranks. Duplicate texts count once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.model import ContrastiveConfig, CtcConfig, DistillConfig
from train.config.train import TrainConfig
from train.distributed.device import all_to_device, to_device
from train.lms.base import LmRequest
from train.lms.distill import distillation_losses
from train.lms.packing import Ids
from train.model.audio_lm import AudioLM, BatchLoss, batch_loss
from train.projectors.ctc import ctc_nll

DISTILL, CONTRASTIVE, CTC_TERM, SPELLING = "distill", "contrastive", "ctc", "spelling"


class Objectives:
    """The loss terms enabled by the settings of a run."""

    def __init__(
        self,
        distill: DistillConfig | None = None,
        contrastive: ContrastiveConfig | None = None,
        ctc: CtcConfig | None = None,
        step: int = 0,
        spelling: float = 0.0,
    ) -> None:
        """Compute the weights of a step.

        Args:
            step: number of completed steps.
            spelling: weight of the CTC loss over bytes, for a projector that scores them.
        """
        self.distill, self.contrastive = distill or DistillConfig(), contrastive or ContrastiveConfig()
        self.contrastive_weight = decayed(self.contrastive, step)
        self.ctc_weight = decayed(ctc or CtcConfig(), step)
        self.spelling_weight = spelling

    @classmethod
    def of_step(cls, config: TrainConfig, step: int) -> Objectives:
        """Return the terms of a run after ``step`` steps."""
        own = getattr(config.projector, "spelling", 0.0)
        share = 1.0 if config.is_stage_one else decayed(config.ctc, step)
        return cls(config.distill, config.contrastive, config.ctc, step, own * share)

    @property
    def names(self) -> list[str]:
        """Names of the enabled terms other than the cross-entropy."""
        weights = {DISTILL: self.distill.weight, CONTRASTIVE: self.contrastive_weight, CTC_TERM: self.ctc_weight}
        weights |= {SPELLING: self.spelling_weight}
        return [name for name, weight in weights.items() if weight]

    def batch_loss(
        self, model: AudioLM, request: LmRequest, nll: Tensor | None, texts: Sequence[str], negatives: Sequence[str]
    ) -> BatchLoss:
        """Compute all terms of a batch.

        Args:
            nll: [B], the negative log-likelihood of each row of ``request`` in nats; None with distillation, which
                computes it in its own forward pass.
            texts: [B], the texts of the batch.
            negatives: the texts of the global batch.
        """
        auxiliary: dict[str, Tensor] = {}
        if nll is None:
            nll, auxiliary[DISTILL] = self._distilled(model, request)
        scores = model.projector.take_scores()
        if self.ctc_weight:
            auxiliary[CTC_TERM] = model.ctc_nll(request, scores, texts)
        if self.spelling_weight:
            auxiliary[SPELLING] = spelling_loss(*scores["bytes"], texts, request.targets)
        if self.contrastive_weight:
            auxiliary[CONTRASTIVE] = contrastive_loss(
                model, request.soft, request.soft_mask, texts, negatives, self.contrastive.temperature
            )
        return batch_loss(request, nll, auxiliary)

    def idle_backward(self, model: AudioLM, request: LmRequest, nll: Tensor | None) -> None:
        """Run the passes of the LM that the losses of a batch need, for a row that counts for nothing."""
        nll = self._distilled(model, request)[0] if nll is None else nll
        nll.sum().backward()  # type: ignore[no-untyped-call]

    def _distilled(self, model: AudioLM, request: LmRequest) -> tuple[Tensor, Tensor]:
        return distillation_losses(
            model.lm, request.soft, request.soft_mask, request.prefix, request.suffix, request.targets,
            temperature=self.distill.temperature,
        )  # fmt: skip

    def step_loss(self, out: BatchLoss, tokens: float, utterances: float) -> Tensor:
        """Return the contribution of a batch to the loss of a step with ``tokens`` target tokens and ``utterances``."""
        d, c = self.distill.weight, self.contrastive_weight
        loss = out.nll.sum() / tokens
        if d:
            loss = (1 - d) * loss + d * out.auxiliary[DISTILL].sum() / tokens
        if self.ctc_weight:
            loss = loss + self.ctc_weight * out.auxiliary[CTC_TERM].sum() / tokens
        if self.spelling_weight:
            loss = loss + self.spelling_weight * out.auxiliary[SPELLING].sum() / tokens
        if c:
            loss = loss + c * out.auxiliary[CONTRASTIVE].sum() / utterances
        return loss

    def means(self, sums: Sequence[float], tokens: float, utterances: float) -> dict[str, float]:
        """Turn ``sums`` over the step, in the order of ``names``, into the means logged in ``metrics.jsonl``."""
        per = {DISTILL: tokens, CONTRASTIVE: utterances, CTC_TERM: tokens, SPELLING: tokens}
        return {name: total / per[name] for name, total in zip(self.names, sums, strict=True)}


def decayed(config: ContrastiveConfig | CtcConfig, step: int) -> float:
    """Return the weight of a term after ``step`` steps."""
    left = 1.0 if config.decay_steps is None else max(0.0, 1 - step / config.decay_steps)
    return config.weight * left


def spelling_loss(scores: Tensor, mask: Tensor, texts: Sequence[str], targets: Ids) -> Tensor:
    """Return the CTC loss of the bytes of each text: nats per byte times the number of its targets, float32 [B].

    Args:
        scores: [B, S, 257], the blank and 256 bytes.
        mask: bool [B, S].
        texts: [B].
        targets: [B], target ids, by whose number all losses of a step are divided.
    """
    classes = [[1 + byte for byte in text.encode()] for text in texts]
    shares = [len(ids) / max(1, len(row)) for ids, row in zip(targets, classes, strict=True)]
    return ctc_nll(scores, mask, classes) * to_device(torch.tensor(shares, dtype=scores.dtype), scores.device)


def contrastive_loss(
    model: AudioLM,
    soft: Tensor,
    soft_mask: Tensor,
    texts: Sequence[str],
    negatives: Sequence[str],
    temperature: float,
) -> Tensor:
    """InfoNCE of each utterance [B] in nats, with ``negatives`` as the other keys.

    Only the soft tokens receive a gradient.

    Args:
        soft: [B, S, D] soft tokens.
        soft_mask: [B, S] bool on the CPU, True at valid soft tokens.
        texts: [B], the text of each utterance.
        negatives: further texts; those equal to one of ``texts`` count once.
        temperature: divisor of the cosine similarities.
    """
    candidates = list(dict.fromkeys([*negatives, *texts]))
    chosen = torch.tensor([candidates.index(text) for text in texts])
    targets, lengths = all_to_device([chosen, soft_mask.sum(1, keepdim=True)], soft.device)
    padding = to_device(~soft_mask, soft.device)
    with torch.no_grad():
        pooled_VD = F.normalize(_mean_text_embeddings(model, candidates), dim=-1)
    embedded = model.lm.to_input_embeddings(soft).float().masked_fill(padding[..., None], 0)
    pooled_BD = F.normalize(embedded.sum(1) / lengths, dim=-1)
    return F.cross_entropy(pooled_BD @ pooled_VD.T / temperature, targets, reduction="none")


def _mean_text_embeddings(model: AudioLM, texts: Sequence[str]) -> Tensor:
    """Mean embedding of the tokens of each text without its end; of the end for an empty text: float32 [V, D]."""
    ids = [(found[:-1] or found) for found in map(model.prompt.target_ids, texts)]
    flat = to_device(torch.tensor([each for row in ids for each in row]), model.lm.device)
    parts = torch.split(model.lm.embed(flat).float(), [len(row) for row in ids])
    return torch.stack([part.mean(0) for part in parts])
