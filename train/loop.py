"""The training loop: batches in, a trained projector and its run folder out.

One step: ``accumulate`` batches -> soft tokens -> frozen LM -> nats of the target tokens -> gradient of (all nats of
the step / all target tokens of the step) -> clip -> AdamW on float32 masters. Every figure of a step goes to
``metrics.jsonl``. On SIGINT or SIGTERM the step is finished, a checkpoint saved, and :class:`Interrupted` raised.

    python -m train fit --config configs/train/demo.yaml
    python -m train fit --resume runs/demo
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from shards.errors import UserError, WorkFailed
from shards.stream import Batch, FeatureStream
from train import report, runs
from train.checkpoint import load_checkpoint, restore, save_checkpoint, trained_parameters, write_tensors
from train.config import TrainConfig
from train.data import Data, Utterances, open_data
from train.device import choose_device, choose_dtype
from train.evaluate import Evaluation, Stopped, evaluate
from train.track import Tracker


class Interrupted(Exception):
    """The run was asked to stop and is saved; the message says how to go on."""


@dataclass
class Counters:
    """What a run has done so far, over all its sessions."""

    seconds: float = 0.0  # wall time of training and evaluation
    step_seconds: float = 0.0  # of which in training steps
    wait_seconds: float = 0.0  # of which waiting for data
    frames: int = 0  # valid frames seen
    padded_frames: int = 0  # frames of the batches, padding included
    utterances: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    evaluated: int = 0  # step of the last evaluation


def fit(config: TrainConfig, resume: Path | None = None) -> Path:
    """Train as ``config`` says, or go on with the run at ``resume``; returns the run folder.

    Raises:
        UserError: bad settings or data, or a resumed run whose settings or caches changed.
        WorkFailed: the loss became NaN or infinite, or fell by less than ``min_loss_drop``.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    run = resume or runs.run_folder(config)
    if resume is not None:
        _refuse_changes(config, resume)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    data = open_data(config)
    model = runs.build_model(config, data.caches[0].spec.channels, device, dtype)
    trainer = Trainer(config, data, model, device, dtype, run)
    if resume is None:
        runs.create(run, config, data.caches)
    else:
        trainer.restore()
    trainer.train()
    return run


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (0 is the first): linear warm-up, then cosine to ``min_lr`` or constant."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """One run: model, optimizer, stream and counters."""

    def __init__(
        self, config: TrainConfig, data: Data, model: Any, device: torch.device, dtype: torch.dtype, run: Path
    ) -> None:
        self.config, self.data, self.model, self.device, self.dtype, self.run = config, data, model, device, dtype, run
        self.step = 0
        self.counters = Counters()
        self.stopping = False
        named = trained_parameters(model)
        self.parameters = list(named.values())
        groups = [  # norms' gains and biases are not decayed
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
        self.stream = FeatureStream(data.caches, config.batch.rules(), config.seed, rows=data.train_rows)

    # what a checkpoint holds ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of the present step."""
        state = {
            "stream": self.stream.state_dict(),
            "counters": asdict(self.counters),
            "identity": self.identity(),
        }
        save_checkpoint(self.run / "checkpoints", self.step, self.model, self.optimizer, state)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: the features and the language model."""
        return {
            "feature id": self.data.caches[0].feature_id,
            "manifest ids": [cache.manifest_id for cache in self.data.caches],
            "language model": self.model.lm.identity,
            "dtype": str(self.dtype),
        }

    def restore(self) -> None:
        """Go back to the newest checkpoint of the run folder; a run without one starts over."""
        path, tensors, state = load_checkpoint(self.run / "checkpoints")
        for name, value in self.identity().items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"'{self.run}' was trained with another {name} ({state['identity'].get(name)}, now {value}): give "
                    "back what it was trained on, or train a new run"
                )
        restore(self.model, self.optimizer, tensors, str(path))
        self.stream.load_state_dict(state["stream"])
        self.step, self.counters = state["step"], Counters(**state["counters"])

    # the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to the last step, evaluate, and write what a finished run leaves."""
        config, start = self.config, self.step
        self._mode(True)
        with Tracker(self.run, config.steps, start, self.counters.evaluated) as tracker, self._signals():
            if start == 0:
                self.save()
            batches: Generator[Batch, None, None] = iter(self.stream)  # type: ignore[assignment]
            try:
                while self.step < config.steps:
                    if self._due(config.eval_every) and self.counters.evaluated < self.step:
                        self._evaluate_on_the_way(tracker)
                    self._check_stop()
                    self._step(batches, tracker)
                    if self._due(config.checkpoint_every) and self.step < config.steps:
                        self.save()
                self.save()
                self._check_stop()
                final = None if config.eval_every == 0 else self._evaluate(self.data.held_out, config.decode_limit)
            except Stopped:
                self.save()
                raise Interrupted(
                    f"stopped at step {self.step} of {config.steps}, saved; go on with: "
                    f"python -m train fit --resume {self.run}"
                ) from None
            finally:
                batches.close()  # ends the threads that read ahead
            self._finish(final, tracker)

    def _step(self, batches: Generator[Batch, None, None], tracker: Tracker) -> None:
        config, begun = self.config, time.perf_counter()
        held, waited = [], 0.0
        for _ in range(config.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            held.append((batch.features, batch.mask(), batch.texts))
        tokens = sum(len(self.model.prompt.target(text)) for _, _, texts in held for text in texts)
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        nats, rms, frames, padded, utterances = 0.0, 0.0, 0, 0, 0
        for features, mask, texts in held:
            out = self.model.nats(features, mask, texts)
            (out.nats.sum() / tokens).backward()
            nats += float(out.nats.detach().double().sum())
            rms += float(out.soft_rms) / len(held)
            frames, padded = frames + int(mask.sum()), padded + mask.numel()
            utterances += len(texts)
        loss = nats / tokens
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise WorkFailed(
                f"the {'loss' if not math.isfinite(loss) else 'gradient'} of step {self.step + 1} is not finite: lower "
                f"lr or set dtype=float32; the last checkpoint stands in '{self.run / 'checkpoints'}'"
            )
        self.optimizer.step()
        if self.counters.first_loss is None:
            features = held[0][0]
            self._tell_shapes(tracker, features, tokens)
        self.step += 1
        seconds = time.perf_counter() - begun
        count = self.counters
        count.seconds, count.step_seconds = count.seconds + seconds, count.step_seconds + seconds
        count.wait_seconds += waited
        count.frames, count.padded_frames = count.frames + frames, count.padded_frames + padded
        count.utterances += utterances
        count.first_loss = loss if count.first_loss is None else count.first_loss
        count.last_loss = loss
        figures = {
            "step": self.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "projector_rms_ratio": rms / self.model.lm.embedding_rms,
            "seconds": seconds,
            "data_wait": waited,
            "padding": 1 - frames / padded,
            "frames": frames,
            "tokens": tokens,
        }
        tracker.step(figures, count.frames / count.step_seconds)

    def _tell_shapes(self, tracker: Tracker, features: torch.Tensor, tokens: int) -> None:
        batch, frames, channels = features.shape
        soft = self.model.projector.soft_frames(frames)
        trained = sum(parameter.numel() for parameter in self.parameters)
        where = f"{self.dtype} on {self.device}"
        tracker.say(
            f"first batch: features [{batch}, {frames}, {channels}] -> soft tokens [{batch}, {soft}, "
            f"{self.model.lm.width}], {tokens} target tokens; {trained:,} trained parameters, {where}"
        )

    # evaluation and the end ---------------------------------------------------------------------------------------

    def _evaluate(self, utterances: Utterances, decode: int) -> Evaluation:
        begun = time.perf_counter()
        result = evaluate(
            self.model,
            utterances,
            batch_size=self.config.eval_batch,
            max_frames=self.config.batch.max_frames,
            decode=decode,
            max_new_tokens=self.config.max_new_tokens,
            stop=lambda: self.stopping,
        )
        self.counters.seconds += time.perf_counter() - begun
        self.counters.evaluated = self.step
        return result

    def _evaluate_on_the_way(self, tracker: Tracker) -> None:
        part = self.data.held_out.first(self.config.eval_limit)
        tracker.evaluation(self.step, self._evaluate(part, self.config.decode_samples).record())
        report.write_report(self.run)

    def _finish(self, final: Evaluation | None, tracker: Tracker) -> None:
        if final is not None:
            tracker.evaluation(self.step, final.record())
        trained = {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}
        write_tensors(self.run / "projector.safetensors", trained, {"feature_id": self.data.caches[0].feature_id})
        runs.write_json(self.run / "summary.json", self._summary(final))
        report.write_report(self.run)
        first, last, drop = self.counters.first_loss, self.counters.last_loss, self.config.min_loss_drop
        if drop is not None and first is not None and last is not None and first - last < drop:
            raise WorkFailed(f"the training loss went from {first:.4f} to {last:.4f}: it fell by less than {drop}")

    def _summary(self, final: Evaluation | None) -> dict[str, Any]:
        count = self.counters
        keys = ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio")
        figures = dict.fromkeys(keys) if final is None else final.figures()
        return {
            **figures,
            "steps": self.step,
            "seconds": round(count.seconds, 3),
            "data_wait_fraction": count.wait_seconds / max(count.step_seconds, 1e-9),
            "padding_fraction": 1 - count.frames / max(count.padded_frames, 1),
            "train_loss_first": count.first_loss,
            "train_loss_last": count.last_loss,
            "frames_per_second": count.frames / max(count.step_seconds, 1e-9),
            "utterances": count.utterances,
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
            "device": str(self.device),
            **{name.replace(" ", "_"): value for name, value in self.identity().items()},
        }

    # small things -------------------------------------------------------------------------------------------------

    def _mode(self, train: bool) -> None:
        self.model.eval()  # a frozen LM never drops out
        self.model.projector.train(train)
        if self.config.lm.train:
            self.model.lm.train(train)

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.step > 0 and self.step % (every or 1) == 0

    def _check_stop(self) -> None:
        if self.stopping:
            raise Stopped

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a stop after the step; the second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _refuse_changes(config: TrainConfig, run: Path) -> None:
    if (run / "summary.json").is_file():
        raise UserError(f"'{run}' is finished: judge it by python -m train evaluate {run}, or train a new run")
    changed = runs.run_config(run).differences(config)
    if changed:
        raise UserError(
            f"'{run}' cannot go on with other settings ({'; '.join(changed)}): leave them alone, or train a new run"
        )
