"""nanochat's GPT as of mid-2026, with audio in its residual stream.

In: a ``Layout`` of token ids and the soft tokens of a batch. Out: hidden states, and logits of those asked for.
Parameter names and shapes are nanochat's own (``transformer.wte.weight``, ``value_embeds.1.weight`` …), so that its
checkpoints fit. Source: github.com/karpathy/nanochat, ``nanochat/gpt.py``; value embeddings: arXiv 2410.17897.

Soft tokens, as W1: the projected audio is RMS-normed and joins the text **after** the smear; rotary positions run over
audio and text alike; on audio positions the value embeddings look up id 0. The smear runs over the text tokens as one
chain, so a prompt before the audio smears into the first token after it.

Letters: B rows, T positions, D width, H heads, G kv heads, d head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from train.lms.splice import Layout

_SMEAR_CHANNELS, _GATE_CHANNELS = 24, 12


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """nanochat's ``model_config``; the defaults are those of the W1 smoke run (d6, head size 64, bytes)."""

    sequence_len: int = 2048
    vocab_size: int = 257
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 384
    window_pattern: str = "SSSL"

    @classmethod
    def from_depth(cls, depth: int, head_size: int = 128, vocab_size: int = 257) -> GPTConfig:
        """nanochat's one dial: width = depth · 64 rounded up to a multiple of the head size."""
        width = -(-depth * 64 // head_size) * head_size
        heads = width // head_size
        return cls(vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=width)

    @property
    def windows(self) -> list[int]:
        """How many positions back each layer sees, itself not counted: L = sequence_len, S = a quarter of it."""
        short = -(-self.sequence_len // (4 * 128)) * 128
        sizes = {"L": self.sequence_len, "S": short}
        pattern = self.window_pattern.upper()
        windows = [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        return [*windows[:-1], self.sequence_len]

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, the last one included."""
        return layer % 2 == (self.n_layer - 1) % 2


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


def rotate(x_BTHd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary embedding by -theta, the head split in halves: y1 = x1·cos + x2·sin, y2 = -x1·sin + x2·cos."""
    x1, x2 = x_BTHd.chunk(2, -1)
    cos, sin = cos_Td[:, None, :].to(x_BTHd.dtype), sin_Td[:, None, :].to(x_BTHd.dtype)
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


class Attention(nn.Module):
    """Causal attention in a left window, q and k normed after the rotation, v with a gated value embedding."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_head, config.n_kv_head
        self.head_size = config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, self.heads * self.head_size)
        self.c_k = Linear(config.n_embd, self.kv_heads * self.head_size)
        self.c_v = Linear(config.n_embd, self.kv_heads * self.head_size)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(_GATE_CHANNELS, self.kv_heads) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        """x [B, T, D] (normed), ve [B, T, G·d] or None, ``window`` positions back -> [B, T, D]."""
        batch, width = x.shape[:2]
        q = self.c_q(x).view(batch, width, self.heads, self.head_size)
        k = self.c_k(x).view(batch, width, self.kv_heads, self.head_size)
        v = self.c_v(x).view(batch, width, self.kv_heads, self.head_size)
        if ve is not None and self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :_GATE_CHANNELS]))
            v = v + gate[..., None] * ve.view_as(v)
        q, k = 1.2 * norm(rotate(q, cos, sin)), 1.2 * norm(rotate(k, cos, sin))
        y = windowed_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, width, -1))
        return out


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
    """Parameters of one layer; ``GPT.forward`` runs it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = Mlp(config.n_embd)


class Transformer(nn.Module):
    """Token embeddings and layers, under nanochat's names."""

    def __init__(self, config: GPTConfig, rows: int) -> None:
        super().__init__()
        self.wte = Embedding(rows, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))


class GPT(nn.Module):
    """The transformer: a ``Layout`` and audio rows in, normed hidden states out; ``head`` makes logits of them."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width, layers = config.n_embd, config.n_layer
        head_size = width // config.n_head
        padded = -(-config.vocab_size // 64) * 64
        self.transformer = Transformer(config, padded)
        self.lm_head = Linear(width, padded)
        self.value_embeds = nn.ModuleDict(
            {
                str(i): Embedding(padded, config.n_kv_head * head_size)
                for i in range(layers)
                if config.has_value_embedding(i)
            }
        )
        self.resid_lambdas = nn.Parameter(torch.empty(layers))
        self.x0_lambdas = nn.Parameter(torch.empty(layers))
        self.smear_gate = Linear(_SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        frequency = 100_000.0 ** -(torch.arange(0, head_size, 2) / head_size)
        angle = torch.outer(torch.arange(10 * config.sequence_len), frequency)  # 10 ×: prompts may outgrow training
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [block for block in self.transformer.h if isinstance(block, Block)]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """nanochat's start, drawn from a generator of its own: the same seed gives the same bytes."""
        generator, layers = torch.Generator().manual_seed(seed), self.config.n_layer
        bound = (3 / self.config.n_embd) ** 0.5
        self.transformer.wte.weight.normal_(0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0, 0.001, generator=generator)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound, generator=generator)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                block.attn.ve_gate.weight.uniform_(0, 0.02, generator=generator)
        for table in self.value_embeds.parameters():
            table.uniform_(-bound, bound, generator=generator)
        self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, layers))
        self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, layers))
        self.smear_gate.weight.uniform_(0, 0.02, generator=generator)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    def forward(self, layout: Layout, audio_features: Tensor, dtype: torch.dtype) -> Tensor:
        """``audio_features`` [all soft tokens of the batch, D] at ``layout.is_soft`` -> normed hidden [B, T, D].

        Rows are padded on the right, which causal attention keeps from the rest, so there is no padding mask.
        """
        width = layout.ids.shape[1]
        if width > len(self.cos):
            raise UserError(
                f"a row of {width} positions is longer than nanochat's {len(self.cos)}: raise projector.stack or drop "
                "long utterances"
            )
        text_ND = self._smear(layout, dtype)
        x = text_ND.new_zeros(*layout.ids.shape, self.config.n_embd)
        x = x.masked_scatter(layout.is_text[..., None], text_ND)
        x = x.masked_scatter(layout.is_soft[..., None], norm(audio_features.to(dtype)))
        cos, sin = self.cos[:width], self.sin[:width]
        x0 = kept = x
        for i, (block, window) in enumerate(zip(self.blocks, self.config.windows, strict=True)):
            x = self.resid_lambdas[i].to(dtype) * x + self.x0_lambdas[i].to(dtype) * x0
            ve = self.value_embeds[str(i)](layout.ids).to(dtype) if self.config.has_value_embedding(i) else None
            x = x + block.attn(norm(x), ve, cos, sin, window)
            x = x + block.mlp(norm(x))
            if i == self.config.n_layer // 2:
                kept = x
        return norm(x - self.backout_lambda.to(dtype) * kept)

    def head(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> logits [N, V] float32, softcapped at 15."""
        z: Tensor = self.lm_head(hidden_ND)[..., : self.config.vocab_size].float()
        return 15 * torch.tanh(z / 15)

    def _smear(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Normed embeddings of all text tokens, each but the first of its row with a gated part of the one before.

        [all text tokens of the batch, D], in row-major order.
        """
        text_ids = layout.ids[layout.is_text]
        x = norm(self.transformer.wte(text_ids).to(dtype))
        row = layout.is_text.nonzero()[:, 0]
        follows = torch.zeros_like(row, dtype=torch.bool)
        follows[1:] = row[1:] == row[:-1]
        gate = self.smear_lambda.to(dtype) * torch.sigmoid(self.smear_gate(x[:, :_SMEAR_CHANNELS]))
        return x + torch.where(follows[:, None], gate * x.roll(1, 0), 0)
