"""Early stopping: when the held-out loss has not fallen for a while, a run ends with the weights that were best.

In: the held-out loss of each evaluation on the way. Out: whether to go on, and the best weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

PREFIX = "best."


class Patience:
    """Counts the evaluations since the best one; with ``evaluations`` None it keeps nothing and never ends a run.

    Attributes:
        loss, step: of the best evaluation; None before the first.
        stale: evaluations since then.
    """

    def __init__(self, evaluations: int | None) -> None:
        self.evaluations = evaluations
        self.loss: float | None = None
        self.step: int | None = None
        self.stale = 0
        self.best: dict[str, Tensor] = {}

    @property
    def ended(self) -> bool:
        """Whether to stop training."""
        return self.evaluations is not None and self.stale >= self.evaluations

    def judge(self, loss: float, step: int, named: Mapping[str, nn.Parameter]) -> None:
        """Take in an evaluation that was made with the weights ``named``."""
        if self.evaluations is None:
            return
        if self.loss is None or loss < self.loss:
            self.loss, self.step, self.stale = loss, step, 0
            self.best = {name: parameter.detach().clone() for name, parameter in named.items()}
        else:
            self.stale += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"loss": self.loss, "step": self.step, "stale": self.stale}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.best.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        """Go back to what :meth:`state` and :meth:`tensors` gave."""
        self.loss, self.step, self.stale = state["loss"], state["step"], state["stale"]
        if self.loss is not None:
            self.best = {name: tensors[f"{PREFIX}{name}"].to(p.device) for name, p in named.items()}
