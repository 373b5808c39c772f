"""Projectors that are MLPs: ``mlp`` (W1), ``residual`` (tiny-audio), ``linear`` (SLAM-LLM), ``swiglu`` (Ultravox) and
``pool`` (Qwen2-Audio, Audio Flamingo 3). Letters as in ``base.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FrameStackProjector, Linear, RMSNorm, init_linear_layers, make_norm, stack_frames

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import LinearConfig, MlpConfig, PoolConfig, ResidualConfig, SwigluConfig


class MlpProjector(FrameStackProjector):
    """[k·C] -> [input norm] -> fc1 [H] -> GELU -> fc2 [D] -> [norm]. The defaults are exactly W1's projector.

    W1: no bias, fc1 ~ U(±sqrt(3/(k·C))), fc2 = 0, so that soft tokens are zero in the first step. Before an output
    norm, a zero fc2 would jump to full scale at step 1 and its gradient would be divided by almost zero, so there
    fc2 ~ N(0, 0.02), as in GPT-2. Biases start at zero.

    With ``stack=4`` it is also the projector of Voxtral (arXiv 2507.13264; transformers' ``modeling_voxtral.py``).
    """

    formula = "k·C·H + H·D [H = D unless set; bias: + H + D; input norm: + 2·k·C; norm: rms + D, layer + 2·D]"

    def __init__(self, config: MlpConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        inputs, hidden = config.stack * channels, config.hidden or width
        self.input_norm = make_norm(config.input_norm, inputs)
        self.fc1 = Linear(inputs, hidden, bias=config.bias)
        self.fc2 = Linear(hidden, width, bias=config.bias)
        self.norm = make_norm(config.norm, width, embedding_rms)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        bound = (3 / self.fc1.in_features) ** 0.5
        self.fc1.weight.uniform_(-bound, bound, generator=generator)
        if isinstance(self.norm, nn.Identity):
            self.fc2.weight.zero_()
        else:
            self.fc2.weight.normal_(0, 0.02, generator=generator)
        for linear in (self.fc1, self.fc2):
            if linear.bias is not None:
                linear.bias.zero_()

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        soft: Tensor = self.norm(self.fc2(F.gelu(self.fc1(self.input_norm(x_BSK)))))
        return soft


class ResidualBlock(nn.Module):
    """norm(x + dropout(fc2(GELU(fc1 x)))), D -> H -> D with biases."""

    def __init__(self, width: int, hidden: int, dropout: float, norm: nn.Module) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        y: Tensor = self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))
        return y


class ResidualProjector(FrameStackProjector):
    """[k·C] -> fc [D] -> RMSNorm -> N × ResidualBlock: the projector of tiny-audio.

    Initial weights: N(0, 0.02), fc2 of each block N(0, 0.002), biases 0, norm gains 1. With ``norm``, the norm of the
    last block is of that kind and its gain starts at the RMS of the LM's embeddings.
    """

    formula = "(k·C + 1)·D + D + N·(2·D·H + H + 2·D) [H = 4·D unless set; norm: layer + D]"

    def __init__(self, config: ResidualConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        hidden = config.hidden or 4 * width
        last = RMSNorm(width) if config.norm == "none" else make_norm(config.norm, width, embedding_rms)
        norms = [*(RMSNorm(width) for _ in range(config.blocks - 1)), last]
        self.fc = Linear(config.stack * channels, width)
        self.norm = RMSNorm(width)
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, config.dropout, norm) for norm in norms)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.weight.normal_(0, 0.002 if name.endswith("fc2") else 0.02, generator=generator)
                module.bias.zero_()

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        x: Tensor = self.norm(self.fc(x_BSK))
        for block in self.blocks:
            x = block(x)
        return x


class LinearProjector(FrameStackProjector):
    """[k·C] -> fc1 [H] -> ReLU -> fc2 [D] -> [norm]: SLAM-LLM's ``linear`` (arXiv 2402.08846; X-LANCE/SLAM-LLM,
    ``models/projector.py``, EncoderProjectorConcat), k = 5, H = 2048, biases, PyTorch's default initial weights.

    SLAM-LLM drops the last T mod k frames; here they are padded with zeros and used.
    """

    formula = "(k·C + 1)·H + (H + 1)·D [norm: rms + D, layer + 2·D]"

    def __init__(self, config: LinearConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        self.fc1 = Linear(config.stack * channels, config.hidden)
        self.fc2 = Linear(config.hidden, width)
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "torch", generator)

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        soft: Tensor = self.norm(self.fc2(F.relu(self.fc1(x_BSK))))
        return soft


class SwigluProjector(FrameStackProjector):
    """[k·C] -> RMSNorm -> fc1 [H] -> a · silu(b) [H/2] -> [RMSNorm] -> fc2 [D] -> [norm]; a and b are the halves of
    fc1's output. Ultravox's projector (fixie-ai/ultravox, ``ultravox_model.py``): k = 8, H = 4096, no biases, norm
    gains 0.4.

    ``mid_norm`` is Ultravox from 0.5 on. Up to 0.4.1 the second norm came last; here that is ``mid_norm=false
    norm=rms``, whose gain starts at the RMS of the LM's embeddings instead. Matrices start at PyTorch's defaults.
    """

    formula = "k·C + k·C·H + H/2 + H/2·D [mid_norm=false: - H/2; norm: rms + D, layer + 2·D]"

    def __init__(self, config: SwigluConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        inputs, half = config.stack * channels, config.hidden // 2
        self.input_norm = RMSNorm(inputs, config.norm_init)
        self.fc1 = Linear(inputs, config.hidden, bias=False)
        self.mid_norm = RMSNorm(half, config.norm_init) if config.mid_norm else nn.Identity()
        self.fc2 = Linear(half, width, bias=False)
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "torch", generator)

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        value, gate = self.fc1(self.input_norm(x_BSK)).chunk(2, -1)
        soft: Tensor = self.norm(self.fc2(self.mid_norm(value * F.silu(gate))))
        return soft


class PoolProjector(FrameStackProjector):
    """Mean of p frames -> concatenate k means -> fc2 [D] (with ``hidden``: fc1 [H] -> GELU -> fc2 [D]) -> [norm].

    Qwen2-Audio (arXiv 2407.10759) has p = 2 and one layer; Audio Flamingo 3 (arXiv 2507.08128) has p = 2 and two layers
    with H = D. Both have biases; weights start at N(0, 0.02), biases at 0. A mean is over the valid frames among its p;
    S = ceil(T / (p·k)).
    """

    formula = "(k·C + 1)·D [with hidden (k·C + 1)·H + (H + 1)·D; norm: rms + D, layer + 2·D]"

    def __init__(self, config: PoolConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.pool, self.stack = config.pool, config.stack
        inputs = config.stack * channels
        self.fc1 = Linear(inputs, config.hidden) if config.hidden else None
        self.fc2 = Linear(config.hidden or inputs, width)
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "normal", generator)

    def soft_frames(self, frames: int) -> int:
        return super().soft_frames(-(-frames // self.pool))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        channels = features.shape[-1]
        stacked, pooled_mask = stack_frames(features, mask, self.pool)
        if self.pool > 1:
            counts, _ = stack_frames(mask[..., None].to(features.dtype), mask, self.pool)
            total = stacked.reshape(*stacked.shape[:2], self.pool, channels).sum(-2)
            stacked = total / counts.sum(-1, keepdim=True).clamp(min=1)
        return super().forward(stacked, pooled_mask)

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        hidden = x_BSK if self.fc1 is None else F.gelu(self.fc1(x_BSK))
        soft: Tensor = self.norm(self.fc2(hidden))
        return soft
