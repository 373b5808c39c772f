"""A layer mixer in front of a projector: a learned weighted sum of encoder layers.

The input is [B, T, L·C], the concatenated channels of L layers (``train/data/layers.py``); the output is their weighted
sum [B, T, C] with learned softmax weights, as in SUPERB (Yang et al. 2021, arXiv 2105.01051; s3prl's ``Featurizer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Projector


class LayerMixer(nn.Module):
    """L × [B, T, C] -> sum over l of softmax(w)_l · x_l [B, T, C]. The L parameters w start at 0, which is the mean.

    With ``normalize``, each x_l is first scaled to mean 0 and variance 1 over C (s3prl's ``normalize``): layers of one
    encoder can differ in scale by a factor of ten, for which the weights would have to compensate.

    Raises:
        ValueError: ``layers`` is less than 1.
    """

    def __init__(self, layers: int, normalize: bool = False) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"expected at least one layer to mix, got {layers}")
        self.normalize = normalize
        self.logits = nn.Parameter(torch.zeros(layers))

    def weights(self) -> Tensor:
        """Return the weights of the layers, float32 [L], which sum to 1."""
        return self.logits.softmax(0)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Mix L tensors [B, T, C] of the same shape and float dtype to one [B, T, C] in that dtype.

        Raises:
            ValueError: the number of tensors is not L.
        """
        if len(features) != len(self.logits):
            raise ValueError(f"expected {len(self.logits)} layers to mix, got {len(features)}")
        if self.normalize:
            features = [F.layer_norm(x, x.shape[-1:]) for x in features]
        weights = self.weights().to(features[0].dtype)
        mixed = weights[0] * features[0]
        for weight, x in zip(weights[1:], features[1:], strict=True):
            mixed = mixed + weight * x
        return mixed


class MixedProjector(Projector):
    """A ``LayerMixer`` followed by a projector."""

    def __init__(self, mixer: LayerMixer, projector: Projector) -> None:
        super().__init__()
        self.mixer, self.projector = mixer, projector
        self.content_decides, self.read_spelling = projector.content_decides, projector.read_spelling

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialize the projector; the mixer always starts at the mean."""
        self.projector.init_weights(generator)

    def soft_frames(self, frames: int) -> int:
        return self.projector.soft_frames(frames)

    def ctc_head(self) -> nn.Module | None:
        """As for the projector."""
        return self.projector.ctc_head()

    def token_vectors(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As for the projector, of mixed features."""
        return self.projector.token_vectors(self._mixed(features), mask)

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
        """Return the learned weights of the layers and the projector's summary."""
        return {"layer_weights": self.mixer.weights().tolist(), **self.projector.summary()}

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, T, L·C], mask [B, T] bool to soft [B, S, D], soft_mask [B, S] bool."""
        soft, soft_mask = self.projector(self._mixed(features), mask)
        return soft, soft_mask

    def _mixed(self, features: Tensor) -> Tensor:
        mixed: Tensor = self.mixer(features.chunk(len(self.mixer.logits), -1))
        return mixed
