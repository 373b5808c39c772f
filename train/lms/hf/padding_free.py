"""Attention of joined rows: several rows that lie one after another in one row, without padding.

Everything but attention treats positions separately, so it computes only valid positions. Attention must not cross
from one row to the next. In bfloat16 on a GPU that is one call of FlashAttention's kernel for rows of different lengths
(``torch.nn.attention.varlen``, torch 2.10 on); otherwise the model's own attention is called for each row.

:func:`enable_padding_free` wraps the attention of a model. Joined rows arrive as the keyword argument ``joined``, which
the decoder passes down to it, so that recomputed layers see it, too; without it, attention is as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.lms.packing import JoinedRows

_KNOWN = {  # keyword arguments of an attention function that do not change what it computes, or that are passed on
    *("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("dropout", "scaling", "is_causal"),
}


def enable_padding_free(model: Any) -> None:
    """Let the attention of ``model`` take joined rows.

    Raises:
        ValueError: the attention of the model cannot be replaced, or is limited to windows.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    name = model.config._attn_implementation
    known = {"sdpa": sdpa_attention_forward, **AttentionInterface._global_mapping}
    if not name.startswith("sdpa"):
        raise ValueError(f"its attention is '{name}'")
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or ()), "full_attention"}
    if len(kinds) > 1:
        raise ValueError(f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}")
    AttentionInterface.register(f"earshard_varlen_{name}", _joined_attention(known[name]))
    AttentionMaskInterface.register(f"earshard_varlen_{name}", sdpa_mask)
    model.set_attn_implementation(f"earshard_varlen_{name}")


def _joined_attention(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``own``, an attention function of transformers, for joined rows as well."""

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, joined: JoinedRows | None = None, **keys: Any
    ) -> tuple[Tensor, None]:
        if joined is None:
            out: tuple[Tensor, None] = own(module, q, k, v, mask, **keys)
            return out
        unknown = [name for name, value in keys.items() if value is not None and name not in _KNOWN]
        if mask is not None or unknown:
            raise ValueError(f"its attention needs {', '.join(unknown) or 'a mask'}")
        if _has_kernel(q, k, v, keys.get("dropout", 0.0)):
            return _one_call(q, k, v, joined, keys.get("scaling")), None
        parts = zip(*(torch.split(each, list(joined.lengths), 2) for each in (q, k, v)), strict=True)
        return torch.cat([own(module, *part, None, **keys)[0] for part in parts], 1), None

    return forward


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether FlashAttention's kernel computes these queries, keys and values, [1, heads, T, head size]."""
    if q.device.type != "cuda" or _dtype(v) not in (torch.bfloat16, torch.float16) or dropout:
        return False
    size = q.shape[-1]
    if size % 8 or size > 256 or not size == k.shape[-1] == v.shape[-1] or q.shape[1] % k.shape[1]:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in varlen_attn.__annotations__ and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which attention computes: that of autocast, which the kernel does not know."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _one_call(q: Tensor, k: Tensor, v: Tensor, joined: JoinedRows, scaling: float | None) -> Tensor:
    """Return the attention of all rows, [1, T, heads, head size]."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (each[0].transpose(0, 1).to(_dtype(v)) for each in (q, k, v))  # [T, heads, head size]
    longest, bounds = max(joined.lengths), joined.bounds
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out[None]
