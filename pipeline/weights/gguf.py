"""Convert a GGUF Llama to a transformers folder (config, safetensors, tokenizer, chat template).

Reads one ``.gguf`` file of architecture ``llama`` with a byte-level BPE vocabulary (SmolLM2), and writes a folder that
``AutoModelForCausalLM`` and ``AutoTokenizer`` read. Used by :mod:`pipeline.weights.wheels`. The GGUF reader of
transformers returns the same values but is slower, and its result cannot be saved.

Values are dequantized in float32 and stored as float16 (270 MB for SmolLM2-135M instead of 540 MB). Rounding to float16
changes a value by at most 1 part in 2048, while 4-bit quantization has already changed it by a few percent. bfloat16
would have the same size and an error eight times as large.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN_TYPE = 3  # token type of special tokens


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k, [heads * d, width]: interleaved rotary pairs become rotated halves."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama_name(name: str) -> str:
    """Return transformers' name of a GGUF tensor.

    Example: ``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``.

    Raises:
        KeyError: The tensor is unknown.
    """
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{TENSOR_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def llama_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Build ``config.json`` from the ``llama.*`` and ``tokenizer.ggml.*`` fields of a GGUF file."""
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 10),  # a float32 1e-05
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write ``tokenizer.json`` (byte-level BPE with single digits, llama.cpp's ``smollm``) and its config.

    Raises:
        ValueError: The tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, pre_tokenizer = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (model, pre_tokenizer) != ("gpt2", "smollm"):
        raise ValueError(f"expected a gpt2/smollm tokenizer, got {model}/{pre_tokenizer}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def convert_llama(source: Path, folder: Path) -> None:
    """Convert the GGUF file ``source`` and write its transformers folder into ``folder``.

    Raises:
        ValueError, KeyError: ``source`` is not a GGUF file of architecture llama with a smollm vocabulary.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"expected the architecture llama, got {fields['general.architecture']}")
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = unpermute(values, heads[part])
        tensors[llama_name(tensor.name)] = np.ascontiguousarray(values, np.float16)
    config = llama_config(fields, tied="lm_head.weight" not in tensors)
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(fields, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
