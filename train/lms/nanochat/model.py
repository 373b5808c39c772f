"""nanochat's GPT as a ``LanguageModel``.

The reference is ``nanochat:d6`` (a depth; random weights from a seed) or ``nanochat:FOLDER`` (a checkpoint, see
``checkpoint.py``).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from shards.errors import UserError
from train.config.model import LmConfig
from train.lms.base import Decoding, LanguageModel, Tokenizer
from train.lms.nanochat.checkpoint import find_model, load_gpt, read_config
from train.lms.nanochat.config import GPTConfig
from train.lms.nanochat.gpt import GPT
from train.lms.nanochat.layers import norm
from train.lms.nanochat.tokenizers import ByteTokenizer, TiktokenTokenizer, find_tokenizer, read_encoding
from train.lms.packing import Ids, PackedInputs, pack_inputs, valid_soft

_REFERENCE = re.compile(r"nanochat:d([1-9]\d?)(?:-h(\d+))?")


class NanochatLanguageModel(LanguageModel):
    """A ``GPT`` and its tokenizer; load it with ``load_nanochat``."""

    def __init__(
        self, gpt: GPT, tokenizer: Tokenizer, reference: str, identity: str, dtype: torch.dtype, train: bool
    ) -> None:
        super().__init__()
        self.gpt, self.tokenizer = gpt, tokenizer
        self.reference, self.identity, self.dtype = reference, identity, dtype
        self.files: dict[str, str] = {}  # ``identity`` covers the weights; ids are compared themselves
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

    def decoding(self, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids, max_new_tokens: int) -> Decoding:
        """As ``LanguageModel.decoding``, with a KV cache."""
        packed = pack_inputs(soft_mask.sum(1), prefix, suffix, device=self.device)
        return _CachedRows(self, packed, valid_soft(soft, soft_mask), packed.ids.shape[1] + max_new_tokens)


class _CachedRows(Decoding):
    """Rows with a KV cache of ``positions`` positions."""

    def __init__(self, lm: NanochatLanguageModel, packed: PackedInputs, soft_ND: Tensor, positions: int) -> None:
        self._lm, self._cache = lm, lm.gpt.new_cache(len(packed.ids), positions, lm.dtype)
        hidden = lm.gpt(packed, soft_ND, lm.dtype, self._cache)
        self.logits = lm.logits(hidden[torch.arange(len(hidden), device=hidden.device), packed.last_positions])

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        if parents is not None:
            self._cache.reorder(parents)
        self.logits = self._lm.logits(self._lm.gpt.decode_step(tokens, self._cache, self._lm.dtype))


def tensors_sha256(gpt: GPT) -> str:
    """Return the hex digest of configuration, names and float32 values: equal weights have equal digests."""
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
    """Load ``nanochat:d<depth>`` or ``nanochat:FOLDER``.

    Args:
        reference: ``nanochat:d<depth>`` has random weights and heads of size 64 as in the W1 smoke run, or of another
            size as in ``nanochat:d6-h128``; ``nanochat:FOLDER`` is a checkpoint.
        device: device of the weights.
        dtype: dtype of the activations, and of the matrices of a frozen checkpoint.
        train: train the weights, which are then float32; otherwise they are frozen.
        seed: seed of random weights.
        options: ``audio_value_embedding`` and ``gradient_checkpointing`` are read.

    Raises:
        UserError: the reference is invalid, the checkpoint cannot be read (see ``checkpoint.py``), or ``options`` sets
            what only Hugging Face models support.
    """
    options = options or LmConfig()
    if options.lora or options.bits or options.compile or options.padding_free or options.shard:
        only = "lm.lora, lm.bits, lm.compile, lm.padding_free and lm.shard are only for Hugging Face models"
        raise UserError(f"'{reference}': {only}")
    match = _REFERENCE.fullmatch(reference)
    place = Path(reference.removeprefix("nanochat:")).expanduser()
    tokenizer: ByteTokenizer | TiktokenTokenizer
    if match is None and place.exists():
        path = find_model(place)
        gpt, tokenizer = load_gpt(path), _tokenizer(path, reference)
        if tokenizer.vocab_size != gpt.config.vocab_size:
            raise UserError(
                f"the tokenizer of '{reference}' has {tokenizer.vocab_size} tokens, its model "
                f"{gpt.config.vocab_size}: put the tokenizer.pkl that it was trained with next to {path.name}"
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
                f"'{reference}' is not a nanochat model: write nanochat:d<depth>, such as nanochat:d6, "
                "nanochat:d6-h128 for another (even) head size, or nanochat:FOLDER for an existing checkpoint"
            )
        gpt, tokenizer = GPT(GPTConfig.from_depth(int(match[1]), head_size)), ByteTokenizer()
        gpt.init_weights(seed)
        identity = f"nanochat-{tensors_sha256(gpt)[:16]}"
    gpt.audio_value_embedding, gpt.bos = options.audio_value_embedding, tokenizer.bos or 0
    gpt.gradient_checkpointing = options.gradient_checkpointing
    return NanochatLanguageModel(gpt.to(device), tokenizer, reference, identity, dtype, train)


def _tokenizer(path: Path, reference: str) -> ByteTokenizer | TiktokenTokenizer:
    """Load the tokenizer of the model at ``path``: its pickle, or bytes if the vocabulary has that size."""
    found = find_tokenizer(path)
    if found is not None:
        chat = path.resolve().parent.parent.name.startswith("chat")  # chatsft_checkpoints, chatrl_checkpoints
        return TiktokenTokenizer(read_encoding(found), chat, reference)
    if read_config(path).vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise UserError(f"'{reference}' has no tokenizer.pkl: copy it from nanochat's tokenizer/ next to {path.name}")
