"""Packing of the language model's inputs: rows [prefix | soft tokens | suffix | targets], one per utterance.

:func:`pack_inputs` takes the number of soft tokens and the token ids of each row, and returns :class:`PackedInputs`:
ids, masks and indices of rows without gaps, padded on one side or joined to one row. They are made on the CPU, where
all sizes are known, and cross to a GPU in one copy for which the host does not wait; the model then selects and writes
positions by their indices, because a mask would make the host wait for its number of True values. The number of tensor
operations does not depend on the number of rows.

Letters: B rows, S soft tokens, T positions, N target tokens of the whole batch, D the LM's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from train.distributed.device import all_to_device, to_device

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Rows that lie one after another in one row of ``sum(lengths)`` positions."""

    lengths: tuple[int, ...]  # [B]
    position_ids: Tensor  # [1, sum of lengths] int64: 0 at the first position of each row
    bounds: Tensor  # [B + 1] int32: 0 and where each row ends


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """The positions of one batch: masks on the CPU, the rest on the LM's device. Positions are in row-major order.

    If the rows are joined, ``ids`` is [1, sum of lengths], and indices and ``last_positions`` count in that row.
    """

    is_text: Tensor  # [B, T] bool, on the CPU
    is_soft: Tensor  # [B, T] bool, on the CPU
    predicts_target: Tensor  # [B, T] bool, on the CPU: the output at this position predicts a target
    ids: Tensor  # [B, T] int64; 0 at soft tokens and padding
    targets: Tensor  # [N] int64, in the order of ``predicts_target``
    last_positions: Tensor  # [B] int64: column of each row's last input
    text_index: Tensor  # int64: flat positions, in [B·T], of ``is_text``
    soft_index: Tensor  # int64, of ``is_soft``
    target_index: Tensor  # [N] int64, of ``predicts_target``
    target_slots: Tensor  # [N] int64: flat places in [B, most targets of a row]
    joined: JoinedRows | None = None  # None: the rows are padded

    @property
    def valid(self) -> Tensor:
        """bool [B, T] on the CPU: text or soft token, not padding."""
        return self.is_text | self.is_soft

    def at_targets(self, x_BTD: Tensor) -> Tensor:
        """Select the positions that predict targets -> [N, D]."""
        return x_BTD.flatten(0, 1).index_select(0, self.target_index)

    def sum_by_row(self, values_N: Tensor) -> Tensor:
        """Sum values of the targets [N] over each row -> [B]."""
        counts = self.predicts_target.sum(1)
        shape = len(counts), int(counts.max())
        return values_N.new_zeros(shape).flatten().index_copy(0, self.target_slots, values_N).view(shape).sum(1)


def pack_inputs(
    soft_lengths: Tensor,
    prefix: Ids,
    suffix: Ids,
    targets: Ids | None = None,
    pad: Literal["left", "right", "none"] = "right",
    device: torch.device | None = None,
) -> PackedInputs:
    """Lay out ``soft_lengths`` [B] int64 soft tokens between ``prefix`` and ``suffix``, followed by ``targets``.

    The last target is predicted but is not an input. Without ``targets``, a row ends with ``suffix``.

    Args:
        pad: the side of the padding; none: the rows are joined, see :class:`JoinedRows`.
        device: of the result; by default that of ``soft_lengths``, which should be on the CPU.

    Raises:
        ValueError: a row has neither soft tokens nor a prompt.
    """
    device, soft_lengths, batch = device or soft_lengths.device, soft_lengths.cpu(), len(prefix)
    wanted = targets if targets is not None else [[] for _ in range(batch)]
    parts = list(zip(prefix, suffix, wanted, strict=True))
    text_ids = chain.from_iterable([*b, *a, *t[:-1]] for b, a, t in parts)
    n_prefix, n_suffix, n_targets = torch.tensor([[len(b), len(a), len(t)] for b, a, t in parts]).unbind(1)
    prompt_lengths = n_prefix + soft_lengths + n_suffix
    lengths = prompt_lengths + (n_targets - 1).clamp(min=0)
    if int(prompt_lengths.min()) < 1:
        raise ValueError("a row without soft tokens and prompt has nothing to predict its first token from")
    width = int(lengths.max())
    start = width - lengths if pad == "left" else torch.zeros_like(lengths)
    position = torch.arange(width) - start[:, None]  # [B, T], 0 at the first input of a row

    def between(low: Tensor, high: Tensor) -> Tensor:
        return (position >= low[:, None]) & (position < high[:, None])

    is_soft = between(n_prefix, n_prefix + soft_lengths)
    is_text = between(torch.zeros_like(lengths), lengths) & ~is_soft
    predicts_target = between(prompt_lengths - 1, prompt_lengths - 1 + n_targets)
    flat = torch.tensor(list(text_ids), dtype=torch.int64)
    index = [places(mask) for mask in (is_text, is_soft, predicts_target)]
    shape, last = (batch, width), start + lengths - 1
    if pad == "none":
        rank = (is_text | is_soft).flatten().cumsum(0) - 1  # of a valid position among the valid ones
        index, shape, last = [rank[each] for each in index], (1, int(lengths.sum())), lengths.cumsum(0) - 1
    ids, wanted_ids, last, text, soft, target, slots, position_ids, bounds = all_to_device(
        [
            torch.zeros(shape, dtype=torch.int64).flatten().index_copy(0, index[0], flat).view(shape),
            torch.tensor(list(chain.from_iterable(wanted)), dtype=torch.int64),
            last,
            *index,
            places(torch.arange(int(n_targets.max())) < n_targets[:, None]),
            position[is_text | is_soft][None],
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        ],
        device,
    )
    joined = JoinedRows(tuple(lengths.tolist()), position_ids, bounds.int()) if pad == "none" else None
    masks = is_text, is_soft, predicts_target
    return PackedInputs(*masks, ids, wanted_ids, last, text, soft, target, slots, joined)


def places(mask: Tensor) -> Tensor:
    """Return the flat indices of the True values of ``mask``, int64."""
    return mask.flatten().nonzero()[:, 0]


def valid_soft(soft: Tensor, soft_mask: Tensor) -> Tensor:
    """Return the soft tokens [B, S, D] where ``soft_mask`` (bool [B, S], on the CPU) is True -> [their number, D]."""
    return soft.flatten(0, 1).index_select(0, to_device(places(soft_mask), soft.device))
