"""The training loop: batches in, a trained projector and its run folder out.

Any number of processes train one run: each takes its part of every global batch (``train/trainer/step.py``), rank 0
writes. Every figure of a step goes to ``metrics.jsonl``. On SIGINT or SIGTERM the step is finished, a checkpoint saved,
and :class:`Interrupted` raised; when a process dies, the others end within seconds and rank 0 saves.

    python -m train fit --config configs/train/demo.yaml
    torchrun --nproc-per-node 2 -m train fit --config configs/train/demo.yaml
    python -m train fit --resume runs/demo
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shards.config.base import flatten
from shards.errors import UserError, WorkFailed
from shards.stream.batch import Batch
from train import report
from train.config.train import TrainConfig
from train.data.caches import Utterances, open_data
from train.data.loader import augment
from train.distributed.device import choose_device, choose_dtype
from train.distributed.group import Group, RankLost
from train.distributed.signals import StopRequest
from train.evaluation.evaluate import Evaluation, Stopped, evaluate
from train.model.build import build_model
from train.model.checkpoint import write_tensors
from train.runs import folder as runs
from train.runs.metrics_log import Silence, Tracker
from train.runs.trackers import open_outlets, require_trackers
from train.trainer.losses import Objectives
from train.trainer.optim import learning_rate
from train.trainer.state import RunState
from train.trainer.step import StepFigures, seed_step, take, take_step

# What may differ between the processes of a run: each machine has its own paths and devices.
OWN_KEYS = ("caches", "extract", "val.caches", "runs", "name", "device")


class Interrupted(Exception):
    """The run was asked to stop and is saved; the message says how to go on."""


def fit(config: TrainConfig, resume: Path | None = None, group: Group | None = None) -> Path:
    """Train as ``config`` says, or go on with the run at ``resume``; returns the run folder.

    Every process of ``group`` calls this. Errors that all have are raised by rank 0; the others leave by SystemExit.

    Raises:
        UserError: bad settings or data, or a resumed run whose settings or caches changed.
        WorkFailed: the loss became NaN or infinite, or fell by less than ``min_loss_drop``; another process ended.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    group = group or Group()
    run = resume
    with group.together():
        require_trackers(config)
        if group.is_first:
            run = resume or runs.run_folder(config)
            if resume is not None:
                refuse_changes(config, resume)
        device = choose_device(group.device(config.device))
        dtype = choose_dtype(config.dtype, device)
        data = open_data(config)
        model = build_model(config, data.caches[0].spec.channels, device, dtype)
    run = Path(group.broadcast(str(run)))
    state = RunState(config, data, model, dtype, run, group)
    settings = flatten(config.model_dump(mode="json"))
    group.agree({key: value for key, value in settings.items() if key not in OWN_KEYS} | state.identity())
    if resume is None:
        with group.together():
            if group.is_first:
                runs.create(run, config, data.caches, data.layers)
        state.share_start()
    else:
        state.restore()
    Trainer(config, state, device).train()
    return run


class Trainer:
    """One run between its steps. :meth:`train` drives it; a sweep (``train/sweeps/``) drives several side by side.

    Inside ``with trainer:``, as long as it has not :attr:`ended`: :meth:`judge_if_due`, :meth:`advance` by the next
    batches, :meth:`save_if_due`. Then :meth:`judge_at_the_end`, and :meth:`finish` with what that gave.

    Args:
        stop: who hears signals; with several runs, one for all of them.
        quiet: write the files of the run and say nothing.
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
        self.tracker: Tracker = Silence()
        self.judged: Evaluation | None = None  # the last on the way
        self.objectives = Objectives(config.distill, config.contrastive)
        self.terms: dict[str, float] = {}  # of the last step, beside the cross-entropy

    def __enter__(self) -> Trainer:
        """Open the run's files, drop their lines past the checkpoint, and save the start values of a new run."""
        self.model.eval()  # a frozen LM never drops out
        self.model.projector.train()
        if self.config.lm.train:
            self.model.lm.train()
        if self.group.is_first:
            counters = self.state.counters
            self.tracker = Tracker(self.run, self.config.steps, self.state.step, counters.evaluated, self.quiet)
        try:
            if self.state.step == 0:
                self.state.save()
            with self.group.together():
                if self.group.is_first and self.config.trackers:
                    self.tracker.attach(open_outlets(self.config, self.run, self.state.step))
        except BaseException:
            self.tracker.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.close()

    # the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to the last step, evaluate, and write what a finished run leaves."""
        with self, self.stop:
            batches = self.state.batches()
            try:
                while not self.ended:
                    self.judge_if_due()
                    if self.ended:
                        break
                    self._check_stop()
                    self.advance(*take(batches, self.config.gradient_accumulation_steps))
                    self.save_if_due()
                self.state.save()
                self._check_stop()
                final = self.judge_at_the_end()
            except Stopped:
                self.state.save()
                self.group.leave(Interrupted(f"stopped at {self._place()}, saved; go on with: {self._go_on()}"), 130)
            except RankLost as lost:
                self.state.save()
                where = f"{self._place()} is saved" if self.group.is_first else "the last checkpoint stands"
                raise RankLost(f"{lost}; {where}, go on with any number of processes by: {self._go_on()}") from None
            finally:
                batches.close()  # ends the threads that read ahead
            self.finish(final)

    @property
    def ended(self) -> bool:
        """Whether there is no further step: all are done, or patience is."""
        return self.state.step >= self.config.steps or self.state.patience.ended

    def advance(self, held: Sequence[Batch], waited: float) -> None:
        """One step with the batches ``held``, which were waited for ``waited`` seconds; they stay as they are.

        Raises:
            WorkFailed: loss or gradient is not finite; no weight was changed.
        """
        config, begun = self.config, time.perf_counter() - waited
        held = [augment(batch, config.seed, config.frame_mask_prob, config.noise_std) for batch in held]
        rate = learning_rate(config, self.state.step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        seed_step(config.seed, self.state.step, self.group.rank)
        done = take_step(
            self.model,
            self.state.optimizer,
            self.state.parameters,
            held,
            clip=config.max_grad_norm,
            group=self.group,
            waited=waited,
            objectives=self.objectives,
        )
        if not done.finite:
            what = "gradient" if math.isfinite(done.loss) else "loss"
            failure = WorkFailed(
                f"the {what} of step {self.state.step + 1} is not finite: lower lr or set dtype=float32; the last "
                f"checkpoint stands in '{self.run / 'checkpoints'}'"
            )
            self.group.leave(failure, 1)
        if self.state.counters.first_loss is None:
            self._tell_shapes(held[0].features, done.tokens)
        seconds = time.perf_counter() - begun
        self.state.advance(done, seconds)
        self.terms = done.terms
        self.tracker.step(self._figures(done, rate, seconds), self.state.counters.frames_per_second, self.terms)

    def save_if_due(self) -> None:
        """A checkpoint each ``checkpoint_every`` steps; the last step's is the caller's."""
        if self._due(self.config.checkpoint_every) and self.state.step < self.config.steps:
            self.state.save()

    def _figures(self, done: StepFigures, rate: float, seconds: float) -> dict[str, Any]:
        """One line of ``metrics.jsonl``."""
        return {
            "step": self.state.step,
            "loss": done.loss,
            **done.terms,
            **done.own_figures,
            "lr": rate,
            "grad_norm": done.grad_norm,
            "projector_rms_ratio": done.soft_rms / self.model.lm.embedding_rms,
            "seconds": seconds,
            "data_wait": done.waited,
            "padding": 1 - done.frames / done.padded_frames,
            "frames": done.frames,
            "tokens": done.tokens,
        }

    def _tell_shapes(self, features: torch.Tensor, tokens: int) -> None:
        batch, frames, channels = features.shape
        soft = self.model.projector.soft_frames(frames)
        trained = sum(parameter.numel() for parameter in self.state.parameters)
        where = f"{self.state.dtype} on {self.device}"
        if self.group.world > 1:
            where += f", the first of {self.group.world} processes"
        held_out = len(self.data.held_out)
        self.tracker.say(f"{len(self.data.train_rows):,} utterances to train on, {held_out:,} to be judged on")
        self.tracker.say(
            f"first batch: features [{batch}, {frames}, {channels}] -> soft tokens [{batch}, {soft}, "
            f"{self.model.lm.width}], {tokens} target tokens; {trained:,} trained parameters, {where}"
        )

    # evaluation and the end ---------------------------------------------------------------------------------------

    def _evaluate(self, utterances: Utterances, decode: int, whole: bool = False) -> Evaluation:
        begun = time.perf_counter()
        result = evaluate(
            self.model,
            utterances,
            batch_size=self.config.eval_batch_size,
            max_frames=self.config.batch.max_frames,
            decode=decode,
            max_new_tokens=self.config.max_new_tokens,
            whole=whole,
            retrieval=self.config.retrieval_limit,
            stop=self._asked_to_stop,
            group=self.group,
        )
        self.state.counters.seconds += time.perf_counter() - begun
        self.state.counters.evaluated = self.state.step
        return result

    def judge_if_due(self) -> None:
        """An evaluation each ``eval_every`` steps, on a part of what is held out.

        Raises:
            Stopped: a signal came.
        """
        if self._due(self.config.eval_every) and self.state.counters.evaluated < self.state.step:
            self._judge_on_the_way()

    def _judge_on_the_way(self) -> None:
        part = self.data.held_out.first(self.config.eval_limit)
        with self.state.judged():
            result = self._evaluate(part, self.config.decode_samples)
            self.state.patience.judge(result.val_loss, self.state.step, self.state.named)
        self.judged = result
        self.tracker.evaluation(self.state.step, result.record())
        if self.group.is_first:
            report.write_report(self.run)

    def judge_at_the_end(self) -> Evaluation | None:
        """The evaluation of the weights that are kept, on all that is held out; None where the run wants none.

        Raises:
            Stopped: a signal came.
        """
        if self.config.eval_every == 0:
            return None
        if self.config.patience is not None and self.state.counters.evaluated < self.state.step:
            self._judge_on_the_way()  # the last weights may be the best
        with self.state.kept():
            return self._evaluate(self.data.held_out, self.config.decode_limit, whole=True)

    def finish(self, final: Evaluation | None) -> None:
        """Write what a finished run leaves.

        Raises:
            WorkFailed: all is written, and the loss fell by less than ``min_loss_drop``.
        """
        if self.group.is_first:
            if final is not None:
                self.tracker.evaluation(self.state.step, final.record())
                final.write(self.run)
            with self.state.kept():
                trained = {name: parameter.detach() for name, parameter in self.state.named.items()}
                metadata = {"feature_id": self.data.caches[0].feature_id}
                write_tensors(self.run / "projector.safetensors", trained, metadata)
            runs.write_json(self.run / "summary.json", self._summary(final))
            report.write_report(self.run)
        first, last, drop = self.state.counters.first_loss, self.state.counters.last_loss, self.config.min_loss_drop
        if drop is not None and first is not None and last is not None and first - last < drop:
            failure = WorkFailed(f"the training loss went from {first:.4f} to {last:.4f}: it fell by less than {drop}")
            self.group.leave(failure, 1)

    def _summary(self, final: Evaluation | None) -> dict[str, Any]:
        keys = ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio")
        return {
            **(dict.fromkeys(keys) if final is None else final.figures()),
            "steps": self.state.step,
            "best_step": self.state.patience.step,
            **self.state.counters.summary(),
            **self.model.projector.facts(),
            "trained_parameters": sum(parameter.numel() for parameter in self.state.parameters),
            "device": str(self.device),
            "processes": self.group.world,
            **{name.replace(" ", "_"): value for name, value in self.state.identity().items()},
        }

    # small things -------------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.state.step > 0 and self.state.step % (every or 1) == 0

    def _asked_to_stop(self) -> bool:
        self.group.check()
        return self.stop.asked

    def _check_stop(self) -> None:
        """A signal reaches the ranks at different steps: all stop as soon as one was asked to."""
        if self.group.any(self._asked_to_stop()):
            raise Stopped

    def _place(self) -> str:
        return f"step {self.state.step} of {self.config.steps}"

    def _go_on(self) -> str:
        return f"python -m train fit --resume {self.run}"


def refuse_changes(config: TrainConfig, run: Path) -> None:
    """UserError when ``run`` is finished, or when ``config`` would give it other numbers than its own settings."""
    if (run / "summary.json").is_file():
        raise UserError(f"'{run}' is finished: judge it by python -m train evaluate {run}, or train a new run")
    changed = runs.run_config(run).differences(config)
    if changed:
        raise UserError(
            f"'{run}' cannot go on with other settings ({'; '.join(changed)}): leave them alone, or train a new run"
        )
