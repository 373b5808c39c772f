"""What projectors are made of, and what a projector of yours derives from.

Letters: B utterances, T frames, C encoder channels, k frames stacked, S soft tokens, H hidden width, D the LM's width.

A projector of yours, ``projector.kind=my_module:MyProjector`` with ``projector.settings.hidden=512``:

    class MyProjector(Projector):
        def __init__(self, channels: int, width: int, embedding_rms: float, *, hidden: int = 256) -> None: ...
        def soft_frames(self, frames: int) -> int: ...
        def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...  # see ``Projector``

``channels`` is C, ``width`` is D, ``embedding_rms`` the RMS of the LM's embeddings (where an output norm should start).
Its constructor runs under the run's seed, its ``forward`` under autocast to the run's dtype. ``my_module`` is looked up
on Python's path and in the working folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # an export carries this file, which then stands without earshard
    from train.config.model import Init, Norm


class Linear(nn.Linear):
    """``nn.Linear`` with float32 masters cast to the input's dtype. It draws no numbers: its owner initialises."""

    def reset_parameters(self) -> None:
        """Nothing: a draw here would come from the global generator and change with the order of construction."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in ``x``'s dtype."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv1d(nn.Conv1d):
    """``nn.Conv1d`` over the time axis of [B, T, C], masters and start as in ``Linear``."""

    def reset_parameters(self) -> None:
        """Nothing: its owner initialises."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T', out] in ``x``'s dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = self._conv_forward(x.transpose(1, 2), self.weight.to(x.dtype), bias)
        return y.transpose(1, 2)


class RMSNorm(nn.Module):
    """y = gain · x / RMS(x) over the last axis (Zhang & Sennrich 2019), with a float32 gain of one start value."""

    def __init__(self, width: int, initial_gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype; an all-zero vector stays zero."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) with a float32 gain of one start value and a bias that starts at zero."""

    def __init__(self, width: int, initial_gain: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), initial_gain))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with biases; queries of [.., N, H], keys and values of [.., M, K]."""

    def __init__(self, hidden: int, heads: int, context: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"an attention of width {hidden} does not divide into {heads} heads: set projector.heads")
        self.heads, self.dropout = heads, dropout
        self.q = Linear(hidden, hidden)
        self.k = Linear(context or hidden, hidden)
        self.v = Linear(context or hidden, hidden)
        self.out = Linear(hidden, hidden)

    def forward(self, x_BNH: Tensor, context_BMK: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """[B, N, H] attends to [B, M, K], to what ``mask_BM`` (bool) admits -> [B, N, H]."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(x_BNH), self.k(context_BMK), self.v(context_BMK))
        )
        seen = None if mask_BM is None else mask_BM[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def make_norm(kind: Norm, width: int, initial_gain: float = 1.0) -> nn.Module:
    """The norm named ``kind``; ``start`` is its gain at the first step."""
    if kind == "none":
        return nn.Identity()
    return RMSNorm(width, initial_gain) if kind == "rms" else LayerNorm(width, initial_gain)


@torch.no_grad()
def init_linear_layers(module: nn.Module, scheme: Init, generator: torch.Generator) -> None:
    """Draw every matrix and bias below ``module`` anew: ``torch`` U(±1/sqrt(fan_in)), ``normal`` N(0, 0.02), ``xavier``
    U(±sqrt(6/(fan_in + fan_out))); the last two with zero biases. Norms, queries and the like stay."""
    for layer in module.modules():
        if not isinstance(layer, Linear | Conv1d):
            continue
        fan_in, fan_out = layer.weight[0].numel(), layer.weight[:, 0].numel()
        if scheme == "normal":
            layer.weight.normal_(0, 0.02, generator=generator)
        else:
            bound = (6 / (fan_in + fan_out)) ** 0.5 if scheme == "xavier" else fan_in**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            if scheme == "torch":
                layer.bias.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            else:
                layer.bias.zero_()


class Projector(nn.Module):
    """Encoder frames in, soft tokens (rows of a language model's input) out. Weights are float32 masters.

    A subclass maps frames to soft tokens in ``forward``, counts them in ``soft_frames``, and may draw its start values
    in ``init_weights``. ``formula`` is its parameter count in the letters above, then what options change, in brackets.
    """

    formula: str = ""

    def __init__(self) -> None:
        super().__init__()
        self._losses: dict[str, Tensor] = {}
        self._metrics: dict[str, Tensor] = {}

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every weight matrix from ``generator``: the same seed gives the same projector."""

    def soft_frames(self, frames: int) -> int:
        """The number of soft tokens of an utterance of ``frames`` frames."""
        raise NotImplementedError

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, T, C], mask [B, T] bool (True = a frame) -> soft [B, S, D] in the same dtype, soft_mask [B, S].

        Valid soft tokens come first in each row, ``soft_frames`` of them. What stands in padding frames, and the rest
        of the batch, never reaches a valid one.
        """
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """What of its weights a run's ``summary.json`` should tell, as JSON; empty for most projectors."""
        return {}

    def take_losses(self) -> dict[str, Tensor]:
        """Losses of the projector's own, by name: scalars, already weighted, to be added to the run's loss.

        Those of the last forward pass in training, handed out once; empty for most projectors. ``metrics.jsonl`` tells
        them beside its other figures, so the name is none of theirs.
        """
        losses, self._losses = self._losses, {}
        return losses

    def take_metrics(self) -> dict[str, Tensor]:
        """What ``metrics.jsonl`` tells beside these losses, by name: scalars without gradient, handed out alike."""
        figures, self._metrics = self._metrics, {}
        return figures


def under_autocast(kind: type[Projector]) -> Callable[..., Projector]:
    """``kind`` with its ``forward`` under autocast to the input's dtype, so that layers of plain torch run in any."""

    def forward(self: Projector, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed = features.dtype != torch.float32
        dtype = features.dtype if mixed else torch.bfloat16
        with torch.autocast(features.device.type, dtype=dtype, enabled=mixed):
            soft, soft_mask = kind.forward(self, features, mask)
        return soft.to(features.dtype), soft_mask

    return type(kind.__name__, (kind,), {"forward": forward})


class FrameStackProjector(Projector):
    """A projector that concatenates ``stack`` frames and then keeps their number: S = ceil(T / stack)."""

    stack: int

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        """[B, S, k·C], [B, S] -> [B, S, D]."""
        raise NotImplementedError

    def soft_frames(self, frames: int) -> int:
        return -(-frames // self.stack)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x_BSK, soft_mask = stack_frames(features, mask, self.stack)
        return self.project(x_BSK, soft_mask), soft_mask


def stack_frames(features: Tensor, mask: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """[B, T, C], [B, T] -> [B, S, stack·C], [B, S]; frames that are padding, or that fill the tail, are zero.

    A stacked frame is valid when any of its frames is.
    """
    if stack == 1:
        return features, mask
    batch, frames, channels = features.shape
    tail = -frames % stack
    features = F.pad(features.masked_fill(~mask[..., None], 0), (0, 0, 0, tail))
    mask = F.pad(mask, (0, tail))
    return features.reshape(batch, -1, stack * channels), mask.reshape(batch, -1, stack).any(-1)
