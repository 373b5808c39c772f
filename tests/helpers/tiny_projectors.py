"""Small projectors for tests: 6 channels to width 8."""

from __future__ import annotations

import torch

from shards.config.base import Config
from train.config.model import (
    ConvConfig,
    LinearConfig,
    MlpConfig,
    MoeConfig,
    PoolConfig,
    ProjectorConfig,
    QformerConfig,
    ResidualConfig,
    SwigluConfig,
    TransformerConfig,
)
from train.projectors import build_projector

# every built-in kind, with each of its settings used once
CONFIGS = [
    MlpConfig(),
    MlpConfig(stack=5, hidden=24, input_norm="layer", norm="rms"),
    MlpConfig(stack=3, hidden=24, bias=True, norm="layer"),
    ResidualConfig(),
    ResidualConfig(stack=1, blocks=1, hidden=20, norm="rms"),
    ResidualConfig(stack=2, norm="layer"),
    LinearConfig(hidden=24),
    LinearConfig(stack=1, hidden=24, norm="rms"),
    ConvConfig(hidden=24),
    ConvConfig(variant="mosa", hidden=24, norm="layer"),
    ConvConfig(variant="mosa", stack=8, hidden=24),
    SwigluConfig(hidden=24),
    SwigluConfig(stack=3, hidden=24, mid_norm=False, norm="rms"),
    QformerConfig(dropout=0.0),
    QformerConfig(stack=2, window=3, queries=2, layers=1, hidden=20, heads=2, intermediate=12, dropout=0.0, norm="rms"),
    MoeConfig(hidden=24, experts=3),
    MoeConfig(routing="top2", stack=2, experts=3, norm="layer"),
    PoolConfig(),
    PoolConfig(pool=3, stack=2, hidden=24, norm="rms"),
    PoolConfig(pool=1),
    TransformerConfig(hidden=32, heads=4),
    TransformerConfig(stack=1, layers=1, hidden=32, norm="rms"),
]


class Holder(Config):
    projector: ProjectorConfig = MlpConfig()


def build(config, channels=6, width=8, seed=0, head_tokens=None):
    return build_projector(config, channels, width, 0.136, seed=seed, head_tokens=head_tokens)


def shake(projector):
    """Move every weight away from its initial value, so that no output is zero or constant."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return projector


def mask_of(lengths, frames):
    return torch.arange(frames) < torch.tensor(lengths)[:, None]
