"""HuBERT, wav2vec 2.0, WavLM and w2v-BERT 2.0 against transformers' own, on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import wav
from tiny_encoders import FAMILIES, load, noise, write_tiny

from pipeline.__main__ import command
from pipeline.weights.resolve import check_weights_folder
from shards.errors import UserError, run_command
from shards.read.cache import Cache


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_tiny(tmp_path_factory.mktemp("ssl") / request.param, request.param)


def test_every_layer_equals_transformers_hidden_states(tiny):
    from transformers import AutoFeatureExtractor, AutoModel

    family, folder = tiny
    model, extract = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    encoder = load(folder)
    for clip in noise(20_000, 320, 1):
        frames = -(-len(clip) // 320)
        (ours,) = encoder.encode([clip], [0, 1, 2])
        if family == "wav2vec2-bert":
            padded = np.pad(clip, (0, 320 * frames + 240 - len(clip)))
            values = extract(padded, sampling_rate=16000, return_tensors="pt").input_features
        else:
            values = extract(clip, sampling_rate=16000, return_tensors="pt").input_values
            values = torch.nn.functional.pad(values, (0, 320 * frames + 80 - len(clip)))
        with torch.inference_mode():
            output = model(values, output_hidden_states=True)
        theirs = [*output.hidden_states[:-1], output.last_hidden_state]  # the last of theirs is without the final norm
        for layer, expected in enumerate(theirs):
            assert ours[layer].shape == (frames, 32)
            np.testing.assert_allclose(ours[layer], expected[0].numpy(), atol=1e-4, rtol=1e-4)


def test_a_clip_has_the_same_bytes_in_any_batch_and_choice_of_layers(tiny):
    clips = noise(9000, 30_001, 0)
    encoder = load(tiny[1])
    together = encoder.encode(clips, [1, 2])
    for clip, found in zip(clips, together, strict=True):
        for layer in (1, 2):
            assert encoder.encode([clip], [layer])[0][layer].tobytes() == found[layer].tobytes()


def test_layers_above_the_highest_requested_are_not_computed(tiny):
    encoder = load(tiny[1])
    expected = encoder.encode(noise(4000), [1])[0][1]
    encoder._model.encoder.layers[1].forward = None
    np.testing.assert_array_equal(encoder.encode(noise(4000), [1])[0][1], expected)


def test_bfloat16_stays_near_float32(tiny):
    exact, near = (load(tiny[1], dtype=dtype).encode(noise(30_000), [2])[0][2] for dtype in ("float32", "bfloat16"))
    assert np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.05


def test_the_identity_holds_family_rate_and_weights(tiny, tmp_path):
    family, folder = tiny
    encoder = load(folder)
    assert encoder.family == family.removesuffix("-stable")
    assert (encoder.hop, encoder.channels, encoder.n_layers, encoder.window) == (320, 32, 2, "clip")
    assert load(write_tiny(tmp_path / "same", family)).tensors == encoder.tensors
    assert load(write_tiny(tmp_path / "other", family, seed=1)).tensors != encoder.tensors


def test_windows_of_whisper_and_folders_without_a_tensor_are_refused_in_a_sentence(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    family, folder = tiny
    check_weights_folder(folder, "encoder")
    with pytest.raises(UserError, match="window=tight"):
        load(folder, window="tight")
    broken = write_tiny(tmp_path / "broken", family)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("encoder.layers.1.final_layer_norm.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor encoder\.layers\.1"):
        load(broken)
    preprocessor = broken / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({**json.loads(preprocessor.read_text()), "sampling_rate": 8000}))
    with pytest.raises(UserError, match="8000 Hz"):
        load(broken)


def test_a_hubert_is_extracted_and_checked_like_a_whisper(tmp_path, capsys):
    folder = write_tiny(tmp_path / "hubert", "hubert")
    samples = {"short": 4000, "long": 31 * 16_000}  # the last takes two windows
    for key, n in samples.items():
        (tmp_path / f"{key}.wav").write_bytes(wav(n))
    rows = [json.dumps({"audio": f"{key}.wav", "text": key, "key": key}) for key in samples]
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    root = tmp_path / "caches"
    words = [f"root={root}", "source.kind=manifest", f"source.path={tmp_path}/manifest.jsonl"]
    words += [f"encoder.model=path:{folder}", "encoder.dtype=float32", "encoder.layers=[1]"]
    assert run_command(command, ["extract", *words]) == 0
    (path,) = root.glob("*/hubert-L1-f16-*")
    cache = Cache.open(path)
    assert (cache.spec.family, cache.spec.window) == ("hubert", "clip")
    assert {row["key"]: row["frames"] for row in cache.manifest.to_pylist()} == {"short": 13, "long": 1550}
    assert run_command(command, ["check", str(path)]) == 0
    assert "2 utterances compared, 0 above" in capsys.readouterr().out
    assert run_command(command, ["extract", *words, "trim=none"]) == 2
    assert "trim=valid" in capsys.readouterr().err
