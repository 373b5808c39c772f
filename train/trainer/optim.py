"""Learning-rate schedule and exponential moving average (EMA) of the trained weights.

The learning rate is a pure function of the settings and the step number. With ``ema_decay`` set, a run evaluates and
keeps the averages instead of the weights of the last step. Source: Polyak & Juditsky 1992. The decay of the first steps
is limited to (1 + t) / (10 + t), so that the averages soon forget the initial values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.config.train import TrainConfig

EMA_PREFIX = "ema."


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of ``step`` (0 is the first): linear warm-up, then decay to ``min_lr`` or a constant rate.

    ``cosine`` follows half a cosine (Loshchilov & Hutter 2017, without restarts), ``linear`` a straight line.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, config.steps - warmup)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


class Ema:
    """Averages of ``named_parameters``, in their dtype and on their device; ``decay`` 0 disables them."""

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.named_parameters, self.decay = named_parameters, decay
        self.averages = {name: p.detach().clone() for name, p in named_parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the weights after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self.named_parameters[name], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint."""
        return {f"{EMA_PREFIX}{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors returned by :meth:`tensors`."""
        for name, average in self.averages.items():
            average.copy_(tensors[f"{EMA_PREFIX}{name}"])


@contextmanager
def swapped_parameters(named_parameters: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Context manager in which the parameters named in ``tensors`` hold the values of ``tensors``."""

    def swap() -> None:
        for name in tensors:
            named_parameters[name].data, tensors[name] = tensors[name], named_parameters[name].data

    swap()
    try:
        yield
    finally:
        swap()
