"""Packing of the language model's inputs: rows [prefix | soft tokens | suffix | targets], one per utterance.

:func:`pack_inputs` takes the number of soft tokens and the token ids of each row, and returns :class:`PackedInputs`:
ids and masks of rows without gaps, padded on one side. The number of tensor operations does not depend on the number of
rows.

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
    """The positions of one batch. Values for the True positions of a mask are in row-major order."""

    ids: Tensor  # [B, T] int64; 0 at soft tokens and padding
    is_text: Tensor  # [B, T] bool
    is_soft: Tensor  # [B, T] bool
    predicts_target: Tensor  # [B, T] bool: the output at this position predicts a target
    targets: Tensor  # [N] int64, in the order of ``predicts_target``
    last_positions: Tensor  # [B] int64: column of each row's last input

    @property
    def valid(self) -> Tensor:
        """bool [B, T]: text or soft token, not padding."""
        return self.is_text | self.is_soft


def pack_inputs(
    soft_lengths: Tensor, prefix: Ids, suffix: Ids, targets: Ids | None = None, pad: Literal["left", "right"] = "right"
) -> PackedInputs:
    """Lay out ``soft_lengths`` [B] int64 soft tokens between ``prefix`` and ``suffix``, followed by ``targets``.

    The last target is predicted but is not an input. Without ``targets``, a row ends with ``suffix``.

    Raises:
        ValueError: a row has neither soft tokens nor a prompt.
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
        raise ValueError("a row without soft tokens and prompt has nothing to predict its first token from")
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
