"""The training loop: trains a projector and writes its run folder.

Any number of processes train one run. Each takes its part of every global batch (``train/trainer/step.py``); rank 0
writes all files. The metrics of every step go to ``metrics.jsonl``. On SIGINT or SIGTERM the loop finishes the step,
saves a checkpoint and raises :class:`Interrupted`. When a process dies, the others exit within seconds, and rank 0
saves a checkpoint first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from shards.errors import WorkFailed
from shards.stream.batch import Batch
from train import report
from train.config.train import STAGE_ONE, TrainConfig
from train.data.caches import Utterances
from train.data.text import emptied_texts
from train.distributed.group import RankLost
from train.distributed.signals import StopRequest
from train.evaluation.evaluate import EvalConfig, Evaluation, Stopped, evaluate_models
from train.evaluation.listening import time_to_listening
from train.lms.base import SeparatePasses
from train.model.audio_lm import ModelList
from train.model.checkpoint import write_tensors
from train.runs import folder as runs
from train.runs.metrics_log import EVALUATIONS, MetricsLogger, NullLogger, StepMetrics, read_jsonl
from train.runs.trackers import open_trackers
from train.trainer.optim import learning_rate
from train.trainer.state import RunState
from train.trainer.step import TrainStep, next_batches, run_step


class Interrupted(Exception):
    """A signal interrupted the run after it was saved; the message says how to resume."""


class Trainer:
    """Drives one run. :meth:`train` is the whole loop; a sweep (``train/sweeps/``) drives several runs in lockstep.

    Inside ``with trainer:``, repeat :meth:`evaluate_if_due`, :meth:`train_step` with the next batches and
    :meth:`save_if_due` until :attr:`done`. Then pass the result of :meth:`final_evaluation` to :meth:`finish`. A sweep
    calls the parts of a step, :meth:`begin_step` and :meth:`end_step`, and :func:`evaluate_together` instead.

    Args:
        stop: the signal handler, shared by all runs of the process.
        quiet: write the files of the run but print nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        device: torch.device,
        stop: StopRequest | None = None,
        quiet: bool = False,
    ) -> None:
        self.config, self.state, self.device = config, state, device
        self.data, self.model, self.run, self.group = state.data, state.model, state.run, state.group
        self.stop = stop or StopRequest()
        self.quiet = quiet
        self.logger: MetricsLogger = NullLogger()
        self.passes = SeparatePasses(state.model.lm)
        self.metrics: StepMetrics | None = None  # of the last step
        # A GPU works on a step while the host prepares the next one. Several ranks compare their metrics at once.
        self._reads_late = device.type == "cuda" and state.group.world_size == 1
        self._unread: TrainStep | None = None
        self._last_read = 0.0  # time.perf_counter()

    def __enter__(self) -> Trainer:
        """Open the log files, drop their lines past the checkpoint, and save the initial weights of a new run."""
        self.model.eval()  # no dropout in a frozen LM
        self.model.projector.train()
        if self.config.lm.train:
            self.model.lm.train()
        if self.group.is_main_process:
            counters = self.state.counters
            self.logger = MetricsLogger(self.run, self.config.steps, self.state.step, counters.evaluated, self.quiet)
        try:
            if self.state.step == 0:
                self.state.save()
            with self.group.raise_on_all_ranks():
                if self.group.is_main_process and self.config.trackers:
                    self.logger.attach_trackers(open_trackers(self.config, self.run, self.state.step))
        except BaseException:
            self.logger.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.close()

    # the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, evaluate, and write the results."""
        with self, self.stop:
            batches = self.state.batches()
            try:
                while not self.done:
                    self.evaluate_if_due()
                    if self.done:
                        break
                    self._check_stop()
                    self.train_step(*next_batches(batches, self.config.gradient_accumulation_steps))
                    self.save_if_due()
                self.save()
                self._check_stop()
                final = self.final_evaluation()
            except Stopped:
                self.save()
                self.group.abort(
                    Interrupted(
                        f"Interrupted at {self._progress_text()}; the run is saved. "
                        f"Resume with: {self._resume_command()}"
                    ),
                    130,
                )
            except RankLost as lost:
                self.state.save()
                saved = (
                    f"{self._progress_text()} is saved" if self.group.is_main_process else "the last checkpoint is kept"
                )
                raise RankLost(
                    f"{lost}; {saved}; resume with any number of processes: {self._resume_command()}"
                ) from None
            finally:
                batches.close()  # stops the prefetch threads
            self.finish(final)

    @property
    def done(self) -> bool:
        """Whether all steps are completed or early stopping ended the run."""
        return self.state.step >= self.config.steps or self.state.early_stopping.should_stop

    def train_step(self, batches: Sequence[Batch], data_wait: float) -> None:
        """Run one step on ``batches``, which took ``data_wait`` seconds to load; ``batches`` are not modified.

        On a GPU the metrics of a step are logged during the next one, or by :meth:`settle`.

        Raises:
            WorkFailed: the loss or the gradient is not finite; no weight was changed.
        """
        step = self.begin_step(batches, data_wait)
        with self.group.rank_loss_explains_errors():
            run_step([step], self.passes)
        if self._reads_late:
            self.state.advance()
            self.settle()
            self._unread = step
            return
        try:
            metrics = step.metrics()
        except RankLost:
            if step.changed_weights():  # by the sums of all ranks, so the step is whole and is saved
                self.state.advance()
            raise
        self.end_step(metrics)

    def settle(self) -> None:
        """Wait for the last step and log it, if that has not been done; raises the errors of :meth:`train_step`."""
        if self._unread is None:
            return
        step, self._unread = self._unread, None
        metrics = step.metrics(self._last_read)
        self._last_read = time.perf_counter()
        self.end_step(metrics, advance=False)

    def begin_step(self, batches: Sequence[Batch], data_wait: float) -> TrainStep:
        """Build the next step, to be run by :func:`~train.trainer.step.optimizer_step`."""
        step = TrainStep(
            self.config,
            self.model,
            self.state.optimizer,
            self.state.parameters,
            batches,
            step=self.state.step,
            lr=learning_rate(self.config, self.state.step),
            group=self.group,
            data_wait=data_wait,
            tasks=self.data.tasks,
        )
        if self.state.counters.first_loss is None and self._unread is None:
            self._log_shapes(batches[0].features, step.tokens)
        return step

    def end_step(self, metrics: StepMetrics, advance: bool = True) -> None:
        """Advance by a step, unless that is done, and log its metrics; raises the errors of :meth:`train_step`."""
        if not metrics.finite:
            what = "gradient" if math.isfinite(metrics.loss) else "loss"
            failure = WorkFailed(
                f"the {what} of step {metrics.step} is not finite: lower lr or set dtype=float32; the last "
                f"checkpoint is in '{self.run / 'checkpoints'}'"
            )
            self.group.abort(failure, 1)
        if advance:
            self.state.advance()
        self.metrics = metrics
        self.state.counters.add(metrics)
        self.logger.log_step(metrics, self.state.counters.frames_per_second)

    def save_if_due(self) -> None:
        """Save a checkpoint every ``checkpoint_every`` steps, except after the last step, which the caller saves."""
        if self._is_due(self.config.checkpoint_every) and self.state.step < self.config.steps:
            self.save()

    def save(self) -> None:
        """Save a checkpoint; raises the errors of :meth:`train_step`."""
        self.settle()
        self.state.save()

    def _log_shapes(self, features: torch.Tensor, tokens: int) -> None:
        batch, frames, channels = features.shape
        soft = self.model.most_soft_tokens(frames)
        trained = sum(parameter.numel() for parameter in self.state.parameters)
        placement = f"{self.state.dtype} on {self.device}"
        if self.group.world_size > 1:
            placement += f", rank 0 of {self.group.world_size}"
        held_out = len(self.data.held_out)
        self.logger.log(f"{len(self.data.train_rows):,} training utterances, {held_out:,} held-out utterances")
        if self.config.text.punctuation != "keep":
            texts = Utterances(self.data.caches, self.data.train_rows).columns("text")["text"]
            if emptied := emptied_texts(texts, self.config.text):
                self.logger.log(
                    f"note: {emptied:,} texts are empty without their punctuation and teach an empty answer"
                )
        self.logger.log(
            f"first batch: features [{batch}, {frames}, {channels}] -> soft tokens [{batch}, {soft}, "
            f"{self.model.lm.width}], {tokens} target tokens; {trained:,} trained parameters, {placement}"
        )

    # evaluation and the end ---------------------------------------------------------------------------------------

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is due: once every ``eval_every`` steps, and after stage 1 before the first step."""
        due = self._is_due(self.config.eval_every) or (self.config.is_pretrained and self.state.step == 0)
        return bool(self.config.eval_every) and due and self.state.counters.evaluated < self.state.step

    @property
    def needs_last_evaluation(self) -> bool:
        """Whether early stopping is on and the last weights, possibly the best, are not evaluated yet."""
        return self.config.patience is not None and self.state.counters.evaluated < self.state.step

    def eval_config(self, final: bool) -> EvalConfig:
        """Return the evaluation settings of this run, during training or ``final``."""
        return EvalConfig.final(self.config) if final else EvalConfig.during_training(self.config)

    def evaluate_if_due(self) -> None:
        """Evaluate on a part of the held-out utterances if an evaluation is due.

        Raises:
            Stopped: a signal arrived.
        """
        if self.evaluation_due:
            self.settle()
            evaluate_together([self], self.passes)

    def final_evaluation(self) -> Evaluation | None:
        """Evaluate the final weights on all held-out utterances; return None if ``eval_every`` is 0.

        Raises:
            Stopped: a signal arrived.
        """
        if self.config.eval_every == 0:
            return None
        if self.needs_last_evaluation:
            evaluate_together([self], self.passes)
        return evaluate_together([self], self.passes, final=True)[0]

    def count_evaluation(self, result: Evaluation, seconds: float, final: bool) -> None:
        """Record an evaluation that took ``seconds``; if not ``final``, also log it and update early stopping."""
        self.state.counters.seconds += seconds
        self.state.counters.evaluated = self.state.step
        if not final:
            self.state.early_stopping.update(result.val_loss, self.state.step, self.state.named_parameters)
            self.logger.log_evaluation(self.state.step, self._record(result))

    def finish(self, final: Evaluation | None) -> None:
        """Write the final evaluation, the weights, ``summary.json`` and the report.

        Raises:
            WorkFailed: the loss fell by less than ``min_loss_drop``; all files are written nevertheless.
        """
        if self.group.is_main_process:
            if final is not None:
                self.logger.log_evaluation(self.state.step, self._record(final))
                final.write(self.run)
            with self.state.final_weights():
                trained = {name: parameter.detach() for name, parameter in self.state.named_parameters.items()}
                metadata = {"feature_id": self.data.caches[0].feature_id}
                write_tensors(self.run / "projector.safetensors", trained, metadata)
            runs.write_json(self.run / runs.SUMMARY, self._summary(final))
            report.write_report(self.run)
        first, last, drop = self.state.counters.first_loss, self.state.counters.last_loss, self.config.min_loss_drop
        if drop is not None and first is not None and last is not None and first - last < drop:
            failure = WorkFailed(
                f"the training loss went from {first:.4f} to {last:.4f}: it fell by less than min_loss_drop={drop}"
            )
            self.group.abort(failure, 1)

    def _record(self, result: Evaluation) -> dict[str, Any]:
        """Return the record of an evaluation with the seconds of training and evaluation so far, stage 1 included."""
        counters = self.state.counters
        return {**result.record(), "elapsed": round(counters.seconds + counters.stage_one_seconds, 3)}

    def _summary(self, final: Evaluation | None) -> dict[str, Any]:
        keys = ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio")
        return {
            **(dict.fromkeys(keys) if final is None else final.metrics()),
            "listening": None if self.config.is_stage_one else time_to_listening(read_jsonl(self.run / EVALUATIONS)),
            "steps": self.state.step,
            "best_step": self.state.early_stopping.best_step,
            **self.state.counters.summary(),
            **self.model.projector.summary(),
            "trained_parameters": sum(parameter.numel() for parameter in self.state.parameters),
            "device": str(self.device),
            "processes": self.group.world_size,
            **{name.replace(" ", "_"): value for name, value in self.state.identity().items()},
        }

    # helpers -------------------------------------------------------------------------------------------------

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.state.step > 0 and self.state.step % (every or 1) == 0

    def stop_requested(self) -> bool:
        """Whether a signal arrived; raises RankLost if a rank has exited."""
        self.group.raise_if_rank_lost()
        return self.stop.requested

    def _check_stop(self) -> None:
        """Stop on all ranks as soon as one received a signal; signals may reach ranks at different steps."""
        if self.group.any(self.stop_requested()):
            raise Stopped

    def _progress_text(self) -> str:
        stage = " of stage 1" if self._is_nested else ""
        return f"step {self.state.step} of {self.config.steps}{stage}"

    def _resume_command(self) -> str:
        return f"python -m train fit --resume {self.run.parent if self._is_nested else self.run}"

    @property
    def _is_nested(self) -> bool:
        """Whether this is stage 1 inside the folder of a run."""
        return self.config.is_stage_one and self.run.name == STAGE_ONE


def evaluate_together(trainers: Sequence[Trainer], passes: SeparatePasses, final: bool = False) -> list[Evaluation]:
    """Evaluate several runs that share the evaluation settings and the held-out utterances.

    Args:
        passes: computes the LM passes of all runs.
        final: whether this is the evaluation of the final weights rather than one during training.

    Raises:
        Stopped: a signal arrived.
    """
    first, began = trainers[0], time.perf_counter()
    with ExitStack() as weights:
        for trainer in trainers:
            weights.enter_context(trainer.state.final_weights() if final else trainer.state.current_weights())
        results = evaluate_models(
            ModelList([trainer.model for trainer in trainers], passes),
            first.data.held_out,
            first.eval_config(final),
            stop=first.stop_requested,
            group=first.group,
        )
        seconds = time.perf_counter() - began
        for trainer, result in zip(trainers, results, strict=True):
            trainer.count_evaluation(result, seconds, final)
    if not final:
        for trainer in trainers:
            if trainer.group.is_main_process:
                report.write_report(trainer.run)
    return results
