"""Scores of the LM's tokens over time, for a CTC loss, and what a path through them says.

A CTC head compares vectors [.., D] of the LM's width with V tokens: with their input embeddings, which do not train,
and with their spellings, so that a token that the labels hold twice is known by the letters that it shares with others.
A blank has a vector of its own (Graves et al. 2006: it separates repeated tokens and fills the time between them). The
tokens are those of the labels (``train/model/ctc.py``).

Letters: B utterances, S time steps, D the LM's width, V tokens of the head, R the width of spellings, L bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Linear, init_linear_layers

BLANK = 0  # class 0 of the scores; token v of the head is class v + 1
SPELLED_BYTES = 8  # L: of a token, from its start and from its end
SPELLING_WIDTH = 128  # R
INITIAL_SCALE = 20.0  # of cosines: a probability of 0.99 is in reach among some thousand tokens


class HeadTokens(NamedTuple):
    """The tokens of a head: input embeddings [V, D] float, and :func:`spellings` [V, 2L] int64."""

    embeddings: Tensor
    spellings: Tensor

    @classmethod
    def placeholder(cls, count: int, width: int) -> HeadTokens:
        """Return tokens whose values a file of weights replaces."""
        return cls(torch.zeros(count, width), torch.zeros(count, 2 * SPELLED_BYTES, dtype=torch.int64))


def spellings(texts: Sequence[str]) -> Tensor:
    """Return the first L and, from the end, the last L bytes of each text, plus 1, and 0 where it has fewer [V, 2L]."""
    rows = []
    for text in texts:
        data = [1 + byte for byte in text.encode()]
        rows.append([*_padded(data), *_padded(data[::-1])])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 2 * SPELLED_BYTES)


def _padded(data: list[int]) -> list[int]:
    return data[:SPELLED_BYTES] + [0] * (SPELLED_BYTES - len(data))


class CtcHead(nn.Module):
    """Vectors x [.., D] -> scores [.., 1 + V] float32: the blank, then for each token what its two sides say.

        scale · cosine(x, embedding) + fc(x) · sum of the vectors [R] of its bytes / sqrt(number of bytes)

    Cosines with a learned scale do not prefer tokens with long embeddings, which dot products do (LegoSLM, arXiv
    2505.11352, has an output matrix of its own instead). Spellings start at N(0, 0.05) and ``fc`` at PyTorch's
    defaults, both from ``generator``.

    Args:
        tokens: kept as buffers, the embeddings as float32.
    """

    embeddings: Tensor
    spellings: Tensor

    def __init__(self, tokens: HeadTokens, generator: torch.Generator | None = None) -> None:
        super().__init__()
        width = tokens.embeddings.shape[1]
        self.register_buffer("embeddings", tokens.embeddings.detach().float().clone())
        self.register_buffer("spellings", tokens.spellings.clone())
        self.scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.blank = nn.Parameter(torch.zeros(width))
        self.blank_bias = nn.Parameter(torch.zeros(()))
        self.fc = Linear(width, SPELLING_WIDTH)
        self.bytes = nn.Parameter(torch.empty(2 * SPELLED_BYTES, 257, SPELLING_WIDTH))
        self.init_weights(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights of the spellings."""
        init_linear_layers(self.fc, "torch", generator)
        self.bytes.normal_(0, 0.05, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, whose softmax over the last axis is the distribution of a time step."""
        x = x.float()
        unit = F.normalize(x, dim=-1)
        embedded = unit @ F.normalize(self.embeddings, dim=-1).T
        blank = unit @ self.blank[:, None] + self.blank_bias
        return torch.cat([blank, embedded * self.scale.exp() + self.fc(x) @ self._spelled().T], -1)

    def _spelled(self) -> Tensor:
        """Return the vector of each token's spelling [V, R]."""
        places = torch.arange(self.bytes.shape[0], device=self.bytes.device) * self.bytes.shape[1]
        there = (self.spellings > 0).float()
        weights = there / there.sum(1, keepdim=True).clamp(min=1).sqrt()
        spelled: Tensor = F.embedding_bag(
            self.spellings + places, self.bytes.flatten(0, 1), per_sample_weights=weights, mode="sum"
        )
        return spelled


def ctc_nll(scores: Tensor, mask: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the CTC loss of each row in nats [B] float32; 0 for rows whose targets do not fit their time steps.

    Args:
        scores: [B, S, 1 + V].
        mask: bool [B, S]; the valid steps of a row come first. The host waits for one on a GPU.
        targets: classes of each row, from 1.
    """
    flat = torch.tensor([each for row in targets for each in row], dtype=torch.int64)  # torch asks for it on the CPU
    logs = F.log_softmax(scores.float(), -1).transpose(0, 1)
    steps: Any = tuple(mask.sum(1).tolist())
    sizes: Any = tuple(map(len, targets))
    return F.ctc_loss(logs, flat, steps, sizes, BLANK, reduction="none", zero_infinity=True)


def needed_steps(classes: Sequence[int]) -> int:
    """Return the fewest time steps of a path that says ``classes``: a blank separates equal neighbours."""
    return len(classes) + sum(a == b for a, b in pairwise(classes))


def best_path(scores: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the classes of each row's likeliest path [B], repeats merged and blanks dropped."""
    best = scores.argmax(-1).masked_fill(~mask.to(scores.device), BLANK).cpu()
    return [[each for each in torch.unique_consecutive(row).tolist() if each != BLANK] for row in best]
