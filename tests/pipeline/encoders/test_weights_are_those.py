"""What is refused before a frame is kept: quantized, wrapped, missing, foreign, corrupt and untrained weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_whisper import write_tiny_whisper
from torch import Tensor

from pipeline.encoders.batching import encode_in_batches
from pipeline.encoders.load import load_encoder
from pipeline.weights.resolve import Weights
from shards.errors import UserError

Tensors = dict[str, Tensor]
ENCODER = "model.encoder."


def load(folder: Path, **settings):
    return load_encoder(Weights(folder, f"path:{folder}", ""), **{"device": "cpu", "dtype": "float32", **settings})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper") / "tiny")


def changed(tiny: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """A copy of ``tiny`` with changed tensors and keys of ``config.json``."""
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    tensors = {
        name: tensor.contiguous().clone() for name, tensor in change(load_file(tiny / "model.safetensors")).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def int8(tensors: Tensors) -> Tensors:
    """As bitsandbytes stores linear layers: codes under the old name, and scales beside them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{ENCODER}layers") and tensor.ndim == 2:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            found |= {name: (tensor / scale).round().to(torch.int8), name.replace(".weight", ".SCB"): scale[:, 0]}
        else:
            found[name] = tensor
    return found


def codes(tensors: Tensors) -> Tensors:
    return {name: t.float() for name, t in int8(tensors).items() if not name.endswith(".SCB")}


def fp8(tensors: Tensors) -> Tensors:
    return {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and "layers" in name else tensor
        for name, tensor in tensors.items()
    }


def same(tensors: Tensors) -> Tensors:
    return tensors


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != ENCODER + name}


def set_to(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, ENCODER + name: value(tensors.get(ENCODER + name, torch.zeros(2)))}


def wrapped(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


BNB = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        (int8, BNB, r"quantization_config: quant_method=bitsandbytes, load_in_8bit=True"),
        (int8, {}, r"layers\.0\S+ as I8, so the weights are quantized"),
        (fp8, {}, r"layers\.0\S+ as F8_E4M3, so the weights are quantized"),
        (same, {"compression_config": {"format": "pack-quantized"}}, "compression_config: format=pack-quantized"),
        (without("layers.1.fc2.bias"), {}, r"lacks the tensor model\.encoder\.layers\.1\.fc2\.bias"),
        (without("layers.0.self_attn.q_proj.weight"), {}, r"lacks the tensor \S+layers\.0\.self_attn\.q_proj"),
        (same, {"encoder_layers": 3}, r"lacks the tensor \S+layers\.2\."),
        (same, {"encoder_layers": 1}, r"has the tensor \S+layers\.1\.\S+, which is no part"),
        (set_to("layers.0.self_attn.k_proj.bias", lambda _: torch.zeros(32)), {}, r"k_proj\.bias, which is no part"),
        (set_to("layers.0.lora_A.weight", lambda _: torch.zeros(2, 2)), {}, r"lora_A\.weight, which is no part"),
        (set_to("layers.1.fc1.weight", lambda t: t.T), {}, r"fc1\.weight of shape \[32, 64\], expected \[64, 32\]"),
        (set_to("conv2.bias", lambda t: t[:0]), {}, r"conv2\.bias of shape \[0\], expected \[32\]"),
        (wrapped("base_model.model."), {}, r"no tensor model\.encoder\.\*.*base_model\.model\.model\.encoder\.conv1"),
        (wrapped("_orig_mod."), {}, r"no tensor model\.encoder\.\*.*_orig_mod\.model"),
        (lambda t: t | {"encoder.conv1.weight": torch.zeros(1)}, {}, r"under model\.encoder\.\* and again under encod"),
        (same, {"encoder_attention_heads": 5}, "encoder_attention_heads=5"),
        (same, {"d_model": "32"}, "no valid d_model"),
        (set_to("layers.1.fc1.weight", lambda t: t * torch.nan), {}, r"NaN or infinite values in the tensor layers\.1"),
        (set_to("layers.0.fc1.weight", lambda t: t * 0), {}, r"only zeros in the tensor layers\.0\.fc1\.weight"),
    ],
)
def test_other_tensors_than_those_of_the_architecture_are_refused_in_a_sentence(
    tiny, tmp_path, change, config, sentence
):
    with pytest.raises(UserError, match=sentence):
        load(changed(tiny, tmp_path / "changed", change, **config))


def test_a_torch_file_that_wraps_its_tensors_or_holds_objects_is_refused_in_a_sentence(tiny, tmp_path):
    folder = changed(tiny, tmp_path / "torch", same)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not map names to tensors"):
        load(folder)
    torch.save({"run": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of tensors alone"):
        load(folder)


def test_a_self_supervised_model_is_read_bare_or_with_a_head_and_refused_quantized_wrapped_or_changed(tmp_path):
    from transformers import HubertConfig, HubertForCTC

    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=8,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    model = HubertForCTC(config)
    model.save_pretrained(tmp_path / "head")
    model.hubert.save_pretrained(tmp_path / "bare")
    assert load(tmp_path / "head").tensors == load(tmp_path / "bare").tensors
    path = tmp_path / "head" / "model.safetensors"
    tensors, name = load_file(path), "hubert.encoder.layers.1.feed_forward.output_dense.weight"
    other = name.replace("weight", "lora_A.weight")
    for change, sentence in [
        ({name: tensors[name].to(torch.int8)}, r"layers\.1\S+ as I8"),
        ({other: torch.zeros(1)}, r"lora_A\.weight, which is no part"),
        ({name: tensors[name].T}, r"of shape \[48, 32\], expected \[32, 48\]"),
        ({name: tensors[name] * torch.nan}, r"NaN or infinite values in the tensor encoder\.layers\.1"),
    ]:
        save_file({key: t.contiguous() for key, t in {**tensors, **change}.items()}, path, {"format": "pt"})
        with pytest.raises(UserError, match=sentence):
            load(tmp_path / "head")
    save_file({f"module.{key}": tensor for key, tensor in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor \S+ and has module\.hubert\.\S+ instead"):
        load(tmp_path / "head")


def audio(seconds: float = 0.5, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(0).normal(0, level, int(16_000 * seconds)).astype(np.float32)


def test_weights_that_explode_are_refused_at_the_first_audible_window(tiny, tmp_path):
    encoder = load(changed(tiny, tmp_path / "codes", codes))  # int8 codes without their scales, cast to float
    silence = np.zeros(8000, np.float32)
    assert len(encode_in_batches(encoder, [silence, audio(0.01)], [2], "valid")) == 2
    with pytest.raises(UserError, match=r"features of layer \d of the encoder 'codes' have an RMS of"):
        encode_in_batches(encoder, [silence, audio()], [2], "valid")


def test_features_that_do_not_depend_on_the_audio_are_refused(tiny, tmp_path):
    def deaf(tensors: Tensors) -> Tensors:
        small = {f"{ENCODER}{name}": 1e-12 for name in ("conv2.weight", "embed_positions.weight")}
        return {name: tensor * small.get(name, 1) for name, tensor in tensors.items()}

    with pytest.raises(UserError, match="layer 0 of the encoder 'deaf' do not depend on the audio"):
        encode_in_batches(load(changed(tiny, tmp_path / "deaf", deaf)), [audio()], [2], "valid")


def test_values_that_overflow_the_dtype_name_the_setting(tiny, monkeypatch):
    encoder = load(tiny)
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda *a: [{k: v * np.float32(np.inf) for k, v in f.items()} for f in encode(*a)]
    )
    with pytest.raises(UserError, match=r"layer 0 .* NaN or infinite values in float32 .* encoder\.dtype=float32"):
        encode_in_batches(encoder, [audio()], [2], "valid")


def test_the_check_computes_one_window_per_encoder(tiny, monkeypatch):
    encoder, calls = load(tiny), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda clips, *a: calls.append(len(clips)) or encode(clips, *a))
    for _ in range(3):
        encode_in_batches(encoder, [audio(), audio()], [2], "valid")
    assert calls == [1, 2, 2, 2]
