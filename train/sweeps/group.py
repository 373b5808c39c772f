"""A group of experiments trained in lockstep in one process, sharing one stream of batches and one language model.

The experiments of a group share caches, held-out rows, the composition and order of batches, and the language model.
Each writes the same run folder as a single run. The stream is read once; every experiment at the current step uses its
batches. Steps and evaluations use the functions of a single run, called with one experiment after another
(``separate``) or with all experiments, whose rows then share passes of the language model (``batched``,
``train/sweeps/lm_batching.py``). An experiment that finishes, or whose loss is not finite, leaves the group; the others
are not affected.

After a kill, each experiment resumes from its own checkpoint: the stream starts at the earliest checkpoint, and
experiments with a later one wait until the stream reaches it.
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
from train.config.train import STAGE_ONE, TrainConfig
from train.data.caches import open_data, print_notes, require_changes_fit
from train.distributed.device import choose_device, choose_dtype, flushed_denormals
from train.distributed.group import ProcessGroup
from train.distributed.signals import StopRequest
from train.evaluation.evaluate import Evaluation, Stopped
from train.lms.base import LanguageModel, SeparatePasses, choose_max_logits
from train.model.build import build_model, load_run_lm
from train.model.checkpoint import checkpoints
from train.model.ctc import (
    alignment_note,
    run_tokens,
    stage_one_folder,
    start_from_stage_one,
    uses_tokens,
)
from train.model.proof import prove
from train.model.replay import replay_lm
from train.runs import folder as runs
from train.runs.metrics_log import format_losses, format_number
from train.sweeps.lm_batching import LmBatcher
from train.trainer.fit import create_folder, require_resumable
from train.trainer.state import RunState
from train.trainer.step import next_batches, optimizer_step
from train.trainer.trainer import Interrupted, Trainer, evaluate_together

DROPPED = "dropped.json"  # in the folder of an experiment that failed or was pruned
LOG_LINES = 10  # number of lines with all losses printed over a whole group
LockstepMode = Literal["batched", "separate", "none"]
# Keys with equal values in a group, besides the language model. ``extract`` does not affect training.
GROUP_KEYS = (
    *("caches", "labels", "filter", "val", "variants", "batch", "gradient_accumulation_steps", "device", "dtype"),
)


@dataclass
class Experiment:
    """An experiment of a group."""

    trainer: Trainer
    end_state: str | None = None  # finished, failed or pruned; None while it trains

    @property
    def name(self) -> str:
        """The name of the run folder."""
        run = self.trainer.run
        return f"{run.parent.name}, stage 1" if self.trainer.config.is_stage_one else run.name

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.trainer.state.step

    def drop(self, state: str, reason: str) -> None:
        """Leave the group before the last step; write ``state`` and ``reason`` to ``dropped.json``."""
        self.end_state = state
        runs.write_json(self.trainer.run / DROPPED, {"state": state, "step": self.step, "reason": reason})


def lm_key(config: TrainConfig) -> str:
    """Return a key that is equal for two configs that can share a frozen language model."""
    parts: list[Any] = [config.lm.model_dump(mode="json"), config.device, config.dtype]
    if config.lm.train or config.lm.lora is not None:
        parts.append(f"{config.runs}/{config.name}")  # trained weights belong to one run
    if config.lm.model.startswith("nanochat:d"):
        parts.append(config.seed)  # its weights are initialized from the seed
    return json.dumps(parts)


def group_key(config: TrainConfig) -> str:
    """Return a key that is equal for two experiments that can run in lockstep."""
    tree = config.model_dump(mode="json")
    tokens = [tree["text"], config.pretrain.negatives] if config.is_stage_one else []
    return json.dumps([lm_key(config), config.order_seed, *(tree[key] for key in GROUP_KEYS), *tokens])


def group_experiments(configs: Sequence[TrainConfig], max_size: int | None) -> list[list[TrainConfig]]:
    """Group the experiments by :func:`group_key`, in order, with at most ``max_size`` in a group."""
    found: dict[str, list[TrainConfig]] = {}
    for config in configs:
        found.setdefault(group_key(config), []).append(config)
    size = max_size or len(configs) or 1
    return [group[start : start + size] for group in found.values() for start in range(0, len(group), size)]


class LmCache:
    """Keeps the last used language model in memory for the next group with the same :func:`lm_key`."""

    def __init__(self) -> None:
        self._key, self._lm = "", None  # type: tuple[str, LanguageModel | None]

    def get(self, config: TrainConfig, tokens: Sequence[int] | None = None) -> LanguageModel:
        """Return the language model of ``config``, in evaluation mode unless it is trained.

        ``tokens``: those of a CTC head, for stage 1.
        """
        key = f"{lm_key(config)} {tokens if config.is_stage_one else ''}"
        if self._lm is None or key != self._key:
            self._lm = None  # free its memory before loading the next one
            device = choose_device(config.device)
            torch.manual_seed(config.seed)
            self._lm = load_run_lm(config, device, choose_dtype(config.dtype, device), tokens)
            self._key = key
        return self._lm


class LockstepTrainer:
    """Trains one group of experiments.

    Args:
        configs: the experiments, all with the same :func:`group_key`; those with a run folder resume from its
            checkpoint.
        lm_cache: provides the language model.
        mode: ``batched`` or ``separate``.
        stop: the signal handler.
        log: called with each log line.
        on_evaluation: called with name, step and held-out loss after each evaluation during training; if it returns a
            string, the experiment is pruned with this string as the reason.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        lm_cache: LmCache,
        mode: LockstepMode,
        stop: StopRequest,
        log: Callable[[str], None] = print,
        on_evaluation: Callable[[str, int, float], str | None] = lambda name, step, loss: None,
    ) -> None:
        self.stop, self.log, self.on_evaluation = stop, log, on_evaluation
        folders = [Path(config.runs) / str(config.name) for config in configs]
        first = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
        data = open_data(configs[0], *(runs.read_pins(first) if first is not None else ()))
        tokens = [
            run_tokens(config, data, folder) if uses_tokens(config) else None
            for config, folder in zip(configs, folders, strict=True)
        ]
        lm = lm_cache.get(configs[0], tokens[0])
        self.batcher = LmBatcher(lm) if mode == "batched" and len(configs) > 1 else None
        self.passes = self.batcher or SeparatePasses(lm)
        self.experiments: list[Experiment] = []
        print_notes(data.notes)
        device = choose_device(configs[0].device)
        lm.max_logits = choose_max_logits(device)
        if first is not None:
            replay_lm(lm, first)
        dtype = choose_dtype(configs[0].dtype, device)
        self.stream: Any = None
        existing = []
        spec = data.caches[0].spec
        for config in configs:
            require_changes_fit(config, spec)
        for config, run, own in zip(configs, folders, tokens, strict=True):
            if (run / "config.yaml").is_file():
                require_resumable(config, run)
                existing.append(run)
            model = build_model(
                config, spec.channels, device, dtype, lm,
                run=run if run in existing else None, tokens=own, codebook_size=spec.codebook_size,
            )  # fmt: skip
            state = RunState(config, data, model, dtype, run, ProcessGroup(), self.stream)
            if config.is_pretrained and not checkpoints(run / "checkpoints"):
                state.counters.stage_one_seconds = start_from_stage_one(model, stage_one_folder(config, run))
            self.stream = state.stream
            self.experiments.append(Experiment(Trainer(config, state, device, stop, quiet=True)))
        for experiment, own in zip(self.experiments, tokens, strict=True):
            run, config, model = experiment.trainer.run, experiment.trainer.config, experiment.trainer.model
            if run not in existing:
                if config.is_stage_one:
                    print_notes(alignment_note(model.projector, data, config, model.lm.tokenizer))
                print_notes(prove(model, data, config))
                create_folder(run, config, data, model, own, latest=False)
            elif any((run / "checkpoints").iterdir()):
                experiment.trainer.state.restore()

    @property
    def lm_seconds(self) -> dict[str, float]:
        """Seconds spent in shared passes of the language model, by purpose."""
        return {} if self.batcher is None else self.batcher.seconds

    @property
    def active(self) -> list[Experiment]:
        """The experiments that have not left the group."""
        return [experiment for experiment in self.experiments if experiment.end_state is None]

    def run(self) -> None:
        """Train all experiments to their last step.

        Raises:
            Interrupted: a signal arrived; all experiments are saved.
        """
        with ExitStack() as opened:
            for experiment in self.experiments:
                opened.enter_context(experiment.trainer)
            earliest = min(self.experiments, key=lambda experiment: experiment.step)
            self.stream.load_state_dict(earliest.trainer.state.stream_state)
            step, batches = earliest.step, iter(self.stream)
            try:
                while True:
                    self._evaluate_due()
                    self._finish_done()
                    if not self.active:
                        break
                    self._check_stop()
                    self._train_step(step, batches)
                    step += 1
            except Stopped:
                for experiment in self.active:
                    experiment.trainer.state.save()
                raise Interrupted(f"Interrupted at step {step}") from None
            finally:
                batches.close()

    def _train_step(self, step: int, batches: Generator[Batch, None, None]) -> None:
        """Run one step of all experiments that are at ``step``, with the same batches."""
        step_batches, data_wait = next_batches(batches, self.experiments[0].trainer.config.gradient_accumulation_steps)
        ready = [experiment for experiment in self.active if experiment.step == step]
        for part in self._split(ready):
            steps = [experiment.trainer.begin_step(step_batches, data_wait) for experiment in part]
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
                self.log(f"{name} pruned: {reason}")

    def _finish_done(self) -> None:
        """Evaluate and finish the experiments that are done; they are saved first, in case a signal arrives."""
        done = [experiment for experiment in self.active if experiment.trainer.done]
        for experiment in done:
            experiment.trainer.state.save()
        if done:
            self._check_stop()
        evaluated = [experiment for experiment in done if experiment.trainer.config.eval_every != 0]
        self._evaluate([experiment for experiment in evaluated if experiment.trainer.needs_last_evaluation])
        finals = {experiment.name: result for experiment, result in self._evaluate(evaluated, final=True)}
        for experiment in done:
            try:
                experiment.trainer.finish(finals.get(experiment.name))
            except WorkFailed as failure:
                experiment.drop("failed", str(failure))
            else:
                experiment.end_state = "finished"
            self.log(f"{experiment.name} {experiment.end_state} after {experiment.step} steps")

    def _evaluate(self, experiments: Sequence[Experiment], final: bool = False) -> list[tuple[Experiment, Evaluation]]:
        """Evaluate the experiments, those with equal evaluation settings together."""
        found: list[tuple[Experiment, Evaluation]] = []
        for part in self._split(experiments, lambda experiment: experiment.trainer.eval_config(final)):
            results = evaluate_together([experiment.trainer for experiment in part], self.passes, final)
            found += zip(part, results, strict=True)
        return found

    def _split(
        self, experiments: Sequence[Experiment], key: Callable[[Experiment], Hashable] = lambda experiment: None
    ) -> list[list[Experiment]]:
        """Split into parts that are computed together: by ``key`` with shared passes, else one by one."""
        parts: dict[Hashable, list[Experiment]] = {}
        for experiment in experiments:
            parts.setdefault(key(experiment) if self.batcher else experiment.name, []).append(experiment)
        return list(parts.values())

    def _log_losses(self, stepped: Sequence[Experiment]) -> None:
        last = max((experiment.trainer.config.steps for experiment in self.experiments), default=0)
        step = max((experiment.step for experiment in stepped), default=0)
        if stepped and (step in (1, last) or step % max(1, last // LOG_LINES) == 0):
            metrics = [
                (experiment.name, experiment.trainer.metrics) for experiment in stepped if not experiment.end_state
            ]
            losses = [f"{name} {m.loss:.4f}{format_losses(m.auxiliary_losses)}" for name, m in metrics if m is not None]
            self.log(f"step {step:>6}/{last}  {'  '.join(losses)}")

    def _check_stop(self) -> None:
        if self.stop.requested:
            raise Stopped


@flushed_denormals()
def train_group(
    configs: Sequence[TrainConfig],
    lm_cache: LmCache,
    mode: LockstepMode,
    stop: StopRequest,
    log: Callable[[str], None] = print,
    on_evaluation: Callable[[str, int, float], str | None] = lambda name, step, loss: None,
) -> dict[str, float]:
    """Train one group: stage 1 of all experiments that have one, in lockstep, then the experiments.

    Arguments as of :class:`LockstepTrainer`. An experiment whose stage 1 fails is dropped.

    Returns:
        The seconds in shared passes of the language model, by purpose.

    Raises:
        Interrupted: a signal arrived; all experiments are saved.
    """
    folders = {str(config.name): Path(config.runs) / str(config.name) for config in configs}
    stages = [config.stage_one(str(folders[str(config.name)])) for config in configs if config.pretrain.steps]
    if stages and mode == "none":
        parts = [[stage] for stage in unfinished(stages)]
    else:
        parts = group_experiments(unfinished(stages), None)
    for part in parts:
        LockstepTrainer(part, lm_cache, mode, stop, log).run()
    for stage in stages:
        if (Path(stage.runs) / STAGE_ONE / DROPPED).is_file():
            reason = runs.read_json(Path(stage.runs) / STAGE_ONE / DROPPED)["reason"]
            runs.write_json(Path(stage.runs) / DROPPED, {"state": "failed", "step": 0, "reason": f"stage 1: {reason}"})
    remaining = unfinished(configs)
    if not remaining:
        return {}
    lockstep = LockstepTrainer(remaining, lm_cache, mode, stop, log, on_evaluation)
    lockstep.run()
    return lockstep.lm_seconds


def unfinished(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Return the experiments that are neither finished nor dropped."""
    folders = [(config, Path(config.runs) / str(config.name)) for config in configs]
    return [c for c, run in folders if not (run / "summary.json").is_file() and not (run / DROPPED).is_file()]


def resume_hint(folder: Path) -> str:
    """Return the last part of the message about an interrupted sweep."""
    return f"the experiments are saved. Resume with: python -m train sweep --resume {folder}"


def log(line: str) -> None:
    """Print a line to standard output and flush it."""
    print(line, flush=True)
