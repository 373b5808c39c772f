"""The state of a run at a step: model, optimizer, position in the data, counters.

Rank 0 writes the checkpoints and reads them for all ranks. A run may resume with a different number of processes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from shards.stream.batch import Batch
from train.config.train import TrainConfig
from train.data.caches import TrainData
from train.data.instructions import ALL_TASKS
from train.data.loader import Stream, open_stream
from train.distributed.group import ProcessGroup
from train.model.audio_lm import AudioLM
from train.model.checkpoint import load_checkpoint, restore, save_checkpoint, trained_parameters
from train.model.prompt import Prompt
from train.runs.metrics_log import StepMetrics
from train.trainer.early_stopping import EarlyStopping
from train.trainer.optim import Ema, swapped_parameters


@dataclass
class Counters:
    """Totals over all steps and sessions of a run: frames and utterances of all ranks, times of rank 0."""

    seconds: float = 0.0  # wall time of training and evaluation
    step_seconds: float = 0.0  # the part spent in training steps
    wait_seconds: float = 0.0  # the part spent waiting for data, on the slowest rank
    frames: int = 0  # valid frames, without padding
    padded_frames: int = 0  # frames including padding
    utterances: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    evaluated: int = -1  # the step of the last evaluation; -1: none
    stage_one_seconds: float = 0.0  # of the stage 1 that the run started from

    def add(self, step: StepMetrics) -> None:
        """Add the metrics of one step."""
        self.seconds, self.step_seconds = self.seconds + step.seconds, self.step_seconds + step.seconds
        self.wait_seconds += step.data_wait
        self.frames, self.padded_frames = self.frames + step.frames, self.padded_frames + step.padded_frames
        self.utterances += step.utterances
        self.first_loss = step.loss if self.first_loss is None else self.first_loss
        self.last_loss = step.loss

    @property
    def frames_per_second(self) -> float:
        """Valid frames per second of training."""
        return self.frames / max(self.step_seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """Return totals, fractions and rates under their keys in ``summary.json``."""
        return {
            "seconds": round(self.seconds, 3),
            "training_seconds": round(self.step_seconds, 3),
            "evaluation_seconds": round(self.seconds - self.step_seconds, 3),
            "data_wait_fraction": self.wait_seconds / max(self.step_seconds, 1e-9),
            "padding_fraction": 1 - self.frames / max(self.padded_frames, 1),
            "train_loss_first": self.first_loss,
            "train_loss_last": self.last_loss,
            "frames_per_second": self.frames_per_second,
            "utterances": self.utterances,
        }


def require_known_tasks(prompt: Prompt, tasks: Sequence[str]) -> None:
    """UserError if the file ``prompt.prompts`` has instructions for a task that no row has."""
    listed = set() if prompt.instructions is None else prompt.instructions.by_task.keys() - {ALL_TASKS, *tasks}
    if listed:
        raise UserError(
            f"prompt.prompts '{prompt.config.prompts}' has instructions for the task '{min(listed)}', and the tasks of "
            f"the labels are {', '.join(map(repr, tasks))}: correct the file, or the column 'task'"
        )


class RunState:
    """A run between two steps.

    Attributes:
        step: number of completed steps.
        named_parameters, parameters: the trained parameters.
        stream: the batches of this rank; call ``iter`` on it only once.
        stream_state: state of the stream after the last completed step.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainData,
        model: AudioLM,
        dtype: torch.dtype,
        run: Path,
        group: ProcessGroup,
        stream: Stream | None = None,
    ) -> None:
        """``stream``: the stream of another run with the same data, batches and order, to be shared with it."""
        self.data, self.model, self.dtype, self.run, self.group = data, model, dtype, run, group
        require_known_tasks(model.prompt, data.tasks)
        self.step = 0
        self.counters = Counters()
        self.named_parameters = trained_parameters(model)
        self.parameters = list(self.named_parameters.values())
        groups = [  # no weight decay on biases and norm gains
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        trained = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, fused=True)
        self.stream = open_stream(config, data, group) if stream is None else stream
        self.ema = Ema(self.named_parameters, config.ema_decay)
        self.early_stopping = EarlyStopping(config.patience)
        self.stream_state = self.stream.state_dict()

    def batches(self) -> Generator[Batch, None, None]:
        """Yield the batches of this rank from the current position; close it to stop the prefetch threads."""
        yield from self.stream

    def advance(self) -> None:
        """Advance by one step, which the device may not have finished."""
        self.step += 1
        self.ema.update(self.step)
        # Kept for `save`: a step that fails midway has already taken batches from the stream.
        self.stream_state = self.stream.state_dict()

    def current_weights(self) -> AbstractContextManager[None]:
        """Context manager in which the model has the weights evaluated during training: the EMA or the last."""
        return swapped_parameters(self.named_parameters, self.ema.averages)

    def final_weights(self) -> AbstractContextManager[None]:
        """Context manager in which the model has the weights a finished run keeps: the best, the EMA or the last."""
        return swapped_parameters(self.named_parameters, self.early_stopping.best_weights or self.ema.averages)

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run resumes: features, labels, language model, dtype, instructions."""
        instructions = self.model.prompt.instructions
        return {
            **self.data.identity(),
            "language model": self.model.lm.identity,
            "dtype": str(self.dtype),
            **({} if instructions is None else {"prompts": instructions.sha256}),
        }

    def save(self) -> None:
        """Write the checkpoint of the last completed step (rank 0 only)."""
        if self.group.is_main_process:
            state = {
                "stream": self.stream_state,
                "counters": asdict(self.counters),
                "patience": self.early_stopping.state(),
                "identity": self.identity(),
            }
            extra_tensors = self.ema.tensors() | self.early_stopping.tensors()
            save_checkpoint(self.run / "checkpoints", self.step, self.model, self.optimizer, state, extra_tensors)

    def broadcast_initial_weights(self) -> None:
        """Copy the initial weights of rank 0 to all ranks: different CPUs may round initial values differently."""
        for name, tensor in self.group.broadcast_tensors(self.named_parameters).items():
            self.named_parameters[name].data.copy_(tensor)
        self.ema = Ema(self.named_parameters, self.ema.decay)

    def restore(self) -> None:
        """Restore the newest checkpoint of the run folder, which rank 0 reads for all ranks.

        Raises:
            UserError: there is no checkpoint, or it was made with different features, weights or stream settings.
        """
        group = self.group
        tensors: Any = {}
        state, checkpoint = None, ""
        with group.raise_on_all_ranks():
            if group.is_main_process:
                path, tensors, state = load_checkpoint(self.run / "checkpoints")
                checkpoint = str(path)
        state, checkpoint = group.broadcast([state, checkpoint])
        tensors = group.broadcast_tensors(tensors)
        with group.raise_on_all_ranks():
            for name, value in self.identity().items():
                if state["identity"].get(name) != value:
                    raise UserError(
                        f"the {name} of '{self.run}' changed (expected {state['identity'].get(name)}, "
                        f"got {value}): restore what it was trained on, or train a new run"
                    )
            restore(self.model, self.optimizer, tensors, checkpoint)
            self.ema.load(tensors)
            self.early_stopping.load(state["patience"], tensors, self.named_parameters)
            self.stream.load_state_dict(state["stream"])
        self.stream_state = state["stream"]
        self.step, self.counters = state["step"], Counters(**state["counters"])
