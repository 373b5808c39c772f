"""The learning rate of each step: a pure function of the settings and the step's number."""

from __future__ import annotations

import math

from train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (0 is the first): linear warm-up, then a fall to ``min_lr`` or constant.

    ``cosine`` is half a cosine (Loshchilov & Hutter 2017, without restarts), ``linear`` a straight line.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, config.steps - warmup)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
