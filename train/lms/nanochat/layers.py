"""The layers of nanochat's GPT: linear layers, rotary attention in a left window with a KV cache, MLP, block.

They take hidden states [B, T, D] of rows padded on the right; ``gpt.py`` puts them together.

Letters: B rows, T positions, D width, H heads, G kv heads, d head size, M positions of a KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.lms.nanochat.config import Generation, GPTConfig


class Linear(nn.Linear):
    """A linear layer without bias whose weight is cast to the input's dtype; ``GPT.init_weights`` initializes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing, so that the global generator does not change."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """An embedding that ``GPT.init_weights`` initializes."""

    def reset_parameters(self) -> None:
        """Do nothing, so that the global generator does not change."""


def norm(x: Tensor) -> Tensor:
    """Apply RMSNorm without parameters over the last axis."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary embedding by -theta to the halves of each head: y1 = x1·cos + x2·sin, y2 = -x1·sin + x2·cos.

    ``cos`` and ``sin`` are [T, d/2], or [B, T, d/2] if rows are at different positions.
    """
    x1, x2 = x_BTHd.chunk(2, -1)
    cos, sin = cos[..., None, :].to(x_BTHd.dtype), sin[..., None, :].to(x_BTHd.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)


def windowed_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, window: int) -> Tensor:
    """Compute causal attention of position i to positions i - window … i -> [B, H, T, d].

    Queries are processed in pieces of ``window``, each with the keys it attends to: O(T · window) time, not O(T²).
    """
    width, gqa = q_BHTd.shape[2], q_BHTd.shape[1] != k_BGTd.shape[1]
    if width <= window + 1:
        return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=gqa)
    position, pieces = torch.arange(width, device=q_BHTd.device), []
    for start in range(0, width, window):
        low, high = max(0, start - window), min(start + window, width)
        back = position[start:high, None] - position[low:high]
        k, v = k_BGTd[:, :, low:high], v_BGTd[:, :, low:high]
        mask = (back >= 0) & (back <= window)
        pieces.append(F.scaled_dot_product_attention(q_BHTd[:, :, start:high], k, v, attn_mask=mask, enable_gqa=gqa))
    return torch.cat(pieces, 2)


@dataclass(slots=True)
class KvCache:
    """The state of decoding. Rows have different lengths and grow by one position per step."""

    keys: list[Tensor]  # per layer [B, G, M, d]
    values: list[Tensor]  # per layer [B, G, M, d]
    lengths: Tensor  # [B] int64: positions filled
    max_length: int  # the longest of them; 0 if the cache is empty
    previous_embedding: Tensor  # [B, D]: embedding of the last text token before the smear; 0 if there is none

    def reorder(self, parents: Tensor) -> None:
        """Let row i be what row ``parents[i]`` was."""
        self.keys = [keys[parents] for keys in self.keys]
        self.values = [values[parents] for values in self.values]
        self.lengths, self.previous_embedding = self.lengths[parents], self.previous_embedding[parents]


class Attention(nn.Module):
    """Causal attention in a left window, with q and k normed after the rotation and a gated value embedding in v."""

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
        """Map normed x [B, T, D] with value embeddings ve [B, T, G·d] or None to [B, T, D].

        Positions attend to ``window`` previous ones. An empty ``cache`` (all lengths 0) is filled with keys and values;
        with a filled one, x is the next position of each row (T = 1).
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
        """Append one position per row to ``cache`` (over the padding of the prompt) and attend -> [B, H, 1, d]."""
        rows, used = torch.arange(len(q_BH1d), device=q_BH1d.device), cache.max_length + 1
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        keys[rows, :, cache.lengths], values[rows, :, cache.lengths] = k_BG1d[:, :, 0], v_BG1d[:, :, 0]
        back = cache.lengths[:, None] - torch.arange(used, device=rows.device)
        mask = ((back >= 0) & (back <= window))[:, None, None]
        gqa = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(
            q_BH1d, keys[:, :, :used], values[:, :, :used], attn_mask=mask, enable_gqa=gqa
        )


class Mlp(nn.Module):
    """D -> 4D -> relu² -> D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
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
        """As ``Attention.forward``, but with x before the norm."""
        x = x + self.attn(norm(x), ve, cos, sin, window, cache)
        y: Tensor = x + self.mlp(norm(x))
        return y


class Transformer(nn.Module):
    """Token embeddings and layers, with nanochat's parameter names."""

    def __init__(self, config: GPTConfig, generation: Generation, rows: int) -> None:
        super().__init__()
        self.wte = Embedding(rows, config.n_embd)
        self.h = nn.ModuleList(Block(config, generation, i) for i in range(config.n_layer))
