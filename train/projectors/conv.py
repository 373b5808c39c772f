"""``conv``: projectors that convolve over time, and the downsampler shared with the dense mixture of experts.

Letters as in ``base.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Conv1d, Linear, Projector, init_linear_layers, make_norm, stack_frames

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import ConvConfig


class Downsampler(nn.Module):
    """log2(k) × [Conv1d of width 3, stride 2, padding 1 -> GELU]: the last maps C to D channels, the others C to C.

    MOSA (arXiv 2508.18998) has two, k = 4. The output has ceil(T / k) frames.
    """

    def __init__(self, channels: int, width: int, stack: int) -> None:
        super().__init__()
        count = stack.bit_length() - 1
        outs = [channels] * (count - 1) + [width]
        self.convs = nn.ModuleList(Conv1d(channels, out, 3, stride=2, padding=1) for out in outs)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, T, C], [B, T] to [B, S, D], [B, S]. Padding is set to zero before each convolution."""
        x = features
        for conv in self.convs:
            x = F.gelu(conv(x.masked_fill(~mask[..., None], 0)))
            mask = mask[:, ::2]  # output i depends on frames 2i - 1, 2i, 2i + 1
        return x, mask


class StridedConv(nn.Module):
    """Conv1d C -> C of width and stride k -> ReLU, computed as a matrix product on stacked frames."""

    def __init__(self, channels: int, stack: int) -> None:
        super().__init__()
        self.stack = stack
        self.fc = Linear(stack * channels, channels)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, T, C], [B, T] to [B, S, C], [B, S]."""
        x, mask = stack_frames(features, mask, self.stack)
        return F.relu(self.fc(x)), mask


class ConvProjector(Projector):
    """A convolution over time, then fc1 [H] -> ReLU -> fc2 [D] -> [norm]; S = ceil(T / k).

    ``slam``: SLAM-LLM's ``cov1d-linear`` (X-LANCE/SLAM-LLM, ``models/projector.py``, EncoderProjectorCov1d): Conv1d
    C -> C with width = stride = k = 5, ReLU, H = 2048. The last frames are padded with zeros; SLAM-LLM drops them.
    ``mosa``: MOSA's downsampler (C -> C -> D, k = 4) and one of its adapters, H = 4096 (arXiv 2508.18998).
    Weights start at PyTorch's defaults.
    """

    formula = "(k·C + 1)·C + (C + 1)·H + (H + 1)·D [norm: rms + D, layer + 2·D]"

    def __init__(self, config: ConvConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        slam = config.variant == "slam"
        if not slam:
            self.formula = "(log2 k - 1)·(3·C + 1)·C + (3·C + 1)·D + (D + 1)·H + (H + 1)·D [norm: rms + D, layer + 2·D]"
        self.stack = config.stack or (5 if slam else 4)
        hidden = config.hidden or (2048 if slam else 4096)
        self.conv = StridedConv(channels, self.stack) if slam else Downsampler(channels, width, self.stack)
        self.fc1 = Linear(channels if slam else width, hidden)
        self.fc2 = Linear(hidden, width)
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "torch", generator)

    def soft_frames(self, frames: int) -> int:
        return -(-frames // self.stack)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, soft_mask = self.conv(features, mask)
        return self.norm(self.fc2(F.relu(self.fc1(x)))), soft_mask
