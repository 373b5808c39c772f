"""One pass of a frozen language model for the rows of many experiments.

In: the :class:`Question`\\ s of experiments, each a batch of soft tokens with prompts and targets. Out: nats and their
gradients, or decoded ids, a question each. A row's answer depends on that row alone, so rows of all questions are
sorted by length and cut anew: rows of one length share a pass, whichever experiment, prompt and stack they are from,
and hardly any padding is computed. What has no soft tokens is the same for all experiments and is computed once.

On a CPU passes run side by side, each on one thread: no thread waits for others at every operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.threads import Threads
from train.lms.base import LanguageModel
from train.lms.layout import Ids

# positions of a pass, padding included: enough for full speed; a layer's activations are kept for each until its end
CPU_POSITIONS, GPU_POSITIONS = 512, 8192
CPU_ROWS, GPU_ROWS = 64, 512  # rows decoded together: the cache of keys and values is copied at each token on a CPU
KINDS = ("training", "judging", "decoding")


@dataclass
class Question:
    """What a batch asks: nats of ``targets``, with their gradient or without, or a greedy answer without them.

    soft [B, S, D], soft_mask [B, S] bool; ids a row before and after the soft tokens.
    """

    soft: Tensor
    soft_mask: Tensor
    before: Ids
    after: Ids
    targets: Ids | None = None
    gradient: bool = False
    max_new_tokens: int = 0

    @property
    def kind(self) -> tuple[bool, bool, int]:
        """Questions of one kind are answered together."""
        return self.targets is not None, self.gradient, self.max_new_tokens


@dataclass
class _Row:
    """A row of a question."""

    soft: Tensor  # [its soft tokens, D]
    before: Sequence[int]
    after: Sequence[int]
    target: Sequence[int]
    answer: Any = None

    @property
    def length(self) -> int:
        return len(self.soft) + len(self.before) + len(self.after) + max(len(self.target) - 1, 0)


class Answerer:
    """Answers the questions of experiments by ``lm``.

    Attributes:
        seconds: spent in the language model, by what was asked: training, judging, decoding.
        positions, padding: computed in training, and those of them that were padding.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.positions, self.padding = 0, 0
        self._cpu = lm.device.type == "cpu"
        self._threads = Threads(torch.get_num_threads() if self._cpu else 1)

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """(nats [B] float32, gradient [B, S, D] or None) of a question with targets, else ids [B] of one without."""
        rows = [_rows(question) for question in questions]
        for kind in dict.fromkeys(question.kind for question in questions):
            asked = [row for question, own in zip(questions, rows, strict=True) if question.kind == kind for row in own]
            begun = time.perf_counter()
            self._answer_rows(asked, *kind)
            judged, gradient, _ = kind
            self.seconds[KINDS[0 if gradient else 1 if judged else 2]] += time.perf_counter() - begun
        return [_put_together(question, own) for question, own in zip(questions, rows, strict=True)]

    def _answer_rows(self, rows: list[_Row], judged: bool, gradient: bool, max_new_tokens: int) -> None:
        first: dict[Any, _Row] = {}
        for row in rows:
            key = id(row) if len(row.soft) else (tuple(row.before), tuple(row.after), tuple(row.target))
            first.setdefault(key, row)
        if judged:
            parts = self._cut(list(first.values()))
            self._each(lambda part: self._nats(part, gradient), parts)
            if gradient:
                self.positions += sum(len(part) * part[-1].length for part in parts)
                self.padding += sum(part[-1].length - row.length for part in parts for row in part)
        else:
            most = CPU_ROWS if self._cpu else GPU_ROWS
            ordered = sorted(first.values(), key=lambda row: row.length)
            size = min(most, -(-len(ordered) // self._threads.n))
            parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            self._each(lambda part: self._generate(part, max_new_tokens), parts)
        for row in rows:
            if not len(row.soft):
                row.answer = first[tuple(row.before), tuple(row.after), tuple(row.target)].answer

    def _cut(self, rows: list[_Row]) -> list[list[_Row]]:
        """Rows of like lengths, about equally much work a part and a multiple of the threads in number."""
        rows = sorted(rows, key=lambda row: row.length)
        most = CPU_POSITIONS if self._cpu else GPU_POSITIONS
        total = sum(row.length for row in rows)
        count = -(-max(total // most + (total % most > 0), 1) // self._threads.n) * self._threads.n
        parts: list[list[_Row]] = [[]]
        done = 0
        for row in rows:
            full = done >= total * len(parts) / count  # the parts so far have their share
            if parts[-1] and (full or row.length * (len(parts[-1]) + 1) > 2 * most):
                parts.append([])
            parts[-1].append(row)
            done += row.length
        return parts

    def _nats(self, part: list[_Row], gradient: bool) -> None:
        soft, mask = _pad(part)
        sides = ([row.before for row in part], [row.after for row in part], [row.target for row in part])
        if not (gradient and soft.numel()):
            with torch.no_grad():
                nats = self.lm.target_nats(soft, mask, *sides)
            slopes: Any = [row.soft.new_zeros(row.soft.shape) for row in part]
        else:
            with torch.enable_grad():
                nats = self.lm.target_nats(soft.requires_grad_(), mask, *sides)
                (slope,) = torch.autograd.grad(nats.sum(), soft)
            slopes = [own[: len(row.soft)] for own, row in zip(slope, part, strict=True)]
        for row, nat, own in zip(part, nats.detach(), slopes, strict=True):
            row.answer = nat, own

    def _generate(self, part: list[_Row], max_new_tokens: int) -> None:
        soft, mask = _pad(part)
        ids = self.lm.generate(soft, mask, [row.before for row in part], [row.after for row in part], max_new_tokens)
        for row, answer in zip(part, ids, strict=True):
            row.answer = answer

    def _each(self, work: Callable[[list[_Row]], None], parts: list[list[_Row]]) -> None:
        """``work`` on every part, as many at a time as there are threads."""
        longest_first = sorted(parts, key=lambda part: -len(part) * part[-1].length)
        self._threads.run(work, [(part,) for part in longest_first])


def _rows(question: Question) -> list[_Row]:
    soft = question.soft.detach()
    found = [own[mask] for own, mask in zip(soft, question.soft_mask, strict=True)]
    targets = question.targets if question.targets is not None else [[]] * len(found)
    return [_Row(*parts) for parts in zip(found, question.before, question.after, targets, strict=True)]


def _put_together(question: Question, rows: list[_Row]) -> Any:
    if question.targets is None:
        return [row.answer for row in rows]
    nats = torch.stack([row.answer[0] for row in rows])
    if not question.gradient:
        return nats, None
    slope = torch.zeros_like(question.soft)
    slope[question.soft_mask] = torch.cat([row.answer[1] for row in rows])
    return nats, slope


def _pad(part: list[_Row]) -> tuple[Tensor, Tensor]:
    """soft [B, S, D] of a part's rows, zero behind, and its mask [B, S]."""
    soft = pad_sequence([row.soft for row in part], batch_first=True)
    lengths = torch.tensor([len(row.soft) for row in part], device=soft.device)
    return soft, torch.arange(soft.shape[1], device=soft.device) < lengths[:, None]
