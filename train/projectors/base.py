"""The base class of projectors and the layers they share.

Letters: B utterances, T frames, C encoder channels, k frames stacked, S soft tokens, H hidden width, D the LM's width.

To use a projector of your own, set ``projector.kind=my_module:MyProjector``, and its keyword arguments as in
``projector.settings.hidden=512``:

    class MyProjector(train.Projector):
        def __init__(self, channels: int, width: int, embedding_rms: float, *, hidden: int = 256) -> None: ...
        def soft_frames(self, frames: int) -> int: ...
        def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...  # see ``Projector``

``channels`` is C, ``width`` is D, and ``embedding_rms`` is the RMS of the LM's embeddings, at which the gain of an
output norm should start. The constructor runs under the run's seed, ``forward`` under autocast to the run's dtype.
``my_module`` is imported from Python's path or the working directory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import Init, Norm


class Linear(nn.Linear):
    """``nn.Linear`` with float32 weights that are cast to the input's dtype. The owner initializes them."""

    def reset_parameters(self) -> None:
        """Do nothing: numbers drawn from the global generator would depend on the order of construction."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of ``x``."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv1d(nn.Conv1d):
    """``nn.Conv1d`` over the time axis of [B, T, C], with weights as in ``Linear``."""

    def reset_parameters(self) -> None:
        """Do nothing: the owner initializes the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, in] to [B, T', out] in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = self._conv_forward(x.transpose(1, 2), self.weight.to(x.dtype), bias)
        return y.transpose(1, 2)


class RMSNorm(nn.Module):
    """y = gain · x / RMS(x) over the last axis (Zhang & Sennrich 2019), with a float32 gain of ``initial_gain``."""

    def __init__(self, width: int, initial_gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` [..., width], keeping shape and dtype; an all-zero vector stays zero."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) with a float32 gain of ``initial_gain`` and a bias that starts at zero."""

    def __init__(self, width: int, initial_gain: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), initial_gain))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` [..., width], keeping shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with biases; queries [B, N, H], keys and values from [B, M, K].

    ``hidden`` is H; ``context`` is K, by default H.

    Raises:
        ValueError: ``hidden`` is not divisible by ``heads``.
    """

    def __init__(self, hidden: int, heads: int, context: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"attention width {hidden} is not divisible by {heads} heads: change projector.heads")
        self.heads, self.dropout = heads, dropout
        self.q = Linear(hidden, hidden)
        self.k = Linear(context or hidden, hidden)
        self.v = Linear(context or hidden, hidden)
        self.out = Linear(hidden, hidden)

    def forward(self, x_BNH: Tensor, context_BMK: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Attend from [B, N, H] to the positions of [B, M, K] where ``mask_BM`` (bool) is True -> [B, N, H]."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(x_BNH), self.k(context_BMK), self.v(context_BMK))
        )
        attn_mask = None if mask_BM is None else mask_BM[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def make_norm(kind: Norm, width: int, initial_gain: float = 1.0) -> nn.Module:
    """Return the norm named ``kind``, with the gain ``initial_gain``."""
    if kind == "none":
        return nn.Identity()
    return RMSNorm(width, initial_gain) if kind == "rms" else LayerNorm(width, initial_gain)


@torch.no_grad()
def init_linear_layers(module: nn.Module, scheme: Init, generator: torch.Generator) -> None:
    """Draw all matrices and biases of linear and convolutional layers in ``module`` again from ``generator``.

    ``torch``: U(±1/sqrt(fan_in)), weights and biases. ``normal``: N(0, 0.02). ``xavier``: U(±sqrt(6/(fan_in +
    fan_out))), Glorot & Bengio 2010. The last two set biases to zero. Other parameters, such as norms, do not change.
    """
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
    """Base class of projectors: maps encoder frames to soft tokens, vectors in a language model's input.

    A subclass implements ``forward`` and ``soft_frames`` and may set its initial weights in ``init_weights``. Weights
    are float32. ``formula`` is the parameter count in the letters above, followed in brackets by what options change.
    ``content_decides`` is True if the number of soft tokens depends on the frames and not only on how many there are.
    ``read_spelling`` is True if the LM is to read the text of the scores ``bytes`` in front of the soft tokens.
    """

    formula: str = ""
    content_decides: bool = False
    read_spelling: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._losses: dict[str, Tensor] = {}
        self._scores: dict[str, tuple[Tensor, Tensor]] = {}
        self._metrics: dict[str, Tensor] = {}

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all weights from ``generator``, so that the same seed produces the same projector."""

    def soft_frames(self, frames: int) -> int:
        """Return the number of soft tokens of an utterance of ``frames`` frames; the most, if its content decides."""
        raise NotImplementedError

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map frames to soft tokens.

        Args:
            features: [B, T, C], float32 or the run's dtype.
            mask: bool [B, T], True at frames and False at padding.

        Returns:
            soft [B, S, D] in the dtype of ``features``, and soft_mask, bool [B, S]. The valid soft tokens of a row,
            ``soft_frames`` of them, come first. They must not depend on padding frames or on other rows of the batch.
        """
        raise NotImplementedError

    def ctc_head(self) -> nn.Module | None:
        """Return the CTC head that the projector itself has and needs for its soft tokens; None for most projectors."""
        return None

    def token_vectors(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors [B, S, D] that stage 1 compares with token embeddings, and their mask, bool [B, S].

        These are the soft tokens, except for a projector that makes soft tokens of them (``posterior``). Arguments as
        in :meth:`forward`.
        """
        soft, soft_mask = self(features, mask)
        return soft, soft_mask

    def summary(self) -> dict[str, Any]:
        """Return facts about the weights for ``summary.json``, as JSON values; empty for most projectors."""
        return {}

    def take_losses(self) -> dict[str, Tensor]:
        """Return the projector's own losses by name: weighted scalars that are added to the run's loss.

        They are those of the last forward pass in training and are returned once; empty for most projectors. They are
        logged in ``metrics.jsonl``, so a name must not be that of another metric.
        """
        losses, self._losses = self._losses, {}
        return losses

    def last_scores(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As :meth:`take_scores`, which may still be called."""
        return self._scores

    def take_scores(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the scores of the projector's CTC heads in the last forward pass, once; empty for most.

        ``tokens``: [B, S, 1 + V] and their mask [B, S]; ``bytes``: [B, S, 257], of the bytes of the text.
        """
        scores, self._scores = self._scores, {}
        return scores

    def take_metrics(self) -> dict[str, Tensor]:
        """Return other metrics for ``metrics.jsonl`` by name: scalars without gradient, returned once."""
        metrics, self._metrics = self._metrics, {}
        return metrics


def under_autocast(projector_class: type[Projector]) -> Callable[..., Projector]:
    """Return a subclass whose ``forward`` runs under autocast to the input's dtype, so that plain torch layers work."""

    def forward(self: Projector, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed = features.dtype != torch.float32
        dtype = features.dtype if mixed else torch.bfloat16
        with torch.autocast(features.device.type, dtype=dtype, enabled=mixed):
            soft, soft_mask = projector_class.forward(self, features, mask)
        return soft.to(features.dtype), soft_mask

    return type(projector_class.__name__, (projector_class,), {"forward": forward})


class FrameStackProjector(Projector):
    """A projector that concatenates every ``stack`` frames to one soft token: S = ceil(T / stack)."""

    stack: int

    def project(self, x_BSK: Tensor, mask_BS: Tensor) -> Tensor:
        """Map stacked frames [B, S, k·C] and their mask [B, S] to soft tokens [B, S, D]."""
        raise NotImplementedError

    def soft_frames(self, frames: int) -> int:
        return -(-frames // self.stack)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x_BSK, soft_mask = stack_frames(features, mask, self.stack)
        return self.project(x_BSK, soft_mask), soft_mask


def stack_frames(features: Tensor, mask: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """Concatenate every ``stack`` frames: [B, T, C], [B, T] -> [B, S, stack·C], [B, S].

    Padding frames, and those that complete the last stack, are zero. A stack is valid if any of its frames is.
    """
    if stack == 1:
        return features, mask
    batch, frames, channels = features.shape
    tail = -frames % stack
    features = F.pad(features.masked_fill(~mask[..., None], 0), (0, 0, 0, tail))
    mask = F.pad(mask, (0, tail))
    return features.reshape(batch, -1, stack * channels), mask.reshape(batch, -1, stack).any(-1)
