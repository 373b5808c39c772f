"""Sizes of a nanochat GPT, and the constants in which its generations differ.

nanochat's code changed without a version number in its checkpoints, but their keys and shapes show which code wrote
them (``train/lms/nanochat/checkpoint.py``). What older generations lack gets values without effect in the newest: smear
and backout of 0, residual factors of 1. Source: the history of github.com/karpathy/nanochat, ``nanochat/gpt.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    """The constants of one generation of nanochat; the defaults are those of the newest (from 2026-03-14 on)."""

    name: str = "2026-03-14"
    rotary_base: float = 100_000.0
    qk_scale: float = 1.2  # of normed queries and of normed keys
    window_divisor: int = 4  # the window of an S layer is sequence_len divided by this ...
    window_multiple: int = 128  # ... and rounded up to a multiple of this
    value_embeddings: bool = True
    gate_channels: int = 12
    gate_scale: float = 3.0
    softcap: float = 15.0


TODAY = Generation()
EARLY_MARCH = Generation("2026-03-09", qk_scale=1.15, window_divisor=3)
FIRST = Generation("2025-10-13", 10_000.0, qk_scale=1.0, window_divisor=2, window_multiple=1, value_embeddings=False)


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """nanochat's ``model_config``; the defaults are those of the W1 smoke run (d6, head size 64, byte tokenizer)."""

    sequence_len: int = 2048
    vocab_size: int = 257
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 384
    window_pattern: str = "SSSL"

    @classmethod
    def from_depth(cls, depth: int, head_size: int = 128, vocab_size: int = 257) -> GPTConfig:
        """Return nanochat's configuration of a depth: width = depth · 64, rounded up to a multiple of the head size."""
        width = -(-depth * 64 // head_size) * head_size
        heads = width // head_size
        return cls(vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=width)

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.n_embd // self.n_head

    def windows(self, generation: Generation = TODAY) -> list[int]:
        """Return how many previous positions each layer attends to: L = sequence_len, S = a part of it."""
        part = generation.window_divisor * generation.window_multiple
        short = (
            self.sequence_len // part
            if generation.window_multiple == 1
            else -(-self.sequence_len // part) * generation.window_multiple
        )
        sizes = {"L": self.sequence_len, "S": short}
        pattern = self.window_pattern.upper()
        windows = [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        return [*windows[:-1], self.sequence_len]

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether ``layer`` has a value embedding: every other layer, including the last."""
        return layer % 2 == (self.n_layer - 1) % 2
