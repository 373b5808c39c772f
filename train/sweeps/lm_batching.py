"""Batches the passes of a frozen language model over the rows of several experiments.

A request is a batch of soft tokens with prompts and targets. :class:`LmBatcher` returns, for each request, the nll of
its rows, differentiable with respect to the soft tokens, or the decoded ids. The result of a row depends only on that
row, so the rows of all requests are sorted by length and split into new batches: rows of similar length share a pass
with hardly any padding, whichever experiment they come from. Rows without soft tokens are the same for all experiments
and are computed once.

The gradient of a pass is computed immediately, with weight one for every row; each experiment scales its rows in its
own backward pass. The activations of one pass are therefore freed before the next pass begins.

On a CPU the passes run in parallel, each on one thread, which avoids synchronizing threads at every operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.threads import ThreadPool
from train.lms.base import LanguageModel, LmRequest, SeparatePasses

# positions per pass, padding included: enough for full speed, while activations are kept for each position
MAX_CPU_POSITIONS, MAX_GPU_POSITIONS = 512, 8192
# rows decoded together: on a CPU the key-value cache is copied at each token
MAX_CPU_ROWS, MAX_GPU_ROWS = 64, 512


@dataclass
class _Row:
    """A row of a request and its results."""

    soft: Tensor  # [S, D], without padding
    prefix: Sequence[int]
    suffix: Sequence[int]
    target: Sequence[int]
    ends: frozenset[int] | None = None
    nll: Any = None  # scalar
    grad: Any = None  # gradient of nll with respect to soft, [S, D]
    ids: Any = None

    @property
    def length(self) -> int:
        return len(self.soft) + len(self.prefix) + len(self.suffix) + max(len(self.target) - 1, 0)


class LmBatcher(SeparatePasses):
    """Computes all requests of a call together.

    Attributes:
        seconds: seconds spent in the language model, by purpose: training, judging (evaluation), decoding.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(lm)
        self.seconds = {"training": 0.0, "judging": 0.0, "decoding": 0.0}
        self._cpu = lm.device.type == "cpu"
        self._threads = ThreadPool(torch.get_num_threads() if self._cpu else 1)

    def nll(self, requests: Sequence[LmRequest]) -> list[Tensor]:
        began, gradient = time.perf_counter(), torch.is_grad_enabled()
        rows = _rows(requests)
        self._run_batches(lambda batch: self._nll(batch, gradient), self._cut(_unique_rows(rows)))
        self.seconds["training" if gradient else "judging"] += time.perf_counter() - began
        return [_gather_nll(request, own, gradient) for request, own in zip(requests, rows, strict=True)]

    def generate(self, requests: Sequence[LmRequest], max_new_tokens: int) -> list[list[list[int]]]:
        began = time.perf_counter()
        rows = _rows(requests)
        ordered = _unique_rows(rows)
        size = min(MAX_CPU_ROWS if self._cpu else MAX_GPU_ROWS, -(-len(ordered) // self._threads.num_threads))
        batches = []
        for ends in dict.fromkeys(row.ends for row in ordered):  # templates of one model may end differently
            same = [row for row in ordered if row.ends == ends]
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        self._run_batches(lambda batch: self._generate(batch, max_new_tokens), batches)
        self.seconds["decoding"] += time.perf_counter() - began
        return [[row.ids for row in own] for own in rows]

    def _cut(self, rows: list[_Row]) -> list[list[_Row]]:
        """Split the sorted ``rows`` into batches of about equal work; their number is a multiple of the threads."""
        max_positions = MAX_CPU_POSITIONS if self._cpu else MAX_GPU_POSITIONS
        total = sum(row.length for row in rows)
        count = -(-max(-(-total // max_positions), 1) // self._threads.num_threads) * self._threads.num_threads
        batches: list[list[_Row]] = [[]]
        done = 0
        for row in rows:
            full = done >= total * len(batches) / count  # the batches so far have their share of the work
            if batches[-1] and (full or row.length * (len(batches[-1]) + 1) > 2 * max_positions):
                batches.append([])
            batches[-1].append(row)
            done += row.length
        return [batch for batch in batches if batch]

    def _nll(self, batch: list[_Row], gradient: bool) -> None:
        request = _request(batch)
        grads: Sequence[Tensor] = [torch.zeros_like(row.soft) for row in batch] if gradient else []
        with torch.set_grad_enabled(gradient and request.soft.numel() > 0):
            request.soft.requires_grad_(torch.is_grad_enabled())
            (nll,) = SeparatePasses.nll(self, [request])
            if nll.requires_grad:
                (padded,) = torch.autograd.grad(nll.sum(), request.soft)
                grads = [own[: len(row.soft)] for own, row in zip(padded, batch, strict=True)]
        for i, row in enumerate(batch):
            row.nll = nll[i].detach()
            row.grad = grads[i] if gradient else None

    def _generate(self, batch: list[_Row], max_new_tokens: int) -> None:
        (ids,) = SeparatePasses.generate(self, [_request(batch)], max_new_tokens)
        for row, own in zip(batch, ids, strict=True):
            row.ids = own

    def _run_batches(self, function: Callable[[list[_Row]], None], batches: list[list[_Row]]) -> None:
        """Call ``function`` on every batch, one batch per thread at a time."""
        longest_first = sorted(batches, key=lambda batch: -len(batch) * batch[-1].length)
        self._threads.run(function, [(batch,) for batch in longest_first])


class _PrecomputedGradient(torch.autograd.Function):
    """nll [B] with a precomputed gradient ``grad`` [B, S, D] with respect to soft [B, S, D].

    The backward pass multiplies row b of ``grad`` by the incoming gradient of its nll. This is exact because rows do
    not interact.
    """

    @staticmethod
    def forward(ctx: Any, soft: Tensor, nll: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return nll.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_outputs[0][:, None, None]).to(grad.dtype), None, None


def _rows(requests: Sequence[LmRequest]) -> list[list[_Row]]:
    """Return the rows of each request; equal rows without soft tokens are one object."""
    found: list[list[_Row]] = []
    without_audio: dict[Any, _Row] = {}
    for request in requests:
        lengths = request.soft_mask.sum(1).tolist()
        soft = [own[:length] for own, length in zip(request.soft.detach(), lengths, strict=True)]
        columns = zip(soft, request.prefix, request.suffix, request.targets, strict=True)
        rows = [_Row(*row, request.ends) for row in columns]
        for i, row in enumerate(rows):
            if not len(row.soft):
                rows[i] = without_audio.setdefault(
                    (tuple(row.prefix), tuple(row.suffix), tuple(row.target), row.ends), row
                )
        found.append(rows)
    return found


def _unique_rows(rows: Sequence[Sequence[_Row]]) -> list[_Row]:
    """Return each distinct row object once, sorted by length."""
    return sorted({id(row): row for own in rows for row in own}.values(), key=lambda row: row.length)


def _request(batch: list[_Row]) -> LmRequest:
    """Combine rows into one request: soft [B, S, D], zero-padded, and its mask [B, S]."""
    soft = pad_sequence([row.soft for row in batch], batch_first=True)
    mask = torch.arange(soft.shape[1]) < torch.tensor([len(row.soft) for row in batch])[:, None]
    prefix, suffix, targets = ([getattr(row, name) for row in batch] for name in ("prefix", "suffix", "target"))
    return LmRequest(soft, mask, prefix, suffix, targets, batch[0].ends)


def _gather_nll(request: LmRequest, rows: Sequence[_Row], gradient: bool) -> Tensor:
    """Stack the nll of the rows [B], differentiable with respect to the soft tokens of ``request``."""
    nll = torch.stack([row.nll for row in rows])
    if not gradient:
        return nll
    grad = torch.zeros_like(request.soft)
    for own, row in zip(grad, rows, strict=True):
        own[: len(row.grad)] = row.grad
    differentiable: Tensor = _PrecomputedGradient.apply(request.soft, nll, grad)  # type: ignore[no-untyped-call]
    return differentiable
