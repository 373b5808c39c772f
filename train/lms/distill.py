"""How far the model that hears is from the same model that reads: distillation within one frozen language model.

In: soft tokens, prompts, and targets, which are transcripts. Out: nats of the targets and the divergence of the two
predictions of each target. Source: Ultravox (fixie-ai/ultravox, ``ultravox_model.py``: ``KL_Divergence`` with
``kl_temperature`` 2): KL(teacher || student) at the target positions, both softmaxes at the temperature, without a
factor of its square. There the answer is the LM's own; here the target is the transcript.

```
student  [before | soft tokens | after | targets]
teacher  [before | transcript  | after | targets]      no gradient
```
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import train.lms.base
from train.lms.base import LanguageModel, sum_by_row
from train.lms.packing import Ids, pack_inputs

TABLES = 4  # tables of [targets, V] that a piece holds: logits and log-probabilities of both


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
    """(nats [B], divergence [B] in nats), float32, each summed over a row's targets; differentiable in ``soft``.

    ``targets`` are a transcript's ids and one that ends it. soft [B, S, D], soft_mask [B, S] bool. Logits exist at
    target positions only, of at most ``train.lms.base.MAX_LOGITS`` numbers at a time over all tables of a piece.
    """
    packed = pack_inputs(soft_mask.sum(1), prefix, suffix, targets)
    student_ND = lm.hidden(packed, soft[soft_mask])[packed.predicts_target]
    with torch.no_grad():
        teacher_ND = _teacher_hidden(lm, prefix, suffix, targets, soft)

    def costs(heard: Tensor, read: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        student = lm.logits(heard)
        with torch.no_grad():
            teacher = F.log_softmax(lm.logits(read) / temperature, -1)
        own = F.log_softmax(student / temperature, -1)
        divergence = F.kl_div(own, teacher, reduction="none", log_target=True).sum(-1)
        return F.cross_entropy(student, ids, reduction="none"), divergence

    rows = max(1, train.lms.base.MAX_LOGITS // (TABLES * lm.vocab_size))
    split = [torch.split(each, rows) for each in (student_ND, teacher_ND, packed.targets)]
    pieces = list(zip(*split, strict=True))
    if len(pieces) == 1:
        found = [costs(*pieces[0])]
    else:
        found = [recompute(costs, *piece, use_reentrant=False) for piece in pieces]
    nll, divergence = (torch.cat(parts) for parts in zip(*found, strict=True))
    return sum_by_row(nll, packed), sum_by_row(divergence, packed)


def _teacher_hidden(lm: LanguageModel, prefix: Ids, suffix: Ids, targets: Ids, soft: Tensor) -> Tensor:
    """Hidden states of the model that reads the transcripts, at the targets [N, D]."""
    nothing = [lm.tokenizer.bos or lm.tokenizer.eos]  # an empty transcript in a prompt without words
    texts = [
        [*b, *ids[:-1]] if b or a or len(ids) > 1 else nothing
        for b, a, ids in zip(prefix, suffix, targets, strict=True)
    ]
    packed = pack_inputs(torch.zeros(len(texts), dtype=torch.int64, device=soft.device), texts, suffix, targets)
    return lm.hidden(packed, soft.new_zeros(0, soft.shape[-1]))[packed.predicts_target]
