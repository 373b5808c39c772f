"""One optimizer step over the batches of all ranks, after which every rank has the same weights.

```
batches -> soft tokens -> frozen LM -> nll of the target tokens -> gradient of
(nll of all batches and ranks / target tokens of the step) -> sum over ranks -> clip -> AdamW
```

Every target token of a step has the same weight, in whichever batch and on whichever rank; the loss is not the mean of
the ranks' means. Projector losses (such as those of a router) and the auxiliary objectives of a run
(``train/trainer/losses.py``) contribute to the gradient but not to the logged ``loss``; each is logged under its own
name.

On a GPU, no part of a step waits for the device: sizes and indices are known on the host, and what is logged is read
later, together (:meth:`TrainStep.metrics`). The device itself leaves the weights alone if the loss or the gradient is
not finite.

A step has three parts, so that several experiments can share the forward passes of one language model
(``train/sweeps/``):

```
experiment A: forward ─┐                                    ┌─> backward -> update
experiment B: forward ─┴─> nll of all rows, and gradient ───┴─> backward -> update
```
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shards.stream.batch import Batch
from train.config.train import TrainConfig
from train.data.loader import augment
from train.data.text import with_text_rules
from train.distributed.device import to_device
from train.distributed.group import ProcessGroup
from train.lms.base import LmRequest, SeparatePasses
from train.model.audio_lm import AudioLM
from train.model.prompt import prompt_rows
from train.runs.metrics_log import StepMetrics
from train.trainer.deferred import DeferredValues
from train.trainer.losses import CONTRASTIVE, DISTILL, Objectives


def next_batches(batches: Iterator[Batch], count: int) -> tuple[list[Batch], float]:
    """Return the next ``count`` batches and the seconds spent waiting for them."""
    began = time.perf_counter()
    return [next(batches) for _ in range(count)], time.perf_counter() - began


class TrainStep:
    """One step of one experiment: call :meth:`forward` and :meth:`backward` for each batch, then :meth:`update`.

    :meth:`metrics` returns what it did. The step must be kept until then: the GPU may still read its batches.

    Attributes:
        batches: this rank's part of each global batch, augmented. A part may be empty; its rank still participates.
        tokens: number of target tokens of the step, over all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: AudioLM,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        batches: Sequence[Batch],
        *,
        step: int,
        lr: float,
        group: ProcessGroup,
        data_wait: float = 0.0,
        tasks: Sequence[str] = (),
    ) -> None:
        """Prepare the step.

        Args:
            step: number of completed steps.
            data_wait: seconds spent waiting for ``batches``.
            tasks: those of the run; with several, the loss of each is computed, too.
        """
        self._began = time.perf_counter() - data_wait
        self.config, self.model, self.optimizer, self.parameters = config, model, optimizer, parameters
        self.step, self.lr, self.group = step, lr, group
        batches = [with_text_rules(batch, config.text) for batch in batches]
        changes = config.frame_mask_prob, config.noise_std, config.augment
        self.batches = batches = [augment(batch, config.seed, *changes) for batch in batches]
        self.objectives = Objectives.of_step(config, step)
        counts = [
            sum(len(model.prompt.target_ids(text)) for batch in batches for text in batch.texts),
            sum(int(batch.lengths.sum()) for batch in batches),
            sum(len(batch.lengths) * batch.features.shape[1] for batch in batches),
            sum(len(batch.texts) for batch in batches),
        ]
        waits = [data_wait if rank == group.rank else 0.0 for rank in range(group.world_size)]
        totals = group.all_reduce_sum([*counts, *waits])
        self.tokens, self._frames, self._padded_frames, self._utterances = map(int, totals[:4])
        self._data_wait = max(totals[4:])  # of the slowest rank
        contrastive = CONTRASTIVE in self.objectives.names
        self._negatives = _gather_texts(batches, group) if contrastive else [batch.texts for batch in batches]
        self._request: LmRequest | None = None
        self._tasks = tasks if len(tasks) > 1 else ()
        self._rows: list[tuple[str, int]] = []  # task and number of targets of each utterance
        self._soft = [0] * len(batches)  # number of soft tokens of each batch
        self._shares: list[float] = []  # of the step's target tokens, of each batch that is not empty
        self._projector_names: dict[str, list[str]] = {"losses": [], "metrics": []}
        self._values = DeferredValues()
        for group_options in optimizer.param_groups:
            group_options["lr"] = lr
        self._nll = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        optimizer.zero_grad(set_to_none=True)

    def forward(self, index: int) -> LmRequest | None:
        """Compute the soft tokens of batch ``index``; return the rows whose nll :meth:`backward` needs, or None."""
        if index == 0:
            _seed(self.config.seed, self.step, self.group.rank)
        batch = self.batches[index]
        self._request = None
        if not batch.texts:  # the global batch has fewer utterances than ranks
            self._request = self.model.lm.idle_request()
            return None if DISTILL in self.objectives.names else self._request
        device = self.model.lm.device
        features = batch.map_tensors(lambda tensor: to_device(tensor, device)).decoded().features
        self._request = self.model.request(features, batch.mask(), batch.texts, prompt_rows(batch))
        return None if DISTILL in self.objectives.names else self._request

    def backward(self, index: int, nll: Tensor | None) -> None:
        """Add the gradient of batch ``index``; ``nll`` [B] in nats belongs to the rows returned by :meth:`forward`."""
        batch, request = self.batches[index], self._request
        if request is None:
            return
        if not batch.texts:
            self.objectives.idle_backward(self.model, request, nll)
            return
        out = self.objectives.batch_loss(self.model, request, nll, batch.texts, self._negatives[index])
        loss = self.objectives.step_loss(out, self.tokens, self._utterances)
        self._shares.append(int(out.tokens.sum()) / self.tokens)
        loss = self._add_projector_losses(loss, self._shares[-1])
        loss.backward()  # type: ignore[no-untyped-call]
        self._nll += out.nll.detach().double().sum()
        if self._tasks:
            self._values.add("rows", out.nll)
            self._rows += zip(batch.tasks, out.tokens.tolist(), strict=True)
        for name, term in out.auxiliary.items():
            self._values.add(f"auxiliary {name}", term.detach().double().sum())
        self._soft[index] = int(request.soft_mask.sum())
        self._values.add(f"rms {index}", out.soft_rms)
        self._request = None

    def update(self) -> None:
        """Sum the gradient over the ranks and update the parameters, unless the loss or the gradient is not finite."""
        nll = self.group.all_reduce_gradients(self.parameters, self._nll)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        finite = torch.isfinite(nll) & torch.isfinite(norm)
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused AdamW then does nothing
        self.optimizer.step()
        self._values.add("nll", self._nll)
        self._values.add("norm", norm)
        self._values.add("finite", finite)
        self._values.send()

    def changed_weights(self) -> bool:
        """Wait for the step and return whether :meth:`update` changed the weights."""
        return bool(self._values.read()["finite"][0])

    def metrics(self, since: float = 0.0) -> StepMetrics:
        """Wait for the step and return its metrics, over all ranks.

        Args:
            since: ``time.perf_counter()`` when the metrics of the step before were read; ``seconds`` count from there.
        """
        group, count, read = self.group, len(self.batches), self._values.read()
        squares = [soft * sum(read[f"rms {i}"]) ** 2 for i, soft in enumerate(self._soft)]
        auxiliary = [sum(read[f"auxiliary {name}"]) for name in self.objectives.names]
        own = [*read["nll"], *self._task_sums(read["rows"]), *self._soft, *squares, *auxiliary]
        nll, *sums = group.all_reduce_sum(own)
        by_task, sums = sums[: 2 * len(self._tasks)], sums[2 * len(self._tasks) :]
        pairs = zip(sums[:count], sums[count : 2 * count], strict=True)
        soft_rms = sum(math.sqrt(square / number) for number, square in pairs) / count
        projectors = group.all_gather((self._projector_sums("losses", read), self._projector_sums("metrics", read)))
        return StepMetrics(
            step=self.step + 1,
            loss=nll / self.tokens,
            auxiliary_losses={
                **self.objectives.means(sums[2 * count :], self.tokens, self._utterances),
                **sum_by_name([losses for losses, _ in projectors]),
            },
            task_losses={
                task: total / tokens
                for task, total, tokens in zip(self._tasks, by_task[::2], by_task[1::2], strict=True)
                if tokens
            },
            projector_metrics=sum_by_name([metrics for _, metrics in projectors]),
            lr=self.lr,
            grad_norm=read["norm"][0],
            projector_rms_ratio=soft_rms / self.model.lm.embedding_rms,
            seconds=time.perf_counter() - max(self._began, since),
            data_wait=self._data_wait,
            frames=self._frames,
            padded_frames=self._padded_frames,
            tokens=self.tokens,
            utterances=self._utterances,
        )

    def _task_sums(self, nlls: Sequence[float]) -> list[float]:
        """Return the nll and the number of targets of each task, one after the other."""
        sums = {task: [0.0, 0] for task in self._tasks}
        for (task, tokens), nll in zip(self._rows, nlls, strict=True):
            sums[task][0] += nll
            sums[task][1] += tokens
        return [value for pair in sums.values() for value in pair]

    def _projector_sums(self, kind: str, read: Mapping[str, list[float]]) -> dict[str, float]:
        """Return the sums over the batches, each weighted by its share of the step's target tokens."""
        found = {name: read[f"{kind} {name}"] for name in self._projector_names[kind]}
        return {
            name: sum(value * share for value, share in zip(values, self._shares, strict=True))
            for name, values in found.items()
        }

    def _add_projector_losses(self, loss: Tensor, share: float) -> Tensor:
        """Add the projector's own losses for its last batch, which holds ``share`` of the step's target tokens."""
        losses = self.model.projector.take_losses()
        for value in losses.values():
            loss = loss + value * share
        for kind, found in (("losses", losses), ("metrics", self.model.projector.take_metrics())):
            for name, value in found.items():
                self._projector_names[kind].append(name)
                self._values.add(f"{kind} {name}", value)
        return loss


def run_step(steps: Sequence[TrainStep], passes: SeparatePasses) -> None:
    """Run one step of each experiment, all with the same number of batches; ``passes`` computes the nll of all rows."""
    alone = len(steps) == 1
    random_states: list[list[Tensor]] = [[] for _ in steps]
    for index in range(len(steps[0].batches)):
        requests = []
        for step, state in zip(steps, random_states, strict=True):
            if state:  # each experiment draws the random numbers it would draw in a run of its own
                _set_random_state(state)
            requests.append(step.forward(index))
            state[:] = [] if alone else _random_state()
        nlls = iter(passes.nll([request for request in requests if request is not None]))
        for step, request in zip(steps, requests, strict=True):
            step.backward(index, None if request is None else next(nlls))
    for step in steps:
        step.update()


def optimizer_step(steps: Sequence[TrainStep], passes: SeparatePasses) -> list[StepMetrics]:
    """As :func:`run_step`; wait for the steps and return their metrics."""
    run_step(steps, passes)
    return [step.metrics() for step in steps]


def sum_by_name(per_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum over the ranks by name; a rank whose part of the batch was empty has no entries."""
    names = dict.fromkeys(name for share in per_rank for name in share)
    return {name: sum(share.get(name, 0.0) for share in per_rank) for name in names}


def _seed(seed: int, step: int, rank: int) -> None:
    """Seed torch (dropout) with a function of the run's seed, the step and the rank.

    A resumed run thus draws the same random numbers without generator states in its checkpoint.
    """
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _random_state() -> list[Tensor]:
    """Return the states of torch's generators: CPU, then every GPU."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_state(state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _gather_texts(batches: Sequence[Batch], group: ProcessGroup) -> list[list[str]]:
    """Return the texts of each global batch, in the same order on every rank."""
    shares = group.all_gather([batch.texts for batch in batches])
    return [[text for share in shares for text in share[i]] for i in range(len(batches))]
