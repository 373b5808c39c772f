"""Small projectors for tests: 6 channels to width 8."""

from __future__ import annotations

import torch

from shards.config import Config
from train.options import MlpConfig, ProjectorConfig
from train.projectors import build_projector


class Holder(Config):
    projector: ProjectorConfig = MlpConfig()


def build(config, channels=6, width=8, seed=0):
    return build_projector(config, channels, width, 0.136, seed=seed)


def shake(projector):
    """Move every weight off its start, so that no output is zero or at rest."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return projector


def mask_of(lengths, frames):
    return torch.arange(frames) < torch.tensor(lengths)[:, None]
