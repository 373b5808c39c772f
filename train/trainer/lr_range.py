"""The learning-rate range test: raise the rate step by step until the loss runs away, and read off a good one.

In: a training configuration. Out: the loss at each rate, and a suggestion with its reason. Source: Smith 2015 (arXiv
1506.01186); the exponential ramp and the smoothing are fastai's ``lr_find`` (weights of 0.98, bias taken out). No run
folder is made and no weight is kept.

    python -m train lr-range --config configs/train/demo.yaml
    python -m train lr-range --config configs/train/demo.yaml --low 1e-5 --high 1 --steps 100 --json rates.json

The ramp ends early when the smoothed loss is above ``DIVERGENCE_RATIO`` × its lowest, or when loss or gradient is not
finite.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.config.train import TrainConfig
from train.data.caches import open_data
from train.distributed.device import choose_device, choose_dtype
from train.distributed.group import ProcessGroup
from train.lms.base import SeparatePasses
from train.model.build import build_model
from train.trainer.state import RunState
from train.trainer.step import TrainStep, next_batches, optimizer_step

DIVERGENCE_RATIO = 4.0
SMOOTHING = 0.9  # fastai's 0.98 is for ramps of thousands of steps
SKIP_FRACTION = 0.1  # of the steps, at the start: the smoothed loss has not settled yet
TABLE_LINES = 20  # lines of the table


@dataclass(frozen=True, slots=True)
class LrPoint:
    """One step of the ramp."""

    lr: float
    loss: float  # nats a target token
    smoothed: float


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A rate, and why."""

    lr: float
    reason: str


def lr_range(config: TrainConfig, low: float, high: float, steps: int) -> list[LrPoint]:
    """The ramp from ``low`` to ``high`` in ``steps`` steps, as far as it goes; warm-up and schedule are not used.

    Raises:
        UserError: bad bounds, data or settings, or several processes.
    """
    if not 0 < low < high or steps < 10:
        raise UserError(
            f"a ramp from {low:g} to {high:g} in {steps} steps cannot be: 0 < --low < --high, --steps >= 10"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lr-range works in one process: start it without torchrun")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    data, group = open_data(config), ProcessGroup()
    model = build_model(config, data.caches[0].spec.channels, device, dtype)
    state = RunState(config, data, model, dtype, Path(config.runs), group)  # writes nothing before it is asked to save
    model.eval()
    model.projector.train()
    model.lm.train(config.lm.train)
    passes, rates = SeparatePasses(model.lm), list[LrPoint]()
    batches = state.batches()
    try:
        for step in range(steps):
            lr = low * (high / low) ** (step / (steps - 1))
            taken, data_wait = next_batches(batches, config.gradient_accumulation_steps)
            train_step = TrainStep(
                config, model, state.optimizer, state.parameters, taken,
                step=step, lr=lr, group=group, data_wait=data_wait,
            )  # fmt: skip
            (metrics,) = optimizer_step([train_step], passes)
            if not metrics.finite:
                break
            rates.append(LrPoint(lr, metrics.loss, _smooth(rates, metrics.loss)))
            if rates[-1].smoothed > DIVERGENCE_RATIO * min(rate.smoothed for rate in rates):
                break
    finally:
        batches.close()
    return rates


def suggest_lr(rates: list[LrPoint]) -> Suggestion:
    """The rate at which the smoothed loss falls fastest, but no more than a third of that at which it is lowest.

    Raises:
        UserError: the ramp is too short, or the loss never falls.
    """
    settled = rates[round(SKIP_FRACTION * len(rates)) :]
    if len(settled) < 5:
        raise UserError(f"the loss ran away after {len(rates)} steps: set --low lower, or look at the data")
    lowest = min(settled, key=lambda rate: rate.smoothed)
    slopes = [
        (_slope(settled[i - 2], settled[i + 2]), settled[i])
        for i in range(2, len(settled) - 2)
        if settled[i].lr <= lowest.lr
    ]
    if not slopes or min(slopes, key=lambda each: each[0])[0] >= 0:
        raise UserError(
            f"the loss never falls between {settled[0].lr:.1e} and {settled[-1].lr:.1e}: set --low "
            "lower, give the ramp more --steps, or look at the data"
        )
    slope, steepest = min(slopes, key=lambda each: each[0])
    fall = f"the loss falls fastest at {steepest.lr:.1e} ({-slope:.2f} nats a tenfold) and is lowest at {lowest.lr:.1e}"
    if steepest.lr <= lowest.lr / 3:
        return Suggestion(steepest.lr, fall)
    return Suggestion(
        lowest.lr / 3, f"{fall}; a third of the latter, for the lowest point is where it begins to run away"
    )


def format_table(rates: list[LrPoint], high: float) -> str:
    """About ``SHOWN`` of the rates, and how the ramp ended."""
    every = max(1, len(rates) // TABLE_LINES)
    lines = [f"{'lr':>9}  {'loss':>9}  {'smoothed':>9}"]
    lines += [f"{rate.lr:>9.2e}  {rate.loss:>9.4f}  {rate.smoothed:>9.4f}" for rate in rates[::every]]
    if rates and not math.isclose(rates[-1].lr, high, rel_tol=1e-6):
        lines.append(f"the loss ran away after {rates[-1].lr:.2e}: the ramp ended there")
    return "\n".join(lines)


def record(rates: list[LrPoint], suggestion: Suggestion) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {"suggestion": asdict(suggestion), "rates": [asdict(rate) for rate in rates]}


def _smooth(rates: list[LrPoint], loss: float) -> float:
    """The exponential average of all losses so far, without the bias of its start."""
    total, weight = 0.0, 0.0
    for each in [*(rate.loss for rate in rates), loss]:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * each, SMOOTHING * weight + (1 - SMOOTHING)
    return total / weight


def _slope(one: LrPoint, two: LrPoint) -> float:
    """Nats a tenfold of the rate."""
    return (two.smoothed - one.smoothed) / math.log10(two.lr / one.lr)
