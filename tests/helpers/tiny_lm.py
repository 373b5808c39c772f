"""A transformers folder with a tiny random causal LM and a byte-level tokenizer of 259 ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_tokenizer(folder: Path, *, chat: bool = True, eos: str | None = "<|im_end|>") -> None:
    """Ids: 0 pad, 1 <|im_start|> (bos), 2 <|im_end|> (eos), then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", pad_token="<|pad|>", **({"eos_token": eos} if eos else {})
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)


def save_tiny_lm(folder: Path, *, seed: int = 0, model: Any = None, **tokenizer: Any) -> Path:
    """A LlamaForCausalLM (2 layers, width 32, 259 ids) or ``model``, with its tokenizer, in ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=259,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    initializer_range=0.2,
                    bos_token_id=1,
                    eos_token_id=2,
                    pad_token_id=0,
                )
            )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder, **tokenizer)
    return folder
