"""Where each token and each soft token of a batch stands: [before | soft | after | targets], one row per utterance.

In: how many soft tokens each row has, and its token ids. Out: a ``Layout`` of masks, with rows packed without gaps and
padded on one side. Built with a handful of tensor operations, however many rows there are.

Letters: B rows, T positions, N target tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """One batch. Row-major order of the True positions of a mask is the order of the values that belong there."""

    ids: Tensor  # [B, T] int64; 0 where a soft token or padding stands
    is_text: Tensor  # [B, T] bool
    is_soft: Tensor  # [B, T] bool
    predicts_target: Tensor  # [B, T] bool: the position's output predicts a target
    targets: Tensor  # [N] int64, in the order of ``predicts``
    last_positions: Tensor  # [B] int64: the column of each row's last input

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: text or soft token, no padding."""
        return self.is_text | self.is_soft


def pack_inputs(
    soft_lengths: Tensor, prefix: Ids, suffix: Ids, targets: Ids | None = None, pad: Literal["left", "right"] = "right"
) -> PackedInputs:
    """Place ``soft_lengths`` [B] int64 soft tokens between ``before`` and ``after``; ``targets`` follow.

    The last target is predicted and never an input. Without ``targets`` the row ends with ``after``.

    Raises:
        ValueError: a row has targets and nothing that could predict the first of them.
    """
    device, batch = soft_lengths.device, len(prefix)
    wanted = targets if targets is not None else [[] for _ in range(batch)]
    parts = list(zip(prefix, suffix, wanted, strict=True))
    text = chain.from_iterable([*b, *a, *t[:-1]] for b, a, t in parts)
    sizes = torch.tensor([[len(b), len(a), len(t)] for b, a, t in parts]).to(device)
    n_prefix, n_suffix, n_targets = sizes.unbind(1)
    prompt_lengths = n_prefix + soft_lengths + n_suffix
    lengths = prompt_lengths + (n_targets - 1).clamp(min=0)
    if int(prompt_lengths.min()) < 1:
        raise ValueError("a row without soft tokens and without a prompt has nothing to predict its first token from")
    width = int(lengths.max())
    start = width - lengths if pad == "left" else torch.zeros_like(lengths)
    position = torch.arange(width, device=device) - start[:, None]  # [B, T], 0 at the first input of a row

    def between(low: Tensor, high: Tensor) -> Tensor:
        return (position >= low[:, None]) & (position < high[:, None])

    is_soft = between(n_prefix, n_prefix + soft_lengths)
    is_text = between(torch.zeros_like(lengths), lengths) & ~is_soft
    flat = torch.tensor(list(text), dtype=torch.int64).to(device)
    return PackedInputs(
        ids=torch.zeros(batch, width, dtype=torch.int64, device=device).masked_scatter(is_text, flat),
        is_text=is_text,
        is_soft=is_soft,
        predicts_target=between(prompt_lengths - 1, prompt_lengths - 1 + n_targets),
        targets=torch.tensor(list(chain.from_iterable(wanted)), dtype=torch.int64).to(device),
        last_positions=start + lengths - 1,
    )
