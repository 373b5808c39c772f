"""Embeddings of integer codes in front of a projector: [B, T, K] codes of K codebooks -> [B, T, C] floats.

Each codebook has a table of its own; a frame is the sum of the embeddings of its codes, as in the language models over
codecs (MusicGen, arXiv 2306.05284). A code of -1 is no code and adds nothing: padding, and frames that are masked in
training, are vectors of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Projector


class CodeEmbedding(nn.Module):
    """Integer codes [B, T, K], 0 to ``size`` - 1 or -1, and mask [B, T] -> sum of K embeddings [B, T, ``dim``].

    ``dtype`` is that of the output; the table, float32 [K, ``size``, ``dim``], starts at N(0, 1/K), so that a frame has
    an RMS of about 1. Whoever builds the model sets ``dtype`` to that of its activations.

    Raises:
        ValueError: a size is less than 1.
    """

    def __init__(self, codebooks: int, size: int, dim: int) -> None:
        super().__init__()
        if min(codebooks, size, dim) < 1:
            raise ValueError(f"expected at least one codebook, code and channel, got {codebooks}, {size} and {dim}")
        self.table = nn.Parameter(torch.empty(codebooks, size, dim))
        self.dtype = torch.float32

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the table from ``generator``."""
        self.table.normal_(0, len(self.table) ** -0.5, generator=generator)

    def forward(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Embed ``codes``, of an integer dtype; frames outside of ``mask`` are zeros.

        Raises:
            ValueError: ``codes`` has floats or another number of codebooks.
        """
        if codes.is_floating_point() or codes.shape[-1] != len(self.table):
            raise ValueError(
                f"expected integer codes of {len(self.table)} codebooks, got {list(codes.shape)} {codes.dtype}"
            )
        codes = codes.long().masked_fill(~mask[..., None], -1)
        x_BTC = torch.zeros((), dtype=self.table.dtype, device=codes.device)
        for table, own in zip(self.table, codes.unbind(-1), strict=True):
            x_BTC = x_BTC + F.embedding(own.clamp(min=0), table) * (own >= 0)[..., None]
        return x_BTC.to(self.dtype)


class CodesProjector(Projector):
    """A ``CodeEmbedding`` followed by a projector of ``dim`` channels."""

    def __init__(self, embedding: CodeEmbedding, projector: Projector) -> None:
        super().__init__()
        self.embedding, self.projector = embedding, projector
        self.content_decides, self.read_spelling = projector.content_decides, projector.read_spelling

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialize the embeddings and the projector."""
        self.embedding.init_weights(generator)
        self.projector.init_weights(generator)

    def soft_frames(self, frames: int) -> int:
        return self.projector.soft_frames(frames)

    def ctc_head(self) -> nn.Module | None:
        """As for the projector."""
        return self.projector.ctc_head()

    def token_vectors(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As for the projector, of embedded codes."""
        return self.projector.token_vectors(self.embedding(features, mask), mask)

    def last_scores(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As for the projector."""
        return self.projector.last_scores()

    def take_scores(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As for the projector."""
        return self.projector.take_scores()

    def take_losses(self) -> dict[str, Tensor]:
        return self.projector.take_losses()

    def take_metrics(self) -> dict[str, Tensor]:
        return self.projector.take_metrics()

    def summary(self) -> dict[str, Any]:
        return self.projector.summary()

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map codes [B, T, K], mask [B, T] bool to soft [B, S, D], soft_mask [B, S] bool."""
        soft, soft_mask = self.projector(self.embedding(features, mask), mask)
        return soft, soft_mask
