"""nanochat's GPT, with audio in its residual stream.

The model takes the ``PackedInputs`` and soft tokens of a batch and returns hidden states; ``GPT.head`` maps them to
logits. Parameter names and shapes are nanochat's (``transformer.wte.weight``, ``value_embeds.1.weight`` …), so its
checkpoints load. Source: github.com/karpathy/nanochat, ``nanochat/gpt.py``; value embeddings: arXiv 2410.17897.

Soft tokens enter as in W1: the projected audio is RMS-normed and joins the text **after** the smear; rotary positions
count audio and text alike; at audio positions the value embeddings look up id 0 (or BOS or nothing, see
``audio_value_embedding``). The smear treats the text tokens as one sequence: a prompt before the audio smears into the
first token after it, and decoding continues from the last text token, whether or not audio is in between.

Letters: B rows, T positions, D width, H heads, G kv heads, d head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards.errors import UserError
from train.config.model import AudioValue
from train.distributed.device import all_to_device
from train.lms.nanochat.config import TODAY, Generation, GPTConfig
from train.lms.nanochat.layers import Block, Embedding, KvCache, Linear, Transformer, norm
from train.lms.packing import PackedInputs

_SMEAR_CHANNELS = 24


class GPT(nn.Module):
    """The transformer: maps ``PackedInputs`` and soft tokens to normed hidden states; ``head`` maps them to logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, generation: Generation = TODAY, rows: int | None = None) -> None:
        """``rows`` of the token tables default to the size of the vocabulary, padded to a multiple of 64."""
        super().__init__()
        self.config, self.generation = config, generation
        self.audio_value_embedding: AudioValue = "id0"
        self.bos = 0  # id that audio positions look up if ``audio_value_embedding`` is bos
        self.gradient_checkpointing = False  # recompute layers in the backward pass
        # parameters that the checkpoint lacks: they have no effect and are not trained
        self.missing_parameters: frozenset[str] = frozenset()
        width, layers = config.n_embd, config.n_layer
        rows = rows or -(-config.vocab_size // 64) * 64
        self.transformer = Transformer(config, generation, rows)
        self.lm_head = Linear(width, rows)
        with_values = [i for i in range(layers) if generation.value_embeddings and config.has_value_embedding(i)]
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(rows, config.n_kv_head * config.head_size) for i in with_values}
        )
        self.resid_lambdas = nn.Parameter(torch.empty(layers))
        self.x0_lambdas = nn.Parameter(torch.empty(layers))
        self.smear_gate = Linear(_SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        with torch.device("cpu"):  # the tables are not weights: they are computed even if weights are on "meta"
            frequency = generation.rotary_base ** -(torch.arange(0, config.head_size, 2) / config.head_size)
            # 10 ×: prompts may be longer than in training
            angle = torch.outer(torch.arange(10 * config.sequence_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @property
    def blocks(self) -> list[Block]:
        """The layers, from first to last."""
        return [block for block in self.transformer.h if isinstance(block, Block)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize weights as nanochat does, from a separate generator: the same seed produces the same bytes."""
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

    def forward(
        self, packed: PackedInputs, audio_features: Tensor, dtype: torch.dtype, cache: KvCache | None = None
    ) -> Tensor:
        """Return normed hidden states [B, T, D] of ``packed`` with ``audio_features`` at ``packed.is_soft``.

        Rows are padded on the right, which causal attention never reads, so there is no padding mask. An empty
        ``cache`` is filled for ``decode_step``.

        Args:
            packed: token ids and masks.
            audio_features: [all soft tokens of the batch, D].
            dtype: dtype of the activations.
            cache: an empty cache, or None.

        Raises:
            UserError: a row is too long for the rotary tables.
        """
        width = packed.ids.shape[1]
        if width > len(self.cos):
            raise self._too_long(width)
        plain_ND, text_ND = self._smear(packed, dtype)
        x_ND = text_ND.new_zeros(packed.ids.numel(), self.config.n_embd).index_copy(0, packed.text_index, text_ND)
        x_ND = x_ND.index_copy(0, packed.soft_index, norm(audio_features.to(dtype)))
        x = x_ND.view(*packed.ids.shape, -1)
        ids, value_mask = packed.ids, None
        if self.audio_value_embedding == "bos":
            ids = ids.flatten().index_fill(0, packed.soft_index, self.bos).view_as(ids)
        elif self.audio_value_embedding == "zero":
            everywhere = torch.ones_like(ids, dtype=torch.bool).flatten()
            value_mask = everywhere.index_fill(0, packed.soft_index, False).view_as(ids)
        hidden = self._trunk(x, ids, value_mask, self.cos[:width], self.sin[:width], cache)
        if cache is not None:
            last = packed.is_text.sum(1).cumsum(0) - 1  # index of each row's last text token among all text tokens
            last = last.masked_fill(~packed.is_text.any(1), len(plain_ND))  # of none: the zeros at the end
            last, cache.lengths = all_to_device([last, packed.valid.sum(1)], x.device)
            cache.previous_embedding = torch.cat([plain_ND, x.new_zeros(1, x.shape[-1])]).index_select(0, last)
            cache.max_length = width
        return hidden

    def new_cache(self, batch: int, positions: int, dtype: torch.dtype) -> KvCache:
        """Return an empty cache for ``batch`` rows of up to ``positions`` positions.

        Raises:
            UserError: ``positions`` is too large for the rotary tables.
        """
        if positions > len(self.cos):
            raise self._too_long(positions)
        shape = (batch, self.config.n_kv_head, positions, self.config.head_size)
        device = self.cos.device

        def buffers() -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(self.config.n_layer)]

        lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        previous = torch.zeros(batch, self.config.n_embd, dtype=dtype, device=device)
        return KvCache(buffers(), buffers(), lengths, 0, previous)

    def decode_step(self, tokens: Tensor, cache: KvCache, dtype: torch.dtype) -> Tensor:
        """Append one text token per row, int64 [B], to ``cache``; return its normed hidden states [B, D]."""
        x = norm(self.transformer.wte(tokens).to(dtype))
        smeared = x + self._gate(x) * cache.previous_embedding
        positions = cache.lengths[:, None]
        cos, sin = self.cos[positions], self.sin[positions]
        hidden = self._trunk(smeared[:, None], tokens[:, None], None, cos, sin, cache)
        cache.previous_embedding, cache.lengths, cache.max_length = x, cache.lengths + 1, cache.max_length + 1
        return hidden[:, 0]

    def _trunk(
        self, x: Tensor, ids: Tensor, value_mask: Tensor | None, cos: Tensor, sin: Tensor, cache: KvCache | None
    ) -> Tensor:
        """Map x [B, T, D] to normed hidden states [B, T, D].

        ``ids`` [B, T] select the value embeddings, which are zero where ``value_mask`` (bool [B, T]) is False.
        """
        x0 = kept = x
        for i, (block, window) in enumerate(zip(self.blocks, self.config.windows(self.generation), strict=True)):
            x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            ve = self.value_embeds[str(i)](ids).to(x.dtype) if str(i) in self.value_embeds else None
            if ve is not None and value_mask is not None:
                ve = ve.masked_fill(~value_mask[..., None], 0)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, ve, cos, sin, window, use_reentrant=False)
            else:
                x = block(x, ve, cos, sin, window, cache)
            if i == self.config.n_layer // 2:
                kept = x
        return norm(x - self.backout_lambda.to(x.dtype) * kept)

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Map hidden states [N, D] to softcapped logits [N, V] float32."""
        z: Tensor = self.lm_head(hidden_ND)[..., : self.config.vocab_size].float()
        return self.generation.softcap * torch.tanh(z / self.generation.softcap)

    def _smear(self, packed: PackedInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the normed embeddings of all text tokens, without and with smear.

        The smear adds a gated part of the previous text token of the row. Both are [text tokens of the batch, D], in
        row-major order.
        """
        text_ids = packed.ids.flatten().index_select(0, packed.text_index)
        x = norm(self.transformer.wte(text_ids).to(dtype))
        row = packed.text_index // packed.ids.shape[1]
        follows = torch.zeros_like(row, dtype=torch.bool)
        follows[1:] = row[1:] == row[:-1]
        return x, x + torch.where(follows[:, None], self._gate(x) * x.roll(1, 0), 0)

    def _gate(self, x: Tensor) -> Tensor:
        """Map embeddings [..., D] to the weight of the previous token in the smear [..., 1]."""
        return self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :_SMEAR_CHANNELS]))

    def _too_long(self, width: int) -> UserError:
        return UserError(
            f"a row of {width} positions is longer than nanochat's maximum of {len(self.cos)}: raise projector.stack "
            "or drop long utterances"
        )
