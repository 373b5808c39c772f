"""The learning-rate range test: increase the learning rate each step until the loss diverges, then suggest a value.

Source: Smith 2015 (arXiv 1506.01186). The exponential ramp and the bias-corrected smoothing follow ``lr_find`` of
fastai. No run folder is created and no weights are saved.

    python -m train lr-range --config configs/train/demo.yaml
    python -m train lr-range --config configs/train/demo.yaml --low 1e-5 --high 1 --steps 100 --json rates.json

The ramp ends early when the smoothed loss exceeds ``DIVERGENCE_RATIO`` × its minimum, or when the loss or the gradient
is not finite.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.config.train import TrainConfig
from train.data.caches import open_data, print_notes
from train.distributed.device import choose_device, choose_dtype, flushed_denormals
from train.distributed.group import ProcessGroup
from train.lms.base import SeparatePasses
from train.model.build import build_model
from train.model.ctc import run_tokens, stage_one_folder, start_from_stage_one, uses_tokens
from train.trainer.state import RunState
from train.trainer.step import TrainStep, next_batches, optimizer_step

DIVERGENCE_RATIO = 4.0
SMOOTHING = 0.9  # fastai uses 0.98, for ramps of thousands of steps
SKIP_FRACTION = 0.1  # fraction of the first points ignored: the smoothed loss has not settled
TABLE_LINES = 20  # approximate number of rows


@dataclass(frozen=True, slots=True)
class LrPoint:
    """One step of the ramp."""

    lr: float
    loss: float  # nats per target token
    smoothed: float


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A suggested learning rate and the reason for it."""

    lr: float
    reason: str


@flushed_denormals()
def lr_range(config: TrainConfig, low: float, high: float, steps: int) -> list[LrPoint]:
    """Ramp the learning rate from ``low`` to ``high`` in ``steps`` steps, without warm-up or schedule.

    Returns the points up to divergence.

    Raises:
        UserError: the bounds, data or settings are invalid, or there are several processes.
    """
    if not 0 < low < high or steps < 10:
        raise UserError(
            f"expected 0 < --low < --high and --steps >= 10, got --low {low:g}, --high {high:g}, --steps {steps}"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lr-range runs in one process: start it without torchrun")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    data, group = open_data(config), ProcessGroup()
    print_notes(data.notes)
    tokens = run_tokens(config, data) if uses_tokens(config) else None
    spec = data.caches[0].spec
    model = build_model(config, spec.channels, device, dtype, tokens=tokens, codebook_size=spec.codebook_size)
    if config.pretrain.start is not None:
        start_from_stage_one(model, stage_one_folder(config, Path(config.runs)))
    state = RunState(config, data, model, dtype, Path(config.runs), group)  # writes nothing until `save`
    model.eval()
    model.projector.train()
    model.lm.train(config.lm.train)
    passes, points = SeparatePasses(model.lm), list[LrPoint]()
    batches = state.batches()
    try:
        for step in range(steps):
            lr = low * (high / low) ** (step / (steps - 1))
            step_batches, data_wait = next_batches(batches, config.gradient_accumulation_steps)
            train_step = TrainStep(
                config, model, state.optimizer, state.parameters, step_batches,
                step=step, lr=lr, group=group, data_wait=data_wait, tasks=data.tasks,
            )  # fmt: skip
            (metrics,) = optimizer_step([train_step], passes)
            if not metrics.finite:
                break
            points.append(LrPoint(lr, metrics.loss, _smooth(points, metrics.loss)))
            if points[-1].smoothed > DIVERGENCE_RATIO * min(point.smoothed for point in points):
                break
    finally:
        batches.close()
    return points


def suggest_lr(points: list[LrPoint]) -> Suggestion:
    """Suggest the learning rate of the steepest fall of the smoothed loss, at most a third of that of its minimum.

    Raises:
        UserError: the ramp is too short, or the loss never falls.
    """
    settled = points[round(SKIP_FRACTION * len(points)) :]
    if len(settled) < 5:
        raise UserError(f"the loss diverged after {len(points)} steps: lower --low, or inspect the data")
    lowest = min(settled, key=lambda point: point.smoothed)
    slopes = [
        (_slope(settled[i - 2], settled[i + 2]), settled[i])
        for i in range(2, len(settled) - 2)
        if settled[i].lr <= lowest.lr
    ]
    if not slopes or min(slopes, key=lambda pair: pair[0])[0] >= 0:
        raise UserError(
            f"the loss never falls between {settled[0].lr:.1e} and {settled[-1].lr:.1e}: lower --low, "
            "raise --steps, or inspect the data"
        )
    slope, steepest = min(slopes, key=lambda pair: pair[0])
    fall = (
        f"the loss falls fastest at {steepest.lr:.1e} ({-slope:.2f} nats per decade) and is lowest at {lowest.lr:.1e}"
    )
    if steepest.lr <= lowest.lr / 3:
        return Suggestion(steepest.lr, fall)
    return Suggestion(
        lowest.lr / 3, f"{fall}; suggesting a third of the latter, because the loss starts to diverge at its minimum"
    )


def format_table(points: list[LrPoint], high: float) -> str:
    """Format about ``TABLE_LINES`` of the points, and say whether the ramp ended early."""
    every = max(1, len(points) // TABLE_LINES)
    lines = [f"{'lr':>9}  {'loss':>9}  {'smoothed':>9}"]
    lines += [f"{point.lr:>9.2e}  {point.loss:>9.4f}  {point.smoothed:>9.4f}" for point in points[::every]]
    if points and not math.isclose(points[-1].lr, high, rel_tol=1e-6):
        lines.append(f"the ramp ended early: the loss diverged after lr={points[-1].lr:.2e}")
    return "\n".join(lines)


def record(points: list[LrPoint], suggestion: Suggestion) -> dict[str, Any]:
    """Return the content of the ``--json`` file."""
    return {"suggestion": asdict(suggestion), "rates": [asdict(point) for point in points]}


def _smooth(points: list[LrPoint], loss: float) -> float:
    """Bias-corrected exponential average of the losses of ``points`` and ``loss``."""
    total, weight = 0.0, 0.0
    for value in [*(point.loss for point in points), loss]:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
    return total / weight


def _slope(start: LrPoint, end: LrPoint) -> float:
    """Change of the smoothed loss in nats per decade of the learning rate."""
    return (end.smoothed - start.smoothed) / math.log10(end.lr / start.lr)
