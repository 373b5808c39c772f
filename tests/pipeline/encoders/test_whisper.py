"""The Whisper encoder against transformers' own, on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_whisper import write_tiny_whisper

from pipeline.encoders import whisper
from pipeline.encoders.base import context_samples, encoder_name
from pipeline.encoders.load import load_encoder
from pipeline.encoders.logmel import LogMel, MelSettings, mel_filters
from pipeline.encoders.whisper import self_attention
from pipeline.weights.resolve import Weights
from shards.errors import UserError
from shards.format.spec import FeatureSpec


def noise(*samples: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in samples]


def load(folder: Path, **settings):
    return load_encoder(Weights(folder, f"path:{folder}", ""), **{"device": "cpu", "dtype": "float32", **settings})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper") / "Tiny.Whisper")


@pytest.fixture(scope="module")
def theirs(tiny):
    """transformers' hidden states [1, 1500, 32] of each layer for a list of clips."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(tiny, dtype=torch.float32).encoder.eval()
    extract = WhisperFeatureExtractor.from_pretrained(tiny)

    def states(clip: np.ndarray) -> list[np.ndarray]:
        mel = extract(clip, sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            hidden = model(mel, output_hidden_states=True).hidden_states
        return [layer[0].numpy() for layer in hidden]

    return states


def test_every_layer_equals_transformers_hidden_states(tiny, theirs):
    encoder = load(tiny)
    for clip in noise(480_000, 31_234, 1):
        (ours,) = encoder.encode([clip], [0, 1, 2], trim="none")
        for layer, expected in enumerate(theirs(clip)):
            np.testing.assert_allclose(ours[layer], expected, atol=1e-4, rtol=1e-4)


def test_valid_frames_are_the_ceiling_of_samples_over_320_and_a_prefix_of_the_window(tiny):
    encoder = load(tiny)
    clips = noise(0, 1, 320, 321, 480_000)
    valid, whole = encoder.encode(clips, [2]), encoder.encode(clips, [2], trim="none")
    assert [len(each[2]) for each in valid] == [0, 1, 1, 2, 1500]
    for short, full in zip(valid, whole, strict=True):
        assert full[2].shape == (1500, 32)
        assert short[2].dtype == np.float32
        np.testing.assert_array_equal(short[2], full[2][: len(short[2])])


def test_a_clip_has_the_same_bytes_in_any_batch(tiny):
    clips = noise(40_000, 90_001, 480_000)
    for dtype in ("float32", "bfloat16"):
        together = load(tiny, batch_size=8, dtype=dtype).encode(clips, [1, 2])
        alone = [load(tiny, batch_size=1, dtype=dtype).encode([clip], [2, 1])[0] for clip in clips]
        for one, other in zip(together, alone, strict=True):
            assert [one[layer].tobytes() for layer in (1, 2)] == [other[layer].tobytes() for layer in (1, 2)]


def tight(folder: Path, **settings):
    return load(folder, window="tight", margin=1.0, **settings)


def test_a_tight_context_is_the_clip_and_its_margin_in_steps_of_five_seconds(tiny):
    encoder = tight(tiny)
    seconds = {0: 5, 1: 5, 64_000: 5, 64_001: 10, 300_000: 20, 400_000: 30, 470_000: 30, 480_000: 30}
    assert {n: context_samples(n, encoder) // 16_000 for n in seconds} == seconds
    frames = encoder.encode(noise(*seconds), [2], trim="none")
    assert [len(each[2]) for each in frames] == [50 * s for s in seconds.values()]
    assert [len(each[2]) for each in encoder.encode(noise(*seconds), [2])] == [-(-n // 320) for n in seconds]


def test_tight_frames_equal_full30_where_the_clip_fills_the_window_and_no_shorter(tiny):
    full, cut = load(tiny), tight(tiny)
    clips = noise(450_000, 40_000)
    filled, short = zip(full.encode(clips, [2]), cut.encode(clips, [2]), strict=True)
    np.testing.assert_array_equal(filled[0][2], filled[1][2])
    assert short[0][2].shape == short[1][2].shape
    assert not np.array_equal(short[0][2], short[1][2])


def test_tight_features_of_a_clip_are_the_same_bytes_in_any_order_and_batch(tiny):
    clips = noise(100_000, 20_000, 90_000, 470_000)
    there = tight(tiny).encode(clips, [1, 2])
    back = tight(tiny, batch_size=1).encode(clips[::-1], [1, 2])[::-1]
    for one, other in zip(there, back, strict=True):
        assert [one[layer].tobytes() for layer in (1, 2)] == [other[layer].tobytes() for layer in (1, 2)]


def test_the_log_mel_of_a_tight_context_is_cut_from_that_of_the_whole_window():
    log_mel = LogMel(MelSettings(80), torch.device("cpu"))
    for clip in (*noise(79_900, 80_000, 30_000), np.zeros(100, np.float32)):
        audio = torch.from_numpy(clip)[None]
        assert torch.equal(log_mel(audio, 500), log_mel(audio)[..., :500])


def test_features_are_the_same_bytes_on_any_number_of_threads(tiny):
    clips = noise(40_000, 90_001, 480_000)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(load(tiny, dtype="bfloat16").encode(clips, [2]))
        finally:
            torch.set_num_threads(before)
    assert [each[2].tobytes() for each in found[0]] == [each[2].tobytes() for each in found[1]]


def test_layers_above_the_highest_requested_are_not_computed(tiny):
    encoder = load(tiny)
    expected = encoder.encode(noise(5000), [1])[0][1]
    for name in [name for name in encoder._weights if name.startswith(("layers.1.", "layer_norm."))]:
        del encoder._weights[name]
    np.testing.assert_array_equal(encoder.encode(noise(5000), [1])[0][1], expected)


def test_only_the_kept_frames_of_the_last_layer_are_computed(tiny):
    encoder = load(tiny)
    mel = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, cut = (encoder._forward(mel, [1, 2], keep) for keep in (1500, 100))
    assert (cut[1].shape, cut[2].shape) == ((2, 1500, 32), (2, 100, 32))
    torch.testing.assert_close(cut[2], whole[2][:, :100])


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_equals_the_whisper_feature_extractor(n_mels):
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=n_mels)
    np.testing.assert_allclose(mel_filters(MelSettings(n_mels)).T, extract.mel_filters, atol=1e-12)
    clips = [*noise(1, 7, 31_999, 479_900, 480_000), np.zeros(1000, np.float32)]
    log_mel = LogMel(MelSettings(n_mels), torch.device("cpu"))
    padded = torch.from_numpy(np.stack([np.pad(clip, (0, 480_000 - len(clip))) for clip in clips]))
    for clip, batched in zip(clips, log_mel(padded), strict=True):
        expected = extract(clip, sampling_rate=16000, return_tensors="pt").input_features[0]
        torch.testing.assert_close(log_mel(torch.from_numpy(clip)[None])[0], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(batched, expected, atol=1e-4, rtol=0)


def test_low_precision_attention_in_blocks_equals_the_full_one():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 1203, 3 * 64, generator=generator)
    qkv[..., :64] *= 0.25  # q comes scaled
    expected = self_attention(qkv, 4)
    ours = self_attention(qkv.bfloat16(), 4).float()
    assert (ours - expected).norm() / expected.norm() < 0.01


def test_bfloat16_stays_near_float32(tiny):
    clips = noise(100_000)
    exact, near = (load(tiny, dtype=dtype).encode(clips, [2])[0][2] for dtype in ("float32", "bfloat16"))
    assert np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.025


def test_emulated_bfloat16_is_the_native_one_up_to_its_rounding(tiny, monkeypatch):
    clips = noise(100_000)
    exact = load(tiny).encode(clips, [2])[0][2]
    found = []
    for fast in (True, False):
        monkeypatch.setattr(whisper, "has_bfloat16_units", lambda fast=fast: fast)
        found.append(load(tiny, dtype="bfloat16").encode(clips, [2])[0][2])
    native, emulated = ((each - exact) / np.linalg.norm(exact) for each in found)
    assert 0.5 < np.linalg.norm(emulated) / np.linalg.norm(native) < 1.5  # the same error against float32 …
    assert np.linalg.norm(emulated - native) < np.linalg.norm(native)  # … and most of it in the same direction


def test_the_same_weights_have_the_same_hash_however_they_are_stored(tiny, tmp_path):
    tensors = load(tiny).tensors
    half = write_tiny_whisper(tmp_path / "half", dtype="float16", whole=False)
    torch_file = write_tiny_whisper(tmp_path / "torch")
    from safetensors.torch import load_file

    torch.save(load_file(torch_file / "model.safetensors"), torch_file / "pytorch_model.bin")
    (torch_file / "model.safetensors").unlink()
    assert load(half).tensors == tensors
    assert load(torch_file).tensors == tensors
    assert load(write_tiny_whisper(tmp_path / "other", seed=1)).tensors != tensors


def test_the_encoder_describes_itself_to_the_feature_spec(tiny):
    encoder = load(tiny)
    spec = FeatureSpec(
        family=encoder.family,
        tensors=encoder.tensors,
        frontend=encoder.frontend,
        layer=encoder.n_layers,
        channels=encoder.channels,
        hop=encoder.hop,
        sampling_rate=encoder.sampling_rate,
        window="full30",
        overlap=0,
        trim="valid",
        dtype=encoder.dtype,
        codec="f16",
    )
    assert (spec.layer, spec.channels, spec.hop, encoder.window_samples) == (2, 32, 320, 480_000)
    assert encoder.frontend["n_mels"] == 80
    assert encoder.name == "tiny-whisper"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("hf:openai/whisper-base@main", "whisper-base"),
        ("wheel:whisper-tiny.en", "whisper-tiny-en"),
        ("path:/models/My Whisper/", "my-whisper"),
        ("modelscope:iic/Whisper-small", "whisper-small"),
    ],
)
def test_the_name_is_fit_for_a_folder(reference, name):
    assert encoder_name(reference) == name


def test_auto_picks_a_device_and_a_dtype_that_work(tiny):
    encoder = load(tiny, device="auto", dtype="auto")
    assert encoder.dtype in ("float32", "bfloat16", "float16")
    assert np.isfinite(encoder.encode(noise(1000), [2])[0][2]).all()


def test_bad_settings_and_folders_are_refused_in_a_sentence(tiny, tmp_path):
    with pytest.raises(UserError, match=r"encoder\.dtype"):
        load(tiny, dtype="int4")
    with pytest.raises(UserError, match=r"encoder\.device"):
        load(tiny, device="tpu0")
    with pytest.raises(UserError, match=r"encoder\.batch_size"):
        load(tiny, batch_size=0)
    other = write_tiny_whisper(tmp_path / "other")
    preprocessor = other / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({**json.loads(preprocessor.read_text()), "feature_size": 128}))
    with pytest.raises(UserError, match="128 mels"):
        load(other)
    preprocessor.write_text(json.dumps({"dither": 0.1}))
    with pytest.raises(UserError, match="dither"):
        load(other)


def test_clips_and_layers_out_of_range_are_refused(tiny):
    encoder = load(tiny)
    with pytest.raises(ValueError, match="480001"):
        encoder.encode(noise(480_001), [2])
    with pytest.raises(ValueError, match="layers"):
        encoder.encode(noise(1), [3])
    with pytest.raises(ValueError, match="trim"):
        encoder.encode(noise(1), [2], trim="tight")


def test_a_turbo_or_distilled_whisper_has_the_identity_of_the_encoder_that_it_shares(tmp_path):
    from transformers import WhisperForConditionalGeneration

    whole = WhisperForConditionalGeneration.from_pretrained(write_tiny_whisper(tmp_path / "large", n_mels=128))
    expected = load(tmp_path / "large")
    for name, decoder_layers in (("large-v3-turbo", 4), ("distil-large-v3.5", 2)):
        config = type(whole.config)(**{**whole.config.to_dict(), "decoder_layers": decoder_layers})
        model = WhisperForConditionalGeneration(config)
        model.model.encoder.load_state_dict(whole.model.encoder.state_dict())
        folder = write_tiny_whisper(tmp_path / name, n_mels=128, seed=1)
        model.save_pretrained(folder)
        encoder = load(folder)
        assert (encoder.tensors, encoder.n_layers, encoder.frontend) == (expected.tensors, 2, expected.frontend)
        assert encoder.name == name.replace(".", "-")
