"""MERT: a HuBERT at 24 kHz whose hub has code of its own, which is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from extraction import only_cache, words, write_corpus
from safetensors.torch import load_file, save_file
from tiny_encoders import load, noise, write_tiny

from pipeline.__main__ import command
from shards.errors import UserError, run_command
from shards.read.cache import Cache

MERT = {
    "model_type": "mert_model", "architectures": ["MERTModel"], "sample_rate": 24_000, "deepnorm": False,
    "attention_relax": -1.0, "feature_extractor_cqt": False, "feature_extractor_cqt_bins": 84,
    "auto_map": {"AutoConfig": "configuration_MERT.MERTConfig", "AutoModel": "modeling_MERT.MERTModel"},
}  # fmt: skip


def write_tiny_mert(folder: Path, **more: Any) -> Path:
    """Write a HuBERT with the config, the preprocessor and the code files of a MERT; the code ends a process."""
    write_tiny(folder, "hubert")
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | MERT | more))
    preprocessor.write_text(json.dumps(json.loads(preprocessor.read_text()) | {"sampling_rate": 24_000}))
    for name in ("configuration_MERT", "modeling_MERT"):
        (folder / f"{name}.py").write_text("raise SystemExit('the code of the hub was run')")
    return folder


def states_of_hubert(folder: Path, clip: np.ndarray) -> list[np.ndarray]:
    """Return the hidden states of transformers' HuBERT for a clip at 24 kHz, with zeros that fill its last frame."""
    import transformers as hf

    model = hf.HubertModel.from_pretrained(folder, dtype=torch.float32).eval()
    values = hf.Wav2Vec2FeatureExtractor(sampling_rate=24_000)(clip, sampling_rate=24_000, return_tensors="pt")
    with torch.inference_mode():
        padded = torch.nn.functional.pad(values.input_values, (0, 400 - 320))
        found = model(padded, output_hidden_states=True)
    return [state[0].numpy() for state in found.hidden_states]


def test_every_layer_is_that_of_transformers_hubert_at_24_khz(tmp_path):
    encoder = load(write_tiny_mert(tmp_path / "mert"))
    assert (encoder.sampling_rate, encoder.hop, encoder.family) == (24_000, 320, "mert_model")
    (clip,) = noise(40 * 320)
    found = encoder.encode([clip], [0, 1, 2])[0]
    for layer, expected in enumerate(states_of_hubert(tmp_path / "mert", clip)):
        np.testing.assert_allclose(found[layer], expected, atol=1e-4, rtol=1e-4)


def test_an_extraction_hears_24_khz(tmp_path):
    write_corpus(tmp_path, 2, 0.5)
    soundfile.write(tmp_path / "clip 00.flac", noise(44_100)[0], 44_100)
    mert = write_tiny_mert(tmp_path / "mert")
    assert run_command(command, words(tmp_path / "caches", tmp_path, mert)) == 0
    cache = Cache.open(only_cache(tmp_path / "caches"))
    index = next(i for i in range(2) if cache.row(i)["id"] == "clip 00")
    samples, rate = soundfile.read(tmp_path / "clip 00.flac", dtype="float32")
    clip = soxr.resample(samples, rate, 24_000, quality="HQ")
    assert (cache.spec.sampling_rate, cache.row(index)["frames"]) == (24_000, 75)
    found = load(mert).encode([clip], [2])[0][2].astype(np.float16)
    assert np.array_equal(cache.features(index), found)


@pytest.mark.parametrize(
    ("key", "value"),
    [("feature_extractor_cqt", True), ("deepnorm", True), ("attention_relax", 32.0), ("sample_rate", 16_000)],
)
def test_a_network_that_is_no_hubert_is_refused_by_the_name_of_its_option(tmp_path, key, value):
    with pytest.raises(UserError, match=f"has {key}={value}, which needs the code of its hub"):
        load(write_tiny_mert(tmp_path / "mert", **{key: value}))


def test_a_tensor_that_a_hubert_does_not_have_is_refused_by_its_name(tmp_path):
    folder = write_tiny_mert(tmp_path / "mert")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "encoder.layers.0.alpha": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"has the tensor encoder\.layers\.0\.alpha, which is no part"):
        load(folder)
