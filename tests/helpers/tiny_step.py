"""A single optimizer step, and the metrics of a step."""

from __future__ import annotations

import torch

from train.config.train import TrainConfig
from train.distributed.group import ProcessGroup
from train.lms.base import SeparatePasses
from train.runs.metrics_log import StepMetrics
from train.trainer.step import TrainStep, optimizer_step


def step_metrics(number: int) -> StepMetrics:
    rates = {"lr": 0.1, "grad_norm": 1.0, "projector_rms_ratio": 1.0, "seconds": 0.5, "data_wait": 0.0}
    return StepMetrics(step=number, loss=1 / 3, **rates, frames=30, padded_frames=40, tokens=20, utterances=2)


def one_step(model, parameters, batches, group=None, **keys):
    """Return the metrics of a step that changes no weight and keeps its gradient."""
    config, optimizer = TrainConfig(caches=["a"], clip=1e9, **keys), torch.optim.SGD(parameters, lr=0.0, fused=True)
    step = TrainStep(config, model, optimizer, parameters, batches, step=0, lr=0.0, group=group or ProcessGroup())
    return optimizer_step([step], SeparatePasses(model.lm))[0]
