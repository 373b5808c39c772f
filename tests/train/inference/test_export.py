"""What leaves the laboratory: the same soft tokens from a run, from its export, and from the card's plain PyTorch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_cache import make_cache
from tiny_projectors import CONFIGS
from tiny_run import make_config

from shards.errors import UserError, run_command
from train.__main__ import command
from train.config.model import MlpConfig, OwnConfig
from train.inference.export import load_exported
from train.inference.pytorch_card import plain
from train.model.build import load_model
from train.projectors import LayerMixer, MixedProjector, build_projector
from train.trainer.trainer import fit

TEN = ("mlp", "linear", "pool", "swiglu", "conv", "residual")  # kinds whose text has at most ten lines


def run_text(text: str, folder: Path, x: torch.Tensor) -> torch.Tensor:
    """Execute the card's lines in ``folder``; they see ``x`` and no module of ours."""
    scope: dict[str, Any] = {"x": x}
    code = text.replace('"projector.safetensors"', repr(str(folder / "projector.safetensors")))
    assert "train" not in re.findall(r"import (\w+)|from (\w+)", code)
    with torch.no_grad():
        exec(code, scope)
    soft: torch.Tensor = scope["soft"]
    return soft


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{CONFIGS.index(config)}")
def test_plain_pytorch_gives_the_same_bits_for_every_kind(tmp_path, config):
    projector = build_projector(config, 12, 16, 0.136).eval()
    with torch.no_grad():
        for parameter in projector.parameters():  # a second layer that starts at zero would hide the first
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_file(dict(projector.named_parameters()), tmp_path / "projector.safetensors")
    text = plain(config)
    assert text is not None
    assert config.kind not in TEN or len(text.splitlines()) <= 10 + (config.norm == "layer"), text
    assert max(map(len, text.splitlines())) <= 120
    for frames in (1, 7, 40):
        x = torch.randn(1, frames, 12, generator=torch.Generator().manual_seed(frames))
        with torch.no_grad():
            soft, mask = projector(x, torch.ones(1, frames, dtype=torch.bool))
        assert mask.all()
        assert torch.equal(run_text(text, tmp_path, x), soft)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_mixer_of_layers_comes_along(tmp_path, normalise):
    config = MlpConfig(stack=2, norm="rms")
    projector = MixedProjector(LayerMixer(3, normalise), build_projector(config, 4, 16, 0.1)).eval()
    with torch.no_grad():
        projector.mixer.logits.copy_(torch.tensor([0.3, -1.0, 2.0]))
    save_file(dict(projector.named_parameters()), tmp_path / "projector.safetensors")
    x = torch.randn(1, 9, 12)
    text = plain(config, 3, normalise)
    assert text is not None
    with torch.no_grad():
        assert torch.equal(run_text(text, tmp_path, x), projector(x, torch.ones(1, 9, dtype=torch.bool))[0])


def test_a_projector_of_ones_own_has_no_text():
    assert plain(OwnConfig(kind="my_module:Mine")) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("export")
    cache = make_cache(folder / "cache", 12, val_every=4)
    config = make_config(folder, cache, "nanochat:d1", steps=2, eval_every=0)
    return fit(config), config


def test_an_export_has_the_soft_tokens_of_its_run_in_one_line_and_in_ten(run, tmp_path, capsys):
    folder = tmp_path / "exported" / "demo"
    assert run_command(command, ["export", str(run[0]), str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "projector.safetensors"]
    model = load_model(run[0], run[1], torch.device("cpu"), torch.float32)
    x, mask = torch.randn(1, 9, 8), torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        wanted = model.projector(x, mask)[0]
        assert torch.equal(load_exported(folder)(x, mask)[0], wanted)
    card = (folder / "README.md").read_text()
    texts = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert len(texts[1].splitlines()) <= 10
    assert torch.equal(run_text(texts[1], folder, x), wanted)
    about = json.loads((run[0] / "caches.json").read_text())
    assert about["feature_id"] in card
    assert about["caches"][0]["manifest_id"] in card
    assert about["spec"]["tensors"] in card
    assert run_command(command, ["export", str(run[0]), str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_is_no_export_is_told(run, tmp_path):
    with pytest.raises(UserError, match=r"is no export: it has no config\.json"):
        load_exported(tmp_path)
    folder = tmp_path / "damaged"
    assert run_command(command, ["export", str(run[0]), str(folder)]) == 0
    (folder / "projector.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="export the run again"):
        load_exported(folder)
    (folder / "config.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="update earshard"):
        load_exported(folder)
