"""nanochat behind the questions of a run, and the byte tokenizer of the W1 smoke run.

In: ``nanochat:d6`` (a depth; random initialisation from a seed). Out: a ``LanguageModel`` over ``gpt.py``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict

import torch
from torch import Tensor

from shards.errors import UserError
from train.lms import LanguageModel
from train.lms.gpt import GPT, GPTConfig
from train.lms.splice import Layout

_REFERENCE = re.compile(r"nanochat:d([1-9]\d?)(?:-h(\d+))?")


class ByteTokenizer:
    """256 bytes and BOS (id 256), which also ends a text: nanochat has no other delimiter."""

    bos: int | None = 256
    eos: int = 256
    vocab_size = 257
    _mark = "<|bos|>"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """UTF-8 bytes; with ``special``, a written ``<|bos|>`` becomes id 256."""
        pieces = text.split(self._mark) if special else [text]
        ids = list(pieces[0].encode())
        for piece in pieces[1:]:
            ids += [self.eos, *piece.encode()]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the bytes among ``ids``; what is not UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, user: str) -> str:
        """None: bytes have no chat template."""
        raise UserError("the byte tokenizer of nanochat has no chat template: set prompt.template to plain or slam")


class NanochatLanguageModel(LanguageModel):
    """``GPT`` and the byte tokenizer behind what a run asks of a language model. Decoding is uncached."""

    def __init__(self, gpt: GPT, reference: str, dtype: torch.dtype, train: bool) -> None:
        super().__init__()
        self.gpt, self.tokenizer = gpt, ByteTokenizer()
        self.reference, self.identity, self.dtype = reference, f"nanochat-{tensors_sha256(gpt)[:16]}", dtype
        self.width, self.embedding_rms = gpt.config.n_embd, 1.0  # embeddings and audio are RMS-normed on entry
        self.trainable = train
        gpt.requires_grad_(train)
        self.train(train)

    def hidden(self, layout: Layout, soft_ND: Tensor) -> Tensor:
        hidden: Tensor = self.gpt(layout, soft_ND, self.dtype)
        return hidden

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.gpt.head(hidden_ND)


def tensors_sha256(gpt: GPT) -> str:
    """Hex digest over configuration, names and float32 values: equal weights, equal digest."""
    digest = hashlib.sha256(repr(sorted(asdict(gpt.config).items())).encode())
    for name, tensor in sorted(gpt.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_nanochat(
    reference: str, *, device: str | torch.device, dtype: torch.dtype, train: bool, seed: int
) -> NanochatLanguageModel:
    """``nanochat:d<depth>`` at random initialisation; heads of 64 as in the W1 smoke, or ``nanochat:d6-h128``.

    Raises:
        UserError: the reference is not of that form.
    """
    match = _REFERENCE.fullmatch(reference)
    head_size = int(match[2] or 64) if match else 0
    if not match or head_size % 2 or head_size < 8:
        raise UserError(
            f"'{reference}' names no nanochat: write nanochat:d<depth>, such as nanochat:d6, or nanochat:d6-h128 "
            "for another (even) head size"
        )
    gpt = GPT(GPTConfig.from_depth(int(match[1]), head_size))
    gpt.initialise(seed)
    return NanochatLanguageModel(gpt.to(device), reference, dtype, train)
