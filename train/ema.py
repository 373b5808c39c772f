"""An exponential moving average of the trained weights: smoother than the last step's, judged and kept instead of them.

In: the parameters after every step. Out: averaged weights that can stand in for them for a while. Source: Polyak &
Juditsky 1992; the decay of the first steps grows as (1 + t) / (10 + t), so that the start values are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREFIX = "ema."


class Ema:
    """Averages of ``named``, in their dtype and on their device; with ``decay`` 0 there are none."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.named, self.decay = named, decay
        self.averages = {name: p.detach().clone() for name, p in named.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self.named[name], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this."""
        return {f"{PREFIX}{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what :meth:`tensors` gave."""
        for name, average in self.averages.items():
            average.copy_(tensors[f"{PREFIX}{name}"])


@contextmanager
def stand_in(named: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]) -> Iterator[None]:
    """The model computes with ``tensors`` instead of the parameters of the same names inside the block."""

    def swap() -> None:
        for name in tensors:
            named[name].data, tensors[name] = tensors[name], named[name].data

    swap()
    try:
        yield
    finally:
        swap()
