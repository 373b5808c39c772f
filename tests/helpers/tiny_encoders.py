"""Tiny HuBERT, wav2vec 2.0, WavLM and w2v-BERT 2.0 with random weights as transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ["hubert", "wav2vec2", "wav2vec2-stable", "wavlm", "wav2vec2-bert"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 8}
CONVOLUTIONS = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def write_tiny(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a transformers folder of ``family``, one of ``FAMILIES``: width 32, 2 layers."""
    import torch
    import transformers as hf

    kind = family.removesuffix("-stable")
    names = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM", "wav2vec2-bert": "Wav2Vec2Bert"}
    more: dict[str, Any] = {} if kind == "wav2vec2-bert" else dict(CONVOLUTIONS)
    if family.endswith("-stable"):
        more |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    config = getattr(hf, f"{names[kind]}Config")(**SMALL, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(hf, f"{names[kind]}Model")(config).save_pretrained(folder)
    extractor = hf.SeamlessM4TFeatureExtractor() if kind == "wav2vec2-bert" else hf.Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Any:
    """Return the encoder of a folder, on the CPU in float32 unless ``settings`` say otherwise."""
    from pipeline.encoders.load import load_encoder
    from pipeline.weights.resolve import Weights

    return load_encoder(Weights(folder, f"path:{folder}", ""), **{"device": "cpu", "dtype": "float32", **settings})


def noise(*samples: int) -> list[np.ndarray]:
    """Return clips of noise of these lengths."""
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in samples]
