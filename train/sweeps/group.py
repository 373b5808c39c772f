"""A group of experiments side by side in one process: one stream of batches, one frozen language model.

In: the settings of experiments that share caches, held-out rows, rules and order of batches, and a language model.
Out: a run folder of each, as a run alone leaves it. The stream is read once; every experiment that stands at a batch
takes it. A step and an evaluation are the functions of a run alone, called with one experiment after another
(``separate``) or with all of them, whose rows then share passes of the language model (``batched``,
``train/sweeps/lm_batching.py``). An experiment that ends, or whose loss is not finite, leaves the group; the others are
not affected.

After a kill, each resumes from its own checkpoint: the stream starts at the earliest one, and those ahead wait until it
has reached them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shards.errors import WorkFailed
from shards.stream.batch import Batch
from train.config.train import TrainConfig
from train.data.caches import open_data
from train.distributed.device import choose_device, choose_dtype
from train.distributed.group import ProcessGroup
from train.distributed.signals import StopRequest
from train.evaluation.evaluate import Evaluation, Stopped
from train.lms.base import LanguageModel, SeparatePasses
from train.lms.load import load_lm
from train.model.build import build_model
from train.runs import folder as runs
from train.runs.metrics_log import format_losses, format_number
from train.sweeps.lm_batching import LmBatcher
from train.trainer.state import RunState
from train.trainer.step import next_batches, optimizer_step
from train.trainer.trainer import Interrupted, Trainer, evaluate_together, require_resumable

DROPPED = "dropped.json"  # in the folder of an experiment that left before its end
LOG_LINES = 10  # lines with all losses that a whole group prints
LockstepMode = Literal["batched", "separate", "none"]
# What experiments of a group have in common, beside the language model. ``extract`` only makes caches.
GROUP_KEYS = ("caches", "filter", "val", "batch", "gradient_accumulation_steps", "device", "dtype")


@dataclass
class Experiment:
    """An experiment of a group."""

    trainer: Trainer
    end_state: str | None = None  # finished, failed or pruned; None while it trains

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.trainer.run.name

    @property
    def step(self) -> int:
        """Steps done."""
        return self.trainer.state.step

    def drop(self, state: str, reason: str) -> None:
        """Leave before the end; the folder says why."""
        self.end_state = state
        runs.write_json(self.trainer.run / DROPPED, {"state": state, "step": self.step, "reason": reason})


def lm_key(config: TrainConfig) -> str:
    """Equal where one language model serves both: it is frozen and of the same options, device and dtype."""
    own: list[Any] = [config.lm.model_dump(mode="json"), config.device, config.dtype]
    if config.lm.train or config.lm.lora is not None:
        own.append(f"{config.runs}/{config.name}")  # what trains belongs to one run
    if config.lm.model.startswith("nanochat:d"):
        own.append(config.seed)  # drawn from it
    return json.dumps(own)


def group_key(config: TrainConfig) -> str:
    """Equal where two experiments can run in lockstep."""
    tree = config.model_dump(mode="json")
    return json.dumps([lm_key(config), config.order_seed, *(tree[key] for key in GROUP_KEYS)])


def group_experiments(configs: Sequence[TrainConfig], max_size: int | None) -> list[list[TrainConfig]]:
    """The experiments by what they share, in order; at most ``together`` in a group."""
    found: dict[str, list[TrainConfig]] = {}
    for config in configs:
        found.setdefault(group_key(config), []).append(config)
    size = max_size or len(configs) or 1
    return [group[start : start + size] for group in found.values() for start in range(0, len(group), size)]


class LmCache:
    """Language models by :func:`lm_key`: the one used last stays in memory for the next group."""

    def __init__(self) -> None:
        self._key, self._lm = "", None  # type: tuple[str, LanguageModel | None]

    def get(self, config: TrainConfig) -> LanguageModel:
        """The language model of ``config``, in evaluation mode unless it trains."""
        key = lm_key(config)
        if self._lm is None or key != self._key:
            self._lm = None  # before the next one takes its memory
            device = choose_device(config.device)
            torch.manual_seed(config.seed)
            self._lm = load_lm(
                config.lm.model,
                device=device,
                dtype=choose_dtype(config.dtype, device),
                train=config.lm.train,
                seed=config.seed,
                options=config.lm,
            )
            self._key = key
        return self._lm


class LockstepTrainer:
    """One group.

    Args:
        configs: its experiments, all of one :func:`group_key`; those with a run folder resume from its checkpoint.
        mode: ``batched`` or ``separate``.
        log: takes lines for people.
        evaluated: gets name, step and loss of each evaluation during training; a string that it returns is the reason
            why the experiment is pruned.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        models: LmCache,
        mode: LockstepMode,
        stop: StopRequest,
        log: Callable[[str], None] = print,
        on_evaluation: Callable[[str, int, float], str | None] = lambda name, step, loss: None,
    ) -> None:
        self.stop, self.log, self.on_evaluation = stop, log, on_evaluation
        lm = models.get(configs[0])
        self.batcher = LmBatcher(lm) if mode == "batched" and len(configs) > 1 else None
        self.passes = self.batcher or SeparatePasses(lm)
        self.experiments: list[Experiment] = []
        data = open_data(configs[0])
        device = choose_device(configs[0].device)
        dtype = choose_dtype(configs[0].dtype, device)
        self.stream: Any = None
        begun = []
        for config in configs:
            run = Path(config.runs) / str(config.name)
            if (run / "config.yaml").is_file():
                require_resumable(config, run)
                begun.append(run)
            model = build_model(config, data.caches[0].spec.channels, device, dtype, lm)
            state = RunState(config, data, model, dtype, run, ProcessGroup(), self.stream)
            self.stream = state.stream
            self.experiments.append(Experiment(Trainer(config, state, device, stop, quiet=True)))
        for experiment in self.experiments:
            run = experiment.trainer.run
            if run not in begun:
                runs.create_run_folder(run, experiment.trainer.config, data.caches, data.layers, latest=False)
            elif any((run / "checkpoints").iterdir()):
                experiment.trainer.state.restore()

    @property
    def lm_seconds(self) -> dict[str, float]:
        """Spent in shared passes of the language model, by purpose."""
        return {} if self.batcher is None else self.batcher.seconds

    @property
    def active(self) -> list[Experiment]:
        """Those that have not left."""
        return [experiment for experiment in self.experiments if experiment.end_state is None]

    def run(self) -> None:
        """Train all to their ends.

        Raises:
            Interrupted: a signal came; all are saved.
        """
        with ExitStack() as opened:
            for experiment in self.experiments:
                opened.enter_context(experiment.trainer)
            earliest = min(self.experiments, key=lambda experiment: experiment.step)
            self.stream.load_state_dict(earliest.trainer.state.stream_state)
            at, batches = earliest.step, iter(self.stream)
            try:
                while True:
                    self._evaluate_due()
                    self._finish_done()
                    if not self.active:
                        break
                    self._check_stop()
                    self._train_step(at, batches)
                    at += 1
            except Stopped:
                for experiment in self.active:
                    experiment.trainer.state.save()
                raise Interrupted(f"stopped at step {at}") from None
            finally:
                batches.close()

    def _train_step(self, step: int, batches: Generator[Batch, None, None]) -> None:
        """One step of all experiments that stand at ``at``, with the same batches."""
        taken, data_wait = next_batches(batches, self.experiments[0].trainer.config.gradient_accumulation_steps)
        ready = [experiment for experiment in self.active if experiment.step == step]
        for part in self._split(ready):
            steps = [experiment.trainer.begin_step(taken, data_wait) for experiment in part]
            for experiment, metrics in zip(part, optimizer_step(steps, self.passes), strict=True):
                try:
                    experiment.trainer.end_step(metrics)
                except WorkFailed as failure:
                    experiment.drop("failed", str(failure))
                    self.log(f"{experiment.name} failed: {failure}")
                else:
                    experiment.trainer.save_if_due()
        self._log_losses(ready)

    def _evaluate_due(self) -> None:
        due = [e for e in self.active if not e.trainer.done and e.trainer.evaluation_due]
        for experiment, result in self._evaluate(due):
            name, step, loss = experiment.name, experiment.step, result.val_loss
            self.log(f"step {step:>6}  {name}: held-out loss {loss:.4f}, audio gain {format_number(result.audio_gain)}")
            reason = self.on_evaluation(name, step, loss)
            if reason:
                experiment.trainer.state.save()
                experiment.drop("pruned", reason)
                self.log(f"{name} is pruned: {reason}")

    def _finish_done(self) -> None:
        """Evaluate and finish; a signal that comes before leaves them saved after their last step."""
        done = [experiment for experiment in self.active if experiment.trainer.done]
        for experiment in done:
            experiment.trainer.state.save()
        if done:
            self._check_stop()
        wanted = [experiment for experiment in done if experiment.trainer.config.eval_every != 0]
        self._evaluate([experiment for experiment in wanted if experiment.trainer.needs_last_evaluation])
        finals = {experiment.name: result for experiment, result in self._evaluate(wanted, final=True)}
        for experiment in done:
            try:
                experiment.trainer.finish(finals.get(experiment.name))
            except WorkFailed as failure:
                experiment.drop("failed", str(failure))
            else:
                experiment.end_state = "finished"
            self.log(f"{experiment.name} {experiment.end_state} after {experiment.step} steps")

    def _evaluate(self, experiments: Sequence[Experiment], final: bool = False) -> list[tuple[Experiment, Evaluation]]:
        """Those with equal settings together."""
        found: list[tuple[Experiment, Evaluation]] = []
        for part in self._split(experiments, lambda experiment: experiment.trainer.eval_config(final)):
            results = evaluate_together([experiment.trainer for experiment in part], self.passes, final)
            found += zip(part, results, strict=True)
        return found

    def _split(
        self, experiments: Sequence[Experiment], key: Callable[[Experiment], Hashable] = lambda experiment: None
    ) -> list[list[Experiment]]:
        """What is computed together: experiments of equal ``key`` in shared passes, each by itself in separate ones."""
        parts: dict[Hashable, list[Experiment]] = {}
        for experiment in experiments:
            parts.setdefault(key(experiment) if self.batcher else experiment.name, []).append(experiment)
        return list(parts.values())

    def _log_losses(self, stepped: Sequence[Experiment]) -> None:
        last = max((experiment.trainer.config.steps for experiment in self.experiments), default=0)
        at = max((experiment.step for experiment in stepped), default=0)
        if stepped and (at in (1, last) or at % max(1, last // LOG_LINES) == 0):
            metrics = [
                (experiment.name, experiment.trainer.metrics) for experiment in stepped if not experiment.end_state
            ]
            losses = [f"{name} {m.loss:.4f}{format_losses(m.auxiliary_losses)}" for name, m in metrics if m is not None]
            self.log(f"step {at:>6}/{last}  {'  '.join(losses)}")

    def _check_stop(self) -> None:
        if self.stop.requested:
            raise Stopped


def unfinished(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Those that have neither a summary nor a reason to have none."""
    folders = [(config, Path(config.runs) / str(config.name)) for config in configs]
    return [c for c, run in folders if not (run / "summary.json").is_file() and not (run / DROPPED).is_file()]


def resume_hint(folder: Path) -> str:
    """The end of a sentence about an interrupted sweep."""
    return f"go on with: python -m train sweep --resume {folder}"


def log(line: str) -> None:
    """A line on standard output, at once."""
    print(line, flush=True)
