"""``transformer``: transformer layers over stacked frames. Letters as in ``base.py``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, FrameStackProjector, LayerNorm, Linear, init_linear_layers, make_norm

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import TransformerConfig


class TransformerLayer(nn.Module):
    """x + attention(LayerNorm x), then x + fc2(GELU(fc1(LayerNorm x))), H -> 4·H -> H."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(hidden)
        self.attention = Attention(hidden, heads, dropout=dropout)
        self.mlp_norm = LayerNorm(hidden)
        self.fc1 = Linear(hidden, 4 * hidden)
        self.fc2 = Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map [B, S, H] with mask [B, S] to [B, S, H]."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        y: Tensor = x + self.dropout(self.fc2(F.gelu(self.fc1(self.mlp_norm(x)))))
        return y


class TransformerProjector(FrameStackProjector):
    """[k·C] -> fc1 [H] -> + positions -> L × TransformerLayer -> LayerNorm -> fc2 [D] -> [norm].

    The adapter of NeMo's SALM (arXiv 2310.09424; NVIDIA/NeMo, ``speechlm2/conf/salm.yaml``: L = 2, H = 1024, 8 heads,
    then a linear layer), with pre-norm transformer layers instead of Conformer layers and sinusoidal positions (Vaswani
    et al. 2017) instead of relative ones. Weights start at PyTorch's defaults.
    """

    formula = "(k·C + 1)·H + L·(12·H² + 13·H) + 2·H + (H + 1)·D [norm: rms + D, layer + 2·D]"

    def __init__(self, config: TransformerConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        self.fc1 = Linear(config.stack * channels, config.hidden)
        self.layers = nn.ModuleList(
            TransformerLayer(config.hidden, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.last_norm = LayerNorm(config.hidden)
        self.fc2 = Linear(config.hidden, width)
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "torch", generator)

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        x = self.fc1(x_BSK)
        x = x + sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask_BS)
        soft: Tensor = self.norm(self.fc2(self.last_norm(x)))
        return soft


def sinusoidal_positions(count: int, width: int, device: torch.device) -> Tensor:
    """Return sinusoidal positions, float32 [count, width], ``width`` even: sines in even columns, cosines in odd."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angle = torch.outer(torch.arange(count, device=device), frequency)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
