"""What a run has done so far, over all its sessions and processes.

In: the figures of each step. Out: the part of a checkpoint that ``summary.json`` tells, as fractions and rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.step import StepFigures


@dataclass
class Counters:
    """Sums over the steps of a run; frames and utterances are those of all ranks, times those of rank 0."""

    seconds: float = 0.0  # wall time of training and evaluation
    step_seconds: float = 0.0  # of which in training steps
    wait_seconds: float = 0.0  # of which waiting for data, on the rank that waited longest
    frames: int = 0  # valid frames seen
    padded_frames: int = 0  # frames of the batches, padding included
    utterances: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    evaluated: int = 0  # step of the last evaluation

    def add(self, step: StepFigures, seconds: float) -> None:
        """Count one step that took ``seconds``, waiting included."""
        self.seconds, self.step_seconds = self.seconds + seconds, self.step_seconds + seconds
        self.wait_seconds += step.waited
        self.frames, self.padded_frames = self.frames + step.frames, self.padded_frames + step.padded_frames
        self.utterances += step.utterances
        self.first_loss = step.loss if self.first_loss is None else self.first_loss
        self.last_loss = step.loss

    @property
    def frames_per_second(self) -> float:
        """Valid frames a second of training."""
        return self.frames / max(self.step_seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """The figures by the names of ``summary.json``."""
        return {
            "seconds": round(self.seconds, 3),
            "data_wait_fraction": self.wait_seconds / max(self.step_seconds, 1e-9),
            "padding_fraction": 1 - self.frames / max(self.padded_frames, 1),
            "train_loss_first": self.first_loss,
            "train_loss_last": self.last_loss,
            "frames_per_second": self.frames_per_second,
            "utterances": self.utterances,
        }
