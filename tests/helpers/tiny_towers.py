"""Tiny models with an audio encoder inside, with random weights, as transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLASSES = {
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "glmasr": "GlmAsrForConditionalGeneration",
    "moonshine": "MoonshineForConditionalGeneration",
    "parakeet_ctc": "ParakeetForCTC",
    "parakeet_rnnt": "ParakeetForRNNT",
    "parakeet_tdt": "ParakeetForTDT",
}
FAMILIES = list(CLASSES)
WHISPER = {"num_mel_bins": 80, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 1, "head_dim": 16}


def write_tiny_tower(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a whole model of ``family``, one of ``FAMILIES``: its encoder has width 32 and 2 layers."""
    import torch
    import transformers as hf

    configs: dict[str, Any] = {
        "qwen2_audio": lambda: hf.Qwen2AudioConfig(audio_config=WHISPER, text_config={"model_type": "qwen2", **TEXT}),
        "voxtral": lambda: hf.VoxtralConfig(
            audio_config={**SMALL, "num_mel_bins": 80}, text_config={"model_type": "llama", **TEXT}
        ),
        "audioflamingo3": lambda: hf.AudioFlamingo3Config(
            audio_config={**SMALL, "num_mel_bins": 80}, text_config={"model_type": "qwen2", **TEXT}
        ),
        "glmasr": lambda: hf.GlmAsrConfig(
            audio_config={**SMALL, "num_mel_bins": 80}, text_config={"model_type": "llama", **TEXT}
        ),
        "moonshine": lambda: hf.MoonshineConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
        ),
        "parakeet_ctc": lambda: hf.ParakeetCTCConfig(
            vocab_size=64, encoder_config={**SMALL, "subsampling_conv_channels": 16}, pad_token_id=63
        ),
        "parakeet_rnnt": lambda: hf.ParakeetRNNTConfig(
            vocab_size=64, encoder_config={**SMALL, "subsampling_conv_channels": 16}, pad_token_id=2,
            blank_token_id=63, decoder_hidden_size=16, num_decoder_layers=1,
        ),
        "parakeet_tdt": lambda: hf.ParakeetTDTConfig(
            vocab_size=64, encoder_config={**SMALL, "subsampling_conv_channels": 16}, pad_token_id=2,
            blank_token_id=63, decoder_hidden_size=16, num_decoder_layers=1,
        ),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(hf, CLASSES[family])(configs[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    if family == "moonshine":
        hf.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    elif family.startswith("parakeet"):
        hf.ParakeetFeatureExtractor().save_pretrained(folder)
    else:
        hf.WhisperFeatureExtractor().save_pretrained(folder)
    return folder
