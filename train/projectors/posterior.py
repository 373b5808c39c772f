"""``posterior``: distributions over the LM's tokens, as soft tokens (LegoSLM, arXiv 2505.11352).

Letters as in ``base.py``; V tokens of the CTC head, N soft tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Conv1d, LayerNorm, Linear, Projector, init_linear_layers, make_norm
from .ctc import BLANK, CtcHead, HeadTokens

if TYPE_CHECKING:  # an export contains a copy of this file, which must work without earshard
    from train.config.model import PosteriorConfig

STRIDE = 2  # of the first two convolutions


class PosteriorProjector(Projector):
    """LayerNorm -> Conv1d (5, stride 2) -> Conv1d (5, stride 2) -> Conv1d (3) … -> fc [D] -> CTC head -> soft tokens.

    Each convolution is followed by GELU. The likeliest class of each time step cuts an utterance into runs; each run of
    a token becomes one soft token, softmax(mean score / temperature) times the embeddings of the V tokens. Blanks are
    dropped. So there are about as many soft tokens as the text has tokens, and each lies among the LM's embeddings. A
    linear map of the run's mean hidden vector is added to it. The map starts at zero: a sharp softmax passes hardly any
    gradient, so it is here that stage 2 learns what else the LM should know. An utterance of blanks becomes one learned
    vector, which starts at zero: the LM needs an input, and can learn that it says nothing.

    Args:
        tokens: those of the CTC head.
    """

    formula = (
        "2·C + (5·C + 1)·H + (5·H + 1)·H + (3·H + 1)·H·(L - 2) + 2·(H + 1)·D + 2·D + 2 "
        "+ (D + 16·257 + 1)·128 + 257·(H + 1) "
        "[without spelling no 257·(H + 1); norm: rms + D, layer + 2·D]"
    )
    content_decides = True

    def __init__(
        self, config: PosteriorConfig, channels: int, width: int, embedding_rms: float, tokens: HeadTokens
    ) -> None:
        super().__init__()
        hidden = config.hidden
        self.temperature, self.dropout = config.temperature, config.dropout
        self.read_spelling = config.read_spelling
        self.input_norm = LayerNorm(channels)
        self.convs = nn.ModuleList(
            [
                Conv1d(channels, hidden, 5, stride=STRIDE, padding=2),
                Conv1d(hidden, hidden, 5, stride=STRIDE, padding=2),
            ]
            + [Conv1d(hidden, hidden, 3, padding=1) for _ in range(config.layers - 2)]
        )
        self.fc = Linear(hidden, width)
        self.spelling = Linear(hidden, 1 + 256) if config.spelling else None
        self.head = CtcHead(tokens)
        self.residual = Linear(hidden, width)
        self.silence = nn.Parameter(torch.zeros(width))
        self.norm = make_norm(config.norm, width, embedding_rms)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear_layers(self, "torch", generator)
        self.head.init_weights(generator)
        with torch.no_grad():
            self.residual.weight.zero_()
            if self.residual.bias is not None:
                self.residual.bias.zero_()

    def soft_frames(self, frames: int) -> int:
        """Return the most soft tokens, one per time step; the audio decides how many there are."""
        return -(-frames // STRIDE**2)

    def ctc_head(self) -> nn.Module:
        return self.head

    def token_vectors(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, T, C], [B, T] to the vectors in front of the CTC head [B, S, D], [B, S]."""
        hidden, mask = self._hidden(features, mask)
        return self.fc(hidden), mask

    def _hidden(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, T, C], [B, T] to [B, S, H], [B, S]."""
        x = self.input_norm(features)
        for i, conv in enumerate(self.convs):
            x = F.dropout(x.masked_fill(~mask[..., None], 0), self.dropout, self.training)
            x = F.gelu(conv(x))
            mask = mask[:, :: STRIDE if i < 2 else 1]
            if i == 0 and self.spelling is not None:
                self._scores["bytes"] = self.spelling(x).float(), mask
        return F.dropout(x, self.dropout, self.training), mask

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask = self._hidden(features, mask)
        scores = self.head(self.fc(hidden))
        self._scores["tokens"] = scores, mask
        mean, soft_mask = merge_runs(scores, mask, torch.cat([scores, hidden.float()], -1))
        said, heard = mean[..., : scores.shape[-1]], mean[..., scores.shape[-1] :]
        soft = (said[..., 1:] / self.temperature).softmax(-1) @ self.head.embeddings + self.residual(heard)
        empty = ~soft_mask.any(1)
        soft = torch.where(empty[:, None, None], self.silence, soft)
        soft_mask[:, 0] |= empty
        return self.norm(soft).to(features.dtype), soft_mask


def merge_runs(scores: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Average ``values`` over each run of equal likeliest classes; runs of blanks are left out.

    Differentiable in ``values``, with the runs held fixed.

    Args:
        scores: [B, S, 1 + V].
        mask: bool [B, S]; the valid steps of a row come first.
        values: [B, S, X].

    Returns:
        means [B, N, X], N at least 1, and the mask of the runs [B, N]. N is the most runs of a row, on a GPU S.
    """
    best = scores.argmax(-1).masked_fill(~mask, BLANK)
    says = best != BLANK
    starts = says & (best != F.pad(best, (1, 0), value=BLANK)[:, :-1])
    counts, rows = starts.sum(1), len(scores)
    width = max(1, int(counts.max())) if scores.device.type == "cpu" else scores.shape[1]  # a GPU is not waited for
    row = torch.arange(rows, device=scores.device)[:, None] * width
    index = torch.where(says, starts.cumsum(1) - 1 + row, rows * width).flatten()  # blanks go to a slot of their own
    sums = values.new_zeros(rows * width + 1, values.shape[-1]).index_add(0, index, values.flatten(0, 1))
    lengths = torch.zeros_like(sums[:, 0]).index_add(0, index, torch.ones_like(index, dtype=sums.dtype)).clamp(min=1)
    mean = (sums / lengths[:, None])[:-1].reshape(rows, width, -1)
    return mean, torch.arange(width, device=scores.device) < counts[:, None]
