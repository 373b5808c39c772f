"""Projectors: encoder frames in, soft tokens (rows of a language model's input) out.

In: features [B, T, C] in the run's dtype and their mask [B, T]. Out: soft tokens [B, S, D] in the same dtype and their
mask [B, S], S = ceil(T / stack). Weights are float32 masters, cast to the input's dtype in ``forward``.
``python -m train projectors`` prints the kinds with their parameter counts.

Letters: B utterances, T frames, C encoder channels, k frames stacked, S soft tokens, H hidden width, D the LM's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from train.options import KINDS, MlpConfig, Norm, ProjectorConfig, ResidualConfig


class Linear(nn.Linear):
    """``nn.Linear`` with float32 masters cast to the input's dtype. It draws no numbers: its owner initialises."""

    def reset_parameters(self) -> None:
        """Nothing: a draw here would come from the global generator and change with the order of construction."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in ``x``'s dtype."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """y = gain · x / RMS(x) over the last axis (Zhang & Sennrich 2019), with a float32 gain of one start value."""

    def __init__(self, width: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype; an all-zero vector stays zero."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) with a float32 gain of one start value and a bias that starts at zero."""

    def __init__(self, width: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype))


def make_norm(kind: Norm, width: int, start: float = 1.0) -> nn.Module:
    """The norm named ``kind``; ``start`` is its gain at the first step."""
    if kind == "none":
        return nn.Identity()
    return RMSNorm(width, start) if kind == "rms" else LayerNorm(width, start)


class Projector(nn.Module):
    """Base: stacks frames, calls ``project`` on [B, S, k·C], and keeps the mask right for odd lengths.

    A subclass sets ``formula`` (its parameter count in words), builds itself from its configuration, draws its start
    values in ``initialise`` from the generator it is given, and maps stacked frames to soft tokens in ``project``.
    """

    formula: ClassVar[str]
    stack: int

    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight matrix from ``generator``: the same seed gives the same projector."""
        raise NotImplementedError

    def project(self, x_BSK: Tensor) -> Tensor:
        """[B, S, k·C] -> [B, S, D]."""
        raise NotImplementedError

    def soft_frames(self, frames: int) -> int:
        """The number of soft tokens of an utterance of ``frames`` frames."""
        return -(-frames // self.stack)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, T, C], mask [B, T] bool (True = a frame) -> soft [B, S, D], soft_mask [B, S] bool.

        A soft token is valid when any of its frames is. What stands in padding frames never reaches a valid one.
        """
        x_BSK, soft_mask = stack_frames(features, mask, self.stack)
        return self.project(x_BSK), soft_mask


def stack_frames(features: Tensor, mask: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """[B, T, C], [B, T] -> [B, S, stack·C], [B, S]; frames that are padding, or that fill the tail, are zero."""
    if stack == 1:
        return features, mask
    batch, frames, channels = features.shape
    tail = -frames % stack
    features = F.pad(features.masked_fill(~mask[..., None], 0), (0, 0, 0, tail))
    mask = F.pad(mask, (0, tail))
    return features.reshape(batch, -1, stack * channels), mask.reshape(batch, -1, stack).any(-1)


class Mlp(Projector):
    """[k·C] -> [input norm] -> fc1 [H] -> GELU -> fc2 [D] -> [norm]. At its defaults, W1's projector exactly.

    W1: no bias, fc1 ~ U(±sqrt(3/(k·C))), fc2 = 0, so that the first step sees the LM with silent soft tokens.
    Behind an output norm a zero fc2 would jump to full size at step 1 and its gradient would be divided by almost
    nothing, so there fc2 ~ N(0, 0.02), GPT-2's start. Biases start at zero.
    """

    formula = "k·C·H + H·D, H = D unless set (bias: + H + D; input norm: + 2·k·C; norm: rms + D, layer + 2·D)"

    def __init__(self, config: MlpConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        inputs, hidden = config.stack * channels, config.hidden or width
        self.input_norm = make_norm(config.input_norm, inputs)
        self.fc1 = Linear(inputs, hidden, bias=config.bias)
        self.fc2 = Linear(hidden, width, bias=config.bias)
        self.norm = make_norm(config.norm, width, embedding_rms)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        bound = (3 / self.fc1.in_features) ** 0.5
        self.fc1.weight.uniform_(-bound, bound, generator=generator)
        if isinstance(self.norm, nn.Identity):
            self.fc2.weight.zero_()
        else:
            self.fc2.weight.normal_(0, 0.02, generator=generator)
        for linear in (self.fc1, self.fc2):
            if linear.bias is not None:
                linear.bias.zero_()

    def project(self, x_BSK: Tensor) -> Tensor:
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
        """[..., D] -> [..., D]."""
        y: Tensor = self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))
        return y


class Residual(Projector):
    """[k·C] -> fc [D] -> RMSNorm -> N × ResidualBlock: the projector of tiny-audio.

    Start: weights N(0, 0.02), each block's fc2 N(0, 0.002), biases 0, norm gains 1. With ``norm`` the last block's
    norm is of that kind and its gain starts at the RMS of the LM's embeddings.
    """

    formula = "(k·C + 1)·D + D + N·(2·D·H + H + 2·D), H = 4·D unless set (norm: layer + D)"

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
    def initialise(self, generator: torch.Generator) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.weight.normal_(0, 0.002 if name.endswith("fc2") else 0.02, generator=generator)
                module.bias.zero_()

    def project(self, x_BSK: Tensor) -> Tensor:
        x: Tensor = self.norm(self.fc(x_BSK))
        for block in self.blocks:
            x = block(x)
        return x


REGISTRY: dict[str, type[Projector]] = {"mlp": Mlp, "residual": Residual}


def build_projector(
    config: ProjectorConfig, channels: int, width: int, embedding_rms: float, *, seed: int = 0
) -> Projector:
    """The projector of ``config`` from ``channels`` to ``width``; an output norm's gain starts at ``embedding_rms``.

    Start values come from a generator of their own: the same seed gives the same bytes, whatever ran before.
    """
    if channels < 1 or width < 1:
        raise UserError(f"a projector from {channels} channels to width {width} cannot be: both must be at least 1")
    projector = _construct(config, channels, width, embedding_rms)
    projector.initialise(torch.Generator().manual_seed(seed))
    return projector


def _construct(config: ProjectorConfig, channels: int, width: int, embedding_rms: float) -> Projector:
    make: type = REGISTRY[config.kind]  # each takes its own configuration model, which ``kind`` has chosen
    projector: Projector = make(config, channels, width, embedding_rms)
    return projector


@dataclass(frozen=True, slots=True)
class Kind:
    """One line of ``python -m train projectors``: a kind at its default settings."""

    name: str
    stack: int
    parameters: int
    formula: str


def list_kinds(channels: int, width: int) -> list[Kind]:
    """Every kind with its parameter count at its defaults, from ``channels`` to ``width``. Allocates no weights."""
    kinds = []
    for name, model in KINDS.items():
        with torch.device("meta"):
            projector = _construct(model(), channels, width, 1.0)
        count = sum(parameter.numel() for parameter in projector.parameters())
        kinds.append(Kind(name, projector.stack, count, REGISTRY[name].formula))
    return kinds
