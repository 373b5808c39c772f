"""Audio encoders inside larger models against what the encoder returns in transformers' whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction import only_cache, words, write_corpus
from tiny_encoders import load, noise
from tiny_towers import CLASSES, FAMILIES, write_tiny_tower

from pipeline.__main__ import command
from pipeline.encoders.recording import encode_recording
from pipeline.encoders.towers import FAMILIES as TABLE
from pipeline.weights.resolve import TOWERS, check_weights_folder
from shards.errors import UserError, run_command
from shards.read.cache import Cache


class Done(Exception):
    pass


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_tiny_tower(tmp_path_factory.mktemp("towers") / request.param, request.param)


@pytest.fixture(scope="module")
def theirs(tiny):
    """What the encoder's layers take and what it returns, when transformers' whole model is given a clip."""
    import transformers as hf

    family, folder = tiny
    model = getattr(hf, CLASSES[family]).from_pretrained(folder, dtype=torch.float32).eval()
    extract, tower = hf.AutoFeatureExtractor.from_pretrained(folder), TABLE[family]
    name = tower.prefixes[0].removesuffix(".") if "parakeet" not in family else "encoder"
    encoder = next(part for path, part in model.named_modules() if path.endswith(name))
    states: list[torch.Tensor] = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    def finish(module, args, output):
        states.append(output.last_hidden_state)
        raise Done

    encoder.register_forward_hook(finish)

    def run(clip: np.ndarray) -> list[np.ndarray]:
        states.clear()
        more = {"padding": "max_length" if tower.window == "full30" else "longest"}
        if tower.frontend == "whisper":
            more["return_attention_mask"] = True
        found = extract(clip, sampling_rate=16000, return_tensors="pt", **more)
        ids = torch.zeros(1, 3, dtype=torch.long)
        calls = {
            "qwen2_audio": lambda: model(
                ids, input_features=found.input_features, feature_attention_mask=found.attention_mask
            ),
            "voxtral": lambda: model.get_audio_features(found.input_features),
            "audioflamingo3": lambda: model.get_audio_features(found.input_features, found.attention_mask),
            "glmasr": lambda: model.get_audio_features(found.input_features, found.attention_mask),
            "moonshine": lambda: model(input_values=found.input_values, decoder_input_ids=ids),
        }
        call = calls.get(family, lambda: encoder(found.input_features, attention_mask=found.attention_mask))
        with torch.inference_mode(), pytest.raises(Done):
            call()
        return [state[0].numpy() for state in states]

    return run


def test_every_layer_is_what_the_whole_model_of_transformers_computes(tiny, theirs):
    family, folder = tiny
    encoder, tower = load(folder), TABLE[family]
    for frames in (41, 3):
        (clip,) = noise(frames * tower.hop)
        (ours,) = encoder.encode([clip], [0, 1, 2])
        field = np.pad(clip, (0, 895 - 384)) if family == "moonshine" else clip  # of the last frame
        for layer, expected in enumerate(theirs(field)):
            if tower.pools and layer < 2:
                expected = (expected[0::2] + expected[1::2]) / 2
            assert ours[layer].shape == (frames, 32)
            np.testing.assert_allclose(ours[layer], expected[:frames], atol=1e-4, rtol=1e-4)


def test_a_clip_has_the_frames_of_its_samples_rounded_up(tiny):
    encoder = load(tiny[1])
    lengths = [0, 1, encoder.hop, encoder.hop + 1, 20_001]
    found = encoder.encode(noise(*lengths), [2])
    assert [len(each[2]) for each in found] == [-(-n // encoder.hop) for n in lengths]
    assert all(np.isfinite(each[2]).all() for each in found)
    assert encoder.window_samples % encoder.hop == 0


def test_a_clip_has_the_same_bytes_in_any_batch_and_choice_of_layers(tiny):
    encoder, clips = load(tiny[1]), noise(9000, 30_001)
    for clip, found in zip(clips, encoder.encode(clips, [1, 2]), strict=True):
        for layer in (1, 2):
            assert encoder.encode([clip], [layer])[0][layer].tobytes() == found[layer].tobytes()


def test_a_clip_has_its_frames_in_a_batch_and_the_same_bytes_among_any_companions(tiny):
    encoder: Any = load(tiny[1])
    clips = noise(30_000, 30_000, 30_000) if encoder.window == "clip" else noise(30_000, 9000, 1)
    assert len({encoder.group(len(clip)) for clip in clips}) == 1
    rows = torch.from_numpy(np.stack([encoder._values(clip) for clip in clips]))
    with torch.inference_mode():
        batch = encoder._forward(rows, {0, 2}, -(-30_000 // encoder.hop))
        other = encoder._forward(rows[[0, 2, 2]], {0, 2}, -(-30_000 // encoder.hop))
    for index, alone in enumerate(encoder.encode(clips, [0, 2])):
        for layer in (0, 2):
            np.testing.assert_allclose(batch[layer][index, : len(alone[layer])], alone[layer], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(batch[layer][0], other[layer][0]) for layer in (0, 2))


def test_the_windows_of_long_audio_begin_with_a_frame_at_any_hop(tiny):
    encoder = load(tiny[1])
    (clip,) = noise(40 * 16_000)
    found = encode_recording(clip, encoder, [2], overlap=4.0, trim="valid")
    assert len(found[2]) == -(-len(clip) // encoder.hop)


def test_bfloat16_stays_near_float32(tiny):
    exact, near = (load(tiny[1], dtype=dtype).encode(noise(30_000), [2])[0][2] for dtype in ("float32", "bfloat16"))
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.1


def test_other_weights_or_a_missing_tensor_are_seen(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    family, folder = tiny
    check_weights_folder(folder, "encoder")
    assert load(folder).family == family
    other = write_tiny_tower(tmp_path / "other", family, seed=1)
    assert load(other).tensors != load(folder).tensors
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.startswith(TABLE[family].prefixes) and "layers.1" in name)
    tensors.pop(name)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks the tensor"):
        load(other)
    with pytest.raises(UserError, match="set window="):
        load(folder, window="tight")


def test_settings_of_the_input_that_are_not_the_familys_are_refused(tiny, tmp_path):
    family, _ = tiny
    folder = write_tiny_tower(tmp_path / "rate", family)
    path = folder / "preprocessor_config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "sampling_rate": 8000}))
    with pytest.raises(UserError, match="8000"):
        load(folder)
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": {**tree, "sampling_rate": 8000}}))
    with pytest.raises(UserError, match="8000"):
        load(folder)


def test_a_tower_is_extracted_and_checked_like_a_whisper(tmp_path, capsys):
    write_corpus(tmp_path, 3)
    folder = write_tiny_tower(tmp_path / "qwen", "qwen2_audio")
    assert run_command(command, words(tmp_path / "caches", tmp_path, folder)) == 0
    cache = Cache.open(only_cache(tmp_path / "caches"))
    assert (cache.spec.family, cache.spec.hop, cache.spec.window) == ("qwen2_audio", 640, "full30")
    assert run_command(command, ["check", str(cache.path)]) == 0
    assert "3 utterances compared, 0 above" in capsys.readouterr().out


def test_the_table_has_every_family_that_a_folder_may_name():
    assert set(TABLE) == set(TOWERS)
