"""``qformer``: learned queries attend to the frames of each window.

Letters as in ``base.py``; W frames per window, Q queries, N windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, LayerNorm, Linear, Projector, init_linear_layers, make_norm, stack_frames

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import QformerConfig

_EPS = 1e-12  # as in BERT


class QformerLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the frames, MLP; each + residual, then LayerNorm (BERT)."""

    def __init__(self, hidden: int, heads: int, context: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.own = Attention(hidden, heads, dropout=dropout)
        self.own_norm = LayerNorm(hidden, eps=_EPS)
        self.cross = Attention(hidden, heads, context, dropout=dropout)
        self.cross_norm = LayerNorm(hidden, eps=_EPS)
        self.fc1 = Linear(hidden, intermediate)
        self.fc2 = Linear(intermediate, hidden)
        self.norm = LayerNorm(hidden, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """Map queries [B·N, Q, H], frames [B·N, W, k·C] and mask [B·N, W] to queries [B·N, Q, H]."""
        x = self.own_norm(x + self.dropout(self.own(x, x)))
        x = self.cross_norm(x + self.dropout(self.cross(x, frames, mask)))
        y: Tensor = self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))
        return y


class QformerProjector(Projector):
    """Windows of W frames; Q queries -> LayerNorm -> L × QformerLayer -> fc [D] -> [norm]. S = ceil(T / (k·W)) · Q.

    Granite Speech (arXiv 2505.08699; transformers' ``modeling_granite_speech.py``): W = 15, Q = 3, L = 2, queries
    N(0, 1), H = the encoder's width, dropout 0.1; a BLIP-2 Q-Former (arXiv 2301.12597) with cross-attention in every
    layer. SALMONN (arXiv 2310.13289): W = 17 (0.33 s), Q = 1, queries N(0, 0.02). Matrices N(0, 0.02), biases 0.

    In Granite, queries attend to the zeros that pad the last window; here they attend only to frames.
    """

    formula = (
        "Q·H + 2·H + L·(6·(H + 1)·H + 2·(k·C + 1)·H + (H + 1)·M + (M + 1)·H + 6·H) + (H + 1)·D "
        "[H = C and M = 4·H unless set; norm: rms + D, layer + 2·D]"
    )

    def __init__(self, config: QformerConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack, self.window, self.query_std = config.stack, config.window, config.query_std
        hidden = config.hidden or channels
        heads = config.heads or max(1, hidden // 64)
        intermediate = config.intermediate or 4 * hidden
        self.queries = nn.Parameter(torch.empty(config.queries, hidden))
        self.query_norm = LayerNorm(hidden, eps=_EPS)
        self.layers = nn.ModuleList(
            QformerLayer(hidden, heads, config.stack * channels, intermediate, config.dropout)
            for _ in range(config.layers)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.fc = Linear(hidden, width)
        self.norm = make_norm(config.norm, width, embedding_rms)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "normal", generator)
        self.queries.normal_(0, self.query_std, generator=generator)

    def soft_frames(self, frames: int) -> int:
        return -(-frames // (self.stack * self.window)) * len(self.queries)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = stack_frames(features, mask, self.stack)
        batch, frames, channels = x.shape
        tail = -frames % self.window
        x = F.pad(x, (0, 0, 0, tail)).reshape(-1, self.window, channels)
        mask = F.pad(mask, (0, tail)).reshape(-1, self.window)
        valid = mask.any(-1)
        attended = mask | ~valid[:, None]  # a softmax over no positions is NaN: a window of padding attends to itself
        q = self.dropout(self.query_norm(self.queries)).to(x.dtype).expand(len(x), -1, -1)
        for layer in self.layers:
            q = layer(q, x, attended)
        soft = self.norm(self.fc(q)).reshape(batch, -1, self.fc.out_features)
        return soft, valid.repeat_interleave(len(self.queries)).reshape(batch, -1)
