"""Exports: a run, its export, and the source code in the export all compute the same soft tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cache import make_cache, make_spec
from tiny_projectors import CONFIGS
from tiny_run import make_config

import train
from shards.errors import UserError, run_command
from train.__main__ import command
from train.config.model import CustomConfig, MlpConfig
from train.inference.export import export, load_projector, make_settings, write_projector
from train.model.build import load_model
from train.projectors import LayerMixer, MixedProjector, build_projector
from train.trainer.fit import fit

CUSTOM_SOURCE = """
import torch
from torch import nn
from train import Projector
from train.projectors.base import Linear, stack_frames

class Mine(Projector):
    def __init__(self, channels, width, embedding_rms, *, stack=2):
        super().__init__()
        self.stack, self.scale = stack, embedding_rms
        self.fc1, self.fc2 = Linear(stack * channels, 8), nn.Linear(8, width)
        self.register_buffer("shift", torch.randn(width))
        self.fc2.weight.requires_grad = False

    def init_weights(self, generator):
        nn.init.normal_(self.fc1.weight, generator=generator)
        nn.init.zeros_(self.fc1.bias)

    def soft_frames(self, frames):
        return -(-frames // self.stack)

    def forward(self, features, mask):
        x, mask = stack_frames(features, mask, self.stack)
        return self.scale * self.fc2(self.fc1(x).relu()) + self.shift, mask
"""

# a process with torch and safetensors, but without earshard and its other dependencies
ALONE = """
import sys
sys.modules.update(dict.fromkeys(("train", "pipeline", "shards", "pydantic", "yaml")))
import torch
from safetensors.torch import load_file, save_file
inputs = {name: x.clone() for name, x in load_file(sys.argv[1]).items()}  # bits depend on alignment in memory
results = {}
for folder in sys.argv[3:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "projector"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    from projector import load
    projector = load(folder)
    sys.path.pop(0)
    for name, x in inputs.items():
        with torch.no_grad():
            soft, soft_mask = projector(x, torch.ones(x.shape[:2], dtype=torch.bool))
        results[f"{folder} {name}"], results[f"{folder} {name} mask"] = soft.contiguous(), soft_mask.contiguous()
save_file(results, sys.argv[2])
"""


class SmallLm:
    """The attributes of a language model that an export records."""

    width, embedding_rms, identity = 16, 0.136, "sha256:0"


def write(folder: Path, config: Any, projector: Any, layers: int = 1, normalise: bool = False) -> None:
    """The export of a projector for features of 12 channels, with every parameter changed from its initial value."""
    with torch.no_grad():
        for parameter in projector.parameters():  # a second layer initialized to zero would hide the first
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    caches = [[f"layer-{layer}" for layer in range(layers)]] if layers > 1 else ["cache"]
    run = make_config(folder, "cache", "nanochat:d1", caches=caches, normalise_layers=normalise)
    run = run.model_copy(update={"projector": config})
    cache_info = {"spec": make_spec(channels=12 // layers), "caches": []}
    write_projector(folder, make_settings(run, cache_info, SmallLm(), projector.eval()), projector)  # type: ignore[arg-type]


def run_alone(folders: list[Path], tmp_path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Soft tokens of the exports in ``folders``, computed in one fresh process."""
    save_file(inputs, tmp_path / "inputs")
    words = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "inputs"), str(tmp_path / "results"), *map(str, folders)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "results")


def assert_same_bits(projectors: dict[Path, Any], tmp_path: Path) -> None:
    inputs = {str(n): torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 40)}
    results = run_alone(list(projectors), tmp_path, inputs)
    for folder, projector in projectors.items():
        for name, x in inputs.items():
            with torch.no_grad():
                soft, soft_mask = projector(x, torch.ones(x.shape[:2], dtype=torch.bool))
            assert torch.equal(results[f"{folder} {name}"], soft), (folder.name, name)
            assert torch.equal(results[f"{folder} {name} mask"], soft_mask)


def test_every_kind_computes_the_same_bits_with_torch_alone(tmp_path):
    projectors: dict[Path, Any] = {}
    for number, config in enumerate(CONFIGS):
        folder = tmp_path / f"{number}-{config.kind}"
        projectors[folder] = build_projector(config, 12, 16, 0.136)
        write(folder, config, projectors[folder])
        assert {path.name for path in (folder / "projector").iterdir()} <= {
            "__init__.py", "base.py", "codes.py", "ctc.py", "mixer.py", "conv.py", "mlp.py", "moe.py", "qformer.py",
            "transformer.py",
        }  # fmt: skip
    for normalise in (False, True):
        folder, config = tmp_path / f"mixed-{normalise}", MlpConfig(stack=2, norm="rms")
        projectors[folder] = MixedProjector(LayerMixer(3, normalise), build_projector(config, 4, 16, 0.136))
        write(folder, config, projectors[folder], 3, normalise)
    assert_same_bits(projectors, tmp_path)
    for folder, projector in projectors.items():
        ours = load_projector(folder).state_dict()
        assert all(torch.equal(ours[name], value) for name, value in projector.state_dict().items())


@pytest.fixture
def custom_module(tmp_path, monkeypatch):
    """Writes a custom projector's module into the working folder and returns its configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(text: str) -> CustomConfig:
        (tmp_path / "own_export.py").write_text(text)
        return CustomConfig(kind="own_export:Mine", settings={"stack": 3})

    yield make
    sys.modules.pop("own_export", None)


def test_the_export_of_a_custom_projector_has_its_module_buffers_and_frozen_weights(custom_module, tmp_path):
    config, folder = custom_module(CUSTOM_SOURCE), tmp_path / "exported"
    projector = build_projector(config, 12, 16, 0.136, seed=5)
    write(folder, config, projector)
    assert_same_bits({folder: projector}, tmp_path)
    assert (folder / "projector" / "own.py").read_text().count("train") == 0


def test_a_custom_module_that_needs_the_rest_of_earshard_is_not_exported(custom_module, tmp_path):
    config, folder = custom_module("import train.config.model\n" + CUSTOM_SOURCE), tmp_path / "exported"
    with pytest.raises(UserError, match=r"own_export:Mine cannot be exported.*ModuleNotFoundError.*train"):
        write(folder, config, build_projector(config, 12, 16, 0.136))
    assert not folder.exists()


def test_loading_an_export_runs_no_code_that_it_contains_or_names(custom_module, tmp_path):
    config, folder = custom_module(CUSTOM_SOURCE), tmp_path / "exported"
    projector = build_projector(config, 12, 16, 0.136)
    write(folder, config, projector)
    for file in (folder / "projector").iterdir():
        file.write_text("raise SystemExit('ran')")
    sys.modules.pop("own_export")
    with pytest.raises(UserError, match="pass kind='own_export:Mine' to import it"):
        train.load_projector(folder)
    assert "own_export" not in sys.modules
    x, mask = torch.randn(1, 7, 12), torch.ones(1, 7, dtype=torch.bool)
    with torch.no_grad():
        loaded = train.load_projector(folder, kind="own_export:Mine")
        assert torch.equal(loaded(x, mask)[0], projector(x, mask)[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("export")
    cache = make_cache(folder / "cache", 12, val_every=4)
    config = make_config(folder, cache, "nanochat:d1", steps=2, eval_every=0)
    return fit(config), config


def test_the_three_lines_of_the_model_card_compute_the_soft_tokens_of_the_run(run, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert run_command(command, ["export", str(run[0]), str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "lm.json", "projector", "projector.safetensors",
    ]  # fmt: skip
    model = load_model(run[0], run[1], torch.device("cpu"), torch.float32)
    x, mask = torch.randn(1, 9, 8), torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        wanted = model.projector(x, mask)[0]
        assert torch.equal(load_projector(folder)(x, mask)[0], wanted)
    card = (folder / "README.md").read_text()
    (text,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert len(text.splitlines()) == 3
    save_file({"x": x, "mask": mask}, tmp_path / "inputs")
    lines = [
        "from safetensors.torch import load_file, save_file",
        "inputs = load_file('inputs'); features, mask = inputs['x'].clone(), inputs['mask']",
        text + "save_file({'soft': soft.detach()}, 'soft')",
    ]
    subprocess.run([sys.executable, "-I", "-c", "\n".join(lines)], cwd=tmp_path, check=True)
    assert torch.equal(load_file(tmp_path / "soft")["soft"], wanted)
    cache_info = json.loads((run[0] / "caches.json").read_text())
    assert cache_info["feature_id"] in card
    assert cache_info["caches"][0]["manifest_id"] in card
    assert cache_info["spec"]["tensors"] in card
    assert run_command(command, ["export", str(run[0]), str(folder)]) == 2
    assert "already exists: name another folder" in capsys.readouterr().err


def test_a_folder_that_is_not_an_export_is_refused_in_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match=r"is not an export: it has no config\.json"):
        load_projector(tmp_path)
    folder = export(run[0], tmp_path / "corrupt")
    tensors = load_file(folder / "projector.safetensors")
    save_file({name: value[:1] for name, value in tensors.items()}, folder / "projector.safetensors")
    with pytest.raises(UserError, match=r"size mismatch .*: export the run again"):
        load_projector(folder)
    (folder / "projector.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="export the run again"):
        load_projector(folder)
    (folder / "config.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="update earshard"):
        load_projector(folder)
