"""A group of experiments side by side in one process: one stream of batches, one frozen language model.

In: the settings of experiments that share caches, held-out rows, rules and order of batches, and a language model.
Out: a run folder of each, as a run alone leaves it. The stream is read once; a batch that was taken is given to every
experiment that stands there. An experiment that ends, or whose loss is no number, leaves; the others do not notice.

After a kill, each goes on from its own checkpoint: the stream starts at the one that is furthest back, and those ahead
wait until it has come to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
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
from train.distributed.group import Group
from train.distributed.signals import StopRequest
from train.evaluation.batches import Stopped
from train.lms.base import LanguageModel
from train.lms.load import load_lm
from train.model.build import build_model
from train.runs import folder as runs
from train.runs.metrics_log import beside, figure
from train.sweeps.lm_batching import Answerer
from train.sweeps.rendezvous import meet, shared_lm
from train.trainer.state import RunState
from train.trainer.step import take
from train.trainer.trainer import Interrupted, Trainer, refuse_changes

DROPPED = "dropped.json"  # in the folder of an experiment that left before its end
TOLD = 10  # lines with all losses that a whole group prints
Mode = Literal["batched", "separate", "none"]
# What experiments of a group have in common, beside the language model. ``extract`` only makes caches.
SHARED = ("caches", "filter", "val", "batch", "gradient_accumulation_steps", "device", "dtype")


@dataclass
class Member:
    """An experiment of a group."""

    trainer: Trainer
    left: str | None = None  # finished, failed or pruned; None while it trains

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
        self.left = state
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
    return json.dumps([lm_key(config), config.order_seed, *(tree[key] for key in SHARED)])


def groups(configs: Sequence[TrainConfig], together: int | None) -> list[list[TrainConfig]]:
    """The experiments by what they share, in order; at most ``together`` in a group."""
    found: dict[str, list[TrainConfig]] = {}
    for config in configs:
        found.setdefault(group_key(config), []).append(config)
    size = together or len(configs) or 1
    return [group[start : start + size] for group in found.values() for start in range(0, len(group), size)]


class Models:
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


class Lockstep:
    """One group.

    Args:
        configs: its experiments, all of one :func:`group_key`; those with a run folder go on from its checkpoint.
        mode: ``batched`` or ``separate``.
        tell: takes lines for people.
        judged: is told each evaluation on the way; what it returns, if anything, is why the experiment is pruned.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        models: Models,
        mode: Mode,
        stop: StopRequest,
        tell: Callable[[str], None] = print,
        judged: Callable[[str, int, float], str | None] = lambda name, step, loss: None,
    ) -> None:
        self.stop, self.tell, self.judged = stop, tell, judged
        shared = models.get(configs[0])
        self.answerer = Answerer(shared) if mode == "batched" and len(configs) > 1 else None
        self.members: list[Member] = []
        data = open_data(configs[0])
        device = choose_device(configs[0].device)
        dtype = choose_dtype(configs[0].dtype, device)
        self.stream: Any = None
        begun = []
        for config in configs:
            run = Path(config.runs) / str(config.name)
            if (run / "config.yaml").is_file():
                refuse_changes(config, run)
                begun.append(run)
            lm = shared if self.answerer is None else shared_lm(shared)
            model = build_model(config, data.caches[0].spec.channels, device, dtype, lm)
            state = RunState(config, data, model, dtype, run, Group(), self.stream)
            self.stream = state.stream
            self.members.append(Member(Trainer(config, state, device, stop, quiet=True)))
        for member in self.members:
            run = member.trainer.run
            if run not in begun:
                runs.create(run, member.trainer.config, data.caches, data.layers, latest=False)
            elif any((run / "checkpoints").iterdir()):
                member.trainer.state.restore()

    @property
    def lm_seconds(self) -> dict[str, float]:
        """Spent in shared passes of the language model, by what was asked."""
        return {} if self.answerer is None else self.answerer.seconds

    @property
    def training(self) -> list[Member]:
        """Those that have not left."""
        return [member for member in self.members if member.left is None]

    def run(self) -> None:
        """Train all to their ends.

        Raises:
            Interrupted: a signal came; all are saved.
        """
        with ExitStack() as opened:
            for member in self.members:
                opened.enter_context(member.trainer)
            hindmost = min(self.members, key=lambda member: member.step)
            self.stream.load_state_dict(hindmost.trainer.state.position)
            at, batches = hindmost.step, iter(self.stream)
            try:
                while True:
                    self._judge()
                    self._let_go()
                    if not self.training:
                        break
                    self._check_stop()
                    self._advance(at, batches)
                    at += 1
            except Stopped:
                for member in self.training:
                    member.trainer.state.save()
                raise Interrupted(f"stopped at step {at}") from None
            finally:
                batches.close()

    def _advance(self, at: int, batches: Generator[Batch, None, None]) -> None:
        """One step of everyone who stands at ``at``, with the same batches."""
        held, waited = take(batches, self.members[0].trainer.config.gradient_accumulation_steps)
        turn = [member for member in self.training if member.step == at]
        for member, error in self._each(turn, lambda trainer: trainer.advance(held, waited)):
            if error is not None:
                member.drop("failed", str(error))
                self.tell(f"{member.name} failed: {error}")
            else:
                member.trainer.save_if_due()
        self._tell_losses(turn)

    def _judge(self) -> None:
        """The evaluations on the way that are due."""
        before = {member.name: member.trainer.state.counters.evaluated for member in self.training}
        going = [member for member in self.training if not member.trainer.ended]
        self._each(going, lambda trainer: trainer.judge_if_due())
        for member in going:
            judged = member.trainer.judged
            if judged is not None and member.trainer.state.counters.evaluated > before[member.name]:
                loss = judged.val_loss
                gain = figure(judged.audio_gain)
                self.tell(f"step {member.step:>6}  {member.name}: held-out loss {loss:.4f}, audio gain {gain}")
                reason = self.judged(member.name, member.step, loss)
                if reason:
                    member.trainer.state.save()
                    member.drop("pruned", reason)
                    self.tell(f"{member.name} is pruned: {reason}")

    def _let_go(self) -> None:
        """Judge and finish those that have ended; a signal in the meantime leaves them one step before that."""
        ended = [member for member in self.training if member.trainer.ended]
        for member in ended:
            member.trainer.state.save()
        if ended:
            self._check_stop()
        finals: dict[str, Any] = {}

        def judge(trainer: Trainer) -> None:
            finals[trainer.run.name] = trainer.judge_at_the_end()

        self._each(ended, judge)
        for member in ended:
            try:
                member.trainer.finish(finals[member.name])
            except WorkFailed as failure:
                member.drop("failed", str(failure))
            else:
                member.left = "finished"
            self.tell(f"{member.name} {member.left} after {member.step} steps")

    def _each(
        self, members: Sequence[Member], work: Callable[[Trainer], None]
    ) -> list[tuple[Member, WorkFailed | None]]:
        """``work`` on every trainer; who failed, by which WorkFailed. Other exceptions are raised when all are done."""
        if self.answerer is not None:
            jobs = {member.name: lambda trainer=member.trainer: work(trainer) for member in members}
            outcome = meet(jobs, self.answerer)
            errors = [outcome[member.name] for member in members]
        else:
            errors = [_failure(work, member.trainer) for member in members]
        for error in errors:
            if error is not None and not isinstance(error, WorkFailed):
                raise error
        return list(zip(members, errors, strict=True))

    def _tell_losses(self, turn: Sequence[Member]) -> None:
        last = max((member.trainer.config.steps for member in self.members), default=0)
        at = max((member.step for member in turn), default=0)
        if turn and (at in (1, last) or at % max(1, last // TOLD) == 0):
            losses = [
                f"{member.name} {member.trainer.state.counters.last_loss:.4f}{beside(member.trainer.terms)}"
                for member in turn
                if not member.left
            ]
            self.tell(f"step {at:>6}/{last}  {'  '.join(losses)}")

    def _check_stop(self) -> None:
        if self.stop.asked:
            raise Stopped


def _failure(work: Callable[[Trainer], None], trainer: Trainer) -> WorkFailed | None:
    try:
        work(trainer)
    except WorkFailed as failure:
        return failure
    return None


def unfinished(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Those that have neither a summary nor a reason to have none."""
    folders = [(config, Path(config.runs) / str(config.name)) for config in configs]
    return [c for c, run in folders if not (run / "summary.json").is_file() and not (run / DROPPED).is_file()]


def how_to_go_on(folder: Path) -> str:
    """The end of a sentence about an interrupted sweep."""
    return f"go on with: python -m train sweep --resume {folder}"


def say(line: str) -> None:
    """A line on standard output, at once."""
    print(line, flush=True)
