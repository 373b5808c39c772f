"""Hidden states of a transformers model by pre-hooks of its layers; layers above the highest one are not computed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _StopForward(Exception):
    """Raised to end the forward pass once the highest requested layer is captured."""


class LayerCapture:
    """The hidden states of a model with the layers ``layers``; may be used by several threads at a time.

    Hidden state 0 is the input of the first layer, the last one the model's ``last_hidden_state``.
    """

    def __init__(self, model: Any, layers: Iterable[Any]) -> None:
        self._model, self._own = model, threading.local()
        self._last = 0
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            self._last = index + 1

    def run(self, layers: set[int], *args: Any, **inputs: Any) -> dict[int, torch.Tensor]:
        """Call the model and return layer -> [B, T, C] of the ``layers``."""
        found: dict[int, torch.Tensor] = {}
        self._own.layers, self._own.found, self._own.top = layers, found, max(layers)
        try:
            last = self._model(*args, **inputs).last_hidden_state
            if self._last in layers:
                found[self._last] = last
        except _StopForward:
            pass
        return found

    def _hook(self, index: int) -> Any:
        """Return a pre-hook for layer ``index`` + 1, whose input is hidden state ``index``."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if index in self._own.layers:
                self._own.found[index] = args[0] if args else kwargs["hidden_states"]
            if index == self._own.top:
                raise _StopForward

        return hook
