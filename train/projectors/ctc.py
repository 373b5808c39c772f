"""Scores of the LM's tokens over time, for a CTC loss, and what a path through them says.

A CTC head compares vectors [.., D] of the LM's width with the input embeddings of V tokens, and scores a blank with a
vector of its own (Graves et al. 2006: the blank separates repeated tokens and fills the time between them). The tokens
are those of the labels (``train/model/ctc.py``); their embeddings do not train.

Letters: B utterances, S time steps, D the LM's width, V tokens of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLANK = 0  # class 0 of the scores; token v of the head is class v + 1
INITIAL_SCALE = 20.0  # of cosines: a probability of 0.99 is in reach among some thousand tokens


class CtcHead(nn.Module):
    """Vectors [.., D] -> scores [.., 1 + V] float32: the blank, then scale · cosine with each token's embedding.

    Cosines with a learned scale do not prefer tokens with long embeddings, which dot products do (LegoSLM, arXiv
    2505.11352, has an output matrix of its own instead).

    Args:
        embeddings: [V, D], the input embeddings of the tokens. Kept as a buffer, float32.
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        width = embeddings.shape[1]
        self.register_buffer("embeddings", embeddings.detach().float().clone())
        self.scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.blank = nn.Parameter(torch.zeros(width))
        self.blank_bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, whose softmax over the last axis is the distribution of a time step."""
        unit = F.normalize(x.float(), dim=-1)
        tokens = unit @ F.normalize(self.embeddings, dim=-1).T
        blank = unit @ self.blank[:, None] + self.blank_bias
        return torch.cat([blank, tokens * self.scale.exp()], -1)


def ctc_nll(scores: Tensor, mask: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the CTC loss of each row in nats [B] float32; 0 for rows whose targets do not fit their time steps.

    Args:
        scores: [B, S, 1 + V].
        mask: bool [B, S]; the valid steps of a row come first.
        targets: classes of each row, from 1.
    """
    lengths = torch.tensor([len(row) for row in targets], device=scores.device)
    flat = torch.tensor([each for row in targets for each in row], dtype=torch.int64, device=scores.device)
    logs = F.log_softmax(scores.float(), -1).transpose(0, 1)
    return F.ctc_loss(logs, flat, mask.sum(1), lengths, BLANK, reduction="none", zero_infinity=True)


def needed_steps(classes: Sequence[int]) -> int:
    """Return the fewest time steps of a path that says ``classes``: a blank separates equal neighbours."""
    return len(classes) + sum(a == b for a, b in pairwise(classes))


def best_path(scores: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the classes of each row's likeliest path [B], repeats merged and blanks dropped."""
    best = scores.argmax(-1).masked_fill(~mask, BLANK)
    return [[each for each in torch.unique_consecutive(row).tolist() if each != BLANK] for row in best]
