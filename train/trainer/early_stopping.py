"""Early stopping: when the held-out loss has not fallen for a while, a run ends with the best weights so far.

In: the held-out loss of each evaluation during training. Out: whether to stop, and the best weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

BEST_PREFIX = "best."


class EarlyStopping:
    """Counts the evaluations since the best one; with ``patience`` None it keeps nothing and never stops a run.

    Attributes:
        loss, step: of the best evaluation; None before the first.
        stale: evaluations since then.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.evaluations_since_best = 0
        self.best_weights: dict[str, Tensor] = {}

    @property
    def should_stop(self) -> bool:
        """Whether to stop training."""
        return self.patience is not None and self.evaluations_since_best >= self.patience

    def update(self, loss: float, step: int, named_parameters: Mapping[str, nn.Parameter]) -> None:
        """Add an evaluation that was made with the weights ``named``."""
        if self.patience is None:
            return
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
            self.best_weights = {name: parameter.detach().clone() for name, parameter in named_parameters.items()}
        else:
            self.evaluations_since_best += 1

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that is JSON."""
        return {"loss": self.best_loss, "step": self.best_step, "stale": self.evaluations_since_best}

    def tensors(self) -> dict[str, Tensor]:
        """The part of a checkpoint that is tensors."""
        return {f"{BEST_PREFIX}{name}": tensor for name, tensor in self.best_weights.items()}

    def load(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], named_parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Restore what :meth:`state` and :meth:`tensors` returned."""
        self.best_loss, self.best_step, self.evaluations_since_best = state["loss"], state["step"], state["stale"]
        if self.best_loss is not None:
            self.best_weights = {
                name: tensors[f"{BEST_PREFIX}{name}"].to(p.device) for name, p in named_parameters.items()
            }
