"""Numbers that a device computes during a step and the host reads once, when they have arrived."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class DeferredValues:
    """Named numbers: :meth:`add` them, then :meth:`send` them to the host, and :meth:`read` them at any later time.

    The host waits only in :meth:`read`, and not for what the device was given to do after :meth:`send`.
    """

    def __init__(self) -> None:
        self._names: list[tuple[str, int]] = []
        self._parts: list[Tensor] = []
        self._sent: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def add(self, name: str, values: Tensor) -> None:
        """Add numbers of any shape to those of ``name``."""
        self._names.append((name, values.numel()))
        self._parts.append(values.detach().double().flatten())

    def send(self) -> None:
        """Start the copy to the host."""
        values, self._parts = torch.cat(self._parts), []
        if values.is_cuda:
            self._sent = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._sent.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._sent = values.cpu()

    def read(self) -> dict[str, list[float]]:
        """Return the numbers by name, in the order in which they were added; [] for any other name."""
        assert self._sent is not None, "send() first"
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers = iter(self._sent.tolist())
        found: dict[str, list[float]] = defaultdict(list)
        for name, count in self._names:
            found[name] += [next(numbers) for _ in range(count)]
        return found
