"""Encoders of the user's own, typed as ``encoder.model=module:Class``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import wav
from tiny_lm import save_tiny_lm
from tiny_run import make_config, write_config

from pipeline.__main__ import command
from pipeline.encoders.load import load_encoder
from pipeline.encoders.recording import open_encoder
from pipeline.weights.resolve import resolve_weights
from shards.errors import UserError, run_command
from shards.read.cache import Cache
from train.__main__ import command as train

OWN = """
import torch
from pipeline import OwnEncoder
from torch import nn

class Mine(OwnEncoder):
    hop, channels, n_layers = 320, 8, 1

    def __init__(self, device, dtype):
        super().__init__(device, dtype)
        self.mix = nn.Linear(320, 8)

    def forward(self, clip, layers):
        frames = -(-len(clip) // 320)
        x = self.mix(nn.functional.pad(clip, (0, 320 * frames - len(clip))).reshape(frames, 320))
        return {0: x, 1: x.tanh()}

class Heavier(Mine):
    def __init__(self, device, dtype):
        super().__init__(device, dtype)
        self.mix.weight.data *= 2

class Second(Mine):
    frontend = {"version": 2}

class Short(Mine):
    def forward(self, clip, layers):
        return {layer: x[:-1] for layer, x in super().forward(clip, layers).items()}

class Integers(Mine):
    def forward(self, clip, layers):
        return {layer: x.long() for layer, x in super().forward(clip, layers).items()}

class Missing(Mine):
    def forward(self, clip, layers):
        return {}

class Nan(Mine):
    def forward(self, clip, layers):
        return {layer: x * float("nan") for layer, x in super().forward(clip, layers).items()}

class Weightless(OwnEncoder):
    hop, channels, n_layers = 320, 8, 0

    def forward(self, clip, layers):
        return {0: clip.new_zeros(-(-len(clip) // 320), 8)}

class Rate(Mine):
    sampling_rate = 24000

class Uneven(Mine):
    window_samples = 1000

class Named(Mine):
    name = "../x"

class NoHop(Mine):
    hop = None

class Lazy(OwnEncoder):
    hop, channels, n_layers = 320, 8, 0

class Picky(Mine):
    def __init__(self, device, dtype, path):
        super().__init__(device, dtype)

class Other:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The working directory has the module ``own_encoders``, which is not imported yet."""
    (tmp_path / "own_encoders.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_encoders"
    sys.modules.pop("own_encoders", None)


def load(name: str, dtype: str = "float32"):
    weights = resolve_weights(f"own_encoders:{name}", role="encoder", typed=True)
    return load_encoder(weights, device="cpu", dtype=dtype)


def words(folder: Path, name: str = "Mine", device: str = "cpu") -> list[str]:
    samples = {f"clip{i}": 6000 + 1000 * i for i in range(6)} | {"long": 31 * 16_000}  # the last takes two windows
    for key, n in samples.items():
        (folder / f"{key}.wav").write_bytes(wav(n))
    rows = [json.dumps({"audio": f"{key}.wav", "text": f"a text {key}", "key": key}) for key in samples]
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    source = [f"root={folder}/caches-{device}", "source.kind=manifest", f"source.path={folder}/manifest.jsonl"]
    encoder = {"model": f"own_encoders:{name}", "dtype": "float32", "device": device}
    return [*source, *(f"encoder.{key}={value}" for key, value in encoder.items())]


def extract(folder: Path, *more: str, name: str = "Mine") -> int:
    return run_command(command, ["extract", *words(folder, name), *more])


def only_cache(folder: Path, device: str = "cpu") -> Path:
    (cache,) = folder.glob(f"caches-{device}/*/mine-*")
    return cache


def test_a_typed_class_is_extracted_and_its_frames_are_what_forward_returned(own, tmp_path):
    assert extract(tmp_path, "encoder.layers=[0]") == 0
    cache = Cache.open(only_cache(tmp_path))
    spec = cache.spec
    assert (spec.family, spec.hop, spec.channels, spec.window) == ("own:own_encoders:Mine", 320, 8, "clip")
    frames = {row["key"]: row["frames"] for row in cache.manifest.to_pylist()}
    assert (frames["clip0"], frames["long"]) == (19, 1550)
    from pipeline.audio import decode

    clip = decode((tmp_path / "clip0.wav").read_bytes())
    stored = np.empty((19, 8), np.float32)
    cache.read_into([row["key"] for row in cache.manifest.to_pylist()].index("clip0"), stored)
    expected = load("Mine")(torch.from_numpy(clip), [0])[0].numpy()
    np.testing.assert_allclose(stored, expected, atol=1e-3)


def test_a_second_extraction_finds_nothing_to_do(own, tmp_path, capsys):
    assert extract(tmp_path) == 0
    assert extract(tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_other_weights_and_other_settings_have_another_identity(own):
    mine, again, heavier, second = map(load, ("Mine", "Mine", "Heavier", "Second"))
    assert mine.tensors == again.tensors != heavier.tensors
    assert (second.tensors, second.frontend) == (mine.tensors, {"type": "own", "version": 2})
    assert mine.frontend == {"type": "own"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Short", r"returned \[9, 8\] for layer 0 of a clip of 3200 samples, expected \[10, 8\]"),
        ("Integers", "a tensor of torch.int64 for layer 0"),
        ("Missing", "NoneType for layer 0"),
    ],
)
def test_frames_that_the_class_did_not_declare_are_refused(own, name, message):
    with pytest.raises(UserError, match=message):
        load(name).encode([np.ones(3200, np.float32)], [0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Weightless", "no weights in its state_dict"),
        ("Rate", "sampling_rate=24000"),
        ("Uneven", "multiple of hop=320"),
        ("Named", "name='../x'"),
        ("NoHop", "hop=None"),
        ("Lazy", "with a method forward"),
        ("Picky", "give every other argument a default"),
        ("Other", "not a subclass of pipeline.OwnEncoder"),
        ("Absent", "not a subclass of pipeline.OwnEncoder"),
    ],
)
def test_a_class_that_declares_what_cannot_be_is_refused_in_one_sentence(own, name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_wrong_frame_count_and_nan_end_an_extraction_with_status_2(own, tmp_path, capsys):
    assert extract(tmp_path, name="Short") == 2
    assert "correct its forward" in capsys.readouterr().err
    assert extract(tmp_path, name="Nan") == 2
    assert "returned NaN" in capsys.readouterr().err


def test_a_padded_window_is_refused(own, tmp_path, capsys):
    assert extract(tmp_path, "window=tight") == 2
    assert "set window=clip" in capsys.readouterr().err


def test_bfloat16_runs_under_autocast_near_float32(own):
    clip = np.random.default_rng(1).normal(0, 0.1, 3000).astype(np.float32)
    exact, near = (load("Mine", dtype).encode([clip], [1])[0][1] for dtype in ("float32", "bfloat16"))
    assert near.dtype == np.float32
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.slow
def test_on_a_gpu_each_clip_is_encoded_in_turn_to_the_frames_of_a_cpu(own, tmp_path, pretended_cuda):
    assert extract(tmp_path) == 0
    argv = {"argv": words(tmp_path, device="cuda"), "folder": str(tmp_path)}
    assert pretended_cuda("cuda_extraction:extract", argv)["status"] == 0
    cpu, gpu = (Cache.open(only_cache(tmp_path, device)) for device in ("cpu", "cuda"))
    assert gpu.feature_id == cpu.feature_id
    for index, row in enumerate(cpu.manifest.to_pylist()):
        mine, theirs = np.empty((2, row["frames"], 8), np.float32)
        cpu.read_into(index, mine)
        gpu.read_into(index, theirs)
        np.testing.assert_array_equal(mine, theirs)


def test_what_a_cache_names_is_not_imported_unless_typed(own, tmp_path, capsys):
    assert extract(tmp_path) == 0
    cache = only_cache(tmp_path)
    sys.modules.pop(own)
    assert run_command(command, ["check", str(cache)]) == 2
    assert f"--encoder {own}:Mine" in capsys.readouterr().err
    next(cache.rglob("*.tar")).write_bytes(b"damaged")
    assert run_command(command, ["repair", str(cache)]) == 2
    assert "extract --verify" in capsys.readouterr().err
    assert own not in sys.modules
    assert extract(tmp_path, "--verify") == 0
    assert run_command(command, ["check", str(cache), "--encoder", f"{own}:Mine"]) == 0
    assert run_command(command, ["check", str(cache), "--encoder", f"{own}:Heavier"]) == 2


def test_an_encoder_with_other_frames_is_not_the_one_of_the_features(own, tmp_path):
    assert extract(tmp_path) == 0
    spec = Cache.open(only_cache(tmp_path)).spec
    reference = f"{own}:Mine"
    open_encoder(spec, None, "cpu", typed=reference)
    with pytest.raises(UserError, match="samples per frame"):
        open_encoder(spec.model_copy(update={"hop": 160}), None, "cpu", typed=reference)
    with pytest.raises(UserError, match="layer 2"):
        open_encoder(spec.model_copy(update={"layer": 2}), None, "cpu", typed=reference)


def test_a_run_trains_on_it_and_transcribes_only_with_the_typed_class(own, tmp_path, capsys):
    assert extract(tmp_path) == 0
    sys.modules.pop(own)
    lm = f"path:{save_tiny_lm(tmp_path / 'lm')}"
    config = make_config(tmp_path, only_cache(tmp_path), lm, steps=2, val={"fraction": 0.3})
    assert run_command(train, ["fit", "--config", str(write_config(tmp_path / "run.json", config))]) == 0
    assert own not in sys.modules
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["silence"].startswith(f"zeros: {own}:Mine is an encoder class")
    capsys.readouterr()
    words = ["transcribe", str(tmp_path / "runs" / "run"), str(tmp_path / "clip0.wav")]
    assert run_command(train, words) == 2
    assert f"--encoder {own}:Mine" in capsys.readouterr().err
    assert own not in sys.modules
    assert run_command(train, [*words, "--encoder", f"{own}:Mine"]) == 0
