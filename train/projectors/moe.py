"""Mixtures of experts: all experts weighted by a softmax (MOSA), or the best two and a shared one (tiny-audio).

Letters as in ``base.py``; E experts, N valid soft tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FrameStackProjector, Linear, Projector, RMSNorm, init_linear_layers, make_norm
from .conv import Downsampler

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import MoeConfig

_TOP_K = 2
_ROUTER_HIDDEN = 512


class Expert(nn.Module):
    """fc1 [H] -> activation -> fc2 [D], with biases."""

    def __init__(self, inputs: int, hidden: int, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = Linear(inputs, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., D]."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class DenseMoeProjector(Projector):
    """Downsampler [D] -> sum over e of softmax(router)_e · expert_e -> [norm]: MOSA-Base (arXiv 2508.18998).

    Router D -> 512 -> ReLU -> E, experts D -> H -> ReLU -> D with H = 4096, E = 4, k = 4. There is no loss besides the
    cross-entropy; ``take_metrics`` returns the mean weight of each expert. Weights start at PyTorch's defaults, except
    the last layer of the router, N(0, 0.02) with bias 0, so that all experts start near 1/E.
    """

    formula = (
        "(log2 k - 1)·(3·C + 1)·C + (3·C + 1)·D + (D + 1)·512 + 513·E + E·((D + 1)·H + (H + 1)·D) "
        "[norm: rms + D, layer + 2·D]"
    )

    def __init__(self, config: MoeConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        self.down = Downsampler(channels, width, config.stack)
        self.router = nn.Sequential(Linear(width, _ROUTER_HIDDEN), nn.ReLU(), Linear(_ROUTER_HIDDEN, config.experts))
        hidden = config.hidden or 4096
        self.experts = nn.ModuleList(Expert(width, hidden, width, F.relu) for _ in range(config.experts))
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "torch", generator)
        init_linear_layers(self.router[-1], "normal", generator)

    def soft_frames(self, frames: int) -> int:
        return -(-frames // self.stack)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, soft_mask = self.down(features, mask)
        weights_BSE = self.router(x).float().softmax(-1).to(x.dtype)
        if self.training:
            used = weights_BSE.detach().float() * soft_mask[..., None]
            self._metrics = _expert_use(used.sum((0, 1)) / soft_mask.sum())
        total = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            total = total + weights_BSE[..., i, None] * expert(x)
        return self.norm(total), soft_mask


class TopKMoeProjector(FrameStackProjector):
    """[k·C] -> RMSNorm -> shared expert + the best two of E, with weights that sum to 1 -> [norm].

    tiny-audio's ``moe`` (alexkroman/tiny-audio, ``projectors.py``; shared experts: DeepSeekMoE, arXiv 2401.06066).
    Router k·C -> E without bias; experts k·C -> H -> GELU -> D, H = D, E = 4, k = 4. Initial weights: router
    N(0, 0.02), fc1 Glorot uniform, fc2 N(0, 0.01), biases 0.

    In training, the router's logits are multiplied by U(1 ± ``router_jitter_noise``). ``take_losses`` returns
    ``balance``, E · mean over experts of (mean probability over valid soft tokens - 1/E)², and ``router_z``, mean of
    logsumexp(logits)² (ST-MoE, arXiv 2202.08906), multiplied by ``router_aux_loss_coef`` and ``router_z_loss_coef``.
    ``take_metrics`` returns the share of each expert in the choices.
    """

    formula = "k·C + k·C·E + (E + 1)·((k·C + 1)·H + (H + 1)·D) [H = D unless set; norm: rms + D, layer + 2·D]"

    def __init__(self, config: MoeConfig, channels: int, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.stack = config.stack
        self.aux_loss_coef, self.z_loss_coef = config.router_aux_loss_coef, config.router_z_loss_coef
        self.jitter_noise = config.router_jitter_noise
        inputs, hidden = config.stack * channels, config.hidden or width
        self.input_norm = RMSNorm(inputs)
        self.router = Linear(inputs, config.experts, bias=False)
        self.shared = Expert(inputs, hidden, width, F.gelu)
        self.experts = nn.ModuleList(Expert(inputs, hidden, width, F.gelu) for _ in range(config.experts))
        self.norm = make_norm(config.norm, width, embedding_rms)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "xavier", generator)
        init_linear_layers(self.router, "normal", generator)
        for expert in (self.shared, *self.experts):
            expert.fc2.weight.normal_(0, 0.01, generator=generator)

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        """As in the base class. Padding is not routed: it would count in the losses.

        On a GPU the host would wait for the number of rows that are left, and for those of each expert. There all rows
        pass through all experts, most with weight 0.
        """
        valid_N = mask_BS.flatten() if x_BSK.is_cuda else None
        x_NK = self.input_norm(x_BSK[mask_BS] if valid_N is None else x_BSK.flatten(0, 1))
        logits_NE = self.router(x_NK).float()
        if self.training and self.jitter_noise:
            logits_NE = logits_NE * torch.empty_like(logits_NE).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        probabilities_NE = logits_NE.softmax(-1)
        best, chosen = probabilities_NE.topk(_TOP_K, -1)
        weights = torch.zeros_like(probabilities_NE).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        total = self.shared(x_NK)
        for i, expert in enumerate(self.experts):  # also experts without tokens, so that their gradient is 0, not None
            if valid_N is None:
                rows = (chosen == i).any(-1).nonzero()[:, 0]
                total = total.index_add(0, rows, (weights[rows, i, None] * expert(x_NK[rows])).to(total.dtype))
            else:
                total = total + (weights[:, i, None] * expert(x_NK)).to(total.dtype)
        if self.training:
            spread = _mean(probabilities_NE, valid_N) - 1 / len(self.experts)
            self._losses = {
                "balance": self.aux_loss_coef * len(self.experts) * spread.square().mean(),
                "router_z": self.z_loss_coef * _mean(logits_NE.logsumexp(-1).square(), valid_N),
            }
            self._metrics = _expert_use(_mean((weights.detach() > 0).float(), valid_N) / _TOP_K)
        soft_ND: Tensor = self.norm(total)
        if valid_N is not None:
            return soft_ND.masked_fill(~valid_N[:, None], 0).view(*mask_BS.shape, -1)
        return soft_ND.new_zeros(*mask_BS.shape, soft_ND.shape[-1]).masked_scatter(mask_BS[..., None], soft_ND)


def _mean(values: Tensor, valid_N: Tensor | None) -> Tensor:
    """Return the mean of ``values`` [N, …] over the valid rows; None: all are valid."""
    if valid_N is None:
        return values.mean(0)
    return values.masked_fill(~valid_N.view(-1, *[1] * (values.dim() - 1)), 0).sum(0) / valid_N.sum()


def _expert_use(shares: Tensor) -> dict[str, Tensor]:
    """Return ``shares`` [E] of the routing over valid soft tokens as metrics ``expert_use_e``; 1/E each if balanced."""
    return {f"expert_use_{e}": share for e, share in enumerate(shares.unbind())}


def make_moe(config: MoeConfig, channels: int, width: int, embedding_rms: float) -> Projector:
    """Build the mixture of experts that ``routing`` names: ``DenseMoeProjector`` or ``TopKMoeProjector``."""
    projector_class = DenseMoeProjector if config.routing == "dense" else TopKMoeProjector
    return projector_class(config, channels, width, embedding_rms)
