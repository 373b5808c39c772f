"""Early stopping: when the held-out loss has not fallen for a while, a run ends with the best weights so far.

In: the held-out loss of each evaluation during training. Out: whether to stop, and the best weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

PREFIX = "best."


class EarlyStopping:
    """Counts the evaluations since the best one; with ``patience`` None it keeps nothing and never stops a run.

    Attributes:
        loss, step: of the best evaluation; None before the first.
        stale: evaluations since then.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.loss: float | None = None
        self.step: int | None = None
        self.stale = 0
        self.best: dict[str, Tensor] = {}

    @property
    def should_stop(self) -> bool:
        """Whether to stop training."""
        return self.patience is not None and self.stale >= self.patience

    def update(self, loss: float, step: int, named: Mapping[str, nn.Parameter]) -> None:
        """Add an evaluation that was made with the weights ``named``."""
        if self.patience is None:
            return
        if self.loss is None or loss < self.loss:
            self.loss, self.step, self.stale = loss, step, 0
            self.best = {name: parameter.detach().clone() for name, parameter in named.items()}
        else:
            self.stale += 1

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that is JSON."""
        return {"loss": self.loss, "step": self.step, "stale": self.stale}

    def tensors(self) -> dict[str, Tensor]:
        """The part of a checkpoint that is tensors."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.best.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        """Restore what :meth:`state` and :meth:`tensors` returned."""
        self.loss, self.step, self.stale = state["loss"], state["step"], state["stale"]
        if self.loss is not None:
            self.best = {name: tensors[f"{PREFIX}{name}"].to(p.device) for name, p in named.items()}
