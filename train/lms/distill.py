"""Distillation within one frozen language model: the teacher reads the transcript, the student the soft tokens.

The losses are the negative log-likelihood of the targets, which are transcripts, and KL(teacher || student) at the
target positions, with both softmaxes at a temperature and without a factor of its square. Source: Ultravox
(fixie-ai/ultravox, ``ultravox_model.py``: ``KL_Divergence`` with ``kl_temperature`` 2). In Ultravox the targets are
answers of the LM; here they are transcripts.

```
student  [prefix | soft tokens | suffix | targets]
teacher  [prefix | transcript  | suffix | targets]      no gradient
```
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from train.lms.base import LanguageModel
from train.lms.packing import Ids, valid_soft

TABLES = 4  # tensors [targets, V] in memory for a piece: logits and log-probabilities of both


def distillation_losses(
    lm: LanguageModel,
    soft: Tensor,
    soft_mask: Tensor,
    prefix: Ids,
    suffix: Ids,
    targets: Ids,
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the divergence from the teacher, differentiable in ``soft``.

    Logits are computed only at target positions, with at most ``lm.max_logits`` values in memory at a time.

    Args:
        lm: the language model, as student and teacher.
        soft: [B, S, D].
        soft_mask: bool [B, S], on the CPU.
        prefix: ids before the soft tokens, per row.
        suffix: ids after the soft tokens, per row.
        targets: ids of the transcript and one that ends it, per row.
        temperature: of both softmaxes.

    Returns:
        (cross-entropy, KL divergence) in nats, float32 [B] each, summed over the targets of a row.
    """
    packed = lm.pack(soft_mask, prefix, suffix, targets)
    student_ND = packed.at_targets(lm.hidden(packed, valid_soft(soft, soft_mask)))
    with torch.no_grad():
        teacher_ND = _teacher_hidden(lm, prefix, suffix, targets, soft)

    def losses(student_ND: Tensor, teacher_ND: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm.logits(student_ND)
        with torch.no_grad():
            teacher = F.log_softmax(lm.logits(teacher_ND) / temperature, -1)
        student = F.log_softmax(logits / temperature, -1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        return F.cross_entropy(logits, ids, reduction="none"), divergence

    rows = max(1, lm.max_logits // (TABLES * lm.vocab_size))
    split = [torch.split(each, rows) for each in (student_ND, teacher_ND, packed.targets)]
    pieces = list(zip(*split, strict=True))
    if len(pieces) == 1:
        results = [losses(*pieces[0])]
    else:
        results = [recompute(losses, *piece, use_reentrant=False) for piece in pieces]
    nll, divergence = (torch.cat(parts) for parts in zip(*results, strict=True))
    return packed.sum_by_row(nll), packed.sum_by_row(divergence)


def _teacher_hidden(lm: LanguageModel, prefix: Ids, suffix: Ids, targets: Ids, soft: Tensor) -> Tensor:
    """Return the hidden states of the model that reads the transcripts, at the targets [N, D]."""
    bos = lm.tokenizer.bos
    placeholder = [lm.tokenizer.eos if bos is None else bos]  # for an empty transcript in an empty prompt
    texts = [
        [*b, *ids[:-1]] if b or a or len(ids) > 1 else placeholder
        for b, a, ids in zip(prefix, suffix, targets, strict=True)
    ]
    packed = lm.pack(torch.zeros(len(texts), 0, dtype=torch.bool), texts, suffix, targets)
    return packed.at_targets(lm.hidden(packed, soft.new_zeros(0, soft.shape[-1])))
