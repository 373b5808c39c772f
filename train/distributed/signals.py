"""Signals: the first SIGINT or SIGTERM asks a run to save and stop, the second one stops it at once.

In: signals. Out: :attr:`StopRequest.asked`, which the loop reads between steps and between batches of an evaluation.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Takes over both signals while it is entered; outside the main thread, where Python forbids that, it does nothing.

    Attributes:
        asked: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._handle_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
