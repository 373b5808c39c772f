"""Inputs of the golden runs: 16 recordings, a tiny Whisper and a tiny language model.

Audio and weights come from integers (NumPy's legacy generator, whose streams are frozen), so they are the same on every
machine and with every version of every library.
"""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLIPS = 14
WORDS = ("red", "green", "blue", "one", "two", "three", "turn", "stop", "left", "right")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_inputs(folder: Path) -> None:
    """``corpus/clips.csv``, ``corpus/broken.csv`` (one more recording, which is cut short), ``whisper`` and ``lm``."""
    write_corpus(folder / "corpus")
    write_whisper(folder / "whisper")
    write_lm(folder / "lm")


def write_corpus(folder: Path) -> None:
    """14 clips of 0.4 to 2.9 s, one of them stereo at 8 kHz, and one of 31 s, which takes two windows."""
    folder.mkdir()
    random = np.random.RandomState(0)
    rows = ["audio,text,speaker,split"]
    for i in range(CLIPS + 1):
        seconds_16 = 31 * 16 if i == CLIPS else 7 + (i * 11) % 40
        rate, channels = (8_000, 2) if i == 3 else (16_000, 1)
        samples = _tone(random, rate * seconds_16 // 16 + 37 * i, channels)
        with wave.open(str(folder / f"clip {i:02d}.wav"), "wb") as file:
            file.setparams((channels, 2, rate, 0, "NONE", ""))
            file.writeframes(samples.astype("<i2").tobytes())
        text = " ".join(WORDS[j] for j in random.randint(0, len(WORDS), 1 + i % 5))
        rows.append(f"clip {i:02d}.wav,{text},speaker {i % 5},{'val' if i % 5 == 0 else 'train'}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    (folder / "cut.wav").write_bytes((folder / "clip 01.wav").read_bytes()[:-2000])
    (folder / "broken.csv").write_text("\n".join([*rows, "cut.wav,too short,speaker 1,train"]) + "\n")


def _tone(random: np.random.RandomState, length: int, channels: int) -> np.ndarray:
    """A triangle wave with noise, int64 [samples, channels] within int16."""
    period = random.randint(40, 160)
    triangle = np.abs(np.arange(length) % period * 2 - period) * (8000 // period)
    return triangle[:, None] + random.randint(-2000, 2001, (length, channels))


class _Weights:
    """Named float32 arrays whose values are multiples of 2^-12, so float16 and bfloat16 hold most of them exactly."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, name: str, *shape: int, around: float = 0.0) -> None:
        values = self._random.randint(-1000, 1001, shape) / 4096 + around
        self.tensors[name] = values.astype(np.float32)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        if bias:
            self.add(f"{name}.bias", outputs)

    def norm(self, name: str, width: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", width, around=1.0)
        if bias:
            self.add(f"{name}.bias", width)

    def write(self, folder: Path, config: dict[str, object]) -> None:
        folder.mkdir()
        save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))


def write_whisper(folder: Path) -> None:
    """Write the encoder of a Whisper: width 32, 2 layers, 80 mels, windows of 30 s."""
    weights, width = _Weights(1), 32
    weights.add("model.encoder.conv1.weight", width, 80, 3)
    weights.add("model.encoder.conv1.bias", width)
    weights.add("model.encoder.conv2.weight", width, width, 3)
    weights.add("model.encoder.conv2.bias", width)
    weights.add("model.encoder.embed_positions.weight", 1500, width)
    for i in range(2):
        layer = f"model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{layer}.self_attn.{name}", width, width, bias=name != "k_proj")
        weights.norm(f"{layer}.self_attn_layer_norm", width)
        weights.linear(f"{layer}.fc1", 2 * width, width)
        weights.linear(f"{layer}.fc2", width, 2 * width)
        weights.norm(f"{layer}.final_layer_norm", width)
    weights.norm("model.encoder.layer_norm", width)
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "activation_function": "gelu",
        "d_model": width,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * width,
        "encoder_layers": 2,
        "num_mel_bins": 80,
    }
    weights.write(folder, config)
    preprocessor = {"feature_size": 80, "n_fft": 400, "hop_length": 160, "chunk_length": 30, "sampling_rate": 16_000}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def write_lm(folder: Path) -> None:
    """Write a Llama of width 32 with 2 layers, and a tokenizer of 3 special tokens and 256 bytes."""
    weights, width, vocabulary = _Weights(2), 32, 259
    weights.add("model.embed_tokens.weight", vocabulary, width)
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, outputs in (("q_proj", width), ("k_proj", width // 2), ("v_proj", width // 2), ("o_proj", width)):
            weights.linear(f"{layer}.self_attn.{name}", outputs, width, bias=False)
        weights.linear(f"{layer}.mlp.gate_proj", 2 * width, width, bias=False)
        weights.linear(f"{layer}.mlp.up_proj", 2 * width, width, bias=False)
        weights.linear(f"{layer}.mlp.down_proj", width, 2 * width, bias=False)
        weights.norm(f"{layer}.input_layernorm", width, bias=False)
        weights.norm(f"{layer}.post_attention_layernorm", width, bias=False)
    weights.norm("model.norm", width, bias=False)
    weights.linear("lm_head", vocabulary, width, bias=False)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    weights.write(folder, config)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": special[0],
        "bos_token": special[1],
        "eos_token": special[2],
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
