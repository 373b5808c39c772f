"""Signal handling: the first SIGINT or SIGTERM requests a graceful stop, the second one interrupts immediately.

The training loop checks :attr:`StopRequest.requested` between steps and between the batches of an evaluation.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager that handles SIGINT and SIGTERM; it does nothing outside the main thread, as Python requires.

    Attributes:
        requested: whether a signal arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
