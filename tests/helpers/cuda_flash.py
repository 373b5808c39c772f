"""FlashAttention's kernel for rows of different lengths, on the CPU: what the pretended device runs in its place.

It refuses what the kernel refuses, and computes each row with torch's attention.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

calls: list[int] = []  # rows of each forward call


def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """[T, heads, head size] -> [T, heads, head size]."""
    lengths = bounds.diff().tolist()
    assert {each.dtype for each in (q, k, v)} <= {torch.bfloat16, torch.float16}
    assert q.dtype == k.dtype == v.dtype
    assert bounds.dtype == torch.int32
    assert bounds[0] == 0
    assert (sum(lengths), max(lengths)) == (len(q), longest)
    assert q.shape[2] % 8 == 0
    assert all(each.stride(-1) == 1 for each in (q, k, v))
    rows = zip(*(each.transpose(0, 1).split(lengths, 1) for each in (q, k, v)), strict=True)
    attended = [F.scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True) for row in rows]
    return torch.cat(attended, 1).transpose(0, 1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int, dropout: float,
    causal: bool, debug: bool, **keys: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert causal
    assert not dropout
    assert (keys["window_size_left"], keys["window_size_right"]) == (-1, 0)
    calls.append(len(bounds) - 1)
    out = _attend(q, k, v, bounds, longest, keys["scale"])
    empty = out.new_zeros(0)
    return out.contiguous(), q.new_zeros(q.shape[1], len(q), dtype=torch.float32), empty, empty.clone(), empty.clone()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, bounds_k: Tensor,
    longest: int, longest_k: int, dropout: float, causal: bool, *rest: Any, scale: float | None, **keys: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    lengths = bounds.diff().tolist()
    rows = zip(*(each.transpose(0, 1).float().split(lengths, 1) for each in (grad, q, k, v)), strict=True)
    parts = zip(*(_row_backward(*row, scale or q.shape[-1] ** -0.5) for row in rows), strict=True)
    return tuple(torch.cat(part, 1).transpose(0, 1).to(q.dtype) for part in parts)


def _row_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """[heads, T, head size] each."""
    shape, groups = k.shape, len(q) // len(k)
    k, v = (each.repeat_interleave(groups, 0) for each in (k, v))
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = ((q @ k.mT) * scale).masked_fill(future, -torch.inf).softmax(-1)
    of_weights = grad @ v.mT
    scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_k, of_v = scores.mT @ q, weights.mT @ grad
    return scores @ k, *(each.view(shape[0], groups, *shape[1:]).sum(1) for each in (of_k, of_v))


@cache
def install() -> None:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    _kept.append(library)


_kept: list[Any] = []
