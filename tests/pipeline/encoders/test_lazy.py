"""A lazy encoder: its attributes come from a memo of the same model, settings and code, or from the encoder itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.encoders import lazy
from pipeline.encoders import load as load_module
from pipeline.encoders.lazy import ATTRIBUTES, LazyEncoder, open_encoder_lazily
from pipeline.encoders.load import load_encoder
from pipeline.weights.resolve import Weights
from shards.errors import UserError
from shards.format.records import seal, unseal

SETTINGS = {"device": "cpu", "dtype": "float32", "window": None, "margin": 0.0}


@pytest.fixture
def model(whisper, tmp_path) -> Path:
    """A copy of the tiny Whisper that was last modified a minute ago."""
    folder = shutil.copytree(whisper, tmp_path / "model")
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60,) * 2)
    return folder


@pytest.fixture
def memo(tmp_path) -> Path:
    return tmp_path / "root" / "memos"


def open_lazily(folder: Path, memo: Path | None, load=None, **changes) -> LazyEncoder:
    weights, settings = Weights(folder, f"path:{folder}", ""), {**SETTINGS, **changes}
    return open_encoder_lazily(load or (lambda: load_encoder(weights, **settings)), weights, memo=memo, **settings)


def test_a_memo_replaces_loading_and_even_torch(model, memo):
    first = open_lazily(model, memo)
    assert first.loaded
    code = f"""
import json, sys
from pathlib import Path
from pipeline.encoders.lazy import ATTRIBUTES, open_encoder_lazily
from pipeline.weights.resolve import resolve_weights
weights = resolve_weights({str(model)!r}, role="encoder")
encoder = open_encoder_lazily(lambda: 1 / 0, weights, memo=Path({str(memo)!r}), **{SETTINGS!r})
print(json.dumps({{name: getattr(encoder, name) for name in ATTRIBUTES}}))
sys.exit(encoder.loaded or bool({{"torch", "transformers"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {name: getattr(first.load(), name) for name in ATTRIBUTES}


def test_encoding_loads_the_encoder_and_returns_its_values(model, memo):
    eager, encoder = open_lazily(model, memo).load(), open_lazily(model, memo)
    assert not encoder.loaded
    clip = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    (values,), (expected,) = encoder.encode([clip], [1, 2]), eager.encode([clip], [1, 2])
    assert encoder.loaded
    assert all(np.array_equal(values[layer], expected[layer]) for layer in (1, 2))


def test_the_batch_size_is_that_of_the_loaded_encoder(model, memo):
    open_lazily(model, memo)
    encoder = open_lazily(model, memo)
    encoder.batch_size = 3  # as after running out of memory
    assert (encoder.batch_size, encoder.load().batch_size) == (3, 3)


def test_other_weights_of_the_same_size_and_time_are_another_encoder(model, memo):
    first = open_lazily(model, memo)
    path = model / "model.safetensors"
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-8000:] = data[-4000:] + data[-8000:-4000]
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    second = open_lazily(model, memo)
    assert second.loaded
    assert second.tensors != first.tensors


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"window": "tight"}, {"margin": 1.0}])
def test_another_setting_has_its_own_memo(model, memo, change):
    open_lazily(model, memo)
    assert open_lazily(model, memo, **change).loaded
    assert not open_lazily(model, memo, **change).loaded


def test_the_name_of_the_model_is_part_of_the_key(model, memo):
    open_lazily(model, memo)
    (model.parent / "renamed").symlink_to(model)
    renamed = open_lazily(model.parent / "renamed", memo)
    assert (renamed.loaded, renamed.name) == (True, "renamed")


@pytest.mark.parametrize("edit", ["text", "seal", "attribute", "key", "folder"])
def test_an_edited_memo_is_ignored_and_replaced(model, memo, edit):
    first = open_lazily(model, memo)
    (path,) = memo.iterdir()
    tree = unseal(path)
    if edit == "text":
        path.write_bytes(path.read_bytes().replace(b'"channels":32', b'"channels":64'))
    elif edit == "seal":
        path.write_bytes(b"{}")
    elif edit == "attribute":
        del tree["attributes"]["tensors"]
        path.write_bytes(seal(tree))
    elif edit == "key":
        tree["key"]["code"] = "0" * 64
        path.write_bytes(seal(tree))
    else:
        path.unlink()
        path.mkdir()
    second = open_lazily(model, memo)
    assert (second.loaded, second.channels) == (True, first.channels)
    assert open_lazily(model, memo).loaded is (edit == "folder")  # which cannot be replaced


def test_an_encoder_that_differs_from_its_memo_is_an_error_that_removes_the_memo(model, memo):
    open_lazily(model, memo)
    (path,) = memo.iterdir()
    tree = unseal(path)
    tree["attributes"]["tensors"] = "0" * 64
    path.write_bytes(seal(tree))
    encoder = open_lazily(model, memo)
    with pytest.raises(
        UserError, match=f"{path.name}' describes another encoder .*tensors is .* run the command again"
    ):
        encoder.encode([], [2])
    assert not path.exists()
    assert open_lazily(model, memo).load().channels == 32


def test_a_model_that_is_still_being_written_gets_no_memo(model, memo):
    os.utime(model / "config.json")
    open_lazily(model, memo)
    assert not memo.exists()


def test_a_model_that_changes_while_it_is_loaded_gets_no_memo(model, memo):
    def load():
        os.utime(model / "config.json", (1e9, 1e9))
        return load_encoder(Weights(model, f"path:{model}", ""), **SETTINGS)

    assert open_lazily(model, memo, load).loaded
    assert not memo.exists()


def test_a_root_that_cannot_be_written_to_is_no_error(model, tmp_path):
    (tmp_path / "file").touch()
    assert open_lazily(model, tmp_path / "file" / "memos").loaded
    assert open_lazily(model, None).loaded


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """A folder for /dev and one for /proc/driver/nvidia; returns a function that installs GPUs of the given models."""
    monkeypatch.setattr(load_module, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(lazy, "NVIDIA_DRIVER", tmp_path / "driver")
    (tmp_path / "dev").mkdir()

    def install(*models: str) -> None:
        for folder in ("dev", "driver"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
            (tmp_path / folder).mkdir()
        (tmp_path / "driver" / "version").write_text("NVRM version: 1\n")
        for i, model in enumerate(models):
            (tmp_path / "dev" / f"nvidia{i}").touch()
            folder = tmp_path / "driver" / "gpus" / f"0000:0{i}"
            folder.mkdir(parents=True)
            (folder / "information").write_text(f"Model: \t\t {model}\nIRQ: {i}\n")

    return install


def stub(device: str, dtype: str) -> SimpleNamespace:
    values = dict.fromkeys(ATTRIBUTES, 0) | {"device": device, "dtype": dtype}
    return SimpleNamespace(**values, batch_size=8)


def test_auto_on_a_gpu_is_remembered_for_that_model_of_gpu_only(model, memo, gpu_machine):
    auto = {"device": "auto", "dtype": "auto"}
    gpu_machine("V100")
    assert open_lazily(model, memo, lambda: stub("cuda", "float16"), **auto).loaded
    assert open_lazily(model, memo, **auto).dtype == "float16"
    gpu_machine("A100", "A100")
    assert open_lazily(model, memo, lambda: stub("cuda:0", "bfloat16"), **auto).dtype == "bfloat16"
    gpu_machine()
    assert open_lazily(model, memo, **auto).device == "cpu"


def test_auto_that_finds_no_usable_gpu_on_a_machine_with_one_is_not_remembered(model, memo, gpu_machine):
    gpu_machine("V100")
    assert open_lazily(model, memo, lambda: stub("cpu", "float32"), device="auto", dtype="auto").loaded
    assert not memo.exists()


def test_a_gpu_with_another_index_is_the_same_encoder(model, memo, gpu_machine):
    gpu_machine("A100")
    open_lazily(model, memo, lambda: stub("cuda", "float16"), device="auto", dtype="auto")
    encoder = open_lazily(model, memo, lambda: stub("cuda:0", "float16"), device="auto", dtype="auto")
    assert not encoder.loaded
    encoder.load()
    assert encoder.device == "cuda:0"
