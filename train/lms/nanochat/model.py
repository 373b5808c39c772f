"""nanochat behind the questions of a run.

In: ``nanochat:d6`` (a depth; random initialisation from a seed) or ``nanochat:FOLDER`` (a checkpoint, see
``checkpoint.py``). Out: a ``LanguageModel`` over ``gpt.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from shards.errors import UserError
from train.config.model import LmConfig
from train.lms.base import LanguageModel, Tokenizer
from train.lms.nanochat.checkpoint import find_model, load_gpt, read_config
from train.lms.nanochat.config import GPTConfig
from train.lms.nanochat.gpt import GPT
from train.lms.nanochat.layers import norm
from train.lms.nanochat.tokenizers import ByteTokenizer, TiktokenTokenizer, find_tokenizer, read_encoding
from train.lms.packing import Ids, PackedInputs, pack_inputs

_REFERENCE = re.compile(r"nanochat:d([1-9]\d?)(?:-h(\d+))?")


class NanochatLanguageModel(LanguageModel):
    """``GPT`` and a tokenizer behind what a run asks of a language model."""

    def __init__(
        self, gpt: GPT, tokenizer: Tokenizer, reference: str, identity: str, dtype: torch.dtype, train: bool
    ) -> None:
        super().__init__()
        self.gpt, self.tokenizer = gpt, tokenizer
        self.reference, self.identity, self.dtype = reference, identity, dtype
        self.vocab_size = gpt.config.vocab_size
        self.width, self.embedding_rms = gpt.config.n_embd, 1.0  # embeddings and audio are RMS-normed on entry
        self.trainable = train
        for name, parameter in gpt.named_parameters():
            parameter.requires_grad_(train and name not in gpt.missing_parameters)
        self.train(train)

    def hidden(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        hidden: Tensor = self.gpt(packed, soft_ND, self.dtype)
        return hidden

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.gpt.head(hidden_ND)

    def embed(self, ids: Tensor) -> Tensor:
        return norm(self.gpt.transformer.wte(ids).to(self.dtype))

    def to_input_embeddings(self, soft: Tensor) -> Tensor:
        return norm(soft)

    @torch.no_grad()
    def generate(
        self,
        soft: Tensor,
        soft_mask: Tensor,
        prefix: Ids,
        suffix: Ids,
        max_new_tokens: int,
        on_token: Callable[[list[int]], None] = lambda tokens: None,
    ) -> list[list[int]]:
        """Greedy, batched, with a KV cache: audio and prompt once, then one position a step; eos is not returned."""
        packed = pack_inputs(soft_mask.sum(1), prefix, suffix)
        batch, width = packed.ids.shape
        cache = self.gpt.new_cache(batch, width + max_new_tokens, self.dtype)
        hidden = self.gpt(packed, soft[soft_mask], self.dtype, cache)
        hidden = hidden[torch.arange(batch, device=hidden.device), packed.last_positions]
        done = torch.zeros(batch, dtype=torch.bool, device=hidden.device)
        steps: list[Tensor] = []
        while len(steps) < max_new_tokens:
            chosen = self.logits(hidden).argmax(-1).masked_fill(done, self.tokenizer.eos)
            steps.append(chosen)
            on_token(chosen.tolist())
            done |= chosen == self.tokenizer.eos
            if bool(done.all()):
                break
            hidden = self.gpt.decode_step(chosen, cache, self.dtype)
        columns = torch.stack(steps, 1).tolist() if steps else [[] for _ in prefix]
        return [ids[: ids.index(self.tokenizer.eos)] if self.tokenizer.eos in ids else ids for ids in columns]


def tensors_sha256(gpt: GPT) -> str:
    """Hex digest over configuration, names and float32 values: equal weights, equal digest."""
    digest = hashlib.sha256(repr(sorted(asdict(gpt.config).items())).encode())
    for name, tensor in sorted(gpt.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_nanochat(
    reference: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    train: bool,
    seed: int,
    options: LmConfig | None = None,
) -> NanochatLanguageModel:
    """``nanochat:d<depth>`` at random initialisation (heads of 64 as in the W1 smoke, or ``nanochat:d6-h128``), or the
    checkpoint at ``nanochat:FOLDER``. A frozen checkpoint's matrices are held in ``dtype``.

    Raises:
        UserError: the reference is of neither form, or the checkpoint cannot be read (see ``checkpoint.py``).
    """
    options = options or LmConfig()
    if options.lora or options.bits or options.compile:
        raise UserError(f"'{reference}': lm.lora, lm.bits and lm.compile are for Hugging Face models alone")
    match = _REFERENCE.fullmatch(reference)
    place = Path(reference.removeprefix("nanochat:")).expanduser()
    tokenizer: ByteTokenizer | TiktokenTokenizer
    if match is None and place.exists():
        path = find_model(place)
        gpt, tokenizer = load_gpt(path), _tokenizer(path, reference)
        if tokenizer.vocab_size != gpt.config.vocab_size:
            raise UserError(
                f"the tokenizer of '{reference}' knows {tokenizer.vocab_size} tokens, its model "
                f"{gpt.config.vocab_size}: put the tokenizer.pkl that it was trained with beside {path.name}"
            )
        with path.open("rb") as file:
            identity = f"nanochat-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        if not train:
            for parameter in gpt.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.to(dtype)
    else:
        head_size = int(match[2] or 64) if match else 0
        if not match or head_size % 2 or head_size < 8:
            raise UserError(
                f"'{reference}' names no nanochat: write nanochat:d<depth>, such as nanochat:d6, nanochat:d6-h128 for "
                "another (even) head size, or nanochat:FOLDER for a checkpoint"
            )
        gpt, tokenizer = GPT(GPTConfig.from_depth(int(match[1]), head_size)), ByteTokenizer()
        gpt.init_weights(seed)
        identity = f"nanochat-{tensors_sha256(gpt)[:16]}"
    gpt.audio_value_embedding, gpt.bos = options.audio_value_embedding, tokenizer.bos or 0
    gpt.gradient_checkpointing = options.gradient_checkpointing
    return NanochatLanguageModel(gpt.to(device), tokenizer, reference, identity, dtype, train)


def _tokenizer(path: Path, reference: str) -> ByteTokenizer | TiktokenTokenizer:
    """The tokenizer of the model at ``path``: its pickle, or bytes where the vocabulary is that of bytes."""
    found = find_tokenizer(path)
    if found is not None:
        chat = path.resolve().parent.parent.name.startswith("chat")  # chatsft_checkpoints, chatrl_checkpoints
        return TiktokenTokenizer(read_encoding(found), chat, reference)
    if read_config(path).vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise UserError(f"'{reference}' has no tokenizer.pkl: copy it from nanochat's tokenizer/ to beside {path.name}")
