"""Hugging Face causal LMs that take ``inputs_embeds``, loaded from a local folder.

The folder holds config, safetensors and tokenizer in the format of transformers; this module does not access a hub.
Rows are padded on the right for losses: causal attention never reads what follows a row, so no mask and no position ids
are needed. With ``padding_free`` they are joined to one row instead (``padding_free.py``). Generation pads on the left,
with a mask and position ids, and uses a KV cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.weights.pretrained import forbid_hub_kernels, load_pretrained
from shards.errors import UserError
from train.config.model import LmConfig
from train.distributed.device import all_to_device
from train.distributed.group import ProcessGroup
from train.lms.base import Decoding, LanguageModel, LmRequest
from train.lms.hf.adapters import add_lora, disable_bf16_packing, enable_gradient_checkpointing, quantization_config
from train.lms.hf.masks import one_sequence_a_row
from train.lms.hf.padding_free import enable_padding_free
from train.lms.hf.scales import Scales, decoder, find_scales
from train.lms.hf.sharding import Shards, can_shard
from train.lms.packing import Ids, PackedInputs, pack_inputs, places, valid_soft

_ANSWER = "earshard answer"  # marks the end of an answer in a rendered chat
_CONFIG_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab"}
_F32_TOLERANCE, _BF16_TOLERANCE = 1e-3, 0.02  # of hidden states, relative to the largest
_EMBEDDING_ROWS = 8192  # rows embedded at a time to compute their RMS: bounds memory for a vocabulary of 150,000


class HfTokenizer:
    """A transformers tokenizer with the interface of ``train.lms.base.Tokenizer``.

    ``ends`` are the tokenizer's end-of-sequence token and those that ``generation_config.json`` names, as in
    transformers' ``generate``.

    Raises:
        UserError: there is no such token.
    """

    def __init__(self, tokenizer: Any, reference: str, generation_ends: Sequence[int] = ()) -> None:
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        ends = [*own, *generation_ends]
        if not ends:
            raise UserError(
                f"neither the tokenizer nor generation_config.json of '{reference}' has an end-of-sequence token, so "
                "decoding would never stop: choose another lm.model"
            )
        self._tokenizer, self._reference = tokenizer, reference
        self.eos: int = ends[0]
        self.ends = frozenset(ends)
        self.bos: int | None = tokenizer.bos_token_id
        self.now = datetime.now()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return ids without added special tokens; those in ``text`` are recognized only with ``special``."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def chat(self, user: str) -> str:
        """Return the user turn ``user`` in the model's chat template, up to the start of the answer.

        Raises:
            UserError: the model has no chat template, or one that cannot write a user turn.
        """
        if not self._tokenizer.chat_template:
            raise UserError(f"'{self._reference}' has no chat template: set prompt.template to plain or slam")
        text, reason = self._render([("user", user)], add_generation_prompt=True)
        if not text:
            raise UserError(
                f"the chat template of '{self._reference}' cannot write a user turn ({reason}): set prompt.template to "
                "plain, slam or your own text"
            )
        return text

    def chat_end(self) -> int:
        """Return the first special token after an answer in the model's chat template; ``eos`` if there is none."""
        text, _ = self._render([("user", "question"), ("assistant", _ANSWER)])
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        after = self.encode(text.rpartition(_ANSWER)[2], special=True)
        return next((token for token in after if token in special), self.eos)

    def _render(self, turns: Sequence[tuple[str, str]], **options: Any) -> tuple[str, str]:
        """Return the turns (role, text) in the chat template, or "" and why it cannot write them.

        The content of a turn is text, or a list of parts for a template that takes only these. ``strftime_now`` of the
        template shows ``now``.
        """
        reason = "it leaves out the text"
        for parts in (False, True):
            chat = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns
            ]
            try:
                with _template_date(self.now):
                    found = str(self._tokenizer.apply_chat_template(chat, tokenize=False, **options))
            except Exception as error:  # a template raises what it likes
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
                continue
            if all(text.strip() in found for _, text in turns):
                return found, ""
        return "", reason


@contextmanager
def _template_date(now: datetime) -> Iterator[None]:
    """Make transformers' ``strftime_now`` return ``now``: it reads the clock, and takes no other from its caller."""
    from transformers.utils import chat_template_utils

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now

    library: Any = chat_template_utils
    clock = library.datetime
    library.datetime = Day
    try:
        yield
    finally:
        library.datetime = clock


class HfLanguageModel(LanguageModel):
    """A causal LM and its tokenizer; load it with ``load_hf``.

    Tokens pass through the model's embedding module and are multiplied by the factor of the model family
    (``scales.py``); soft tokens enter unchanged.

    Raises:
        UserError: the model computes its logits in a way that ``scales.py`` does not cover.
    """

    def __init__(self, model: Any, tokenizer: HfTokenizer, reference: str, identity: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.reference, self.identity, self.dtype = reference, identity, dtype
        self.files: dict[str, str] = {}
        self.trainable = any(parameter.requires_grad for parameter in model.parameters())
        self.width = model.get_input_embeddings().embedding_dim
        self.vocab_size = model.get_output_embeddings().out_features
        self._compiled: Callable[..., Any] | None = None
        self._shards: Shards | None = None
        self._scales = self._find_scales()
        self._has_cache = self._find_cache()
        self.max_positions, self.learned_positions = find_positions(model)
        self.embedding_rms = self._embedding_rms()

    def hidden(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        joined = packed.joined
        keys = {} if joined is None else {"joined": joined, "position_ids": joined.position_ids}
        with self._autocast(), one_sequence_a_row():
            out = (self._compiled or decoder(self.model))(
                inputs_embeds=self._embed_inputs(packed, soft_ND), use_cache=False, **keys
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with self._autocast():
            product: Tensor = self.model.get_output_embeddings()(hidden_ND)
        return self._scales.to_logits(product)

    def embed(self, ids: Tensor) -> Tensor:
        return self._embed_ids(ids).to(self.dtype)

    @torch.no_grad()
    def candidate_nll(self, soft_SD: Tensor, prefix: Sequence[int], suffix: Sequence[int], candidates: Ids) -> Tensor:
        """As ``LanguageModel.candidate_nll``, without gradient.

        Soft tokens and prompt are computed once; their keys and values are repeated for the candidates.
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        packed = pack_inputs(torch.tensor([len(soft_SD)]), [prefix], [suffix], device=self.device)
        with self._autocast(), one_sequence_a_row():
            read = decoder(self.model)(inputs_embeds=self._embed_inputs(packed, soft_SD), use_cache=True)
        cache: Any = getattr(read, "past_key_values", None)
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if not all(type(layer) in plain for layer in getattr(cache, "layers", [None])):
            return super().candidate_nll(soft_SD, prefix, suffix, candidates)  # a recurrent or family-specific cache
        cache.batch_repeat_interleave(len(candidates))
        targets = pad_sequence([torch.tensor(ids) for ids in candidates], batch_first=True)
        target_mask = torch.arange(targets.shape[1]) < torch.tensor([len(ids) for ids in candidates])[:, None]
        index, wanted, targets = all_to_device([places(target_mask), targets[target_mask], targets], self.device)
        states = read.last_hidden_state[:, -1:].expand(len(candidates), -1, -1)  # predicts the first token of each
        if targets.shape[1] > 1:
            with self._autocast(), one_sequence_a_row():
                rest = decoder(self.model)(
                    inputs_embeds=self._embed_ids(targets[:, :-1]), past_key_values=cache, use_cache=True
                )
            states = torch.cat([states, rest.last_hidden_state], 1)  # right padding, which no target attends to
        nll_N = self._token_nll(states.flatten(0, 1).index_select(0, index), wanted)
        return nll_N.new_zeros(targets.numel()).index_copy(0, index, nll_N).view(targets.shape).sum(1)

    def decoding(self, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids, max_new_tokens: int) -> Decoding:
        """As ``LanguageModel.decoding``, with a KV cache if the model has one."""
        if not self._has_cache:
            return super().decoding(soft, soft_mask, prefix, suffix, max_new_tokens)
        packed = pack_inputs(soft_mask.sum(1), prefix, suffix, pad="left", device=self.device)
        return _CachedRows(self, packed, valid_soft(soft, soft_mask))

    def shard(self, device: torch.device) -> None:
        """Divide the layers among the processes of the run, and move the model to ``device``; see ``sharding.py``."""
        self._shards = Shards(self.model, decoder(self.model), self._embed_ids, device)

    def passes_together(self, group: ProcessGroup) -> AbstractContextManager[None]:
        return super().passes_together(group) if self._shards is None else self._shards.passes_together(group)

    def idle_request(self) -> LmRequest | None:
        return None if self._shards is None else self._shards.idle_request(self.width, self.dtype)

    def compile_forward(self) -> None:
        """Compile the forward pass of ``hidden`` with torch.compile, for dynamic shapes; generation is not compiled."""
        self._compiled = torch.compile(decoder(self.model).__call__, dynamic=True)

    @torch.no_grad()
    def enable_padding_free(self) -> None:
        """Compute losses without padding.

        Raises:
            UserError: the attention of the model does not keep joined rows apart.
        """
        ids = [[5, 6, 7, 8, 9], [6], [8, 5, 6]]
        rows: tuple[Tensor, Ids, Ids] = torch.zeros(len(ids), dtype=torch.int64), ids, [[]] * len(ids)
        soft = torch.empty(0, self.width, device=self.device, dtype=self.dtype)
        padded = pack_inputs(*rows, device=self.device)
        apart = self.hidden(padded, soft).flatten(0, 1).index_select(0, padded.text_index).float()
        reason = "its other layers, or their positions, do not keep rows apart"
        try:
            enable_padding_free(self.model)
            joined = self.hidden(pack_inputs(*rows, pad="none", device=self.device), soft)[0].float()
            tolerance = _BF16_TOLERANCE if self.dtype == torch.bfloat16 else _F32_TOLERANCE
            same = bool((joined - apart).abs().max() <= tolerance * apart.abs().max())
        except (ValueError, TypeError, RuntimeError) as error:
            same, reason = False, " ".join(str(error).split())[:200]
        if not same:
            raise UserError(
                f"lm.padding_free=true: '{self.reference}' cannot attend to rows without padding ({reason}): set "
                "lm.padding_free=false"
            )
        self.padding_free = True

    def _embed_ids(self, ids: Tensor) -> Tensor:
        """Map ids of any shape to their rows of ``inputs_embeds`` [..., D]."""
        rows: Tensor = self.model.get_input_embeddings()(ids)
        return rows if self._scales.embedding == 1 else rows * self._scales.embedding

    def _embed_inputs(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        x_BTD = self._embed_ids(packed.ids)
        x_ND = x_BTD.flatten(0, 1).index_copy(0, packed.soft_index, soft_ND.to(x_BTD.dtype))
        return x_ND.view(x_BTD.shape)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return autocast for float32 weights that train in a smaller dtype; frozen weights already have that dtype."""
        mixed = self.trainable and self.model.get_input_embeddings().weight.dtype != self.dtype
        return torch.autocast(self.device.type, dtype=self.dtype if mixed else torch.bfloat16, enabled=mixed)

    @torch.no_grad()
    def _embedding_rms(self) -> float:
        total, rows = 0.0, self.model.get_input_embeddings().num_embeddings
        for start in range(0, rows, _EMBEDDING_ROWS):
            ids = torch.arange(start, min(start + _EMBEDDING_ROWS, rows), device=self.device)
            total += float(self._embed_ids(ids).float().square().sum())
        return math.sqrt(total / (rows * self.width))

    @torch.no_grad()
    def _find_cache(self) -> bool:
        """Return whether the model returns a cache; Mamba, RWKV and RecurrentGemma keep their state elsewhere."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with self._autocast():
            out = decoder(self.model)(inputs_embeds=self._embed_ids(ids), use_cache=True)
        return getattr(out, "past_key_values", None) is not None

    def _find_scales(self) -> Scales:
        """Return the factors of the model family, or raise UserError if ``scales.py`` does not find them."""
        with self._autocast():
            scales = find_scales(self.model)
        if scales is None:
            raise UserError(
                f"'{self.reference}' ({type(self.model).__name__}) does not compute its logits from embeddings, layers "
                "and output matrix alone, and earshard does not support that yet: choose another lm.model"
            )
        return scales


class _CachedRows(Decoding):
    """Rows of a model with a KV cache, padded on the left."""

    def __init__(self, lm: HfLanguageModel, packed: PackedInputs, soft_ND: Tensor) -> None:
        self._lm = lm
        self._cache: Any = None  # transformers has a class for each family
        (self._mask,) = all_to_device([packed.valid.long()], lm.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._read(lm._embed_inputs(packed, soft_ND))

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        if parents is not None:
            self._cache.reorder_cache(parents)
            self._mask, self._positions = self._mask[parents], self._positions[parents]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
        self._read(self._lm._embed_ids(tokens[:, None]))

    def _read(self, inputs: Tensor) -> None:
        with self._lm._autocast(), one_sequence_a_row():
            out = decoder(self._lm.model)(
                inputs_embeds=inputs,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = out.past_key_values
        # [R, D]: a product with [R, 1, D], sliced from longer rows, would copy the output matrix R times on a CPU
        self.logits = self._lm.logits(out.last_hidden_state[:, -1])


def _attend_in_float32(model: Any) -> None:
    """Run the attention of a bfloat16 model in float32, which is faster and more accurate on a CPU.

    There, PyTorch's fused attention takes 2 to 3 × as long in bfloat16 for rows of 50 to 150 tokens. With SmolLM2 and
    batch size 8, forward and backward pass together take a quarter less time than with attention in bfloat16.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        out, _ = sdpa_attention_forward(module, q.float(), k.float(), v.float(), mask, **kwargs)
        return out.to(q.dtype), None

    if model.config._attn_implementation != "sdpa":  # not supported by the family, or disabled in its configuration
        return
    AttentionInterface.register("sdpa_float32", forward)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
    model.set_attn_implementation("sdpa_float32")


@contextmanager
def loading_errors(folder: Path, reference: str) -> Iterator[None]:
    """Turn what transformers raises for a folder that holds no causal LM into a :class:`UserError`."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"'{reference}' (folder {folder}) cannot be loaded as a causal language model: {reason}"
        ) from None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar for loading: it ends at once, and every process would show one."""
    from transformers.utils import logging as library

    logging: Any = library  # untyped functions
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def generation_ends(model: Any) -> list[int]:
    """Return the tokens with which transformers' ``generate`` ends a text, from the model's generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return [int(token) for token in (found if isinstance(found, list | tuple) else [found]) if token is not None]


def find_positions(model: Any) -> tuple[int | None, bool]:
    """Return the number of positions that ``model`` was made for (None: unknown), and whether each has an embedding."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    names = (name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, torch.nn.Embedding))
    learned = any(name == "wpe" or "position" in name for name in names)
    return (found if isinstance(found, int) and found > 0 else None), learned


def require_usable(model: Any, tokenizer: Any, reference: str) -> None:
    """Refuse a model whose embeddings do not cover the tokenizer, or whose weights are not finite.

    Raises:
        UserError: names the sizes, or the tensor.
    """
    rows, tokens = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > rows:
        raise UserError(
            f"the tokenizer of '{reference}' has {tokens} tokens and its embeddings only {rows}: put the tokenizer "
            "beside the model that it was trained with, or resize the model's embeddings"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach().sum(dtype=torch.float32))):
            raise UserError(f"'{reference}' holds NaN or infinite values in the tensor {name}: copy it again")


def hash_weights(folder: Path) -> str:
    """Return ``sha256:…`` over the safetensors files of ``folder``.

    A revision on a hub does not identify weights, because it can be a branch; a folder has none.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def hash_configs(folder: Path) -> dict[str, str]:
    """Return the sha256 of the files in ``folder`` that determine ids and the architecture, by their names."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix in _CONFIG_SUFFIXES]
    paths += folder.glob("*chat_templates/*.jinja")
    found = {}
    for path in sorted(paths):
        if not path.name.endswith(".index.json"):  # of the weights
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def load_hf(
    folder: Path,
    *,
    reference: str,
    identity: str,
    device: str | torch.device,
    dtype: torch.dtype,
    train: bool = False,
    seed: int = 0,
    options: LmConfig | None = None,
) -> HfLanguageModel:
    """Load the causal LM in the transformers folder ``folder``.

    Args:
        folder: config, safetensors and tokenizer.
        reference: the name of the model in errors and in the run's records.
        identity: the identity that a run records; see ``hash_weights``.
        device: device of the weights.
        dtype: dtype of activations and frozen weights.
        train: train all weights, which are then float32; otherwise they are frozen.
        seed: seed of the initial weights of LoRA adapters.
        options: ``compile``, ``bits``, ``lora``, ``gradient_checkpointing``, ``padding_free`` and ``shard`` are read;
            see ``adapters.py``, ``padding_free.py`` and ``sharding.py``.

    Raises:
        UserError: the folder holds no causal LM, its tokenizer has no end-of-sequence token, the model computes its
            logits in an unsupported way or does not support ``options``, or a package that these need is not installed.
    """
    options = options or LmConfig()
    target, divided = torch.device(device), options.shard and can_shard()
    device = "cpu" if divided else device  # a GPU may not hold the whole model
    loading: dict[str, Any] = {"dtype": torch.float32 if train else dtype}
    if options.bits is not None:
        loading |= {"quantization_config": quantization_config(options.bits, dtype), "device_map": {"": str(device)}}
    forbid_hub_kernels()  # before the first import of transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading_errors(folder, reference):
        with _no_progress_bar():
            model: Any = load_pretrained(AutoModelForCausalLM, folder, use_safetensors=True, **loading)
        tokenizer = load_pretrained(AutoTokenizer, folder)
    if options.bits is None:
        model.to(device)
    else:  # device_map placed it there, and quantized matrices cannot be moved
        disable_bf16_packing(model)
    require_usable(model, tokenizer, reference)
    model.requires_grad_(train).eval()
    if dtype == torch.bfloat16 and not train and target.type == "cpu":
        _attend_in_float32(model)
    if options.lora is not None:
        add_lora(model, options.lora, seed)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    lm = HfLanguageModel(model, HfTokenizer(tokenizer, reference, generation_ends(model)), reference, identity, dtype)
    lm.files = hash_configs(folder)
    lm.train(train)
    if options.padding_free:
        lm.enable_padding_free()
    if divided:
        lm.shard(target)
    if options.compile:
        lm.compile_forward()
    return lm
