"""A tiny Whisper with random weights as a transformers folder, for tests that need any encoder: 20 ms per clip.

``write_tiny_whisper(folder)`` needs torch and transformers; it is deterministic for a seed.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_tiny_whisper(
    folder: Path, *, seed: int = 0, n_mels: int = 80, dtype: str = "float32", whole: bool = True
) -> Path:
    """Write config, safetensors and preprocessor of a Whisper (width 32, 2 + 1 layers, 30 s windows) into ``folder``.

    With ``whole``, tensor names are those of ``WhisperForConditionalGeneration``, else of ``WhisperModel``. The weights
    are float16 values in every ``dtype``.
    """
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=n_mels,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():  # wider than the default 0.02, which leaves attention nearly uniform
                parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).half())
    part = (model if whole else model.model).to(getattr(torch, dtype))
    part.save_pretrained(folder)
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": n_mels,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "padding_value": 0.0,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
