"""Tiny Mimi, EnCodec and DAC models with random weights, and a tiny MERT, as transformers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = ["mimi", "encodec", "dac"]
CODEBOOK = {"codebook_size": 16, "codebook_dim": 8}


def write_tiny_codec(folder: Path, family: str, seed: int = 0, **more: Any) -> Path:
    """Write a codec of ``family``, one of ``FAMILIES``; ``more`` are keys of its config.

    Mimi has 4 codebooks at 12.5 Hz, EnCodec 4 at 75 Hz (2 at its lowest bandwidth), DAC 3 at 50 Hz.
    """
    import torch
    import transformers as hf

    configs: dict[str, Any] = {
        "mimi": lambda: hf.MimiConfig(
            **{**CODEBOOK, "hidden_size": 32, "num_filters": 4, "num_hidden_layers": 1, "intermediate_size": 32,
               "num_attention_heads": 2, "num_key_value_heads": 2, "vector_quantization_hidden_dimension": 8,
               "num_quantizers": 4, "upsample_groups": 32, "sliding_window": 20, **more}
        ),
        "encodec": lambda: hf.EncodecConfig(
            **{"codebook_size": 16, "num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1,
               "target_bandwidths": [0.6, 1.2], **more}
        ),
        "dac": lambda: hf.DacConfig(
            **{**CODEBOOK, "encoder_hidden_size": 4, "decoder_hidden_size": 16, "n_codebooks": 3,
               "downsampling_ratios": [2, 4, 5, 8], **more}
        ),
    }  # fmt: skip
    names = {"mimi": "MimiModel", "encodec": "EncodecModel", "dac": "DacModel"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(hf, names[family])(configs[family]()).eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("embed_sum", "codebook.weight")):  # of zeros, until they are trained
                    tensor.normal_()
            if family == "encodec":  # codebooks among what the encoder returns
                frames = model.encoder(torch.randn(1, model.config.audio_channels, 32_000) / 10)
                for layer in model.quantizer.layers:
                    layer.codebook.embed.copy_(frames[0].T[torch.randperm(frames.shape[2])[:16]])
                    frames = frames - layer.decode(layer.encode(frames))
    model.save_pretrained(folder)
    rate = model.config.sampling_rate
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": rate, "feature_size": 1}))
    return folder


def codes_of_transformers(folder: Path, clip: Any, codebooks: int | None = None) -> Any:
    """Return what transformers' own ``encode`` makes of a clip at the codec's rate: int64 [frames, codebooks]."""
    import torch
    import transformers as hf

    model = hf.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    kind = model.config.model_type
    extractor = hf.DacFeatureExtractor if kind == "dac" else hf.EncodecFeatureExtractor
    rate = model.config.sampling_rate
    more = {"hop_length": model.config.hop_length} if kind == "dac" else {}
    values = extractor(sampling_rate=rate, **more)(clip, sampling_rate=rate, return_tensors="pt")["input_values"]
    with torch.inference_mode():
        if kind == "encodec":
            found = model.encode(values, bandwidth={None: 0.6, 2: 0.6, 4: 1.2}[codebooks]).audio_codes[0]
        else:
            found = model.encode(
                values, **{"n_quantizers" if kind == "dac" else "num_quantizers": codebooks}
            ).audio_codes
    return found[0].T.numpy()
