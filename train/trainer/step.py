"""One step of the optimizer: this rank's batches in, the same new weights on every rank out.

```
batches -> soft tokens -> frozen LM -> nats of the target tokens -> gradient of
(all nats of the step, over batches and ranks / all target tokens of the step) -> sum over ranks -> clip -> AdamW
```

Every target token of a step weighs the same, whichever batch and rank it is in: not the mean of the ranks' means.
Losses of the projector's own (a router's) and the further objectives of a run (``train/trainer/losses.py``) are added
to what is differentiated, not to the loss that is told; each is told under its own name.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from shards.stream.batch import Batch
from train.distributed.group import Group
from train.model.audio_lm import AudioLM
from train.projectors import Projector
from train.trainer.losses import CONTRASTIVE, Objectives


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one step did, over all ranks."""

    loss: float  # nats a target token
    grad_norm: float  # before clipping
    soft_rms: float  # RMS of the soft tokens, the mean over the step's batches
    tokens: int  # target tokens
    frames: int  # valid frames
    padded_frames: int  # with padding
    utterances: int
    waited: float  # seconds for data, on the rank that waited longest
    further: dict[str, float] = field(default_factory=dict)  # means of the further objectives, by name
    own_losses: dict[str, float] = field(default_factory=dict)  # of the projector, as they were added
    own_figures: dict[str, float] = field(default_factory=dict)  # what else the projector tells

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers; if not, no weight was changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def terms(self) -> dict[str, float]:
        """What was minimised beside the cross-entropy, by the names of ``metrics.jsonl``."""
        return {**self.further, **self.own_losses}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what torch draws in a step (dropout) a function of the run's seed, the step and the rank alone.

    A resumed run then draws what it would have drawn, without a generator's state in its checkpoint.
    """
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def take(batches: Iterator[Batch], count: int) -> tuple[list[Batch], float]:
    """The next ``count`` batches and the seconds that they were waited for."""
    begun = time.perf_counter()
    return [next(batches) for _ in range(count)], time.perf_counter() - begun


def take_step(
    model: AudioLM,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    batches: Sequence[Batch],
    *,
    clip: float,
    group: Group,
    waited: float = 0.0,
    objectives: Objectives | None = None,
) -> StepFigures:
    """Gradient of the step and one update of ``parameters``; none where the gradient is not finite.

    ``batches`` is this rank's part of each global batch of the step; a part may be empty, and takes part all the same.
    """
    objectives = objectives or Objectives()
    mine = [
        sum(len(model.prompt.target(text)) for batch in batches for text in batch.texts),
        sum(int(batch.lengths.sum()) for batch in batches),
        sum(len(batch.lengths) * batch.features.shape[1] for batch in batches),
        sum(len(batch.texts) for batch in batches),
    ]
    waits = [waited if rank == group.rank else 0.0 for rank in range(group.world)]
    tokens, frames, padded, utterances, *waits = group.total([*mine, *waits])
    optimizer.zero_grad(set_to_none=True)
    nats = 0.0
    soft = [0] * len(batches)  # soft tokens of each batch
    squares = [0.0] * len(batches)  # their mean square, times their number
    further = dict.fromkeys(objectives.names, 0.0)
    own = _Own()
    texts = _texts_of_all(batches, group) if CONTRASTIVE in further else [batch.texts for batch in batches]
    for i, batch in enumerate(batches):
        if not batch.texts:  # a global batch of fewer utterances than ranks
            continue
        out = objectives.measure(model, batch.features, batch.mask(), batch.texts, texts[i])
        loss = objectives.loss(out, tokens, utterances)
        loss = own.add_to(loss, model.projector, int(out.tokens.sum()) / tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        nats += float(out.nats.detach().double().sum())
        for name, term in out.further.items():
            further[name] += float(term.detach().double().sum())
        soft[i] = sum(map(model.projector.soft_frames, batch.lengths.tolist()))
        squares[i] = soft[i] * float(out.soft_rms) ** 2
    group.sum_gradients(parameters)
    nats, *sums = group.total([nats, *soft, *squares, *further.values()])
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    count = len(batches)
    pairs = zip(sums[:count], sums[count : 2 * count], strict=True)
    owns = group.gather((own.losses, own.figures))
    figures = StepFigures(
        loss=nats / tokens,
        grad_norm=norm,
        soft_rms=sum(math.sqrt(square / number) for number, square in pairs) / count,
        tokens=int(tokens),
        frames=int(frames),
        padded_frames=int(padded),
        utterances=int(utterances),
        waited=max(waits),
        further=objectives.told(sums[2 * count :], tokens, utterances),
        own_losses=_sum_by_name([losses for losses, _ in owns]),
        own_figures=_sum_by_name([figures for _, figures in owns]),
    )
    if figures.finite:
        optimizer.step()
    return figures


class _Own:
    """The projector's own losses and figures over the batches of a step; each weighs as much as its batch does."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.figures: dict[str, float] = {}

    def add_to(self, loss: torch.Tensor, projector: Projector, share: float) -> torch.Tensor:
        """``loss`` and what the projector adds to that of its last batch, which has ``share`` of the step's tokens."""
        for name, own in projector.take_losses().items():
            loss = loss + own * share
            self.losses[name] = self.losses.get(name, 0.0) + float(own.detach()) * share
        for name, figure in projector.take_figures().items():
            self.figures[name] = self.figures.get(name, 0.0) + float(figure) * share
        return loss


def _sum_by_name(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over the ranks; one whose part of the batch was empty has no names."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) for name in names}


def _texts_of_all(batches: Sequence[Batch], group: Group) -> list[list[str]]:
    """The texts of each global batch, on every rank in the same order."""
    shares = group.gather([batch.texts for batch in batches])
    return [[text for share in shares for text in share[i]] for i in range(len(batches))]
