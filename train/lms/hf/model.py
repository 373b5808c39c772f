"""Any Hugging Face causal LM that takes ``inputs_embeds``, from a local folder.

In: a transformers folder (config, safetensors, tokenizer). Out: a ``LanguageModel``. Nothing here asks a hub.
Rows are padded on the right for nats: under causal attention what follows a row cannot reach it, so no mask is needed
and positions are natural. Generation pads on the left, with a mask and position ids, and keeps a KV cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.errors import UserError
from train.config.model import LmConfig
from train.lms.base import LanguageModel
from train.lms.hf.adapters import add_lora, disable_bf16_packing, enable_gradient_checkpointing, quantization_config
from train.lms.hf.scales import Scales, find_scales
from train.lms.packing import Ids, PackedInputs, pack_inputs

_EMBEDDING_ROWS = 8192  # rows embedded at a time when their RMS is taken: a 150k vocabulary must not blow memory


class HfTokenizer:
    """A transformers tokenizer behind the four things a run asks for."""

    def __init__(self, tokenizer: Any, reference: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of '{reference}' has no end-of-text token, so its answers would never end")
        self._tokenizer, self._reference = tokenizer, reference
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids without added special tokens; those written in ``text`` count only with ``special``."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens leave no trace."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def chat(self, user: str) -> str:
        """The user turn ``user`` in the model's chat template, up to where the answer begins."""
        if not self._tokenizer.chat_template:
            raise UserError(f"'{self._reference}' has no chat template: set prompt.template to plain or slam")
        turn = [{"role": "user", "content": user}]
        return str(self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


class HfLanguageModel(LanguageModel):
    """A causal LM and its tokenizer; build it with ``load_hf``.

    Tokens pass through the model's own embedding module and what its family multiplies them by (``scales.py``); soft
    tokens are put beside them as they are.
    """

    def __init__(self, model: Any, tokenizer: HfTokenizer, reference: str, identity: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.reference, self.identity, self.dtype = reference, identity, dtype
        self.trainable = any(parameter.requires_grad for parameter in model.parameters())
        self.width = model.get_input_embeddings().embedding_dim
        self.vocab_size = model.get_output_embeddings().out_features
        self._compiled: Callable[..., Any] | None = None
        self._scales = self._find_scales()
        self.embedding_rms = self._embedding_rms()

    def hidden(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        with self._autocast():
            out = (self._compiled or self.model.base_model)(
                inputs_embeds=self._embed_inputs(packed, soft_ND), use_cache=False
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
        """Audio and prompt pass once; their keys and values are repeated under the candidates. No gradient."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        packed = pack_inputs(torch.tensor([len(soft_SD)], device=self.device), [prefix], [suffix])
        with self._autocast():
            read = self.model.base_model(inputs_embeds=self._embed_inputs(packed, soft_SD), use_cache=True)
        cache = read.past_key_values
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if not all(type(layer) in plain for layer in getattr(cache, "layers", [None])):
            return super().candidate_nll(soft_SD, prefix, suffix, candidates)  # a recurrent state, or a family's own
        cache.batch_repeat_interleave(len(candidates))
        targets = pad_sequence([torch.tensor(ids) for ids in candidates], batch_first=True).to(self.device)
        lengths = torch.tensor([len(ids) for ids in candidates], device=self.device)
        states = read.last_hidden_state[:, -1:].expand(len(candidates), -1, -1)  # predicts the first token of each
        if targets.shape[1] > 1:
            with self._autocast():
                rest = self.model.base_model(
                    inputs_embeds=self._embed_ids(targets[:, :-1]), past_key_values=cache, use_cache=True
                )
            states = torch.cat([states, rest.last_hidden_state], 1)  # padding stands behind, where nothing looks back
        target_mask = torch.arange(targets.shape[1], device=self.device) < lengths[:, None]
        nll_N = self._token_nll(states[target_mask], targets[target_mask])
        return nll_N.new_zeros(target_mask.shape).masked_scatter(target_mask, nll_N).sum(1)

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
        """Greedy, batched, with a KV cache; eos ends a row and is not returned."""
        packed = pack_inputs(soft_mask.sum(1), prefix, suffix, pad="left")
        inputs, mask, cache = self._embed_inputs(packed, soft[soft_mask]), packed.valid.long(), None
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        steps: list[Tensor] = []
        done = torch.zeros(len(prefix), dtype=torch.bool, device=mask.device)
        for _ in range(max_new_tokens):
            with self._autocast():
                out = self.model.base_model(
                    inputs_embeds=inputs,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
            # [B, D]: a product of [B, 1, D], cut from longer rows, would copy the output matrix B times on a CPU
            chosen = self.logits(out.last_hidden_state[:, -1]).argmax(-1).masked_fill(done, self.tokenizer.eos)
            steps.append(chosen)
            on_token(chosen.tolist())
            done |= chosen == self.tokenizer.eos
            if bool(done.all()):
                break
            cache = out.past_key_values
            inputs = self._embed_ids(chosen[:, None])
            mask = torch.cat([mask, mask.new_ones(len(prefix), 1)], 1)
            positions = positions[:, -1:] + 1
        columns = torch.stack(steps, 1).tolist() if steps else [[] for _ in prefix]
        return [ids[: ids.index(self.tokenizer.eos)] if self.tokenizer.eos in ids else ids for ids in columns]

    def compile_forward(self) -> None:
        """From here on ``hidden`` runs through torch.compile, once for all shapes; generation stays as it is."""
        self._compiled = torch.compile(self.model.base_model.__call__, dynamic=True)

    def _embed_ids(self, ids: Tensor) -> Tensor:
        """Ids of any shape -> what stands for them in ``inputs_embeds`` [..., D]."""
        rows: Tensor = self.model.get_input_embeddings()(ids)
        return rows if self._scales.embedding == 1 else rows * self._scales.embedding

    def _embed_inputs(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        x_BTD = self._embed_ids(packed.ids)
        return x_BTD.masked_scatter(packed.is_soft[..., None], soft_ND.to(x_BTD.dtype))

    def _autocast(self) -> AbstractContextManager[Any]:
        """Float32 masters that train in a smaller dtype run under autocast; a frozen model simply is of that dtype."""
        mixed = self.trainable and self.model.get_input_embeddings().weight.dtype != self.dtype
        return torch.autocast(self.device.type, dtype=self.dtype if mixed else torch.bfloat16, enabled=mixed)

    @torch.no_grad()
    def _embedding_rms(self) -> float:
        total, rows = 0.0, self.model.get_input_embeddings().num_embeddings
        for start in range(0, rows, _EMBEDDING_ROWS):
            ids = torch.arange(start, min(start + _EMBEDDING_ROWS, rows), device=self.device)
            total += float(self._embed_ids(ids).float().square().sum())
        return math.sqrt(total / (rows * self.width))

    def _find_scales(self) -> Scales:
        """Refuse a family that does more around its layers than ``scales.py`` knows of."""
        with self._autocast():
            scales = find_scales(self.model)
        if scales is None:
            raise UserError(
                f"'{self.reference}' ({type(self.model).__name__}) does not make its logits from its embeddings, "
                "layers and output matrix alone, which earshard cannot read yet: choose another lm.model"
            )
        return scales


def _attend_in_float32(model: Any) -> None:
    """On a CPU, PyTorch's fused attention is slower in bfloat16 than in float32: 2 to 3 × for rows of 50 to 150 tokens.

    Measured with SmolLM2 and batch 8, forward and backward: a quarter less time than all in bfloat16, and exacter.
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

    if model.config._attn_implementation != "sdpa":  # the family cannot, or its configuration says otherwise
        return
    AttentionInterface.register("sdpa_float32", forward)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
    model.set_attn_implementation("sdpa_float32")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' bar over the tensors it reads: it is over at once, and every process would draw one."""
    from transformers.utils import logging as library

    logging: Any = library  # untyped functions
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def hash_weights(folder: Path) -> str:
    """``sha256:…`` over a folder's safetensors: a hub's revision can be a branch that moves, and a folder has none."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


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
    """The causal LM in the transformers folder ``folder``, frozen unless ``train`` (then with float32 masters).

    ``options`` tells ``compile``, ``bits``, ``lora`` (its start from ``seed``) and ``checkpointing``; see ``adapt.py``.

    Raises:
        UserError: the folder holds no causal LM, no end-of-text token, or a head that is not understood; or a library
            that ``options`` needs is not installed.
    """
    options = options or LmConfig()
    loading: dict[str, Any] = {"dtype": torch.float32 if train else dtype}
    if options.bits is not None:
        loading |= {"quantization_config": quantization_config(options.bits, dtype), "device_map": {"": str(device)}}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_progress_bar():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, **loading
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"'{reference}' (folder {folder}) cannot be read as a causal language model: {reason}"
        ) from None
    if options.bits is None:
        model.to(device)
    else:  # device_map has put it there, and packed matrices do not move
        disable_bf16_packing(model)
    model.requires_grad_(train).eval()
    if dtype == torch.bfloat16 and not train and model.device.type == "cpu":
        _attend_in_float32(model)
    if options.lora is not None:
        add_lora(model, options.lora, seed)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    lm = HfLanguageModel(model, HfTokenizer(tokenizer, reference), reference, identity, dtype)
    lm.train(train)
    if options.compile:
        lm.compile_forward()
    return lm
