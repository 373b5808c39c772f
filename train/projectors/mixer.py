"""A layer mixer in front of a projector: which layers of the encoder a task wants, learned.

In: features [B, T, L·C], the channels of L layers side by side (``train/data/layers.py``), and their mask. Out: the
layers' weighted sum [B, T, C], softmax weights learned, as in SUPERB (Yang et al. 2021, arXiv 2105.01051; s3prl's
``Featurizer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Projector


class LayerMixer(nn.Module):
    """L × [B, T, C] -> sum over l of softmax(w)_l · x_l [B, T, C]. L parameters, w = 0 at the start: the plain mean.

    With ``normalise`` each x_l is first brought to mean 0 and variance 1 over C (s3prl's ``normalize``): layers of one
    encoder can differ in scale by a factor of ten, and the weights would have to make up for it.
    """

    def __init__(self, layers: int, normalize: bool = False) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a layer mixer needs at least one layer and was given {layers}")
        self.normalize = normalize
        self.logits = nn.Parameter(torch.zeros(layers))

    def weights(self) -> Tensor:
        """float32 [L], sums to 1: what a report shows."""
        return self.logits.softmax(0)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """L tensors [B, T, C] of one shape and float dtype -> [B, T, C] in that dtype."""
        if len(features) != len(self.logits):
            raise ValueError(f"a mixer of {len(self.logits)} layers was given {len(features)}")
        if self.normalize:
            features = [F.layer_norm(x, x.shape[-1:]) for x in features]
        weights = self.weights().to(features[0].dtype)
        mixed = weights[0] * features[0]
        for weight, x in zip(weights[1:], features[1:], strict=True):
            mixed = mixed + weight * x
        return mixed


class MixedProjector(Projector):
    """A ``LayerMixer`` and the projector behind it, as one."""

    def __init__(self, mixer: LayerMixer, projector: Projector) -> None:
        super().__init__()
        self.mixer, self.projector = mixer, projector

    def init_weights(self, generator: torch.Generator) -> None:
        """The projector's own start; the mixer's is the mean, whatever the seed."""
        self.projector.init_weights(generator)

    def soft_frames(self, frames: int) -> int:
        return self.projector.soft_frames(frames)

    def take_losses(self) -> dict[str, Tensor]:
        return self.projector.take_losses()

    def take_metrics(self) -> dict[str, Tensor]:
        return self.projector.take_metrics()

    def summary(self) -> dict[str, Any]:
        """The learned weights of the layers, and what the projector tells."""
        return {"layer_weights": self.mixer.weights().tolist(), **self.projector.summary()}

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, T, L·C], mask [B, T] bool -> soft [B, S, D], soft_mask [B, S] bool."""
        layers = features.chunk(len(self.mixer.logits), -1)
        soft, soft_mask = self.projector(self.mixer(layers), mask)
        return soft, soft_mask
