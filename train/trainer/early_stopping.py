"""Early stopping: ends a run when the held-out loss stops improving, and keeps the best weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

BEST_PREFIX = "best."


class EarlyStopping:
    """Tracks the best evaluation and counts the evaluations since.

    Args:
        patience: number of evaluations without improvement after which to stop; None disables early stopping, and no
            weights are kept.

    Attributes:
        best_loss, best_step: held-out loss and step of the best evaluation; None before the first.
        best_weights: copies of the parameters at ``best_step``, by name.
        evaluations_since_best: number of evaluations since ``best_step``.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.evaluations_since_best = 0
        self.best_weights: dict[str, Tensor] = {}

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` is exhausted."""
        return self.patience is not None and self.evaluations_since_best >= self.patience

    def update(self, loss: float, step: int, named_parameters: Mapping[str, nn.Parameter]) -> None:
        """Record the held-out loss of ``named_parameters`` at ``step``."""
        if self.patience is None:
            return
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
            self.best_weights = {name: parameter.detach().clone() for name, parameter in named_parameters.items()}
        else:
            self.evaluations_since_best += 1

    def state(self) -> dict[str, Any]:
        """Return the JSON part of the checkpoint."""
        return {"loss": self.best_loss, "step": self.best_step, "stale": self.evaluations_since_best}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint."""
        return {f"{BEST_PREFIX}{name}": tensor for name, tensor in self.best_weights.items()}

    def load(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], named_parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Restore the values returned by :meth:`state` and :meth:`tensors`."""
        self.best_loss, self.best_step, self.evaluations_since_best = state["loss"], state["step"], state["stale"]
        if self.best_loss is not None:
            self.best_weights = {
                name: tensors[f"{BEST_PREFIX}{name}"].to(p.device) for name, p in named_parameters.items()
            }
