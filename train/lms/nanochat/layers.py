"""The parts of nanochat's GPT: linear layers, rotary attention in a left window with a KV cache, MLP, block.

In: normed hidden states [B, T, D] of rows padded on the right. Out: what each layer adds to them. ``gpt.py`` runs them.

Letters: B rows, T positions, D width, H heads, G kv heads, d head size, M positions of a KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.lms.nanochat.config import Generation, GPTConfig


class Linear(nn.Linear):
    """Without bias, its weight cast to the input's dtype, never initialised here (``GPT.initialise`` does it)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: the global generator stays untouched."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """An embedding that is never initialised here."""

    def reset_parameters(self) -> None:
        """Nothing: the global generator stays untouched."""


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without parameters."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by -theta, the head split in halves: y1 = x1·cos + x2·sin, y2 = -x1·sin + x2·cos.

    ``cos`` and ``sin`` are [T, d/2], or [B, T, d/2] where rows stand at positions of their own.
    """
    x1, x2 = x_BTHd.chunk(2, -1)
    cos, sin = cos[..., None, :].to(x_BTHd.dtype), sin[..., None, :].to(x_BTHd.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)


def windowed_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, window: int) -> Tensor:
    """Causal attention in which position i sees i - window … i -> [B, H, T, d].

    Queries go in pieces of ``window``, each against the keys it can see: work grows with T · window, not with T².
    """
    width, gqa = q_BHTd.shape[2], q_BHTd.shape[1] != k_BGTd.shape[1]
    if width <= window + 1:
        return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=gqa)
    position, pieces = torch.arange(width, device=q_BHTd.device), []
    for start in range(0, width, window):
        low, high = max(0, start - window), min(start + window, width)
        back = position[start:high, None] - position[low:high]
        k, v = k_BGTd[:, :, low:high], v_BGTd[:, :, low:high]
        seen = (back >= 0) & (back <= window)
        pieces.append(F.scaled_dot_product_attention(q_BHTd[:, :, start:high], k, v, attn_mask=seen, enable_gqa=gqa))
    return torch.cat(pieces, 2)


@dataclass(slots=True)
class KvCache:
    """What decoding remembers of each row; rows have lengths of their own and grow by one position a step."""

    keys: list[Tensor]  # each layer [B, G, M, d]
    values: list[Tensor]
    lengths: Tensor  # [B] int64: positions filled
    max_length: int  # the longest of them; 0 is an empty cache
    previous_embedding: Tensor  # [B, D]: the last text token's embedding before the smear; 0 where there was none


class Attention(nn.Module):
    """Causal attention in a left window, q and k normed after the rotation, v with a gated value embedding."""

    def __init__(self, config: GPTConfig, generation: Generation, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.layer, self.generation = layer, generation
        self.c_q = Linear(config.n_embd, self.heads * self.head_size)
        self.c_k = Linear(config.n_embd, self.kv_heads * self.head_size)
        self.c_v = Linear(config.n_embd, self.kv_heads * self.head_size)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        gated = generation.value_embeddings and config.has_value_embedding(layer)
        self.ve_gate = Linear(generation.gate_channels, self.kv_heads) if gated else None

    def forward(
        self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int, cache: KvCache | None = None
    ) -> Tensor:
        """x [B, T, D] (normed), ve [B, T, G·d] or None, ``window`` positions back -> [B, T, D].

        With an empty ``cache`` (all lengths 0) the keys and values are kept; with a filled one x is one position a row.
        """
        batch, width = x.shape[:2]
        q = self.c_q(x).view(batch, width, self.heads, self.head_size)
        k = self.c_k(x).view(batch, width, self.kv_heads, self.head_size)
        v = self.c_v(x).view(batch, width, self.kv_heads, self.head_size)
        if ve is not None and self.ve_gate is not None:
            gate = self.generation.gate_scale * torch.sigmoid(self.ve_gate(x[..., : self.generation.gate_channels]))
            v = v + gate[..., None] * ve.view_as(v)
        scale = self.generation.qk_scale
        q, k = scale * norm(rotate(q, cos, sin)), scale * norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is None:
            y = windowed_attention(q, k, v, window)
        elif cache.max_length:
            y = self._attend_to(cache, q, k, v, window)
        else:
            cache.keys[self.layer][:, :, :width], cache.values[self.layer][:, :, :width] = k, v
            y = windowed_attention(q, k, v, window)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, width, -1))
        return out

    def _attend_to(self, cache: KvCache, q_BH1d: Tensor, k_BG1d: Tensor, v_BG1d: Tensor, window: int) -> Tensor:
        """One position a row, written behind what the row holds (over the padding of its prompt) -> [B, H, 1, d]."""
        rows, used = torch.arange(len(q_BH1d), device=q_BH1d.device), cache.max_length + 1
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        keys[rows, :, cache.lengths], values[rows, :, cache.lengths] = k_BG1d[:, :, 0], v_BG1d[:, :, 0]
        back = cache.lengths[:, None] - torch.arange(used, device=rows.device)
        seen = ((back >= 0) & (back <= window))[:, None, None]
        gqa = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(
            q_BH1d, keys[:, :, :used], values[:, :, :used], attn_mask=seen, enable_gqa=gqa
        )


class Mlp(nn.Module):
    """D -> 4D -> relu² -> D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y: Tensor = self.c_proj(F.relu(self.c_fc(x)).square())
        return y


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config: GPTConfig, generation: Generation, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, generation, layer)
        self.mlp = Mlp(config.n_embd)

    def forward(
        self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int, cache: KvCache | None = None
    ) -> Tensor:
        """As ``Attention.forward``, but x is not normed."""
        x = x + self.attn(norm(x), ve, cos, sin, window, cache)
        y: Tensor = x + self.mlp(norm(x))
        return y


class Transformer(nn.Module):
    """Token embeddings and layers, under nanochat's names."""

    def __init__(self, config: GPTConfig, generation: Generation, rows: int) -> None:
        super().__init__()
        self.wte = Embedding(rows, config.n_embd)
        self.h = nn.ModuleList(Block(config, generation, i) for i in range(config.n_layer))
