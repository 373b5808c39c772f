"""Emergence: a loss that stood still for a while and then falls at once, as when a projector begins to be heard.

In: the training loss of each step. Out: an :class:`Emergence` at the step that shows it, once an event. Known from
projectors trained alone: steps 200 to 4000 bring no progress, then the loss drops within a few dozen steps.

Definition, with n = 50 steps:

- *plateau*: of the last n losses, the means of the older and the newer half differ by no more than 2 % of their mean,
  or by no more than the standard error of that difference.
- *emergence*: no more than n steps after the end of the last plateau, the mean of the last 10 losses is below the
  plateau's by more than 15 %, and by more than four standard errors of such a mean.

After one, a new plateau must come before there can be another.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

PLATEAU = 50  # steps
FLAT = 0.02  # of the mean
FLAT_ERRORS = 1.0
RECENT = 10  # steps
DROP = 0.15  # of the plateau's mean
DROP_ERRORS = 4.0


@dataclass(frozen=True, slots=True)
class Emergence:
    """The loss fell from the plateau's ``before`` to ``after`` (means, nats a token) within ``steps``."""

    step: int
    before: float
    after: float
    steps: int  # since the plateau's end

    def sentence(self) -> str:
        """For people."""
        return (
            f"step {self.step}: emergence? The loss fell from {self.before:.3f} to {self.after:.3f} within "
            f"{self.steps} steps after a plateau; the next evaluation's audio gain tells whether the model listens"
        )

    def record(self) -> dict[str, float]:
        """For ``metrics.jsonl``, under ``emergence`` of the step's line."""
        return {"before": self.before, "after": self.after, "steps": self.steps}


@dataclass(frozen=True, slots=True)
class _Plateau:
    end: int
    mean: float
    spread: float  # standard deviation of a loss


class EmergenceDetector:
    """Takes the losses of a run in the order of its steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=PLATEAU)
        self._plateau: _Plateau | None = None

    def take(self, step: int, loss: float) -> Emergence | None:
        """The emergence that the loss of ``step`` shows, if any."""
        self._losses.append(loss)
        found = self._fallen(step)
        if found is not None:
            self._plateau = None
            self._losses.clear()  # the next plateau must lie behind this drop
        elif len(self._losses) == PLATEAU:
            self._plateau = self._flat(step) or self._plateau
        return found

    def _flat(self, step: int) -> _Plateau | None:
        losses = list(self._losses)
        old, new = losses[: PLATEAU // 2], losses[PLATEAU // 2 :]
        level = _mean(losses)
        spread = math.sqrt((_variance(old) + _variance(new)) / 2)
        error = spread * math.sqrt(4 / PLATEAU)
        moved = abs(_mean(new) - _mean(old))
        return _Plateau(step, level, spread) if moved <= max(FLAT * abs(level), FLAT_ERRORS * error) else None

    def _fallen(self, step: int) -> Emergence | None:
        plateau = self._plateau
        if plateau is None or step - plateau.end > PLATEAU or step == plateau.end:
            return None
        recent = _mean(list(self._losses)[-RECENT:])
        needed = max(DROP * abs(plateau.mean), DROP_ERRORS * plateau.spread / math.sqrt(RECENT))
        if plateau.mean - recent <= needed:
            return None
        return Emergence(step, plateau.mean, recent, step - plateau.end)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return _mean([(value - mean) ** 2 for value in values])
