"""Model folders that bring code: none of it runs, whatever stands on standard input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_lm import save_tiny_lm

from pipeline.weights.pretrained import KERNELS, forbid_hub_kernels
from shards.errors import UserError
from train.lms.load import load_lm

ROOT = Path(__file__).parents[3]
EVIL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path(r"{marker}").touch()

class Config(LlamaConfig):
    model_type = "stranger"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
LOAD_LM = """
import sys, torch
from train.lms.load import load_lm
lm = load_lm(sys.argv[1], device="cpu", dtype=torch.float32)
lm.tokenizer.encode("one two")
print("loaded")
"""
LOAD_ENCODER = """
import sys
from pathlib import Path
from pipeline.encoders.load import load_encoder
from pipeline.weights.resolve import Weights
folder = sys.argv[1].removeprefix("path:")
load_encoder(Weights(Path(folder), sys.argv[1], ""), device="cpu", dtype="float32")
print("loaded")
"""


def load(program: str, folder: Path, **env: str) -> tuple[int, str]:
    """Run a program of this module as a command whose standard input says yes; returns exit status and output."""
    body = program.replace("\n", "\n    ")
    start = "import sys\nfrom shards.errors import run_command\ndef command(argv):\n    "
    text = f"{start}{body}\nsys.exit(run_command(command))"
    done = subprocess.run(
        [sys.executable, "-c", text, f"path:{folder}"],
        input="y\n" * 20,
        env={**os.environ, "HF_HOME": str(folder.parent / "home"), "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


def change(file: Path, **keys: object) -> None:
    tree = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


@pytest.fixture
def folder(tmp_path) -> Path:
    made = save_tiny_lm(tmp_path / "model")
    for module in ("evil", "custom_generate/generate"):
        (made / module).parent.mkdir(exist_ok=True)
        (made / f"{module}.py").write_text(EVIL.format(marker=tmp_path / "ran"))
    return made


NAMES = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "both"])
def test_the_code_of_a_model_folder_never_runs_and_piped_input_does_not_agree_to_it(folder, tmp_path, file):
    if file != "tokenizer_config.json":
        change(folder / "config.json", auto_map=NAMES, model_type="stranger", architectures=["Model"])
    if file != "config.json":
        tokenizer = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        change(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")
    status, told = load(LOAD_LM, folder)
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in told
    if file != "tokenizer_config.json":
        assert status == 2, told
        assert told.rstrip().count("\n") == 0, told
        assert "cannot be loaded as a causal language model" in told


def test_a_folder_that_brings_code_without_need_loads_without_it(folder, tmp_path):
    change(folder / "config.json", auto_map=NAMES)
    status, told = load(LOAD_LM, folder)
    assert (status, told.splitlines()[0]) == (0, "loaded"), told
    assert not (tmp_path / "ran").exists()


def test_the_code_of_an_encoder_folder_never_runs(tmp_path):
    import transformers

    folder, small = tmp_path / "model", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.HubertConfig(**small, conv_dim=[16] * 7, num_conv_pos_embedding_groups=4)
    transformers.HubertModel(config).save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=tmp_path / "ran"))
    change(folder / "config.json", auto_map=NAMES)
    status, told = load(LOAD_ENCODER, folder)
    assert (status, told.splitlines()[0]) == (0, "loaded"), told
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernels_of_a_hub_are_loaded(folder, tmp_path, key):
    (tmp_path / "lib").mkdir()  # a `kernels` package that notes when it is asked for any
    (tmp_path / "lib" / "kernels.py").write_text(f"from pathlib import Path\nPath(r'{tmp_path / 'ran'}').touch()\n")
    change(folder / "config.json", **{key: "someone/kernels"})
    status, told = load(LOAD_LM, folder, PYTHONPATH=f"{ROOT}:{tmp_path / 'lib'}")
    assert status == 2, told
    assert "asks for the kernels of 'someone/kernels'" in told


def test_weights_that_are_not_those_of_the_folder_are_refused(folder, tmp_path):
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    change(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"config\.json names 'other\.safetensors' as its weights"):
        load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)
    change(folder / "config.json", transformers_weights=None)
    load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 1}))
    with pytest.raises(UserError, match=r"it has an adapter.*: merge it, or remove adapter_config\.json"):
        load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)


def test_transformers_is_told_to_load_no_kernels_before_and_after_its_import(monkeypatch):
    from transformers.integrations import hub_kernels

    monkeypatch.setenv(KERNELS, "YES")
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    forbid_hub_kernels()
    assert (os.environ[KERNELS], hub_kernels._kernels_enabled) == ("NO", False)


def test_no_other_module_loads_a_folder_with_transformers_or_asks_a_question():
    found = []
    for room in ("pipeline", "train", "shards"):
        for file in (ROOT / room).rglob("*.py"):
            text = file.read_text()
            if re.search(r"\.from_pretrained\((?!`)|(?<![\w.])input\(|trust_remote_code=True", text):
                found.append(str(file.relative_to(ROOT)))
    told = ["export", "model_card", "receiver/modeling_earshard"]  # what a receiver writes
    assert sorted(found) == ["pipeline/weights/pretrained.py", *(f"train/inference/{name}.py" for name in told)]
